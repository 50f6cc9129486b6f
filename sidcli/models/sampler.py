"""Generate images from prompts and noise. One-step generators and many-step teachers use the same code in every command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from PIL import PngImagePlugin
from torch import Tensor

from sidcli.diffusion.sampling import Renoise, exit_grid, few_steps, many_steps
from sidcli.errors import UsageError
from sidcli.models.codec import to_bytes
from sidcli.models.loading import Description, Model
from sidcli.models.overrides import check_sampling
from sidcli.models.sources import Source
from sidcli.models.unet import TextEncoder, denoise, guided_predictions
from sidcli.printable import json_text
from sidcli.progress import Progress, counted, silent

T_INIT = 625
"""Timestep of the one-step generator in the paper, with sigma / a = 2.5."""
TEACHER_STEPS = 50
"""Default number of DDIM steps of a teacher."""


@dataclass(frozen=True)
class Plan:
    """Sampling settings. With a `grid` of timesteps a model is a generator of one or a few steps; otherwise DDIM with guidance."""

    steps: int
    guidance: float = 0.0
    grid: tuple[int, ...] = ()
    renoise: Renoise = "ddim"

    @property
    def noises(self) -> int:
        """Number of noise tensors per image: one, or one per step if each step adds fresh noise."""
        return self.steps if self.grid and self.renoise == "fresh" else 1

    def describe(self) -> str:
        if not self.grid:
            return f"{counted(self.steps, 'step')}, guidance {self.guidance:g}"
        return f"1 step at t = {self.grid[0]}" if self.steps == 1 else f"{self.steps} steps at t = {', '.join(map(str, self.grid))}"


def seeded_noise(shape: tuple[int, ...], seeds: Sequence[int], draws: int = 1) -> list[Tensor]:
    """Return `draws` tensors of standard normal latents [B, *shape], one `torch.Generator("cpu").manual_seed(seed)` per image.

    Stock diffusers draws the same noise for `generator=`, so a seed gives the same image in both.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return [torch.cat([torch.randn((1, *shape), generator=one) for one in generators]) for _ in range(draws)]


class Sampler:
    """A model on a device: it encodes prompts, denoises latents and decodes images. The VAE moves to the device on first use."""

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device
        self.encode = TextEncoder(model.text_encoders, model.tokenizers, model.size, model.empty_is_zero, device)
        self.unet = model.unet.to(device)

    def noise(self, seeds: Sequence[int], draws: int = 1) -> list[Tensor]:
        """Return `draws` tensors of standard normal latents [B, C, h, w] on the device, one seed per image."""
        return [value.to(self.device) for value in seeded_noise(self.model.latent_shape, seeds, draws)]

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], noise: Sequence[Tensor], plan: Plan, stepped: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Return the clean latents of a plan; `stepped` is called after each denoising step.

        A generator has its guidance built in and uses only the prompt.
        """
        cond = self.encode(prompts)
        scale = 1.0 if plan.grid else plan.guidance
        empty = cond if scale == 1.0 else self.encode([""])

        def predict(x: Tensor, t: Tensor) -> Tensor:
            (predicted,) = guided_predictions(partial(denoise, self.unet), x, t, cond, empty, (scale,))
            stepped()
            return predicted

        if plan.grid:
            return few_steps(predict, noise.__getitem__, self.model.path, plan.grid, plan.renoise)
        return many_steps(predict, noise[0], self.model.path, plan.steps)

    @torch.no_grad()
    def decode(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Decode the latents of prompts and image seeds to images uint8 [B, H, W, 3] on the CPU.

        Raises NotFinite if an image has a value that is not finite.
        """
        copy = f"another copy of {self.model.source.name}, with weights in fp32"
        hint = copy if self.model.is_student else f"a smaller --guidance, or {copy}"
        return to_bytes(self.model.codec.to(self.device).decode(latents), prompts, seeds, hint)

    def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> Tensor:
        """Return images uint8 [B, H, W, 3] for prompts and image seeds; see `Drawer`."""
        part, steps = len(prompts) / (plan.steps + 1), itertools.count(1)  # the decoder counts as a step

        def stepped() -> None:
            step = next(steps)
            advance(part, f"step {step}/{plan.steps}" if plan.steps > 1 else "")

        images = self.decode(self.latents(prompts, self.noise(seeds, plan.noises), plan, stepped), prompts, seeds)
        advance(part)
        return images

    @property
    def truncated(self) -> int:
        return self.encode.truncated


def untrained_plan(steps: int) -> Plan:
    """Return the plan of a teacher that is sampled as a student of `steps` steps, as at the start of a distillation."""
    return Plan(steps, grid=exit_grid(T_INIT, steps))


def plan_for(model: Model | Description, steps: int | None = None, guidance: float | None = None) -> Plan:
    """Return the model's default plan with the user's steps and guidance. Raises UsageError for values that it does not support."""
    if model.is_student:
        return student_plan(model.card, steps, guidance, model.source.name)
    check_sampling(steps, guidance)
    if steps is not None and steps > model.path.steps:
        raise UsageError(f"{model.source.name} has {counted(model.path.steps, 'timestep')}; --steps {steps} is not possible")
    return Plan(steps or TEACHER_STEPS, model.default_guidance if guidance is None else guidance)


def student_plan(card: dict[str, Any], steps: int | None = None, guidance: float | None = None, name: str = "this model") -> Plan:
    """Return the plan of a student from its card; see `plan_for`."""
    check_sampling(steps, guidance)
    own = int(card.get("student_steps", 1))
    if steps is not None and steps > own:
        at_most = "is a one-step model" if own == 1 else f"was trained for at most {own} steps"
        raise UsageError(f"{name} {at_most}; --steps {steps} is not possible", "leave --steps out")
    if guidance not in (None, 0, 1):
        raise UsageError(f"a student has its guidance built in; --guidance {guidance:g} is not possible")
    wanted = steps or own
    return Plan(wanted, grid=exit_grid(int(card["t_init"]), own)[:wanted], renoise=card.get("renoise", "ddim"))


def png_info(prompt: str, seed: int, source: Source, plan: Plan) -> PngImagePlugin.PngInfo:
    """Return the prompt, seed, model and sampling of an image as PNG metadata: one JSON text chunk named `sid`."""
    info = PngImagePlugin.PngInfo()
    made = {
        "prompt": prompt,
        "seed": seed,
        "model": source.origin,
        "revision": source.revision,
        "sampling": plan.describe(),
    }
    info.add_itxt("sid", json_text(made))
    return info


class Drawer(Protocol):
    """An image generator: networks in torch, or exported graphs. `truncated` counts prompts that are too long for its text encoder.

    `images` calls `advance` with fractions of images that sum to the batch size.
    """

    @property
    def truncated(self) -> int: ...
    def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> Tensor: ...


def draw(
    sampler: Drawer, plan: Plan, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, advance: Progress
) -> Iterator[Tensor]:
    """Yield images uint8 [B, H, W, 3] batch by batch. Memory use does not grow with the number of prompts."""
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        yield sampler.images(chunk, seeds[start : start + batch_size], plan, advance)
