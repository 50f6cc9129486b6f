"""Diffusion Self-Distillation (arXiv 2411.18616): tune a model to draw the subject of a reference image in another scene.

The training data are pairs of images of one subject that the model drew itself. Both images of a pair are noised at one timestep and
denoised together; see `models.reference` for the layouts. The result is a model of many steps, a teacher for other objectives.
"""

from __future__ import annotations

from collections.abc import Collection
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
    RunConfig,
    Values,
)
from sidcli.objectives.terms import spread

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SelfDistillationSettings(ImageSettings):
    name: str = "self-distillation"
    layout: str = "diptych"
    """How the network sees both images: diptych (one wide image), frames (shared attention) or channels (no first image)."""
    reference_weight: float = 1.0
    """Weight of the loss on the first image of a pair, which shows the reference."""
    weighting: str = "debiased"
    """Weight of a noise level in the loss: debiased (1 / sqrt(SNR), at most 10) or uniform; flow matching has that of the velocity."""
    caption_dropout: float = 0.05
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
    shared_noise: float = 0.0
    """Share of the variance of the noise that the panels of a sheet have in common; more: their subjects agree more, in similar poses."""
    scenes: str = "grammar"
    """What writes the scenes of a sheet: grammar (built in) or http (a language model behind an OpenAI-compatible endpoint)."""
    scenes_model: str = ""
    """Model of the endpoint for scenes."""
    scenes_url: str = ""
    """Address of the endpoint for scenes, such as http://localhost:8000/v1."""
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
    ranges: ClassVar = {
        "reference_weight": (0, 1000),
        "guidance": (-100, 100),
        "sheets": (1, 10_000_000),
        "sheet_guidance": (-100, 100),
        "sheet_steps": (1, 1000),
        "shared_noise": (0, 1),
        "copy": (0.01, 1),
        "cut": (0, 1),
    }
    before: ClassVar = {"weighting": "uniform"}
    shares = ("caption_dropout", "reference_dropout", "both_dropout")
    draws_pairs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"layout": LAYOUTS, "weighting": WEIGHTINGS, "panels": (2, 4), "pairs": PAIRS, "scenes": SCENES, "judge": JUDGES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        if self.scenes == "http" and not (self.scenes_url and self.scenes_model):
            raise UsageError("scenes=http needs an endpoint and a model", "--set scenes_url=... --set scenes_model=...")
        for name in THRESHOLDS:
            least = 0 if self.judge in ANSWERS else -1
            if (value := getattr(self, name)) != "auto" and not _is_within(value, least, 1):
                raise UsageError(f"{name} must be auto or a number from {least} to 1 with the judge {self.judge}, not {value!r}")
        if (total := self.caption_dropout + self.reference_dropout + self.both_dropout) >= 1:
            raise UsageError(f"caption_dropout, reference_dropout and both_dropout add up to {total:g}; the sum must be below 1")

    @property
    def judge_options(self) -> dict[str, str | None]:
        """The options of the judge by name; None: its default."""
        return {name: getattr(self, f"judge_{name}") or None for name in JUDGES[self.judge]}

    def without_effect(self, given: Collection[str], pairs: str) -> dict[str, str]:
        """Return the settings in `given` that others turn off, each with the reason. `pairs` is the place of pairs that are there.

        The end of a sentence: --set NAME=VALUE has no effect ...
        """
        if pairs:
            off = dict.fromkeys(SHEET_SETTINGS, f"beside the pairs of {pairs}, which are drawn and judged")
        else:
            off = {
                f"judge_{option}": f"on the judge {self.judge}; it is a setting of {', '.join(owners)}"
                for option in ("model", "url")
                if self.judge not in (owners := [judge for judge, options in JUDGES.items() if option in options])
            }
            off |= dict.fromkeys(("scenes_model", "scenes_url"), "on scenes of the grammar") if self.scenes == "grammar" else {}
            off |= dict.fromkeys(THRESHOLDS, "on the judge none, which accepts every pair") if self.judge == "none" else {}
            off |= {"cut": "with pairs=shared-attention, which draws each panel alone"} if self.pairs != "grid" else {}
        off |= (
            {"reference_weight": "with layout=channels, which does not draw the first image"} if self.layout == "channels" else {}
        )
        return {name: reason for name, reason in off.items() if name in given}


def _is_within(text: str, least: float, most: float) -> bool:
    try:
        return least <= float(text) <= most
    except ValueError:
        return False


LAYOUTS = ("diptych", "frames", "channels")
WEIGHTINGS = ("debiased", "uniform")
PAIRS = ("grid", "shared-attention")
SCENES = ("grammar", "http")
THRESHOLDS = ("same", "caption")
SHEET_SETTINGS = (
    *("sheets", "panels", "pairs", "sheet_guidance", "sheet_steps", "shared_noise", "scenes", "scenes_model", "scenes_url"),
    *("judge", "judge_model", "judge_url", *THRESHOLDS, "copy", "cut"),
)
"""Settings of the first two stages of a run, sheets and curation."""
ANSWERS = ("vlm", "http", "oracle")
"""Judges whose scores are between 0, no, and 1, yes. Scores of others are cosines, and differences of errors whose scale is the variance
of the noise, 1."""
JUDGES: dict[str, tuple[str, ...]] = {
    "features": (),
    "clip": ("model",),
    "dino": ("model",),
    "vlm": ("model",),
    "http": ("url", "model"),
    "oracle": (),
    "none": (),
}
"""Judge -> its options, of which judge_NAME is the setting; see `curation`."""


class SelfDistillation(Objective):
    Settings = SelfDistillationSettings
    title = "Diffusion Self-Distillation (arXiv 2411.18616)"
    defaults: ClassVar = {"lr_generator": 1e-4, "t_min": 0, "t_max": 1000}
    emoji_defaults: ClassVar = {"lr_generator": 1e-3, "t_min": 0, "t_max": 1000, "ema_images": 8000.0}
    is_one_step = True
    makes = "teacher"
    unused = (*FAKE_OPTIONS, "t_init", "renoise")
    reads = "The loss of self-distillation is the error of the predicted noise; it falls slowly and fluctuates with the timesteps."

    def __init__(self, config: RunConfig, timesteps: int):
        super().__init__(config, timesteps)
        if self.settings.sheet_steps > timesteps:
            raise UsageError(
                f"sheet_steps must be at most {timesteps}, the timesteps of the teacher, not {self.settings.sheet_steps}"
            )

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
            *("generator", step, step, (config.t_min, config.t_max), s.caption_dropout),
            reference_dropout=s.reference_dropout,
            both_dropout=s.both_dropout,
            source="images",
        )
        return [Phase(GENERATOR, inputs, denoise, self.gradient, (Pass(GENERATOR, 1, "weights"),), step)]

    def gradient(self, nets: Networks, noise: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """Return the gradient of w_t || eps_theta(x_t) - eps ||^2 with respect to eps_theta, and measurements.

        The loss is summed over the elements of both images and averaged over the global batch. The first image has the weight
        `reference_weight`. It is the loss of the two-frame video of section 3.2. A network that predicts the noise learns little where
        the noise is high with w_t = 1, and there it is decided whether both images show the same subject.
        """
        assert batch.samples is not None
        of_path = nets.path.debiased_weight if self.settings.weighting == "debiased" else nets.path.noise_weight
        weight = of_path(batch.t) * nets.weights(self.settings.reference_weight)
        difference = noise - batch.noise
        loss = (weight * difference.square()).sum() / batch.size
        return difference * (2.0 * weight / batch.size), {"generator_loss": loss, "sample_std": spread(batch.samples, batch)}


def denoise(nets: Networks, batch: Batch) -> Tensor:
    """Return the noise [B, C, h, w] that the tuned network predicts in noised canvases."""
    assert batch.samples is not None
    return nets.noise(GENERATOR, nets.path.noised(batch.samples, batch.noise, batch.t), batch, 1.0)[0]
