"""How images are drawn, whichever library computes them: plans, drawers, batches, and the record in a PNG.

Imports no torch, so that exported graphs draw without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import PngImagePlugin

from sidcli.diffusion.grids import Renoise, consistency_grid, even_shares, exit_grid, flow_grid
from sidcli.errors import InputError, UsageError
from sidcli.models.overrides import check_sampling
from sidcli.models.sources import Source
from sidcli.printable import json_text
from sidcli.progress import Progress, counted, silent

Record = Mapping[str, str | None] | Sequence[Mapping[str, str | None]]
"""Name and SHA-256 of a reference image, or a list of those of several."""


@dataclass(frozen=True)
class Plan:
    """Sampling settings. With a `grid` of timesteps a model is a generator of one or a few steps; otherwise a teacher with guidance.

    With `consistency`, the generator uses multistep consistency sampling (`diffusion.sampling.consistency_steps`). `sigmas` are the
    times of the grid before the shift of a scheduler of flow matching. `reference_guidance` is the guidance scale of the reference
    image, if the model takes one; 1 is no guidance. `precision` is that of the denoiser and the decoder, "fp32" or "bf16"; latents
    are float32 in both.
    """

    steps: int
    guidance: float = 0.0
    grid: tuple[float, ...] = ()
    renoise: Renoise = "ddim"
    consistency: bool = field(default=False, repr=False)  # the text of a plan names cached images
    sigmas: tuple[float, ...] = field(default=(), repr=False)
    reference_guidance: float = field(default=1.0, repr=False)
    precision: str = field(default="fp32", repr=False)

    @property
    def noises(self) -> int:
        """Number of noise tensors per image: one, or one per step if each step adds fresh noise."""
        return self.steps if self.grid and self.renoise == "fresh" else 1

    @property
    def in_diffusers(self) -> dict[str, Any]:
        """Arguments that make a stock pipeline of diffusers take the steps of this generator with the scheduler of its export."""
        if self.steps == 1 or self.consistency:
            return {"num_inference_steps": self.steps}
        return {"sigmas": list(self.sigmas)} if self.sigmas else {"timesteps": list(self.grid)}

    @property
    def timesteps(self) -> str:
        """The grid as text."""
        return ", ".join(f"{t:g}" for t in self.grid)

    def describe(self) -> str:
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        if self.grid:
            return f"{counted(self.steps, 'step')} at t = {self.timesteps}{precision}"
        more = f", reference guidance {self.reference_guidance:g}" if self.reference_guidance != 1 else ""
        return f"{counted(self.steps, 'step')}, guidance {self.guidance:g}{more}{precision}"


def student_plan(
    card: Mapping[str, Any], steps: int | None = None, guidance: float | None = None, name: str = "this model"
) -> Plan:
    """Return the plan of a student from its card with the user's steps and guidance.

    Raises UsageError for values that the student does not support.
    """
    check_sampling(steps, guidance)
    own = int(card.get("student_steps", 1))
    if is_consistency(card):
        return _consistency_plan(card, steps or own, guidance, name)
    if steps is not None and steps > own:
        at_most = "is a one-step model" if own == 1 else f"was trained for at most {own} steps"
        raise UsageError(f"{name} {at_most}; --steps {steps} is not possible", "leave --steps out")
    _check_guidance(guidance)
    wanted, t_init, renoise = steps or own, int(card["t_init"]), card.get("renoise", "ddim")
    if "shift" in card:
        grid = flow_grid(t_init, float(card["shift"]), own)
        return Plan(wanted, grid=grid[:wanted], renoise=renoise, sigmas=even_shares(own)[:wanted])
    return Plan(wanted, grid=exit_grid(t_init, own)[:wanted], renoise=renoise)


def is_consistency(card: Mapping[str, Any]) -> bool:
    """Return whether a card is that of a student that draws by multistep consistency sampling."""
    return card.get("sampler") == "lcm"


def _consistency_plan(card: Mapping[str, Any], steps: int, guidance: float | None, name: str) -> Plan:
    """Return the plan of a student that draws in any number of steps up to that of the solver of its training."""
    most = int(card["solver_steps"])
    if steps > most:
        raise UsageError(f"{name} draws in at most {counted(most, 'step')}; --steps {steps} is not possible", f"--steps {most}")
    _check_guidance(guidance)
    grid = consistency_grid(int(card["t_init"]), most, steps)
    return Plan(steps, grid=grid, renoise="fresh", consistency=True)


def _check_guidance(guidance: float | None) -> None:
    if guidance not in (None, 0, 1):
        raise UsageError(f"a student has its guidance built in; --guidance {guidance:g} is not possible")


class NotFinite(InputError):
    """Raised if a model draws an image with values that are not finite. A conversion to bytes would make it black."""


def check_finite(finite: Sequence[bool], prompts: Sequence[str], seeds: Sequence[int], hint: str) -> None:
    """Raises NotFinite, with the first prompt and seed whose entry of `finite`, one per image, is False."""
    for is_finite, prompt, seed in zip(finite, prompts, seeds, strict=True):
        if not is_finite:
            raise NotFinite(f"the image of {prompt!r} with seed {seed} has values that are not finite", hint)


def sizes(height: int, width: int) -> list[float]:
    """Return SDXL's size conditioning in pixels for an image that is not scaled or cropped: original size, crop, target size."""
    return [float(height), float(width), 0.0, 0.0, float(height), float(width)]


def png_info(prompt: str, seed: int, source: Source, plan: Plan, reference: Record | None = None) -> PngImagePlugin.PngInfo:
    """Return the prompt, seed, model and sampling of an image as PNG metadata: one JSON text chunk named `sid`.

    `reference` is the record of the reference image, if the model takes one, or a list of several.
    """
    info = PngImagePlugin.PngInfo()
    made = {
        "prompt": prompt,
        "seed": seed,
        "model": source.origin,
        "revision": source.revision,
        "sampling": plan.describe(),
        **({"reference": reference} if reference else {}),
    }
    info.add_itxt("sid", json_text(made))
    return info


class Drawer(Protocol):
    """An image generator: networks in torch, or exported graphs. `truncated` counts prompts that are too long for its text encoder.

    `images` returns images uint8 [B, H, W, 3], one per prompt and image seed. `references` are images uint8 [B, H, K W, 3] for a model
    that takes them, K for each image, side by side. It calls `advance` with fractions of images that sum to the batch size.
    """

    @property
    def truncated(self) -> int: ...
    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        advance: Progress = silent,
        references: np.ndarray | None = None,
    ) -> np.ndarray: ...


def draw(
    sampler: Drawer,
    plan: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    advance: Progress,
    references: Sequence[np.ndarray] | np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield images uint8 [B, H, W, 3] batch by batch. Memory use does not grow with the number of prompts.

    `references` are images uint8 [H, K W, 3], one for each prompt, for a model that takes them.
    """
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        shown = None if references is None else np.stack(list(references[part]))
        yield sampler.images(prompts[part], seeds[part], plan, advance, shown)
