"""The catalog of metrics by their names in options and JSON: label, direction, range and number format of each metric."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Metric:
    """A metric. Its values lie between `low` and `high`.

    `label`, `decimals` and `percent` define how tables show it; JSON keeps fractions as fractions.
    """

    label: str
    lower_is_better: bool
    decimals: int
    meaning: str
    low: float = -inf
    high: float = inf
    percent: bool = False

    @property
    def share(self) -> bool:
        """Whether the metric is a share of images. Its interval is limited to 0..1 and is therefore written as [low, high]."""
        return (self.low, self.high) == (0, 1)

    def write(self, value: float) -> str:
        return f"{100 * value:.{self.decimals}f} %" if self.percent else f"{value:.{self.decimals}f}"

    def write_measured(self, one: Measured) -> str:
        """Return a value and its interval as text for tables."""
        if not self.share:
            return f"{self.write(one.value)} ± {self.write(one.half_width)}"
        low, high = (self.write(end).removesuffix(" %") for end in (one.low, one.high))
        return f"{self.write(one.value)} [{low}, {high}]"


@dataclass(frozen=True)
class Measured:
    """A value and its 95 % interval, in the metric's own unit."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


METRICS = {
    "fid": Metric("FID", True, 2, "Frechet distance of features to the reference images (arXiv 1706.08500)", 0),
    "fid_infinity": Metric("FID infinity", True, 2, "FID extrapolated to an infinite number of drawn images (arXiv 1911.07023)"),
    "fid_teacher": Metric("FID to teacher", True, 2, "Frechet distance to the teacher's images of the same captions", 0),
    "kid": Metric("KID", True, 5, "kernel distance of features to the reference images, unbiased (arXiv 1801.01401)"),
    "precision": Metric("precision", False, 3, "share of drawn images that could be reference images (arXiv 1904.06991)", 0, 1),
    "recall": Metric("recall", False, 3, "share of reference images that could be drawn (arXiv 1904.06991)", 0, 1),
    "density": Metric(
        "density", False, 3, "reference neighborhoods a drawn image is in, over k; may exceed 1 (arXiv 2002.09797)", 0
    ),
    "coverage": Metric("coverage", False, 3, "share of reference images with a drawn one nearby (arXiv 2002.09797)", 0, 1),
    "fd_dinov2": Metric("FD-DINOv2", True, 2, "Frechet distance in the features of DINOv2 (arXiv 2306.04675)", 0),
    "cmmd": Metric("CMMD", True, 3, "kernel distance of CLIP image embeddings, times 1000 (arXiv 2401.09603)", 0),
    "clip": Metric("CLIP score", False, 4, "mean cosine of image and caption, as a fraction (arXiv 2104.08718)", -1, 1),
    "noun": Metric("noun", False, 1, "images whose noun the emoji classifier sees", 0, 1, percent=True),
    "color": Metric("color", False, 1, "images whose background color the emoji classifier sees", 0, 1, percent=True),
    "bare_noun": Metric(
        "bare noun", False, 1, "images of prompts of a noun alone, with the noun of the prompt", 0, 1, percent=True
    ),
    "identity": Metric(
        "identity", False, 1, "images whose subject has the identity of the reference, seen by the emoji reader", 0, 1, percent=True
    ),
    "subject_text": Metric(
        "noun and color", False, 1, "images of a reference with the noun and background of the prompt", 0, 1, percent=True
    ),
    "dino_i": Metric("DINO-I", False, 4, "mean cosine of DINOv2's features of the subjects of image and reference", -1, 1),
    "clip_i": Metric("CLIP-I", False, 4, "mean cosine of CLIP's embeddings of image and reference", -1, 1),
    "copy": Metric("copy score", True, 3, "mean structural similarity of image and reference", -1, 1),
    "diversity": Metric("diversity", False, 4, "mean cosine distance of CLIP's embeddings of images of one prompt", 0, 2),
    "concept_preservation": Metric(
        "concept preservation", False, 3, "how well images keep the subject of the reference, 0 to 1 (arXiv 2406.16855)", 0, 1
    ),
    "prompt_following": Metric("prompt following", False, 3, "how well images show their prompt, 0 to 1 (arXiv 2406.16855)", 0, 1),
    "cp_pf": Metric("CP x PF", False, 3, "product of concept preservation and prompt following (arXiv 2406.16855)", 0, 1),
    "composition": Metric("composition", False, 1, "images of held-out noun and color pairs, both right", 0, 1, percent=True),
}
ALIASES = {"dino": "fd_dinov2", "clip_score": "clip", "color": "color"}
"""Alternative names that a gate accepts: the names in options and tables."""


def metric_named(text: str) -> str | None:
    """Return the key of a metric for its name in options, JSON or tables (`dino`, `fd_dinov2`, `FD-DINOv2`), or None."""
    name = text.strip().lower().replace("-", "_").replace(" ", "_")
    name = ALIASES.get(name, name)
    return name if name in METRICS else None
