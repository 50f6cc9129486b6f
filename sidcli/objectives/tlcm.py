"""Multistep latent consistency distillation (the first stage of TLCM, arXiv 2406.05768).

The student draws with DDIM at `--student-steps` timesteps, which divide the trajectory from noise to image into segments. It learns to jump
from each point of a segment to the end of the segment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from sidcli.errors import UsageError
from sidcli.objectives.base import (
    FAKE_OPTIONS,
    GENERATOR,
    TEACHER,
    Batch,
    ImageSettings,
    Inputs,
    Networks,
    Objective,
    Pass,
    Phase,
    Role,
    RunConfig,
    Values,
)
from sidcli.objectives.terms import branches, ddim, distance, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TlcmSettings(ImageSettings):
    name: str = "tlcm"
    guidance: float = 7.5
    """Guidance scale of the teacher's step. The student draws without guidance."""
    stride: int = 20
    """Timesteps of the teacher's step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise UsageError(f"stride must be at least 1, not {self.stride}")


class Tlcm(Objective):
    Settings = TlcmSettings
    title = "Multistep latent consistency distillation (TLCM, arXiv 2406.05768)"
    defaults: ClassVar = {"student_steps": 4, "t_init": 999}
    emoji_settings: ClassVar = {"guidance": 3.0}
    unused = (*FAKE_OPTIONS, "t_min", "t_max", "renoise")
    discrete = True
    reads = "The loss of TLCM compares the student with itself at an earlier timestep, and does not show progress."

    def __init__(self, config: RunConfig, timesteps: int):
        from sidcli.diffusion.grids import exit_grid

        super().__init__(config, timesteps)
        self.grid = exit_grid(config.t_init, config.student_steps)
        self.segments = [start - end for start, end in pairwise((*self.grid, 0))]
        """Lengths of the segments in timesteps."""
        self.check_segments()

    def check_segments(self) -> None:
        """Raises UsageError if the teacher's step is longer than every segment."""
        stride, most = self.settings.stride, max(self.segments)
        if stride > most:
            raise UsageError(
                f"stride must be at most {most}, the timesteps of the longest segment, not {stride}",
                "a smaller --set stride, or fewer --student-steps",
            )

    @property
    def sampling(self) -> dict[str, Any]:
        return super().sampling | {"renoise": "ddim"}

    @property
    def roles(self) -> dict[str, Role]:
        return {GENERATOR: self.student_role(Role(0.0, betas=(0.9, 0.999), weight_decay=0.01))}

    def phases(self, step: int) -> list[Phase]:
        inputs = Inputs("generator", step, step, (1, self.config.t_init + 1), source="images")
        teacher = Pass(TEACHER, branches(self.settings.guidance), "none")
        passes = Pass(GENERATOR, 1, "weights"), Pass(GENERATOR, 1, "none"), teacher
        return [Phase(GENERATOR, inputs, self.forward, self.gradient, passes, step)]

    def forward(self, nets: Networks, batch: Batch) -> Tensor:
        """Return the student's DDIM step from noised images at `batch.t` to the end of the segment."""
        x_t = nets.path.noised(batch.samples, batch.noise, batch.t)
        return ddim(nets, GENERATOR, x_t, batch, self.end(batch.t))

    def gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of || g(x_t, t) - sg g(x_s, s) ||^2 and measurements.

        g is the student's DDIM step to the end of the segment, x_s the end of the teacher's guided step from x_t to s, which is not
        beyond the end of the segment.
        """
        x_t, end = nets.path.noised(batch.samples, batch.noise, batch.t), self.end(batch.t)
        closer = replace(batch, t=(batch.t - self.settings.stride).max(end))
        x_s = ddim(nets, TEACHER, x_t, batch, closer.t, self.settings.guidance)
        slope, loss = distance(x, ddim(nets, GENERATOR, x_s, closer, end), 0.0, batch)
        return slope, {"generator_loss": loss, "sample_std": spread(x, batch)}

    def end(self, t: Tensor) -> Tensor:
        """Return the end of the segment of each timestep t [B]: the largest timestep of the grid below it, or 0."""
        end = t * 0
        for bound in self.grid[::-1]:
            end = end.where(t <= bound, bound)
        return end
