"""The Frechet distance between two sets of features. clean-fid's version fails with scipy >= 1.18 (it uses a removed option)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sidcli.metrics.catalog import Measured
from sidcli.metrics.intervals import Z, around, jackknife
from sidcli.randomness import numpy_generator

GROUPS = 20
"""Number of groups of generated images in the jackknife of an interval; the FID needs at least as many images."""
POINTS = 15
"""Number of sample sizes in the extrapolation, as in arXiv 1911.07023."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [D] and covariance [D, D] of n feature vectors, float64.

    `factor` F [n, D], with F^T F equal to the covariance, is kept if n is at most D.
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
    """Return the statistics of features [n, D], n at least 2. The covariance is normalized by n - 1, as in clean-fid."""
    values = features.astype(np.float64)
    n, dimensions = values.shape
    mean = values.mean(0)
    factor = (values - mean) / math.sqrt(n - 1) if n <= dimensions else None
    return Statistics(mean, np.cov(values, rowvar=False), n, factor)


def frechet_distance(a: Statistics, b: Statistics, quick: bool = False) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv 1706.08500), clamped at 0; NaN if features are not finite.

    The trace of the square root is the sum of the square roots of the eigenvalues of C_a C_b, so no matrix root is needed and
    covariances may be singular. If C_a = F^T F has fewer vectors than dimensions, the eigenvalues are those of F C_b F^T and zeros.
    `quick` computes them from the symmetric C_b^(1/2) C_a C_b^(1/2), which is ten times as fast once b's root is known, with an
    error of about 1e-6 if a covariance is singular.
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
    """Return the Frechet distance of generated features [n, D] to the reference, with a jackknife interval over groups of images.

    n must be at least GROUPS.
    """
    if not (np.isfinite(features).all() and np.isfinite(reference.covariance).all()):
        return Measured(math.nan, math.nan, math.nan)
    groups = np.array_split(numpy_generator(0, "jackknife").permutation(len(features)), GROUPS)
    left_out = [frechet_distance(statistics(np.delete(features, group, axis=0)), reference, quick=True) for group in groups]
    return jackknife(frechet_distance(statistics(features), reference), np.array(left_out))


def fid_infinity(features: np.ndarray, reference: Statistics, measured: Measured) -> Measured:
    """Return the limit of the FID for infinitely many generated images (arXiv 1911.07023).

    The FIDs of random subsets are fitted by a line in 1 / size. `measured` is the FID of all images; its standard error is combined
    with that of the fit.
    """
    count = len(features)
    sizes = np.linspace(count // 5, count, POINTS).astype(int)
    parts = [numpy_generator(0, "extrapolation", int(size)).choice(count, size, replace=False) for size in sizes]
    distances = [frechet_distance(statistics(features[part]), reference, quick=True) for part in parts]
    (_, limit), spread = np.polyfit(1 / sizes, distances, 1, cov=True)
    own = measured.half_width / Z
    return around(float(limit), float(np.hypot(own, spread[1, 1] ** 0.5)))
