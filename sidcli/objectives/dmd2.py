"""Improved Distribution Matching Distillation (DMD2, arXiv 2405.14867) without its GAN, which needs real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives.base import FAKE, GENERATOR, TEACHER, Batch, Networks, Pass, Phase, Role, Settings, Values, branches, spread
from sidcli.objectives.scores import OnSharedSamples, denoising_gradient, health, predict_noise

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Dmd2Settings(Settings):
    name: str = "dmd2"
    guidance: float = 1.75
    """Guidance scale of the teacher."""


class Dmd2(OnSharedSamples):
    Settings = Dmd2Settings
    title = "DMD2 without its GAN (arXiv 2405.14867)"
    defaults: ClassVar = {"fake_updates": 10, "lr_fake": 1e-5, "lr_generator": 1e-5}
    reads = "The generator's loss of DMD2 is the size of its gradient and does not show progress."
    generator = fake = Role(0.0, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0)

    def fake_phase(self, step: int, update: int) -> Phase:
        inputs = self.fake_inputs(step, update, (0, self.timesteps))
        passes = (Pass(GENERATOR, 1, "none"), Pass(FAKE, 1, "weights"))
        return Phase(FAKE, inputs, predict_noise, denoising_gradient, passes)

    def generator_phase(self, step: int) -> Phase:
        scores = Pass(FAKE, 1, "none"), Pass(TEACHER, branches(self.settings.guidance), "none")
        return self.generator_update(step, self.matching_gradient, (Pass(GENERATOR, 1, "weights"), *scores))

    def matching_gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient (f_psi - f_phi) / mean |x - f_phi| (equations 7 and 8 of arXiv 2311.18828) and measurements.

        f_psi and f_phi are the clean predictions of fake score and teacher.
        """
        x_t = nets.path.noised(x, batch.noise, batch.t)
        (fake,), (real,) = nets.clean(FAKE, x_t, batch, 1.0), nets.clean(TEACHER, x_t, batch, self.settings.guidance)
        direction = ((fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)).nan_to_num()
        values = {"generator_loss": 0.5 * direction.square().sum() / batch.size, "ratio": batch.share * health(x, real, fake)}
        return direction / batch.size, values | {"sample_std": spread(x, batch)}
