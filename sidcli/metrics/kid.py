"""Kernel distances: KID (arXiv 1801.01401) of any features, and CMMD (arXiv 2401.09603) of CLIP's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sidcli.metrics.catalogue import Measured
from sidcli.metrics.intervals import jackknife

SIGMA = 10.0
"""Width of CMMD's Gaussian kernel on embeddings of length 1, and below the factor its values are written with."""
SCALE = 1000.0
CHUNK = 1000
"""Rows of a kernel matrix held at once."""

Kernel = Callable[[Tensor], Tensor]
"""From the products x.y of two sets of features."""


def kid(drawn: np.ndarray, real: np.ndarray) -> Measured:
    """KID of features [n, D] and [m, D], n at least 3 and m at least 2: unbiased squared MMD under (x.y / D + 1)^3; may be negative.

    Over all pairs, which has the expectation that the usual mean over 100 random subsets of 1000 has, and less noise.
    """
    width = drawn.shape[1]
    return _squared_mmd(drawn, real, lambda products: (products / width + 1.0) ** 3, unbiased=True)


def cmmd(drawn: np.ndarray, real: np.ndarray) -> Measured:
    """CMMD of CLIP image embeddings of length 1, [n, D] and [m, D]: squared MMD under exp(-|x - y|^2 / 2 sigma^2), times 1000.

    As in the paper's code an image is also compared with itself, so few images make it larger.
    """
    found = _squared_mmd(drawn, real, lambda products: torch.exp((products - 1.0) / SIGMA**2), unbiased=False)
    return Measured(*(SCALE * value for value in (found.value, found.low, found.high)))


def _squared_mmd(drawn: np.ndarray, real: np.ndarray, kernel: Kernel, unbiased: bool) -> Measured:
    """With the interval of a jackknife that leaves each drawn image out once, for which one pass over the kernel is enough."""
    x, y = torch.from_numpy(drawn).double(), torch.from_numpy(real).double()
    count, own = len(x), int(unbiased)
    rows, selves = _row_sums(x, x, kernel), kernel((x * x).sum(1))
    rows -= own * selves
    real_total = _row_sums(y, y, kernel).sum() - own * kernel((y * y).sum(1)).sum()
    among_real = real_total / (len(y) * (len(y) - own))
    across = _row_sums(x, y, kernel) / len(y)
    left = rows.sum() - 2 * rows + (1 - own) * selves
    left_out = left / ((count - 1) * (count - 1 - own)) + among_real - 2 * (across.sum() - across) / (count - 1)
    value = rows.sum() / (count * (count - own)) + among_real - 2 * across.mean()
    return jackknife(float(value), left_out.numpy())


def _row_sums(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Sum [n] of the kernel between each row of x [n, D] and all rows of y [m, D]."""
    return torch.cat([kernel(rows @ y.T).sum(1) for rows in x.split(CHUNK)])
