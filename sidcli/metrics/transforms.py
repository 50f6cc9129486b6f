"""What a measuring protocol does to an image before any network sees it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: the square of the short side at the centre, resized by PIL's Lanczos filter.

    GigaGAN's `CenterCropLongEdge` and resize (its evaluation code for COCO): torchvision's center_crop, which rounds half pixels
    to even.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = round((width - side) / 2), round((height - side) / 2)
    crop = Image.fromarray(image).crop((left, top, left + side, top + side))
    return np.array(crop.resize((size, size), Image.Resampling.LANCZOS))
