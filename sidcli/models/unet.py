"""UNets of Stable Diffusion 1, 2 and XL: conditioning, guided predictions, blocks, features and LoRA adapters.

Stable Diffusion 1 and 2 have one text encoder, SDXL has two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sidcli.diffusion.guidance import guided
from sidcli.models.drawing import sizes

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv", "conv_shortcut", "time_emb_proj"),
)
"""Modules that get a LoRA adapter: attention, feed-forward and convolutions."""


@dataclass(frozen=True)
class Cond:
    """Conditioning of a UNet on B prompts: `states` float32 [B, tokens, width]; for SDXL also `added`, with the pooled
    `text_embeds` [B, P] and the sizes `time_ids` [B, 6]."""

    states: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def expand(self, count: int) -> Cond:
        """Return the cond of one prompt, repeated `count` times."""
        return Cond(self.states.expand(count, -1, -1), {name: value.expand(count, -1) for name, value in self.added.items()})

    def cat(self, other: Cond) -> Cond:
        """Return both conds as one batch, this one first."""
        return Cond(
            torch.cat([self.states, other.states]),
            {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()},
        )


def denoise(net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the prediction [B, C, h, w] of a UNet for x_t [B, C, h, w], timesteps int64 [B] and the cond of B prompts."""
    more: dict[str, Any] = {"added_cond_kwargs": dict(cond.added)} if cond.added else {}
    return net(x, t, cond.states, **more).sample


Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t [B, C, h, w], t [B], cond of B prompts) -> prediction [B, C, h, w]."""


def guided_predictions(denoise: Denoise, x_t: Tensor, t: Tensor, cond: Cond, empty: Cond, scales: Sequence[float]) -> list[Tensor]:
    """Return predictions [B, C, h, w] with classifier-free guidance, one per guidance scale, from one call of the network.

    `empty` is the cond of the empty prompt [1]. The unconditional half of the batch is computed only if a scale is not 1, the
    conditional half only if a scale is not 0.
    """
    if all(scale == 1.0 for scale in scales):
        return [denoise(x_t, t, cond)] * len(scales)
    nothing = empty.expand(len(cond))
    if all(scale == 0.0 for scale in scales):
        return [denoise(x_t, t, nothing)] * len(scales)
    both = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(nothing))
    conditional, unconditional = both.chunk(2)
    return [guided(conditional, unconditional, scale) for scale in scales]


def blocks(net: Any) -> list[nn.Module]:
    """Return the blocks of a UNet in the order of its forward pass, for sharding and for a discriminator that reads features."""
    return [*net.down_blocks, net.mid_block, *net.up_blocks]


class Head(nn.Module):
    """Discriminator that maps features [B, channels, h, w] to one logit per image [B], the last layers of arXiv 2405.14867.

    Convolutions of stride 2 halve a side while it is above 4, and one convolution covers what remains. For maps of 8 x 8 these are the
    layers of the published head; maps of 2 x 2 to 4 x 4 have no convolution of stride 2.
    """

    def __init__(self, channels: int, height: int, width: int, groups: int):
        super().__init__()
        layers: list[nn.Module] = []
        while max(height, width) > 4:
            stride = [2 if side > 4 else 1 for side in (height, width)]
            kernel = [step + 2 for step in stride]
            layers += [nn.Conv2d(channels, channels, kernel, stride, 1), nn.GroupNorm(groups, channels), nn.SiLU()]  # type: ignore[arg-type]
            height, width = height // stride[0], width // stride[1]
        layers += [nn.Conv2d(channels, channels, (height, width)), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten()


def add_head(net: Any) -> None:
    """Add a discriminator that reads the middle block of a UNet, as its module `discriminator`; see `features`."""
    size, channels = net.config.sample_size, net.config.block_out_channels
    height, width = (size, size) if isinstance(size, int) else size
    shrunk = 2 ** (len(channels) - 1)
    net.discriminator = Head(channels[-1], -(-height // shrunk), -(-width // shrunk), net.config.norm_num_groups).to(net.device)


@contextmanager
def features(net: Any) -> Iterator[list[Tensor]]:
    """Context that collects what a discriminator uses from each call of a UNet.

    This is the output [B, channels, h, w] of the middle block or, after `add_head`, the logits [B] of the head for it. The head runs
    inside of the call, where the weights of a sharded network are complete.
    """
    found: list[Tensor] = []
    head = getattr(net, "discriminator", nn.Identity())
    hook = net.mid_block.register_forward_hook(lambda module, inputs, output: found.append(head(output)))
    try:
        yield found
    finally:
        hook.remove()


def add_adapters(net: Any, rank: int) -> None:
    """Add LoRA adapters of this rank to every module in LORA_TARGETS. Their output is zero at first."""
    from peft import LoraConfig

    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))


def merged(net: Any, adapters: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the weights of a UNet, float32 on the CPU, with trained adapters merged into them; see `add_adapters`."""
    copies: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("cpu", torch.float32, copy=True)) for value in net.parameters()
    }
    twin = copy.deepcopy(net, copies)
    add_adapters(twin, rank)
    twin.load_state_dict(adapters, strict=False)
    twin.fuse_lora()
    twin.unload_lora()
    return twin.state_dict()


class TextEncoder:
    """The text encoders of a model on a device. `truncated` counts prompts that exceed the encoders' maximum length.

    With two encoders (SDXL, arXiv 2307.01952) the hidden states before the last layer of both are concatenated, and the second
    encoder's pooled projection of the prompt is added to the cond. `empty_is_zero`: the empty prompt is encoded as zeros, as in the
    published SDXL.
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
        """Return the token ids int64 [B, length] for the encoder `index`."""
        tokenizer: Any = self.tokenizers[index]
        config: Any = self.encoders[index].config
        length = min(tokenizer.model_max_length, config.max_position_embeddings)
        if index == 0:
            self.truncated += sum(len(row) > length for row in tokenizer(list(prompts)).input_ids)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), **options).input_ids.to(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        if len(self.encoders) == 1:
            return Cond(self.encoders[0](self.tokens(prompts, 0)).last_hidden_state)
        outputs = [net(self.tokens(prompts, index), output_hidden_states=True) for index, net in enumerate(self.encoders)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self.empty_is_zero:
            said = torch.tensor([float(bool(prompt)) for prompt in prompts], device=self.device)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        ids = torch.tensor(sizes(*self.size), device=self.device).expand(len(prompts), -1)
        return Cond(states, {"text_embeds": pooled, "time_ids": ids})
