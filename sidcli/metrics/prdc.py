"""Precision, recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of generated images, from nearest neighbors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidcli.metrics.catalog import Measured
from sidcli.metrics.intervals import mean, share

NEIGHBORS = 5
CHUNK = 1000
"""Number of rows of a distance matrix in memory at a time, so that memory grows linearly with the number of images."""


@dataclass(frozen=True)
class Prdc:
    """Precision, recall, density and coverage of generated images. See `prdc` for the neighborhood of an image.

    `precision`: share of generated images in the neighborhood of a reference image; `recall`: share of reference images in the
    neighborhood of a generated image; `density`: mean number of reference neighborhoods that contain a generated image, over k (may
    exceed 1); `coverage`: share of reference images with a generated image in their neighborhood. Each interval covers the sampling
    of the averaged images; the neighborhoods are fixed.
    """

    precision: Measured
    recall: Measured
    density: Measured
    coverage: Measured


def radii(features: Tensor, k: int) -> Tensor:
    """Return the distance [n] of each of n features [n, D] to its k-th nearest neighbor. Raises ValueError if n is not above k."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k} neighbors each")
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1).values for rows in features.split(CHUNK)])


def prdc(real: Tensor, drawn: Tensor, k: int = NEIGHBORS) -> Prdc:
    """Return the metrics for reference features [n, D] and generated features [m, D], float, n and m above k.

    The neighborhood of an image is the ball around its features whose radius is the distance to its k-th nearest neighbor.
    """
    real, drawn = real.double(), drawn.double()  # equal images must have distance 0 in every chunk
    real_radii, drawn_radii = radii(real, k), radii(drawn, k)
    inside = torch.zeros(len(drawn), dtype=torch.long)
    reached, covered = [], []
    for rows, limits in zip(real.split(CHUNK), real_radii.split(CHUNK), strict=True):
        distances = torch.cdist(rows, drawn)
        inside += (distances < limits[:, None]).sum(0)
        covered.append(distances.min(1).values < limits)
        reached.append((distances < drawn_radii[None, :]).any(1))
    return Prdc(
        precision=share((inside > 0).numpy()),
        recall=share(torch.cat(reached).numpy()),
        density=mean(inside.double().numpy() / k, "density"),
        coverage=share(torch.cat(covered).numpy()),
    )
