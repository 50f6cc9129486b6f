"""Prompts -> what the drawing network is told: one text encoder for Stable Diffusion 1 and 2, two of them for SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Condition:
    """`states` float32 [B, tokens, width]; for SDXL also `added`: the pooled `text_embeds` [B, P] and the sizes `time_ids` [B, 6]."""

    states: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def expanded(self, count: int) -> Condition:
        """One prompt's condition, `count` times."""
        return Condition(self.states.expand(count, -1, -1), {name: value.expand(count, -1) for name, value in self.added.items()})

    def beside(self, other: Condition) -> Condition:
        """Both as one batch, this one first."""
        return Condition(
            torch.cat([self.states, other.states]),
            {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()},
        )


def denoise(net: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The raw prediction [B, C, h, w] of a UNet for x_t [B, C, h, w], timesteps int64 [B] and B conditions."""
    more: dict[str, Any] = {"added_cond_kwargs": dict(condition.added)} if condition.added else {}
    return net(x, t, condition.states, **more).sample


def sizes(height: int, width: int) -> list[float]:
    """What SDXL is told about an image of its own that is neither scaled nor cropped: original size, crop, size, in pixels."""
    return [float(height), float(width), 0.0, 0.0, float(height), float(width)]


class TextEncoder:
    """One model's text encoders on one device. `truncated` counts prompts that were longer than they read.

    With two encoders (SDXL, arXiv 2307.01952) the states before each one's last layer stand side by side, and the second one's
    projection of the whole prompt is added. `empty_is_zero`: the empty prompt is all zeros, as SDXL was published.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        tokenizers: Sequence[CLIPTokenizer],
        size: tuple[int, int],
        empty_is_zero: bool,
        device: torch.device,
    ):
        self.encoders = [encoder.to(device) for encoder in encoders]
        self.tokenizers, self.size, self.empty_is_zero, self.device = tokenizers, size, empty_is_zero, device
        self.truncated = 0

    def tokens(self, prompts: Sequence[str], index: int) -> Tensor:
        """Token ids int64 [B, length] for one encoder."""
        tokenizer: Any = self.tokenizers[index]
        config: Any = self.encoders[index].config
        length = min(tokenizer.model_max_length, config.max_position_embeddings)
        if index == 0:
            self.truncated += sum(len(row) > length for row in tokenizer(list(prompts)).input_ids)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), **options).input_ids.to(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        if len(self.encoders) == 1:
            return Condition(self.encoders[0](self.tokens(prompts, 0)).last_hidden_state)
        outputs = [net(self.tokens(prompts, index), output_hidden_states=True) for index, net in enumerate(self.encoders)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self.empty_is_zero:
            said = torch.tensor([float(bool(prompt)) for prompt in prompts], device=self.device)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        ids = torch.tensor(sizes(*self.size), device=self.device).expand(len(prompts), -1)
        return Condition(states, {"text_embeds": pooled, "time_ids": ids})
