"""The Frechet distance between two sets of features. Ours, because clean-fid's breaks on scipy >= 1.18 (it calls a removed option)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sidcli.metrics.catalog import Measured
from sidcli.metrics.intervals import Z, around, jackknife
from sidcli.randomness import numpy_generator

GROUPS = 20
"""Parts of the drawn images that are left out in turn for an interval; fewer images have no FID."""
POINTS = 15
"""Sample sizes that an extrapolation goes through, as in arXiv 1911.07023."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [D] and covariance [D, D] of n feature vectors, float64.

    `factor` [n, D], whose product with itself is the covariance, is kept where n is at most D.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int
    factor: np.ndarray | None = None

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0.0))) @ vectors.T


def statistics(features: np.ndarray) -> Statistics:
    """Of features [n, D], n at least 2. The covariance divides by n - 1, as clean-fid's does."""
    values = features.astype(np.float64)
    n, dimensions = values.shape
    mean = values.mean(0)
    factor = (values - mean) / math.sqrt(n - 1) if n <= dimensions else None
    return Statistics(mean, np.cov(values, rowvar=False), n, factor)


def frechet_distance(a: Statistics, b: Statistics, quick: bool = False) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv 1706.08500), clamped at zero; nan where features are not finite.

    The trace of the square root is the sum of the square roots of the eigenvalues of C_a C_b, so no matrix root is needed and
    singular covariances do no harm. With C_a = F^T F of fewer vectors than dimensions, those are the eigenvalues of F C_b F^T and
    zeros. `quick` takes them from the symmetric C_b^(1/2) C_a C_b^(1/2): ten times as fast once b's root is known, and less exact by
    some 1e-6 where a covariance is singular.
    """
    if a.factor is None and b.factor is not None:
        a, b = b, a
    with np.errstate(over="ignore", invalid="ignore"):
        if a.factor is not None:
            product = a.factor @ b.covariance @ a.factor.T
        else:
            product = b.root @ a.covariance @ b.root if quick else a.covariance @ b.covariance
    if not np.isfinite(product).all():
        return math.nan
    if a.factor is not None or quick:
        return _distance(a, b, np.sqrt(np.linalg.eigvalsh(product).clip(0.0)).sum())
    return _distance(a, b, np.sqrt(np.linalg.eigvals(product).astype(np.complex128)).real.sum())


def _distance(a: Statistics, b: Statistics, root: float) -> float:
    difference = a.mean - b.mean
    squared = float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * root)
    return 0.0 if squared < 0.0 else squared  # max(0, nan) would be 0; keep NaN


def fid(features: np.ndarray, reference: Statistics) -> Measured:
    """Frechet distance of drawn features [n, D] to the reference, with the interval of a jackknife over groups of drawn images.

    n is GROUPS at least.
    """
    if not (np.isfinite(features).all() and np.isfinite(reference.covariance).all()):
        return Measured(math.nan, math.nan, math.nan)
    groups = np.array_split(numpy_generator(0, "jackknife").permutation(len(features)), GROUPS)
    left_out = [frechet_distance(statistics(np.delete(features, group, axis=0)), reference, quick=True) for group in groups]
    return jackknife(frechet_distance(statistics(features), reference), np.array(left_out))


def fid_infinity(features: np.ndarray, reference: Statistics, measured: Measured) -> Measured:
    """The FID's limit for infinitely many drawn images: a line through FIDs of random parts over 1 / size (arXiv 1911.07023).

    `measured` is the FID of all of them; the interval adds its spread to that of the line.
    """
    count = len(features)
    sizes = np.linspace(count // 5, count, POINTS).astype(int)
    parts = [numpy_generator(0, "extrapolation", int(size)).choice(count, size, replace=False) for size in sizes]
    distances = [frechet_distance(statistics(features[part]), reference, quick=True) for part in parts]
    (_, limit), spread = np.polyfit(1 / sizes, distances, 1, cov=True)
    own = measured.half_width / Z
    return around(float(limit), float(np.hypot(own, spread[1, 1] ** 0.5)))
