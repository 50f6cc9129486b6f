"""Variational Score Distillation of one-step students as in SwiftBrush (arXiv 2312.05239, 2305.16213)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives.base import FAKE, GENERATOR, TEACHER, Batch, Networks, Pass, Phase, Role, Settings, Values
from sidcli.objectives.scores import OnSharedSamples, denoising_gradient, predict_noise
from sidcli.objectives.terms import branches, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VsdSettings(Settings):
    name: str = "vsd"
    guidance: float = 4.5
    """Guidance scale of both scores in the generator's update."""
    dropout: float = 0.1
    """Share of captions emptied in the fake score's updates."""
    shares = ("dropout",)


class Vsd(OnSharedSamples):
    Settings = VsdSettings
    title = "Variational Score Distillation (SwiftBrush, arXiv 2312.05239)"
    takes_references = True
    defaults: ClassVar = {"fake_lora": 64, "lr_fake": 1e-3}
    emoji_defaults: ClassVar = {"lr_fake": 1e-3}
    reads = "The generator's loss of VSD is the size of its gradient and does not show progress."
    generator = fake = Role(0.0, betas=(0.9, 0.999), clip=1.0)

    def fake_phase(self, step: int, update: int) -> Phase:
        inputs = self.fake_inputs(step, update, (0, self.timesteps), self.settings.dropout)
        passes = (Pass(GENERATOR, 1, "none"), Pass(FAKE, 1, "weights"))
        return Phase(FAKE, inputs, predict_noise, weighted_denoising_gradient, passes)

    def generator_phase(self, step: int) -> Phase:
        scale = self.settings.guidance
        scores = (Pass(role, branches(scale), "none", (scale,)) for role in (FAKE, TEACHER))
        return self.generator_update(step, self.score_difference, (Pass(GENERATOR, 1, "weights"), *scores))

    def score_difference(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient sigma_t^2 (eps_phi - eps_psi) (arXiv 2305.16213) and measurements.

        eps_phi and eps_psi are the noise that teacher and fake score predict.
        """
        x_t, scale = nets.path.noised(x, batch.noise, batch.t), self.settings.guidance
        (real,), (fake,) = nets.noise(TEACHER, x_t, batch, scale), nets.noise(FAKE, x_t, batch, scale)
        direction = nets.path.scale(batch.t)[1] ** 2 * (real - fake)
        loss = 0.5 * direction.square().sum() / batch.size
        return direction / batch.size, {"generator_loss": loss, "sample_std": spread(x, batch)}


def weighted_denoising_gradient(nets: Networks, noise: Tensor, batch: Batch) -> tuple[Tensor, Values]:
    """Return the gradient of a_t^2 || eps_psi(x_t) - eps ||^2 and the loss; see `denoising_gradient`."""
    return denoising_gradient(nets, noise, batch, nets.path.scale(batch.t)[0] ** 2)
