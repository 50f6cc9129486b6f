"""Prompts and noise -> images, for every command: the one-step generator and the many-step teacher share this path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidcli.diffusion import guided, many_steps, one_step
from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.teachers import Model

Progress = Callable[[int], None]

T_INIT = 625
"""The timestep of the one-step generator in the paper; sigma / a = 2.5 there."""


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:i`. Raises EnvironmentProblem for a device this machine lacks."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(f"no device {wanted}: {torch.cuda.device_count()} CUDA devices here", "use --device cpu or auto")
    return device


class Sampler:
    """One model on one device: prompts -> text states, text states and noise -> latents -> images."""

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device
        self.text_encoder = model.text_encoder.to(device)
        self.vae = model.vae.to(device)
        self.unet = model.unet.to(device)
        self.truncated_prompts = 0

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states float32 [B, tokens, width]; prompts beyond the encoder's length are cut and counted."""
        tokenizer = self.model.tokenizer
        length = min(tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        whole = tokenizer(list(prompts)).input_ids
        self.truncated_prompts += sum(len(row) > length for row in whole)
        with torch.no_grad():
            return self.text_encoder(ids.to(self.device)).last_hidden_state

    def noise(self, seeds: Sequence[int], shape: tuple[int, int, int] | None = None) -> Tensor:
        """Standard normal latents for image seeds, each as `torch.Generator("cpu").manual_seed(seed)` draws it.

        That is what stock diffusers draws for `generator=`, so a seed means the same image there and here.
        """
        shape = shape or self.model.latent_shape
        draw = [torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        return torch.cat(draw).to(self.device)

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], noise: Tensor, steps: int, guidance: float, t_init: int | None = None) -> Tensor:
        """Clean latents. One step means the one-step generator at t_init (no guidance), more mean DDIM with guidance."""
        states = self.encode(prompts)
        if t_init is not None:
            return one_step(lambda x, t: self.unet(x, t, states).sample, noise, self.model.schedule, t_init)
        empty = self.encode([""]).expand_as(states)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 1.0:
                return self.unet(x, t, states).sample
            both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([states, empty])).sample
            return guided(both[: len(x)], both[len(x) :], guidance)

        return many_steps(denoise, noise, self.model.schedule, steps)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images uint8 [B, H, W, 3] on the CPU."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


@dataclass(frozen=True)
class Plan:
    """How a model draws. `steps` 1 with a `t_init` is the one-step generator; otherwise DDIM with guidance."""

    steps: int
    guidance: float
    t_init: int | None

    def describe(self) -> str:
        return f"1 step at t = {self.t_init}" if self.t_init is not None else f"{self.steps} steps, guidance {self.guidance:g}"


def plan_for(model: Model, steps: int | None, guidance: float | None, untrained: bool = False) -> Plan:
    """The model's own way of drawing, with the user's wishes. Raises UsageError for wishes it cannot fulfil.

    `untrained` uses a teacher as if it were a one-step generator: the point from which a distillation starts.
    """
    if untrained:
        return Plan(1, 0.0, T_INIT)
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}")
    if model.is_student:
        if steps not in (None, 1):
            raise UsageError(f"{model.source.name} is a one-step student; --steps {steps} is not possible", "leave --steps out")
        if guidance not in (None, 0, 1):
            raise UsageError(f"a one-step student has its guidance built in; --guidance {guidance:g} is not possible")
        return Plan(1, 0.0, int(model.card["t_init"]))
    return Plan(steps or 50, model.default_guidance if guidance is None else guidance, None)


def draw(
    sampler: Sampler, plan: Plan, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, advance: Progress
) -> Iterator[Tensor]:
    """Images uint8 [B, H, W, 3] batch by batch; memory does not grow with the number of prompts."""
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        noise = sampler.noise(seeds[start : start + batch_size])
        latents = sampler.latents(chunk, noise, plan.steps, plan.guidance, plan.t_init)
        yield sampler.decode(latents)
        advance(len(chunk))
