"""Crops of the subject of a panel without its background, which differs between the panels of a sheet."""

from __future__ import annotations

import numpy as np

TOLERANCE = 32
"""Difference of a channel from the color of the border, of 255, above which a pixel belongs to the subject."""
PLAIN = 0.75
"""Least share of the border that has its color. Otherwise the background is not plain, and the whole image is used."""
LEAST = 1 / 32
"""Share of the pixels of a row or a column that differ, above which the crop contains it. Fewer are noise."""
GRAY = 127
"""Value of the pixels that replace the background."""


def subject(image: np.ndarray) -> np.ndarray:
    """Return the smallest square around the subject of an image uint8 [H, W, 3], with a gray background.

    The subject is what differs from the color of the border, which is the median of the outermost pixels, and what it encloses in the
    directions of all four sides. A square that would leave the image is moved, and cut where the image is smaller. Without a plain
    border or a subject, the image is returned unchanged.
    """
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    color = np.median(border, axis=0)
    differs = _distance(image, color) > TOLERANCE
    rows, columns = (np.flatnonzero(differs.mean(axis) > LEAST) for axis in (1, 0))
    if (_distance(border, color) <= TOLERANCE).mean() < PLAIN or not (len(rows) and len(columns)):
        return image
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    box = tuple(_centered(found, side, size) for found, size in zip((rows, columns), differs.shape, strict=True))
    return np.where(_filled(differs)[..., None], image, np.uint8(GRAY))[box]


def _distance(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Return the largest difference of a channel [...] of pixels [..., 3] from a color [3]."""
    return np.abs(pixels - color).max(-1)


def _filled(mask: np.ndarray) -> np.ndarray:
    """Return a mask [H, W] with every position that has a part of it, or itself, in each of the four directions."""
    from_start = [np.logical_or.accumulate(mask, axis) for axis in (0, 1)]
    from_end = [np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis) for axis in (0, 1)]
    return np.logical_and.reduce([*from_start, *from_end])


def _centered(found: np.ndarray, side: int, size: int) -> slice:
    """Return `side` positions around the middle of those found, inside of 0..size."""
    start = int(np.clip((found[0] + found[-1] + 1 - side) // 2, 0, max(0, size - side)))
    return slice(start, min(size, start + side))
