"""Improved Distribution Matching Distillation (DMD2, arXiv 2405.14867). Its GAN, which needs real images, is off by default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives import adversarial
from sidcli.objectives.base import FAKE, GENERATOR, TEACHER, Batch, Networks, Pass, Phase, Role, Settings, Values
from sidcli.objectives.scores import OnSharedSamples, denoising_gradient, health, predict_noise
from sidcli.objectives.terms import branches, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Dmd2Settings(Settings):
    name: str = "dmd2"
    guidance: float = 1.75
    """Guidance scale of the teacher."""
    gan: float = 0.0
    """Weight of the adversarial term in the generator's loss, per element of a latent; 0: no GAN. Published: 0.001."""
    gan_fake: float = 0.01
    """Weight of the discriminator's loss in the fake score's loss, per element of a latent, if gan is not 0."""
    divergence: str = "reverse-kl"
    """Divergence that the difference of the scores minimizes: reverse-kl, or with the GAN kl, js or jeffreys (f-distill)."""
    weights = ("gan", "gan_fake")

    def __post_init__(self) -> None:
        super().__post_init__()
        adversarial.check_divergence(self.divergence, self.gan)

    @property
    def needs_images(self) -> bool:
        return self.gan > 0.0


class Dmd2(OnSharedSamples):
    Settings = Dmd2Settings
    title = "DMD2 without its GAN (arXiv 2405.14867)"
    with_gan = "DMD2 (arXiv 2405.14867)"
    takes_references = True
    defaults: ClassVar = {"fake_updates": 10, "lr_fake": 1e-5, "lr_generator": 1e-5}
    reads = "The generator's loss of DMD2 is the size of its gradient and does not show progress."
    generator = fake = Role(0.0, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0)

    @property
    def method(self) -> str:
        name = self.with_gan if self.settings.needs_images else self.title
        divergence = self.settings.divergence
        return name if divergence == "reverse-kl" else f"{name} with the {divergence} weights of f-distill (arXiv 2502.15681)"

    @property
    def roles(self) -> dict[str, Role]:
        """Trained networks by name. With the GAN the fake score has the discriminator's head."""
        roles = super().roles
        return roles | {FAKE: replace(roles[FAKE], head=self.settings.needs_images)}

    def fake_phase(self, step: int, update: int) -> Phase:
        inputs = self.fake_inputs(step, update, (0, self.timesteps))
        passes = (Pass(GENERATOR, 1, "none"), Pass(FAKE, 1, "weights"))
        if not self.settings.needs_images:
            return Phase(FAKE, inputs, predict_noise, denoising_gradient, passes)
        forward, more = partial(adversarial.predict_and_discriminate, logits=lambda found: found), Pass(FAKE, 1, "weights")
        return Phase(FAKE, replace(inputs, real=True), forward, self.fake_score_gradient, (*passes, more))

    def fake_score_gradient(self, nets: Networks, outputs: adversarial.Outputs, batch: Batch) -> tuple[adversarial.Outputs, Values]:
        """Return the gradients of the loss with the weight gan_fake CHW; CHW is the number of elements of a latent."""
        return adversarial.fake_score_gradient(nets, outputs, batch, self.settings.gan_fake * outputs[0][0].numel())

    def generator_phase(self, step: int) -> Phase:
        gan, scale = self.settings.needs_images, self.settings.guidance
        scores = Pass(FAKE, 1, "input" if gan else "none"), Pass(TEACHER, branches(scale), "none", (scale,))
        gradient = self.adversarial_gradient if gan else self.matching_gradient
        return self.generator_update(step, gradient, (Pass(GENERATOR, 1, "weights"), *scores), split=gan)

    def matching_gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        return matched(nets, x, batch, self.settings.guidance)

    def adversarial_gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of `matched` plus that of the sum over samples of gan CHW softplus(-D(x_t)), and measurements.

        The discriminator reads the forward pass of the fake score at the same x_t.
        """
        x_t = nets.path.noised(x, batch.noise, batch.t)
        (real,) = nets.clean(TEACHER, x_t, batch, self.settings.guidance)

        def discriminate(x: Tensor) -> list[Tensor]:
            x_t = nets.path.noised(x, batch.noise, batch.t)
            (predicted,), logits = nets.features(FAKE, x_t, batch, 1.0)
            return [nets.path.clean(predicted, x_t, batch.t), logits]

        def loss(x: Tensor, fake: Tensor, logits: Tensor) -> tuple[Tensor, Values]:
            weight = adversarial.divergence_weight(self.settings.divergence, logits.detach())
            direction, values = matching(x.detach(), real, fake.detach(), batch, weight)
            fooling = adversarial.fooling_losses(logits).sum() / batch.size
            return (direction * x).sum() + self.settings.gan * x[0].numel() * fooling, values | {"adversarial_loss": fooling}

        return nets.gradient_through(x, [discriminate], loss)


def matched(nets: Networks, x: Tensor, batch: Batch, guidance: float) -> tuple[Tensor, Values]:
    """Return the gradient (f_psi - f_phi) / mean |x - f_phi| (equations 7 and 8 of arXiv 2311.18828) and measurements.

    f_psi and f_phi are the clean predictions of fake score and teacher, the latter at the guidance scale.
    """
    x_t = nets.path.noised(x, batch.noise, batch.t)
    (fake,), (real,) = nets.clean(FAKE, x_t, batch, 1.0), nets.clean(TEACHER, x_t, batch, guidance)
    return matching(x, real, fake, batch)


def matching(x: Tensor, real: Tensor, fake: Tensor, batch: Batch, weight: Tensor | float = 1.0) -> tuple[Tensor, Values]:
    """Return the gradient of distribution matching from the clean predictions of teacher and fake score, and measurements.

    `weight` [B, 1, 1, 1] multiplies the gradient of each sample.
    """
    direction = weight * ((fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)).nan_to_num()
    values = {"generator_loss": 0.5 * direction.square().sum() / batch.size, "ratio": batch.share * health(x, real, fake)}
    return direction / batch.size, values | {"sample_std": spread(x, batch)}
