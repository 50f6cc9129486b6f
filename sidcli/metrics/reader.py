"""What the reader of the emoji world sees in images: noun, background and identity of the subject."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load_file

from sidcli.emoji.reader import HEADS, Reader
from sidcli.emoji.world import SIZE
from sidcli.errors import InputError
from sidcli.files import sha256
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.sources import WEIGHTS

READER = WEIGHTS / "reader.safetensors"


def load_reader() -> Reader:
    """Return the reader with its shipped weights. Raises InputError if they are missing."""
    if not READER.is_file():
        raise InputError(f"{READER} is missing: the reader of the emoji world has no weights", "install sid again")
    reader = Reader().eval()
    reader.load_state_dict(load_file(READER))
    return reader


class ReaderFeatures:
    """The extractor of the predicted attributes of images, float32 [B, 5]: positions of the values in the order of HEADS."""

    reads_captions = False

    def __init__(self) -> None:
        self.net = load_reader()
        self.name = f"emoji reader {sha256(READER)[:12]}"

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> np.ndarray:
        fitted = [image if image.shape[:2] == (SIZE, SIZE) else crop_and_resize(image, SIZE, SIZE) for image in images]
        found = self.net.read(torch.from_numpy(np.stack(fitted)))
        return np.array([(one.noun, one.color, *one.identity) for one in found], np.float32).reshape(-1, len(HEADS))
