"""Gates of a pair of panels: the same subject, true captions, no copy, and a sheet that was cut between its panels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sidcli.curation.judge import Verdict

Gate = Literal["same", "caption", "copy", "cut"]
"""The gates, in the order in which they are applied, under the names of their settings and scores."""
STEP = 8.0
"""Difference of pixels, of 255, by which a step across a cut must exceed the difference beside it."""
BANDS = 64
"""Number of bands of pixels into which a panel is divided beside a cut. A band is at least one pixel wide."""


@dataclass(frozen=True)
class Gates:
    """Thresholds: the lowest `same`, `caption` and `cut` and the highest `copy` of a pair that is kept."""

    same: float
    caption: float
    copy: float = 0.9
    cut: float = 0.8

    def rejection(self, verdict: Verdict, copy: float, cut: float) -> Gate | None:
        """Return the first gate that a pair does not pass, or None if it is kept. A score that is not a number does not pass.

        `copy` is the `copy_score` of the panels, `cut` the lowest `cut_score` of the cuts between them.
        """
        passed: dict[Gate, bool] = {
            "same": verdict.same >= self.same,
            "caption": verdict.caption >= self.caption,
            "copy": copy < self.copy,
            "cut": cut >= self.cut,
        }
        return next((gate for gate, is_passed in passed.items() if not is_passed), None)


def cut_score(sheet: np.ndarray, at: int, axis: int) -> float:
    """Return the share, in 0..1, of the places along a cut at which a sheet changes there and not beside it.

    The cut of a sheet uint8 [H, W, 3] lies before row `at` (axis 0) or column `at` (axis 1), with at least three pixels on each side.
    A place counts if the difference across the cut exceeds that inside of the calmer panel by more than STEP. Differences are those
    of the means of neighboring bands of pixels; the bands at the cut itself are left out, because a VAE blurs it. Two plain
    backgrounds that meet at the cut score 1, also if a subject is close to it. One background that continues scores 0, unless it is a
    gradient of more than STEP / 2 in a band, and so does a subject where it looks the same on both sides.
    """
    lines = np.moveaxis(sheet, axis, 0).astype(np.float32)
    width = max(1, min(at, len(lines) - at) // BANDS)
    before, first, last, after = (lines[at + place * width :][:width].mean(0) for place in (-3, -2, 1, 2))
    across, *inside = (np.abs(one - other).max(-1) for one, other in ((first, last), (before, first), (last, after)))
    return float((across > np.minimum(*inside) + STEP).mean())
