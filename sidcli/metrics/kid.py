"""Kernel distances: KID (arXiv 1801.01401) of any features, and CMMD (arXiv 2401.09603) of CLIP embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sidcli.metrics.catalog import Measured
from sidcli.metrics.intervals import jackknife

SIGMA = 10.0
"""Width of CMMD's Gaussian kernel on embeddings of norm 1."""
SCALE = 1000.0
"""Factor by which CMMD values are multiplied."""
CHUNK = 1000
"""Number of rows of a kernel matrix in memory at a time."""

Kernel = Callable[[Tensor], Tensor]
"""Maps the inner products x.y of two sets of features to kernel values."""


class KernelDistance:
    """The squared maximum mean discrepancy to reference features [m, D]. `unbiased` leaves out pairs of an image with itself."""

    def __init__(self, real: np.ndarray, kernel: Kernel, unbiased: bool, scale: float = 1.0):
        self.real, self.kernel, self.own, self.scale = torch.from_numpy(real).double(), kernel, int(unbiased), scale

    def _without_own(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernel sum [n] of each row with all rows (without itself if unbiased), and its kernel [n] with itself."""
        selves = self.kernel((x * x).sum(1))
        return _row_sums(x, x, self.kernel) - self.own * selves, selves

    @cached_property
    def _among_real(self) -> float:
        count = len(self.real)
        return float(self._without_own(self.real)[0].sum() / (count * (count - self.own)))

    def __call__(self, drawn: np.ndarray) -> Measured:
        """Return the distance of generated features [n, D], n at least 3, with its jackknife interval.

        The jackknife leaves each image out once and needs only one pass over the kernel.
        """
        x, own = torch.from_numpy(drawn).double(), self.own
        count = len(x)
        rows, selves = self._without_own(x)
        across = _row_sums(x, self.real, self.kernel) / len(self.real)
        value = rows.sum() / (count * (count - own)) + self._among_real - 2 * across.mean()
        left = rows.sum() - 2 * rows + (1 - own) * selves
        left_out = left / ((count - 1) * (count - 1 - own)) + self._among_real - 2 * (across.sum() - across) / (count - 1)
        return jackknife(self.scale * float(value), self.scale * left_out.numpy())


def kid(real: np.ndarray) -> KernelDistance:
    """Return the KID to features [m, D]: the unbiased squared MMD with kernel (x.y / D + 1)^3. It may be negative.

    It is computed over all pairs. Its expectation equals that of the usual mean over 100 random subsets of 1000 images; its
    variance is lower.
    """
    width = real.shape[1]
    return KernelDistance(real, lambda products: (products / width + 1.0) ** 3, unbiased=True)


def cmmd(real: np.ndarray) -> KernelDistance:
    """Return the CMMD to CLIP image embeddings of norm 1 [m, D]: squared MMD with kernel exp(-|x - y|^2 / 2 sigma^2), times 1000.

    As in the paper's code, pairs of an image with itself are included, so the CMMD of few images is larger.
    """
    return KernelDistance(real, lambda products: torch.exp((products - 1.0) / SIGMA**2), unbiased=False, scale=SCALE)


def _row_sums(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Return the sum [n] of the kernel between each row of x [n, D] and all rows of y [m, D]."""
    return torch.cat([kernel(rows @ y.T).sum(1) for rows in x.split(CHUNK)])
