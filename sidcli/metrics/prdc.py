"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of drawn images, by nearest neighbors of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidcli.metrics.catalog import Measured
from sidcli.metrics.intervals import mean, share

NEIGHBORS = 5
CHUNK = 1000
"""Rows of a distance matrix held at once: memory grows with the number of images, not with its square."""


@dataclass(frozen=True)
class Prdc:
    """`precision`: drawn images that could be real; `recall`: real ones that could be drawn; `density`: how many real neighborhoods a
    drawn image is in, over k (may pass 1); `coverage`: real images with a drawn one nearby. The intervals count images of the one
    set while the other's neighborhoods stay as they are."""

    precision: Measured
    recall: Measured
    density: Measured
    coverage: Measured


def radii(features: Tensor, k: int) -> Tensor:
    """Distance [n] of each of n features [n, D] to its k-th nearest other one. Raises ValueError where n is not above k."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k} neighbors each")
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1).values for rows in features.split(CHUNK)])


def prdc(real: Tensor, drawn: Tensor, k: int = NEIGHBORS) -> Prdc:
    """Of features float [n, D] and [m, D], n and m above k. A neighborhood is the ball around an image to its k-th neighbor."""
    real, drawn = real.double(), drawn.double()  # two equal images must be at no distance, whatever the chunks
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
        density=mean(inside.double().numpy() / k),
        coverage=share(torch.cat(covered).numpy()),
    )
