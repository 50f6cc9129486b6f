"""Regression on pairs of noise and the image that the teacher draws from it (arXiv 2101.02388).

It is also the regression loss of DMD (section 3.3 of arXiv 2311.18828), with a distance of latents instead of LPIPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sidcli.objectives.base import (
    FAKE_OPTIONS,
    GENERATOR,
    Batch,
    ImageSettings,
    Inputs,
    Networks,
    Objective,
    Pass,
    Phase,
    Role,
    Values,
    generate,
)
from sidcli.objectives.terms import distance, spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RegressionSettings(ImageSettings):
    name: str = "regression"
    guidance: float = 7.5
    """Guidance scale at which the teacher draws the images; by default the teacher's own, which is 7.5 of a UNet."""
    huber: float = 0.0
    """Constant c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; 0: the squared distance d^2."""
    weights = ("huber",)
    needs_pairs = True
    has_scale_of_teacher = True

    @property
    def drawing_guidance(self) -> float | None:
        return self.guidance


class Regression(Objective):
    """The teacher starts at the noise z, the student at sigma z at its first timestep. Both start from the same z."""

    Settings = RegressionSettings
    title = "Regression on the teacher's pairs of noise and image (arXiv 2101.02388)"
    defaults: ClassVar = {"lr_generator": 1e-5}
    emoji_settings: ClassVar = {"guidance": 3.0}
    is_one_step = True
    unused = (*FAKE_OPTIONS, "t_min", "t_max")
    reads = "The loss of regression is the distance of the student's images to the teacher's; it falls."

    @property
    def roles(self) -> dict[str, Role]:
        return {GENERATOR: self.student_role(Role(0.0, betas=(0.9, 0.999)))}

    def phases(self, step: int) -> list[Phase]:
        inputs = Inputs("generator", step, step, (0, self.timesteps), source="images")
        return [Phase(GENERATOR, inputs, generate, self.gradient, (Pass(GENERATOR, 1, "weights"),), step)]

    def gradient(self, nets: Networks, x: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of the distance of G(z, c) to the teacher's image and measurements."""
        assert batch.samples is not None
        slope, loss = distance(x, batch.samples, self.settings.huber, batch)
        return slope, {"generator_loss": loss, "sample_std": spread(x, batch)}
