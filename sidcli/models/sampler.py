"""Draw images with networks in torch. One-step generators and many-step teachers use the same code in every command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from sidcli.devices import half_precision
from sidcli.diffusion.path import Path
from sidcli.diffusion.sampling import consistency_steps, few_steps, many_steps
from sidcli.errors import UsageError
from sidcli.models.codec import to_bytes
from sidcli.models.drawing import Plan, student_plan
from sidcli.models.kind import Cond, doubly_guided
from sidcli.models.loading import Description, Model
from sidcli.models.overrides import check_sampling
from sidcli.progress import Progress, counted, silent

T_INIT = 625
"""Timestep of the one-step generator in the paper, with sigma / a = 2.5."""
ENCODING = Lock()
"""A training encodes prompts in a thread, and the tokenizers of transformers cannot be used by two threads at once."""
TEACHER_STEPS = 50
"""Default number of steps of a teacher."""


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
        self.text = model.kind.encoder(model, torch.device("cpu") if model.text_on_cpu else device)
        self.denoiser = model.denoiser.to(device)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Return the cond of B prompts on the device."""
        with ENCODING:
            return self.text(prompts).to(self.device)

    def noise(self, seeds: Sequence[int], draws: int = 1) -> list[Tensor]:
        """Return `draws` tensors of standard normal latents [B, C, h, w] on the device, one seed per image."""
        return [value.to(self.device) for value in seeded_noise(self.model.latent_shape, seeds, draws)]

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        noise: Sequence[Tensor],
        plan: Plan,
        stepped: Callable[[], None] = lambda: None,
        references: Tensor | None = None,
    ) -> Tensor:
        """Return the clean latents of a plan; `stepped` is called after each denoising step.

        A generator has its guidance built in and uses only the prompt and the latents `references` [B, C, h, w], if it takes them.
        """
        cond, kind = self.encode(prompts).with_reference(references), self.model.kind
        scale, on_reference = (1.0, 1.0) if plan.grid else (plan.guidance, plan.reference_guidance)
        empty = cond if scale == on_reference == 1.0 else self.encode([""])

        def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            with half_precision(self.device, plan.precision):
                return kind.denoise(self.denoiser, x, t, cond).float()

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if on_reference == 1.0 or references is None:
                (predicted,) = kind.guided(denoise, x, t, cond, empty, (scale,))
            else:
                predicted = doubly_guided(denoise, x, t, cond, empty, scale, on_reference)
            stepped()
            return predicted

        if plan.consistency:
            return consistency_steps(predict, noise.__getitem__, self.model.path, plan.grid)
        if plan.grid:
            return few_steps(predict, noise.__getitem__, self.model.path, plan.grid, plan.renoise)
        return many_steps(predict, noise[0], self.model.path, plan.steps)

    def encode_images(self, images: Iterable[np.ndarray]) -> Tensor:
        """Return the latents [B, C, h, w] of B images uint8 [H, W, 3], on the device. The result does not depend on the batch."""
        codec = self.model.codec.to(self.device)
        return torch.cat([codec.encode_image(image) for image in images])

    @torch.no_grad()
    def decode(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], precision: str = "fp32") -> np.ndarray:
        """Decode the latents of prompts and image seeds to images uint8 [B, H, W, 3]. Of a canvas only the drawn frame is decoded.

        Raises NotFinite if an image has a value that is not finite.
        """
        copy = f"another copy of {self.model.source.name}, with weights in fp32"
        hint = copy if self.model.is_student else f"a smaller --guidance, or {copy}"
        latents = self.model.layout.target(latents) if self.model.layout else latents
        with half_precision(self.device, precision):
            decoded = self.model.codec.to(self.device).decode(latents).float()
        return to_bytes(decoded, prompts, seeds, hint)

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        advance: Progress = silent,
        references: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return images uint8 [B, H, W, 3] for prompts, image seeds and, if the model takes them, reference images; see `Drawer`.

        The references of an image are side by side, uint8 [B, H, K W, 3].
        """
        part, steps = len(prompts) / (plan.steps + 1), itertools.count(1)  # the decoder counts as a step

        def stepped() -> None:
            step = next(steps)
            advance(part, f"step {step}/{plan.steps}" if plan.steps > 1 else "")

        frames = [] if references is None else np.split(references, references.shape[2] // self.model.size[1], axis=2)
        known = torch.cat([self.encode_images(frame) for frame in frames], -1) if frames else None
        with self._taking(len(frames)):
            latents = self.latents(prompts, self.noise(seeds, plan.noises), plan, stepped, known)
            images = self.decode(latents, prompts, seeds, plan.precision)
        advance(part)
        return images

    @contextmanager
    def _taking(self, references: int) -> Iterator[None]:
        """Context in which the denoiser takes this number of references for each image, if it takes references."""
        if references < 2:
            yield
            return
        self.model.kind.set_references(self.denoiser, references)
        try:
            yield
        finally:
            self.model.kind.set_references(self.denoiser, 1)

    @property
    def truncated(self) -> int:
        return self.text.truncated


def untrained_plan(path: Path, steps: int) -> Plan:
    """Return the plan of a teacher that is sampled as a student of `steps` steps, as at the start of a distillation."""
    first, last = path.starts
    return Plan(steps, grid=path.student_grid(min(max(first, T_INIT), last), steps))


def plan_for(model: Model | Description, steps: int | None = None, guidance: float | None = None) -> Plan:
    """Return the model's default plan with the user's steps and guidance. Raises UsageError for values that it does not support."""
    if model.is_student:
        return student_plan(model.card, steps, guidance, model.source.name)
    check_sampling(steps, guidance)
    if steps is not None and steps > model.path.steps:
        raise UsageError(f"{model.source.name} has {counted(model.path.steps, 'timestep')}; --steps {steps} is not possible")
    return Plan(steps or TEACHER_STEPS, model.default_guidance if guidance is None else guidance)
