"""User settings that override a model's files. This module imports no large library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sidcli.errors import UsageError

PREDICTIONS = ("auto", "epsilon", "v_prediction")
PRECISIONS = ("fp32", "bf16")
"""Arithmetic in which a model draws."""
MOST_REFERENCE_GUIDANCE = 100
"""Greatest guidance scale of the reference image, as of the guidance scales of `self-distillation`. A larger one is a typing error."""
STOCK_STEP = 8
"""Width and height in pipelines of diffusers are multiples of this number of pixels, also if the model's own step is smaller."""


@dataclass(frozen=True)
class Overrides:
    """User settings: prediction type, folder with the JSON files for a single file, image size in pixels (0: the model's own).

    Raises UsageError if the prediction type is not in PREDICTIONS.
    """

    prediction_type: str = "auto"
    model_config: str = ""
    width: int = 0
    height: int = 0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise UsageError(f"--prediction-type must be one of {', '.join(PREDICTIONS)}, not {self.prediction_type!r}")


def check_sampling(steps: int | None, guidance: float | None) -> None:
    """Raises UsageError for a number of steps below 1 or a guidance scale that is not finite."""
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}")
    check_guidance(guidance)


def check_precision(precision: str) -> None:
    """Raises UsageError for a precision that is not in PRECISIONS."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision must be {' or '.join(PRECISIONS)}, not {precision!r}")


def check_guidance(guidance: float | None) -> None:
    """Raises UsageError for a guidance scale that is not finite."""
    if guidance is not None and not math.isfinite(guidance):
        raise UsageError(f"--guidance must be finite, not {guidance}")


def check_reference_guidance(scale: float | None) -> None:
    """Raises UsageError for a guidance scale of the reference outside 0 (the reference is not used) .. MOST_REFERENCE_GUIDANCE."""
    if scale is not None and not 0 <= scale <= MOST_REFERENCE_GUIDANCE:
        raise UsageError(f"--reference-guidance must be at least 0 and at most {MOST_REFERENCE_GUIDANCE}, not {scale:g}")
