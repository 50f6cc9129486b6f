"""The reference image of a model that draws the subject of an image in another scene."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from sidcli.data.imagefiles import decoding, open_image, rgb
from sidcli.errors import InputError, UsageError
from sidcli.files import sha256
from sidcli.formats.images import Opened, Shown
from sidcli.progress import Listener

ENLARGED = 2
"""Largest factor by which an image is enlarged. Smaller images are refused."""
UNNAMED = "the reference image"
"""Name of an image that is not in a file, in messages."""


@dataclass(frozen=True, eq=False)
class Reference:
    """An image uint8 [H, W, 3], and what a user is told of its conversion.

    `record` has the name of its file, None for an image in memory, and the SHA-256 of the file or of the pixels, uint8 [H, W, 3].
    """

    name: str
    pixels: np.ndarray
    record: dict[str, str | None]
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Reference:
        """Return the image in a file. Raises InputError if the file is missing, or is no image that can be read."""
        with open_image(file) as image:
            pixels, notes = upright(image, str(file))
            return cls(str(file), pixels, {"file": file.name, "sha256": sha256(file)}, notes)

    @classmethod
    def of(cls, image: Image.Image) -> Reference:
        """Return an image of Pillow. Raises InputError if it cannot be read."""
        with decoding(UNNAMED, "give an image that Pillow can read"):
            pixels, notes = upright(image.copy(), UNNAMED)
        return cls(UNNAMED, pixels, {"file": None, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}, notes)

    def fitted(self, size: tuple[int, int], listener: Listener) -> np.ndarray:
        """Return the image uint8 [H, W, 3] in the height and width `size` of a model: its center, resized.

        The listener is told if parts of the image are cut off, and how it was converted. Raises InputError if it is too small.
        """
        from sidcli.metrics.transforms import crop_and_resize

        (height, width), (wanted_height, wanted_width) = self.pixels.shape[:2], size
        if ENLARGED * height < wanted_height or ENLARGED * width < wanted_width:
            least = f"{-(-wanted_width // ENLARGED)} x {-(-wanted_height // ENLARGED)}"
            raise InputError(
                f"{self.name} has {width} x {height} pixels, too small for {wanted_width} x {wanted_height}",
                f"give an image of at least {least} pixels",
            )
        for note in self.notes:
            listener.note(note)
        if abs(height * wanted_width - width * wanted_height) > max(wanted_height, wanted_width):
            listener.note(f"{self.name} has {width} x {height} pixels; its center is used")
        return crop_and_resize(self.pixels, *size)


def upright(image: Image.Image, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return an image as uint8 [H, W, 3], and notes on its conversion.

    It is turned as its EXIF orientation says, transparent parts become white, and of an animation the first frame is used.
    """
    notes = [f"{name} is an animation; its first frame is used"] if getattr(image, "n_frames", 1) > 1 else []
    mode = image.mode
    if image.getexif().get(Base.Orientation, 1) != 1:
        notes.append(f"{name} was turned as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    layer = image.convert("RGBA") if image.has_transparency_data else None
    if layer and np.asarray(layer)[..., 3].min() < 255:
        notes.append(f"{name} has transparent parts, which were filled with white")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    elif mode != "RGB":
        notes.append(f"{name} was converted from {mode} to RGB")
    return rgb(image), tuple(notes)


def with_references(
    opened: Opened, given: Sequence[Reference], count: int, guidance: float | None, listener: Listener
) -> tuple[Opened, list[Shown]]:
    """Return a model with a guidance scale of its reference images, and the images of `count` prompts in its size.

    `given` are no image, one for all prompts, one for each prompt, or several for one prompt. Raises UsageError if the model takes a
    reference image and none is given, or the other way round, or if it takes one and several are given, InputError if one is too small.
    """
    name, size = opened.source.name, opened.reference_size
    if size is None and given:
        raise UsageError(
            f"{name} takes no reference image", "leave --reference out, or --model RUN with a run of --objective self-distillation"
        )
    if size is None and guidance is not None:
        raise UsageError(f"{name} takes no reference image, which --reference-guidance needs", "leave it out")
    if size and not given:
        raise UsageError(f"{name} draws the subject of a reference image, and none is given", "--reference FILE")
    if count == 1 < len(given) and not opened.several_references:
        raise UsageError(
            f"{name} takes one reference image for an image, and {len(given)} are given",
            "give one; a model that was tuned with --set layout=frames takes several",
        )
    if opened.plan.grid and guidance not in (None, 1):
        raise UsageError(f"a student has its guidance built in; --reference-guidance {guidance:g} is not possible")
    plan = opened.plan if guidance is None else replace(opened.plan, reference_guidance=guidance)
    shown = [Shown(one.fitted(size, listener), one.record) for one in given] if size else []
    if count == 1 < len(shown):
        shown = [Shown(np.concatenate([one.pixels for one in shown], 1), [one.record for one in given])]
    return replace(opened, plan=plan), shown * count if len(shown) == 1 else shown
