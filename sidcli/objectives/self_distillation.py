"""Diffusion Self-Distillation (arXiv 2411.18616): tune a model to draw the subject of a reference image in another scene.

The training data are pairs of images of one subject that the model drew itself. Both images of a pair are noised at one timestep and
denoised together; see `models.reference` for the layouts. The result is a model of many steps, a teacher for other objectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sidcli.errors import UsageError
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
    spread,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SelfDistillationSettings(ImageSettings):
    name: str = "self-distillation"
    layout: str = "frames"
    """How the network sees both images: frames (shared attention), diptych (one wide image) or channels (no first image)."""
    reference_weight: float = 1.0
    """Weight of the loss on the first image of a pair, which shows the reference."""
    text_dropout: float = 0.05
    """Share of the pairs without the caption, for guidance on the prompt."""
    reference_dropout: float = 0.05
    """Share of the pairs without the reference, for guidance on the reference."""
    both_dropout: float = 0.05
    """Share of the pairs without both."""
    guidance: float = 2.0
    """Guidance scale of the prompt with which the tuned model draws by default."""
    sheets: int = 1000
    """Sheets that the teacher draws for pairs, if --data does not give pairs."""
    panels: int = 2
    """Panels of a sheet: 2 or 4. Each two of them are a pair."""
    pairs: str = "grid"
    """How the teacher draws a sheet: grid (one image with panels) or shared-attention (an image per panel, with one self-attention)."""
    sheet_guidance: float = 3.0
    """Guidance scale of the sheets."""
    sheet_steps: int = 25
    """Denoising steps of the sheets."""
    judge: str = "features"
    """What decides whether a pair shows one subject: features, clip, dino, vlm, http, oracle (emoji world) or none."""
    judge_model: str = ""
    """Model of the judge: name or folder of dino, clip and vlm, or the model of http."""
    judge_url: str = ""
    """Address of the OpenAI-compatible endpoint of http, such as http://localhost:8000/v1."""
    same: str = "auto"
    """Least score of the judge for "the same subject"; auto: the default of the judge."""
    caption: str = "auto"
    """Least score of the judge for "the captions are true"; auto: the default of the judge."""
    copy: float = 0.9
    """Similarity of the two images (SSIM) from which a pair is a copy, and is rejected."""
    cut: float = 0.8
    """Least share of the cut between two panels of a sheet at which the image changes; less: the cut goes through a subject."""
    weights, scale = ("reference_weight", "cut"), "guidance"
    shares = ("text_dropout", "reference_dropout", "both_dropout")
    draws_pairs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"layout": LAYOUTS, "panels": (2, 4), "pairs": PAIRS, "judge": JUDGES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        for name in ("same", "caption"):
            if (value := getattr(self, name)) != "auto" and not _is_number(value):
                raise UsageError(f"{name} must be a number or auto, not {value!r}")
        if (total := self.text_dropout + self.reference_dropout + self.both_dropout) >= 1:
            raise UsageError(f"text_dropout, reference_dropout and both_dropout add up to {total:g}; the sum must be below 1")
        for name in ("sheets", "sheet_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


LAYOUTS = ("frames", "diptych", "channels")
PAIRS = ("grid", "shared-attention")
JUDGES = ("features", "clip", "dino", "vlm", "http", "oracle", "none")


class SelfDistillation(Objective):
    Settings = SelfDistillationSettings
    title = "Diffusion Self-Distillation (arXiv 2411.18616)"
    defaults: ClassVar = {"lr_generator": 1e-4, "t_min": 0, "t_max": 1000}
    emoji_defaults: ClassVar = {"lr_generator": 3e-4, "t_min": 0, "t_max": 1000}
    is_one_step = True
    makes = "teacher"
    unused = (*FAKE_OPTIONS, "t_init", "renoise")
    reads = "The loss of self-distillation is the error of the predicted noise; it falls slowly and fluctuates with the timesteps."

    @property
    def roles(self) -> dict[str, Role]:
        role = self.student_role(Role(0.0, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0))
        return {GENERATOR: replace(role, layout=self.settings.layout)}

    @property
    def sampling(self) -> dict[str, Any]:
        return {"guidance": self.settings.guidance}

    def phases(self, step: int) -> list[Phase]:
        s, config = self.settings, self.config
        inputs = Inputs(
            *("generator", step, step, (config.t_min, config.t_max), s.text_dropout),
            reference_dropout=s.reference_dropout,
            both_dropout=s.both_dropout,
            source="images",
        )
        return [Phase(GENERATOR, inputs, denoise, self.gradient, (Pass(GENERATOR, 1, "weights"),), step)]

    def gradient(self, nets: Networks, noise: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of || eps_theta(x_t) - eps ||^2 with respect to eps_theta, and measurements.

        The loss is summed over the elements of both images and averaged over the global batch. The first image has the weight
        `reference_weight`. It is the loss of the two-frame video of section 3.2.
        """
        assert batch.samples is not None
        weight = nets.path.noise_weight(batch.t) * nets.weights(self.settings.reference_weight)
        difference = noise - batch.noise
        loss = (weight * difference.square()).sum() / batch.size
        return difference * (2.0 * weight / batch.size), {"generator_loss": loss, "sample_std": spread(batch.samples, batch)}


def denoise(nets: Networks, batch: Batch) -> Tensor:
    """Return the noise [B, C, h, w] that the tuned network predicts in noised canvases."""
    assert batch.samples is not None
    return nets.noise(GENERATOR, nets.path.noised(batch.samples, batch.noise, batch.t), batch, 1.0)[0]
