"""Image preprocessing of the protocols, equal to that of the published evaluation code."""

from __future__ import annotations

import numpy as np
from PIL import Image


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Crop uint8 [H, W, 3] to its center square and resize it to uint8 [size, size, 3] with PIL's Lanczos filter.

    This is `CenterCropLongEdge` and the resize of GigaGAN's evaluation code for COCO. It uses torchvision's center_crop, which
    rounds half pixels to even.
    """
    return crop_and_resize(image, size, size)


def crop_and_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop uint8 [H, W, 3] to the largest central part with the aspect ratio of the result, and resize it to [height, width, 3].

    The filter is PIL's Lanczos. A square result is that of `square`.
    """
    given_height, given_width = image.shape[:2]
    scale = min(given_height / height, given_width / width)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = round((given_width - inner_width) / 2), round((given_height - inner_height) / 2)
    crop = Image.fromarray(image).crop((left, top, left + inner_width, top + inner_height))
    return np.array(crop.resize((width, height), Image.Resampling.LANCZOS))


def quantized(image: np.ndarray) -> np.ndarray:
    """Return uint8 pixels as CLIP receives them in GigaGAN's evaluation code, which lowers 63 of the 256 values by one.

    The code maps pixels to [-1, 1] in float32 (torchvision's ToTensor and Normalize) and back to bytes by truncation (its
    `tensor2pil`).
    """
    return _LEVELS[image]


_UNIT = np.arange(256, dtype=np.float32) / np.float32(255)
_LEVELS = (((_UNIT - np.float32(0.5)) / np.float32(0.5) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
