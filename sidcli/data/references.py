"""The reference image of a model that draws the subject of an image in another scene."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sidcli.data.imagefiles import read_image
from sidcli.errors import InputError, UsageError
from sidcli.formats.images import Opened
from sidcli.progress import Listener

ENLARGED = 2
"""Largest factor by which an image is enlarged. Smaller images are refused."""


@dataclass(frozen=True)
class Reference:
    """An image uint8 [H, W, 3] of a file, and the mode in which Pillow reads the file."""

    name: str
    pixels: np.ndarray
    mode: str

    @classmethod
    def read(cls, file: Path) -> Reference:
        """Raises InputError if the file is missing or is no image."""
        return cls(str(file), *read_image(file))

    def fitted(self, size: tuple[int, int], listener: Listener) -> np.ndarray:
        """Return the image uint8 [H, W, 3] in the height and width `size` of a model: its center, resized.

        The listener is told if parts of the image are cut off, or if it is not in RGB. Raises InputError if it is too small.
        """
        from sidcli.metrics.transforms import crop_and_resize

        (height, width), (wanted_height, wanted_width) = self.pixels.shape[:2], size
        if ENLARGED * height < wanted_height or ENLARGED * width < wanted_width:
            least = f"{-(-wanted_width // ENLARGED)} x {-(-wanted_height // ENLARGED)}"
            raise InputError(
                f"{self.name} has {width} x {height} pixels, too small for {wanted_width} x {wanted_height}",
                f"give an image of at least {least} pixels",
            )
        if self.mode != "RGB":
            listener.note(f"{self.name} was converted from {self.mode} to RGB")
        if abs(height * wanted_width - width * wanted_height) > max(wanted_height, wanted_width):
            listener.note(f"{self.name} has {width} x {height} pixels; its center is used")
        return crop_and_resize(self.pixels, *size)


def with_reference(
    opened: Opened, shown: Reference | None, guidance: float | None, listener: Listener
) -> tuple[Opened, np.ndarray | None]:
    """Return a model with a guidance scale of its reference image, and the image uint8 [H, W, 3] in its size.

    Raises UsageError if the model takes a reference image and none is given, or the other way round, InputError if it is too small.
    """
    name, size = opened.source.name, opened.reference_size
    if size is None and shown:
        raise UsageError(
            f"{name} takes no reference image", "leave --reference out, or --model RUN with a run of --objective self-distillation"
        )
    if size is None and guidance is not None:
        raise UsageError(f"{name} takes no reference image, which --reference-guidance needs", "leave it out")
    if size and shown is None:
        raise UsageError(f"{name} draws the subject of a reference image, and none is given", "--reference FILE")
    if opened.plan.grid and guidance not in (None, 1):
        raise UsageError(f"a student has its guidance built in; --reference-guidance {guidance:g} is not possible")
    plan = opened.plan if guidance is None else replace(opened.plan, reference_guidance=guidance)
    return replace(opened, plan=plan), shown.fitted(size, listener) if shown and size else None
