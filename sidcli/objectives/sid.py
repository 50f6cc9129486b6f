"""Score identity Distillation with Long and Short Guidance (SiD-LSG, arXiv 2406.01561).

Notation: x is the generator's sample, y_real the clean prediction of the teacher, y_fake the clean prediction of the fake score.
All are float32 [B, C, h, w]; both predictions are made from the same noised x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sidcli.objectives.base import FAKE, GENERATOR, TEACHER, Batch, Networks, Pass, Phase, Settings, Values
from sidcli.objectives.scores import ScoreDistillation, denoising_gradient, health, predict_noise
from sidcli.objectives.terms import branches, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SidSettings(Settings):
    name: str = "sid"
    kappa1: float = 2.0
    """Guidance scale of the fake score in its own loss."""
    kappa2: float = 2.0
    """Guidance scale of the fake score in the score difference y_real - y_fake."""
    kappa3: float = 2.0
    """Guidance scale of the fake score in the second factor of the generator's loss."""
    kappa4: float = 2.0
    """Guidance scale of the teacher in the generator's loss."""
    alpha: float = 1.0
    """Weight of the squared score difference in the generator's loss."""
    dropout: float = 0.1
    """Share of captions emptied for the fake score, where guidance uses its unconditional branch."""
    shares, scale = ("dropout",), "kappa4"


class Sid(ScoreDistillation):
    Settings = SidSettings
    title = "SiD-LSG (arXiv 2406.01561)"
    takes_references = True
    reads = "The losses of SiD fluctuate and do not show progress."

    def fake_phase(self, step: int, update: int) -> Phase:
        s = self.settings
        dropout = 0.0 if s.kappa1 == s.kappa2 == s.kappa3 == 1.0 else s.dropout
        inputs = self.fake_inputs(step, update, (self.config.t_min, self.config.t_max), dropout)
        passes = (Pass(GENERATOR, 1, "none"), Pass(FAKE, branches(s.kappa1), "weights", (s.kappa1,)))
        return Phase(FAKE, inputs, partial(predict_noise, scale=s.kappa1), denoising_gradient, passes)

    def generator_phase(self, step: int) -> Phase:
        s = self.settings
        fake = Pass(FAKE, branches(s.kappa2, s.kappa3), "input", (s.kappa2, s.kappa3))
        passes = Pass(GENERATOR, 1, "weights"), fake, Pass(TEACHER, branches(s.kappa4), "input", (s.kappa4,))
        return self.generator_update(step, self.score_gradient, passes, split=True)

    def score_gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return d loss / d x through both scores (equation 23 of arXiv 2404.04057 with guidance), and measurements."""
        s = self.settings

        def clean(x: Tensor, role: str, scales: tuple[float, ...]) -> list[Tensor]:
            return nets.clean(role, nets.path.noised(x, batch.noise, batch.t), batch, *scales)

        def loss(x: Tensor, y_fake: Tensor, y_fake_target: Tensor, y_real: Tensor) -> tuple[Tensor, Values]:
            value = generator_loss(x, y_real, y_fake, y_fake_target, s.alpha, batch.size, nets.path.loss_scale(batch.t))
            ratio = batch.share * health(x, y_real, y_fake)
            return value, {"generator_loss": value, "ratio": ratio, "sample_std": spread(x, batch)}

        fake, real = partial(clean, role=FAKE, scales=(s.kappa2, s.kappa3)), partial(clean, role=TEACHER, scales=(s.kappa4,))
        return nets.gradient_through(x, [fake, real], loss)


def generator_loss(
    x: Tensor, y_real: Tensor, y_fake: Tensor, y_fake_target: Tensor, alpha: float, batch: int, scale: Tensor | None = None
) -> Tensor:
    """Return the generator's loss, summed over elements and divided by `batch`:

    (y_real - y_fake) . [(y_fake_target - x) + (1 - alpha) (y_real - y_fake)] / w

    y_fake is the fake score's prediction at kappa2, y_fake_target at kappa3. w is `scale` [B, 1, 1, 1] or, without it, the mean
    absolute |x - y_real| of each sample, a constant for the gradient. The gradient flows through both score networks. The value stays
    near zero and does not show progress.
    """
    difference, w = y_real - y_fake, distance(x, y_real) if scale is None else scale
    return (difference * ((y_fake_target - x) + (1.0 - alpha) * difference) / w).sum() / batch


def distance(x: Tensor, y_real: Tensor) -> Tensor:
    """Return the mean absolute |x - y_real| of each sample [B, 1, 1, 1], at least 1e-5, as a constant for the gradient."""
    return (x - y_real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5).detach()
