"""Distribution Matching Distillation (DMD, arXiv 2311.18828): distribution matching and regression on the teacher's pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives.base import FAKE, GENERATOR, TEACHER, Batch, Networks, Pass, Phase, Role, Settings, Values
from sidcli.objectives.dmd2 import matched
from sidcli.objectives.scores import OnSharedSamples, denoising_gradient, predict_noise
from sidcli.objectives.terms import branches, distance

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DmdSettings(Settings):
    name: str = "dmd"
    guidance: float = 3.0
    """Guidance scale of the teacher, also for its images."""
    regression: float = 0.25
    """Weight of the squared distance to the teacher's images in the student's loss."""
    weights = ("regression",)
    needs_pairs = True

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def discriminates(self) -> bool:
        return False

    @property
    def drawing_guidance(self) -> float | None:
        return self.guidance


class Dmd(OnSharedSamples):
    Settings = DmdSettings
    title = "DMD (arXiv 2311.18828)"
    defaults: ClassVar = {"lr_fake": 1e-5, "lr_generator": 1e-5}
    is_one_step = True
    reads = "The regression loss of DMD falls. Its generator's loss is the size of a gradient and does not show progress."
    generator = fake = Role(0.0, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0)

    def fake_phase(self, step: int, update: int) -> Phase:
        inputs = self.fake_inputs(step, update, (0, self.timesteps))
        passes = (Pass(GENERATOR, 1, "none"), Pass(FAKE, 1, "weights"))
        return Phase(FAKE, inputs, predict_noise, denoising_gradient, passes)

    def generator_phase(self, step: int) -> Phase:
        scale = self.settings.guidance
        scores = Pass(FAKE, 1, "none"), Pass(TEACHER, branches(scale), "none", (scale,))
        phase = self.generator_update(step, self.gradient, (Pass(GENERATOR, 2, "weights"), *scores))  # type: ignore[arg-type]
        return replace(phase, inputs=replace(phase.inputs, real=True), forward=generate_both)

    def gradient(self, nets: Networks, outputs: tuple[Tensor, Tensor], batch: Batch) -> tuple[tuple[Tensor, Tensor], Values]:
        """Return the gradients of distribution matching at samples x of new noise, and of the regression loss at those of the pairs."""
        assert batch.real is not None and batch.real.samples is not None
        x, of_pairs = outputs
        direction, values = matched(nets, x, batch, self.settings.guidance)
        slope, loss = distance(of_pairs, batch.real.samples, 0.0, batch)
        return (direction, self.settings.regression * slope), values | {"regression_loss": loss}


def generate_both(nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the generator's samples [B, C, h, w] of new noise, and those of the noise from which the teacher drew its images."""
    assert batch.real is not None
    return nets.generate(batch), nets.generate(batch.real)
