"""The Frechet distance between two sets of features. Ours, because clean-fid's breaks on scipy >= 1.18 (it calls a removed option)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [D] and covariance [D, D] of n feature vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int


def statistics(features: np.ndarray) -> Statistics:
    """Of features [n, D], n at least 2. The covariance divides by n - 1, as clean-fid's does."""
    values = features.astype(np.float64)
    return Statistics(values.mean(0), np.cov(values, rowvar=False), len(values))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv 1706.08500), clamped at zero.

    The trace of the square root is the sum of the square roots of the eigenvalues of C_a C_b, so no matrix root is needed and
    singular covariances do no harm.
    """
    eigenvalues = np.linalg.eigvals(a.covariance @ b.covariance)
    root = np.sqrt(eigenvalues.astype(np.complex128)).real.sum()
    difference = a.mean - b.mean
    return max(0.0, float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * root))
