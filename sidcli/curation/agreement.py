"""Agreement of a judge with the known truth: yield, precision and recall, and the threshold that balances the last two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidcli.errors import UsageError
from sidcli.metrics.catalog import Measured
from sidcli.metrics.intervals import share
from sidcli.progress import counted


@dataclass(frozen=True)
class Agreement:
    """Shares of pairs with Wilson's 95 % intervals. A share of no pairs is None.

    `kept`: pairs that were kept, the yield. `precision`: kept pairs that are good. `recall`: good pairs that were kept.
    """

    kept: Measured
    precision: Measured | None
    recall: Measured | None


def agreement(kept: Sequence[bool], truth: Sequence[bool]) -> Agreement:
    """Return the agreement of the pairs that were kept with those that are good, one value per pair each.

    Raises UsageError if there is no pair, or if the numbers of values differ.
    """
    is_kept, is_good = _checked(kept, truth, bool)
    return Agreement(share(is_kept), *(share(hits) if len(hits) else None for hits in (is_good[is_kept], is_kept[is_good])))


def calibrated(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the threshold with the highest F1 score (harmonic mean of precision and recall) of the pairs whose score is at least it.

    It lies halfway between the lowest score that is kept and the next lower one. Of equally good thresholds it is the highest.
    Raises UsageError if no pair is good, or if the numbers of values differ.
    """
    values, is_good = _checked(scores, truth, float)
    if not is_good.any():
        raise UsageError(f"a threshold cannot be set: none of {counted(len(is_good), 'pair')} is good", "use more pairs")
    levels = np.unique(values)[::-1]
    kept, hits = (len(some) - np.searchsorted(np.sort(some), levels) for some in (values, values[is_good]))
    best = int(np.argmax(2 * hits / (kept + is_good.sum())))
    return float(levels[best : best + 2].mean())


def auc(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the probability that a good pair has a higher score than another pair, a tie counting half; 0.5 is chance.

    It is the area under the ROC curve. Raises UsageError if either kind of pair is missing, or if the numbers of values differ.
    """
    values, is_good = _checked(scores, truth, float)
    good, others = values[is_good], np.sort(values[~is_good])
    if not (len(good) and len(others)):
        raise UsageError("good pairs cannot be compared with others: only one of the two kinds is there", "use more pairs")
    below = (np.searchsorted(others, good, side="left") + np.searchsorted(others, good, side="right")) / 2
    return float(below.mean() / len(others))


def _checked(values: Sequence[float], truth: Sequence[bool], kind: type) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of pairs and their truth as arrays [n]."""
    if len(values) != len(truth) or not len(truth):
        raise UsageError(f"{counted(len(values), 'pair')} cannot be compared with the truth of {counted(len(truth), 'pair')}")
    return np.asarray(values, kind), np.asarray(truth, bool)
