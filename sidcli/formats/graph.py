"""A student as graphs with nothing left to choose: prompts' tokens -> states, and (noise, states) -> image, its constants inside.

onnx, openvino and torch-export write these modules; whoever runs them needs a tokenizer and normal noise, and no diffusion library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidcli.diffusion import few_steps
from sidcli.errors import UsageError
from sidcli.formats.card import write_card
from sidcli.formats.diffusers_folder import save_tokenizer
from sidcli.formats.order import Order
from sidcli.progress import Progress, silent
from sidcli.sampler import Plan, plan_for, seeded_noise
from sidcli.teachers import Model
from sidcli.text import Condition, denoise, sizes

GENERATOR = "generator"


class Drawing(nn.Module):
    """noise [B, C, h, w], states [B, tokens, width] (SDXL: and text_embeds [B, P], time_ids [B, 6]) -> images [B, 3, H, W] in 0..1."""

    def __init__(self, model: Model, plan: Plan, dtype: torch.dtype):
        super().__init__()
        self.unet, self.vae = copy.deepcopy(model.unet).to(dtype), copy.deepcopy(model.vae).to(dtype)
        self.schedule, self.plan, self.dtype = model.schedule, plan, dtype
        assert self.schedule.values  # computed before the graph is traced
        self.scaling = float(model.vae.config.scaling_factor)

    def forward(self, noise: Tensor, states: Tensor, text_embeds: Tensor | None = None, time_ids: Tensor | None = None) -> Tensor:
        added = {} if text_embeds is None or time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        told = Condition(states.to(self.dtype), {name: value.to(self.dtype) for name, value in added.items()})
        latents = few_steps(
            lambda x, t: denoise(self.unet, x.to(self.dtype), t, told),
            lambda _: noise,
            self.schedule,
            self.plan.grid,
            self.plan.renoise,
        )
        images = self.vae.decode((latents / self.scaling).to(self.dtype)).sample.float()
        return (images / 2 + 0.5).clamp(0, 1)


class Text(nn.Module):
    """Token ids int64 [B, tokens] -> states [B, tokens, width] as one of a model's text encoders gives them, and for SDXL's second one
    the pooled text_embeds [B, P]."""

    def __init__(self, encoder: nn.Module, beside_another: bool):
        super().__init__()
        self.encoder, self.beside_another = encoder, beside_another

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.beside_another:
            return self.encoder(tokens).last_hidden_state
        output = self.encoder(tokens, output_hidden_states=True)
        states = output.hidden_states[-2]
        return (states, output.text_embeds) if "text_embeds" in output else states


Writer = Callable[[nn.Module, dict[str, Tensor], list[str], Path, dict[str, dict[int, str]]], None]
"""(module, example inputs by name, output names, file without suffix, dynamic axes by input) -> None."""


def write_graphs(folder: Path, model: Model, order: Order, write_one: Writer, kind: str, usage: str) -> None:
    """One graph for each text encoder and one for the rest, tokenizers beside them. `kind` goes into sid.json."""
    plan = plan_for(model)
    names = ["text_encoder", "text_encoder_2"][: len(model.text_encoders)]
    inputs: dict[str, Tensor] = {"noise": torch.zeros(2, *model.latent_shape)}
    states = []
    for name, encoder, tokenizer in zip(names, model.text_encoders, model.tokenizers, strict=True):
        text = Text(encoder, model.is_xl)
        tokens = torch.zeros(2, min(tokenizer.model_max_length, encoder.config.max_position_embeddings), dtype=torch.long)
        outputs = text(tokens)
        states.append(outputs if isinstance(outputs, Tensor) else outputs[0])
        titles = ["states"] if isinstance(outputs, Tensor) else ["states", "text_embeds"]
        write_one(text, {"tokens": tokens}, titles, folder / name, {"tokens": {0: "batch"}})
        save_tokenizer(tokenizer, folder / name.replace("text_encoder", "tokenizer"))
        if not isinstance(outputs, Tensor):
            pooled = outputs[1]
    inputs["states"] = torch.cat(states, dim=-1)
    if model.is_xl:
        inputs |= {"text_embeds": pooled, "time_ids": torch.tensor(sizes(*model.size)).repeat(2, 1)}
    axes = {name: {0: "batch"} for name in inputs}
    halvings = len(model.unet.config.block_out_channels) - 1
    any_size = min(model.latent_shape[1:]) >> halvings > 1  # a side of 1 inside the network is taken for a constant
    if any_size:
        axes["noise"] |= {2: "height", 3: "width"}
    drawing = Drawing(model, plan, order.torch_dtype)
    write_one(drawing, inputs, ["images"], folder / GENERATOR, axes)
    facts = {"format": kind, "any_size": any_size, "latent_shape": model.latent_shape, "size": model.size}
    write_card(folder, model, model.card | {"graph": facts}, usage)


Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""A loaded graph: inputs by name -> outputs in order."""


class GraphSampler:
    """Draws with exported graphs, whatever runs them. It knows tokenizers and noise; the rest is in the graphs.

    `opened` maps a graph's name to a function that runs it.
    """

    def __init__(self, card: dict[str, Any], tokenizers: Sequence[Any], opened: dict[str, Run]):
        self.card, self.tokenizers, self.opened = card, tokenizers, opened
        self.shape, self.size = tuple(card["graph"]["latent_shape"]), tuple(card["graph"]["size"])
        self.truncated = 0

    def resize(self, height: int, width: int) -> None:
        """Draw at this size in pixels; 0: as before. Raises UsageError where the graphs do not go that way."""
        factor = self.size[0] // self.shape[1]
        wanted = (height or self.size[0], width or self.size[1])
        if wanted == self.size:
            return
        if not self.card["graph"]["any_size"] or any(side % factor for side in wanted):
            hint = f"multiples of {factor}, or leave --width and --height out"
            raise UsageError(f"these graphs do not draw at {wanted[1]}x{wanted[0]}", hint)
        self.size, self.shape = wanted, (self.shape[0], wanted[0] // factor, wanted[1] // factor)

    def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> Tensor:
        """uint8 [B, H, W, 3] of prompts and image seeds; the same noise as every other sampler takes for a seed."""
        states, pooled = [], None
        for index, tokenizer in enumerate(self.tokenizers):
            length = tokenizer.model_max_length
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
            tokens = tokenizer(list(prompts), **options).input_ids.astype(np.int64)
            if index == 0:
                self.truncated += sum(len(row) > length for row in tokenizer(list(prompts)).input_ids)
            first, *rest = self.opened["text_encoder" + ("_2" if index else "")]({"tokens": tokens})
            states.append(first)
            pooled = rest[0] if rest else pooled
        inputs = {"noise": seeded_noise(self.shape, seeds)[0].numpy(), "states": np.concatenate(states, axis=-1)}
        if pooled is not None:
            inputs |= {"text_embeds": pooled, "time_ids": np.tile(np.array(sizes(*self.size), np.float32), (len(prompts), 1))}
        drawn = self.opened[GENERATOR](inputs)[0]
        advance(len(prompts))
        return torch.from_numpy((drawn * 255).round().astype(np.uint8)).permute(0, 2, 3, 1)
