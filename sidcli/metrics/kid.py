"""The kernel distance (KID, arXiv 1801.01401): like the FID, but unbiased for few images, and with an interval of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUBSETS, SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation over random subsets, as the paper reports it; `size` images of each set in a subset."""

    mean: float
    deviation: float
    size: int


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features [m, D] and [m, D] under the kernel (x.y / D + 1)^3; may be negative."""
    count, width = x.shape
    within = 0.0
    for side in (x, y):
        kernel = (side @ side.T / width + 1.0) ** 3
        within += (kernel.sum() - np.trace(kernel)) / (count * (count - 1))
    return float(within - 2.0 * ((x @ y.T / width + 1.0) ** 3).mean())


def kid(x: np.ndarray, y: np.ndarray, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET_SIZE) -> Kid:
    """KID of features [n, D] and [m, D]. Subsets are drawn from the seed; where a set has fewer images than `size`, all of them."""
    rng = np.random.default_rng(seed)
    size = min(size, len(x), len(y))
    x, y = x.astype(np.float64), y.astype(np.float64)
    values = [
        squared_mmd(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)]) for _ in range(subsets)
    ]
    return Kid(float(np.mean(values)), float(np.std(values)), size)
