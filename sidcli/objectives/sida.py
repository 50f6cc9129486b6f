"""Adversarial Score identity Distillation (SiDA, arXiv 2410.14919) with Long and Short Guidance.

The discriminator has no weights of its own: its logits are the channel means of the output of the fake score's middle block, a map of
logits per image. Notation as in `sid`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from sidcli.errors import UsageError
from sidcli.objectives.adversarial import fake_score_gradient, fooling_losses, predict_and_discriminate
from sidcli.objectives.base import FAKE, TEACHER, Batch, Networks, Pass, Phase, RunConfig, Values
from sidcli.objectives.scores import health
from sidcli.objectives.sid import Sid, SidSettings, distance, generator_loss
from sidcli.objectives.terms import spread

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 10.0
"""The generator's loss clamps logits to this absolute value."""


@dataclass(frozen=True, kw_only=True)
class SidaSettings(SidSettings):
    name: str = "sida"
    lsg: float = 100.0
    """Weight of SiD's term in the generator's loss."""
    lsg_gan: float = 0.01
    """Weight of the adversarial term in the generator's loss, per element of a latent."""
    lsd: float = 1.0
    """Weight of the discriminator's loss in the fake score's loss."""
    frozen_images: int = 100_000
    """Images at the start for which only the fake score is trained."""
    gan_images: int = 200_000
    """Images after which the adversarial term joins the generator's loss."""
    weights = ("lsg", "lsg_gan", "lsd")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kappa1 == 0.0) != (self.kappa2 == self.kappa3 == 0.0):
            raise UsageError(
                "the discriminator of sida reads captions where it is trained and none where it is used, or the reverse",
                "kappa1, kappa2 and kappa3 all 0 (--guidance-strategy zero-cfg), or kappa1 and one of the others not 0",
            )

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def joining_images(self) -> int:
        return self.gan_images if self.lsg_gan else 0


class Sida(Sid):
    Settings = SidaSettings
    title = "SiDA (arXiv 2410.14919) with the guidance of SiD-LSG (arXiv 2406.01561)"
    emoji_settings: ClassVar = {"frozen_images": 160, "gan_images": 320}
    reads = (
        "The losses of SiDA fluctuate and do not show progress. At a discriminator loss of 1.39, 2 ln 2, it tells nothing apart."
    )

    @staticmethod
    def first_step(config: RunConfig) -> int:
        return max(config.fake_warmup, -(-config.objective.frozen_images // config.batch_size))

    def fake_phase(self, step: int, update: int) -> Phase:
        plain, s = super().fake_phase(step, update), self.settings
        return replace(
            plain,
            inputs=replace(plain.inputs, real=True),
            forward=partial(predict_and_discriminate, logits=channel_mean, scale=s.kappa1),
            gradient=partial(fake_score_gradient, weight=0.5 * s.lsd),
            passes=(*plain.passes, Pass(FAKE, 1, "weights")),
        )

    def generator_phase(self, step: int) -> Phase:
        joined = step * self.config.batch_size >= self.settings.gan_images
        gradient = partial(self.adversarial_gradient, gan=self.settings.lsg_gan if joined else 0.0)
        return replace(super().generator_phase(step), gradient=gradient)

    def adversarial_gradient(self, nets: Networks, x: Tensor, batch: Batch, gan: float) -> tuple[Tensor, Values]:
        """Return the gradient of the sum over samples of lsg / 2 SiD(x) + gan / 2 CHW BCE(clamp(D(x_t)), 1) / w, and measurements.

        CHW is the number of elements of a latent, w the weight of SiD's loss.
        """
        s = self.settings

        def fake(x: Tensor) -> list[Tensor]:
            x_t = nets.path.noised(x, batch.noise, batch.t)
            predictions, found = nets.features(FAKE, x_t, batch, s.kappa2, s.kappa3)
            return [*(nets.path.clean(value, x_t, batch.t) for value in predictions), channel_mean(found)]

        def real(x: Tensor) -> list[Tensor]:
            return nets.clean(TEACHER, nets.path.noised(x, batch.noise, batch.t), batch, s.kappa4)

        def loss(x: Tensor, y_fake: Tensor, y_fake_target: Tensor, logits: Tensor, y_real: Tensor) -> tuple[Tensor, Values]:
            scale = nets.path.loss_scale(batch.t)
            sid = 0.5 * s.lsg * generator_loss(x, y_real, y_fake, y_fake_target, s.alpha, batch.size, scale)
            fooling = fooling_losses(logits.clamp(-LIMIT, LIMIT))
            w = distance(x, y_real) if scale is None else scale
            weighted = (fooling / w.flatten()).sum() * x[0].numel() / batch.size
            value, ratio = sid + 0.5 * gan * weighted, batch.share * health(x, y_real, y_fake)
            measured = {"generator_loss": value, "ratio": ratio, "sample_std": spread(x, batch)}
            return value, measured | {"adversarial_loss": fooling.sum() / batch.size}

        return nets.gradient_through(x, [fake, real], loss)


def channel_mean(features: Tensor) -> Tensor:
    """Return the logits [B, h, w] of features [B, channels, h, w]."""
    return features.mean(1)
