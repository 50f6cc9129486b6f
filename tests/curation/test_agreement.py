"""Yield, precision, recall and thresholds against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from sidcli.curation.agreement import Agreement, agreement, auc, calibrated
from sidcli.errors import UsageError
from sidcli.metrics.catalog import Measured


def wilson(hits: int, count: int) -> Measured:
    found = binomtest(hits, count).proportion_ci(method="wilson")
    return Measured(hits / count, pytest.approx(found.low, abs=1e-6), pytest.approx(found.high, abs=1e-6))  # type: ignore[arg-type]


def test_yield_precision_and_recall_have_wilson_intervals() -> None:
    kept = [True] * 6 + [False] * 4
    truth = [True] * 5 + [False] + [True] * 2 + [False] * 2
    assert agreement(kept, truth) == Agreement(wilson(6, 10), wilson(5, 6), wilson(5, 7))


def test_shares_of_nothing_are_none() -> None:
    assert agreement([False, False], [True, False]).precision is None
    assert agreement([True, False], [False, False]).recall is None


def test_the_threshold_has_the_best_f1_score_of_all() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(60) < 0.4
    scores = np.round(rng.normal(truth, 1.0), 1)  # with ties

    def f1(threshold: float) -> float:
        kept = scores >= threshold
        return float(2 * (kept & truth).sum() / (kept.sum() + truth.sum()))

    assert f1(calibrated(scores.tolist(), truth.tolist())) == max(f1(level) for level in np.unique(scores))


def test_the_threshold_lies_halfway_between_the_scores_that_it_separates() -> None:
    assert calibrated([0.0, 0.5, 1.0, 1.0], [False, False, True, True]) == 0.75
    assert calibrated([0.2, 0.4], [True, True]) == 0.2
    assert calibrated([0.1, 0.2, 0.3], [True, False, True]) == 0.1  # 0.25 would lose one of two good pairs


def test_the_area_is_the_share_of_pairs_of_pairs_in_the_right_order() -> None:
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert auc([4, 2, 3, 1], [False, True, False, True]) == 0.0
    assert auc([1, 1, 2, 2], [False, True, True, False]) == 0.5


def test_a_comparison_with_nothing_is_refused() -> None:
    for refused, said in (
        (lambda: agreement([], []), "0 pairs cannot be compared"),
        (lambda: agreement([True], [True, False]), "1 pair cannot be compared with the truth of 2 pairs"),
        (lambda: calibrated([0.1, 0.2], [False, False]), "none of 2 pairs is good"),
        (lambda: auc([0.1, 0.2], [True, True]), "only one of the two kinds"),
    ):
        with pytest.raises(UsageError, match=said):
            refused()
