"""Latent consistency distillation (LCM, arXiv 2310.04378): the student maps all points of a guided trajectory to its end.

A point x_t is a noised image. The teacher takes one guided DDIM step from it to an earlier timestep. The student's consistency function
at x_t learns the value of the target network, an average of the student, at that point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sidcli.errors import UsageError
from sidcli.objectives.base import (
    FAKE_OPTIONS,
    GENERATOR,
    TARGET,
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
from sidcli.objectives.terms import branches, consistency, ddim, distance, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LcmSettings(ImageSettings):
    name: str = "lcm"
    guidance: float = 7.5
    """Guidance scale of the teacher's step. The student draws without guidance."""
    solver_steps: int = 50
    """Steps of the teacher's DDIM solver from noise to image: T / 50 timesteps each, 20 of 1000."""
    huber: float = 0.001
    """Constant c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; 0: the squared distance d^2."""
    target: float = 0.95
    """Weight of the old average in each update of the target network; 0: the target network is the student itself."""
    shares, weights = ("target",), ("huber",)


class Lcm(Objective):
    Settings = LcmSettings
    title = "Latent consistency distillation (LCM, arXiv 2310.04378)"
    defaults: ClassVar = {"student_steps": 4}
    emoji_settings: ClassVar = {"guidance": 3.0}
    unused: ClassVar[tuple[str, ...]] = (*FAKE_OPTIONS, "t_init", "t_min", "t_max", "renoise")
    discrete = True
    reads = "The loss of LCM compares the student with its own average, and does not show progress."

    def __init__(self, config: RunConfig, timesteps: int):
        super().__init__(config, timesteps)
        most = self.settings.solver_steps
        if not 1 <= most <= timesteps:
            raise UsageError(f"solver_steps must be at least 1 and at most {timesteps}, the teacher's timesteps, not {most}")
        if config.student_steps > most:
            raise UsageError(f"--student-steps {config.student_steps}: a student of lcm draws in at most solver_steps, {most}")
        self.skip = timesteps // most
        """Timesteps of one step of the solver, k."""

    @property
    def sampling(self) -> dict[str, Any]:
        most = self.settings.solver_steps
        own = {"t_init": self.skip * most - 1, "student_steps": self.config.student_steps, "renoise": "fresh"}
        return own | {"sampler": "lcm", "solver_steps": most}

    @property
    def roles(self) -> dict[str, Role]:
        """The student and, unless it is its own target, the target network."""
        student = self.student_role(Role(0.0, betas=(0.9, 0.999), weight_decay=0.01))
        target = Role(0.0, student.lora, student.stream, follows=GENERATOR, decay=self.settings.target)
        return {GENERATOR: student} | ({TARGET: target} if self.settings.target else {})

    def phases(self, step: int) -> list[Phase]:
        inputs = Inputs("generator", step, step, (0, self.settings.solver_steps), source="images")
        teacher = Pass(TEACHER, branches(self.settings.guidance), "none")
        passes = (Pass(GENERATOR, 1, "weights"), teacher, Pass(TARGET if self.settings.target else GENERATOR, 1, "none"))
        return [Phase(GENERATOR, inputs, self.forward, self.gradient, passes, step)]

    def start(self, nets: Networks, batch: Batch) -> tuple[Tensor, Batch]:
        """Return x_t and the batch with the timesteps t = k (n + 1) - 1; `batch.t` is the number n of a solver step."""
        begun = replace(batch, t=self.skip * (batch.t + 1) - 1)
        return nets.path.noised(batch.samples, batch.noise, begun.t), begun

    def forward(self, nets: Networks, batch: Batch) -> Tensor:
        """Return the student's consistency function at x_t."""
        x_t, begun = self.start(nets, batch)
        return consistency(nets, GENERATOR, x_t, begun)

    def gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of the distance to the target network at the end of the teacher's step (algorithm 1), and measurements.

        The step ends at t - k, that of the earliest point at timestep 0.
        """
        x_t, begun = self.start(nets, batch)
        ended = replace(begun, t=(begun.t - self.skip).clamp_min(0))
        earlier = ddim(nets, TEACHER, x_t, begun, ended.t, self.settings.guidance)
        target = consistency(nets, TARGET if self.settings.target else GENERATOR, earlier, ended)
        slope, loss = distance(x, target, self.settings.huber, batch)
        return slope, {"generator_loss": loss, "sample_std": spread(x, batch)}
