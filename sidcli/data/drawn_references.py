"""Reference images that a student draws during the training (`--references`), in place of those of pairs; see `data.pairs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidcli import randomness
from sidcli.data.prompts import Prompts
from sidcli.data.sheets import sheet_prompt
from sidcli.models.drawing import Plan
from sidcli.models.sampler import Sampler
from sidcli.objectives.base import Drawing


@dataclass(frozen=True, eq=False)
class DrawnReferences:
    """A student that draws reference images. Position i has the subject and the first two scenes of a sheet, and its own noise, all of
    them functions of (seed, i): the student draws the first scene, and the second one is the caption to train on."""

    sampler: Sampler
    """The student on the device of the training."""
    plan: Plan
    """How the student draws."""
    fingerprint: str
    """Digest of the student's files."""

    def at(self, prompts: Prompts, seed: int, positions: Sequence[int]) -> tuple[list[str], Drawing]:
        """Return the captions at B positions, and the random inputs of their reference images, on the CPU.

        Subjects are those of `prompts`; see `data.sheets`.
        """
        shown, captions = zip(*(sheet_prompt(prompts, seed, position, 2).captions for position in positions), strict=True)
        shape, streams = self.sampler.model.latent_shape, range(self.plan.noises)
        noise = [randomness.normal(shape, seed, f"drawn reference {stream}", 0, positions) for stream in streams]
        return list(captions), Drawing(list(shown), noise)

    @torch.no_grad()
    def latents(self, drawing: Drawing) -> Tensor:
        """Return the latents float32 [B, C, h, w] that the student draws, on its device."""
        noise = [value.to(self.sampler.device) for value in drawing.noise]
        return self.sampler.latents(drawing.prompts, noise, self.plan).float()
