"""Gates of a pair of panels: the same subject, true captions, no copy, and a sheet that was cut between its panels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sidcli.curation.judge import Verdict

Reason = Literal["other subject", "caption", "copy", "cut"]
"""Why a pair is rejected, in the order in which the gates are applied."""
STEP = 8.0
"""Difference of pixels, of 255, by which a step across a seam must exceed the difference beside it."""
BANDS = 64
"""Number of bands of pixels into which a panel is divided beside a seam. A band is at least one pixel wide."""


@dataclass(frozen=True)
class Gates:
    """Thresholds: the lowest `same`, `text` and `seam` and the highest `copy` of a pair that is kept."""

    same: float
    text: float
    copy: float = 0.9
    seam: float = 0.8

    def rejection(self, verdict: Verdict, copy: float, seam: float) -> Reason | None:
        """Return why a pair is rejected, or None if it is kept. A score that is not a number is rejected.

        `copy` is the `copy_score` of the panels, `seam` the lowest `seam_score` of the seams between them.
        """
        passed: dict[Reason, bool] = {
            "other subject": verdict.same >= self.same,
            "caption": verdict.text >= self.text,
            "copy": copy < self.copy,
            "cut": seam >= self.seam,
        }
        return next((reason for reason, is_passed in passed.items() if not is_passed), None)


def seam_score(sheet: np.ndarray, at: int, axis: int) -> float:
    """Return the share, in 0..1, of the places along a seam at which a sheet changes there and not beside it.

    The seam of a sheet uint8 [H, W, 3] lies before row `at` (axis 0) or column `at` (axis 1), with at least three pixels on each side.
    A place counts if the difference across the seam exceeds that inside of the calmer panel by more than STEP. Differences are those
    of the means of neighboring bands of pixels; the bands at the seam itself are left out, because a VAE blurs it. Two plain
    backgrounds that meet at the seam score 1, also if a subject is close to it. One background that continues scores 0, unless it is a
    gradient of more than STEP / 2 in a band, and so does a subject where it looks the same on both sides.
    """
    lines = np.moveaxis(sheet, axis, 0).astype(np.float32)
    width = max(1, min(at, len(lines) - at) // BANDS)
    before, first, last, after = (lines[at + place * width :][:width].mean(0) for place in (-3, -2, 1, 2))
    across, *inside = (np.abs(one - other).max(-1) for one, other in ((first, last), (before, first), (last, after)))
    return float((across > np.minimum(*inside) + STEP).mean())
