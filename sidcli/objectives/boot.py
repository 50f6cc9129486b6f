"""Data-free distillation with bootstrapping (BOOT, arXiv 2306.05544), on a variance-preserving path.

The student g(z, t) maps the start noise z to the signal y_t = (x_t - sigma_t z) / a_t of the teacher's trajectory at timestep t, and
g(z, t_min) is the image. It learns each signal from its own one at a later timestep, by one step of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from sidcli.errors import UsageError
from sidcli.objectives.base import (
    FAKE_OPTIONS,
    GENERATOR,
    TEACHER,
    Batch,
    Inputs,
    Networks,
    Objective,
    Pass,
    Phase,
    Role,
    RunConfig,
    Settings,
    Values,
)
from sidcli.objectives.terms import branches, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BootSettings(Settings):
    name: str = "boot"
    guidance: float = 7.5
    """Guidance scale of the teacher."""
    stride: int = 20
    """Timesteps of the teacher's step."""
    boundary: float = 1.0
    """Weight of the loss at the first timestep of the trajectory."""
    weights = ("boundary",)


class Boot(Objective):
    Settings = BootSettings
    title = "BOOT (arXiv 2306.05544)"
    defaults: ClassVar = {"lr_generator": 1e-5, "t_init": 999}
    emoji_settings: ClassVar = {"guidance": 3.0}
    is_one_step = True
    unused = (*FAKE_OPTIONS, "t_max")
    discrete = True
    reads = "The loss of BOOT compares the student with its own signal at a later timestep, and does not show progress."

    def __init__(self, config: RunConfig, timesteps: int):
        super().__init__(config, timesteps)
        most = config.t_init - config.t_min
        if most < 1:
            raise UsageError(
                f"--t-init must be above --t-min {config.t_min}, where the trajectory of boot ends, not {config.t_init}"
            )
        if not 1 <= self.settings.stride <= most:
            raise UsageError(f"stride must be at least 1 and at most {most}, from --t-min to --t-init, not {self.settings.stride}")

    @property
    def roles(self) -> dict[str, Role]:
        return {GENERATOR: self.student_role(Role(0.0, betas=(0.9, 0.999)))}

    def phases(self, step: int) -> list[Phase]:
        config, teacher = self.config, branches(self.settings.guidance)
        inputs = Inputs("generator", step, step, (config.t_min + self.settings.stride, config.t_init + 1))
        passes = Pass(GENERATOR, 2, "weights"), Pass(GENERATOR, 1, "none"), Pass(TEACHER, 2 * teacher, "none")
        return [Phase(GENERATOR, inputs, self.forward, self.gradient, passes, step)]

    def forward(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the signals [B, C, h, w] one step before `batch.t`, and at the first timestep of the trajectory."""
        return self.signal(nets, batch, batch.t - self.settings.stride), self.signal(nets, batch, self.first(batch))

    def gradient(self, nets: Networks, outputs: tuple[Tensor, Tensor], batch: Batch) -> tuple[tuple[Tensor, Tensor], Values]:
        """Return the gradients of the two terms, and measurements. With t = `batch.t` and s one step before it:

        || g(z, s) - [g(z, t) + D (f_phi(a_t g(z, t) + sigma_t z, t) - g(z, t))] ||^2 / D^2,  D = 1 - sigma_s a_t / (sigma_t a_s)
        boundary || g(z, t_init) - f_phi(sigma z, t_init) ||^2
        """
        before, start = outputs
        now, z = self.signal(nets, batch, batch.t), batch.latents[0]
        (a_t, sigma_t), (a_s, sigma_s) = nets.path.scale(batch.t), nets.path.scale(batch.t - self.settings.stride)
        (clean,) = nets.clean(TEACHER, a_t * now + sigma_t * z, batch, self.settings.guidance)
        size = 1.0 - sigma_s * a_t / (sigma_t * a_s)
        step = before - (now + size * (clean - now))
        first = replace(batch, t=self.first(batch))
        (wanted,) = nets.clean(TEACHER, nets.path.scale(first.t)[1] * z, first, self.settings.guidance)
        edge, weight = start - wanted, self.settings.boundary
        loss = (step / size).square().sum() / batch.size
        at_edge = edge.square().sum() / batch.size
        values = {"generator_loss": loss + weight * at_edge, "boundary_loss": at_edge, "sample_std": spread(before, batch)}
        return (2.0 * step / (size**2 * batch.size), 2.0 * weight * edge / batch.size), values

    def first(self, batch: Batch) -> Tensor:
        return batch.t * 0 + self.config.t_init

    def signal(self, nets: Networks, batch: Batch, t: Tensor) -> Tensor:
        """Return g(z, t) [B, C, h, w].

        The network's input is that of every one-step student, sigma z at t_init. Its timestep counts from t_min at t_init to t_init at
        t_min, so that the image is the output at t_init and students of all objectives draw in the same way.
        """
        start = self.first(batch)
        x = nets.path.scale(start)[1] * batch.latents[0]
        (predicted,) = nets.predict(GENERATOR, x, replace(batch, t=self.config.t_init + self.config.t_min - t), 1.0)
        return nets.path.clean(predicted, x, start)
