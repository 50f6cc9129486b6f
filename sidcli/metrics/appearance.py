"""Measures of how images look, without a reference: for noticing over-saturation and collapse during a training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""


def saturation(images: Sequence[np.ndarray]) -> float:
    """Return the mean over pixels of (largest - smallest channel), in 0..1, of images uint8 [H, W, 3]."""
    return float(np.mean([np.ptp(image, axis=2).mean() for image in images]) / 255)


def contrast(images: Sequence[np.ndarray]) -> float:
    """Return the mean over images of the standard deviation of the brightness, in 0..1, of images uint8 [H, W, 3]."""
    return float(np.mean([(image.astype(np.float32) @ LUMA).std() for image in images]) / 255)


def diversity(embeddings: np.ndarray) -> float:
    """Return the mean cosine distance of all pairs of embeddings [n, D] of norm 1, n at least 2. 0: all images are the same."""
    n = len(embeddings)
    total = embeddings.astype(np.float64).sum(0)
    return float(1 - (total @ total - n) / (n * (n - 1)))
