"""What a protocol does to an image before a network sees it, each step as the published evaluation code does it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: the square of the short side at the center, resized by PIL's Lanczos filter.

    GigaGAN's `CenterCropLongEdge` and resize (its evaluation code for COCO): torchvision's center_crop, which rounds half pixels
    to even.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = round((width - side) / 2), round((height - side) / 2)
    crop = Image.fromarray(image).crop((left, top, left + side, top + side))
    return np.array(crop.resize((size, size), Image.Resampling.LANCZOS))


def quantized(image: np.ndarray) -> np.ndarray:
    """uint8 -> uint8, of which 63 of the 256 values come out one lower: what CLIP sees in GigaGAN's evaluation code.

    It maps pixels to [-1, 1] in float32 (torchvision's ToTensor and Normalize) and back to bytes by truncation (its `tensor2pil`).
    """
    return _LEVELS[image]


_UNIT = np.arange(256, dtype=np.float32) / np.float32(255)
_LEVELS = (((_UNIT - np.float32(0.5)) / np.float32(0.5) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
