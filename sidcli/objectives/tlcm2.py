"""Multistep consistency across segments (the second stage of TLCM, arXiv 2406.05768), which continues from a student of `tlcm`.

The student's predictions at the timesteps of its grid learn to agree, so that it draws well in fewer steps. It trains on its own samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from sidcli.errors import UsageError
from sidcli.objectives.base import GENERATOR, TEACHER, Batch, Inputs, Networks, Pass, Phase, Settings, Values
from sidcli.objectives.terms import branches, ddim, distance, spread
from sidcli.objectives.tlcm import Tlcm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tlcm2Settings(Settings):
    name: str = "tlcm2"
    guidance: float = 7.5
    """Guidance scale of the teacher's steps. The student draws without guidance."""
    teacher_steps: int = 3
    """DDIM steps of the teacher through a segment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_steps < 1:
            raise UsageError(f"teacher_steps must be at least 1, not {self.teacher_steps}")


class Tlcm2(Tlcm):
    Settings = Tlcm2Settings  # type: ignore[assignment]
    title = "Multistep consistency across segments (second stage of TLCM, arXiv 2406.05768)"
    emoji_settings: ClassVar = {"guidance": 3.0}
    continues = "tlcm"

    def check_segments(self) -> None:
        """Raises UsageError if a segment has fewer timesteps than the teacher's steps through it."""
        steps, most = self.settings.teacher_steps, min(self.segments)
        if steps > most:
            raise UsageError(
                f"teacher_steps must be at most {most}, the timesteps of the shortest segment, not {steps}",
                "fewer --set teacher_steps, or fewer --student-steps",
            )

    def phases(self, step: int) -> list[Phase]:
        s, visits = self.settings, len(self.grid)
        inputs = Inputs("generator", step, step, (0, visits))
        teacher = Pass(TEACHER, branches(s.guidance) * s.teacher_steps, "none")
        passes = Pass(GENERATOR, 1, "weights"), Pass(GENERATOR, 2 * visits + 1, "none"), teacher
        return [Phase(GENERATOR, inputs, self.forward, self.gradient, passes, step)]

    def start(self, nets: Networks, batch: Batch) -> tuple[Tensor, Batch]:
        """Return the student's own samples, noised, and the batch with their timesteps; `batch.t` are positions in the grid."""
        from torch import no_grad, tensor

        with no_grad():  # all steps of the student: the batch itself may have noise for some of them
            x = nets.generate(replace(batch, latents=batch.latents[:1] * len(self.grid)))
        begun = replace(batch, t=tensor(self.grid, device=batch.t.device)[batch.t])
        return nets.path.noised(x, batch.noise, begun.t), begun

    def forward(self, nets: Networks, batch: Batch) -> Tensor:
        """Return the student's clean prediction at a timestep of its grid."""
        x_t, begun = self.start(nets, batch)
        return nets.clean(GENERATOR, x_t, begun, 1.0)[0]

    def gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of || f(x_t, t) - sg f(x_s, s) ||^2 and measurements.

        f is the student's clean prediction, s the end of the segment that starts at t, and x_s the end of the teacher's steps from x_t.
        """
        x_s, begun = self.start(nets, batch)
        end, count = self.end(begun.t), self.settings.teacher_steps
        for index in range(count):
            following = begun.t + (end - begun.t) // (count - index)
            x_s = ddim(nets, TEACHER, x_s, begun, following, self.settings.guidance)
            begun = replace(begun, t=following)
        slope, loss = distance(x, nets.clean(GENERATOR, x_s, begun, 1.0)[0], 0.0, batch)
        return slope, {"generator_loss": loss, "sample_std": spread(x, batch)}
