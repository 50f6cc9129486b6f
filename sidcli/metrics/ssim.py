"""Structural similarity of two images (SSIM, Wang et al. 2004), which is high if one is a copy of the other."""

from __future__ import annotations

import numpy as np

from sidcli.metrics.appearance import LUMA

WINDOW, DEVIATION = 11, 1.5
"""Side of the Gaussian window of SSIM and its standard deviation, in pixels (Wang et al. 2004)."""
STABILIZERS = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""C1 and C2 of SSIM for pixels in 0..255."""


def copy_score(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean structural similarity of the brightness of two images uint8 [H, W, 3] of one size; 1 if they are equal.

    Sides are at least 11 pixels. This is equation 13 of Wang et al. 2004, "Image quality assessment: from error visibility to
    structural similarity", averaged over the positions at which the whole window lies inside of the image, at full resolution.
    """
    x, y = (image.astype(np.float32) @ LUMA for image in (first, second))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = STABILIZERS
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((brightness * structure).mean())


def _blurred(image: np.ndarray) -> np.ndarray:
    """Return the Gaussian average [H - 10, W - 10] around each pixel whose window lies inside of an image [H, W]."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    weights /= weights.sum()
    rows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), WINDOW, 0) @ weights
    return np.lib.stride_tricks.sliding_window_view(rows, WINDOW, 1) @ weights
