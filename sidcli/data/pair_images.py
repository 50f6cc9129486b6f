"""The images of pairs as latents to train on; see `data.pairs`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sidcli.data.imagefiles import DAMAGE
from sidcli.data.imagesets import digest
from sidcli.data.latents import FORMAT, Unit
from sidcli.data.pairs import HINT, PairRow, read_rows
from sidcli.errors import InputError
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.loading import Model
from sidcli.progress import Progress


def panels(folder: Path, row: PairRow) -> tuple[np.ndarray, np.ndarray]:
    """Return both images of a pair, uint8 [H, W, 3]. Raises InputError if the sheet cannot be read or is smaller than its panels."""
    file = folder / row.sheet
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            sheet = opened.convert("RGB")
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise InputError(
            f"{file} is not a PNG image: {error}", "run the command of its run folder again, which draws it again"
        ) from error
    if any(box[2] > sheet.width or box[3] > sheet.height for box in row.boxes):
        raise InputError(f"{file} is {sheet.width} x {sheet.height} pixels, smaller than its panels", HINT)
    first, second = (np.asarray(sheet.crop(box)) for box in row.boxes)
    return first, second


def is_intact(file: Path, size: tuple[int, int]) -> bool:
    """Return whether a file is a PNG image of this width and height whose checksums are right. Its pixels are not decoded."""
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            opened.verify()
            return opened.size == size
    except (*DAMAGE, Image.DecompressionBombError):
        return False


@dataclass(frozen=True)
class PairImages:
    """The kept pairs of a folder as images to train on: image 2 i is pair i with its first panel as the reference, image 2 i + 1 the
    same pair with the second. A latent [C, h, 2 w] is the reference beside the image of the caption."""

    folder: Path
    model: Model
    device: torch.device
    title = "encode pairs"
    identity = ""

    @cached_property
    def rows(self) -> list[PairRow]:
        return [row for row in read_rows(self.folder) if row.kept]

    @property
    def name(self) -> str:
        return f"{self.folder}"

    @cached_property
    def key(self) -> str:
        rows = [(row.sheet, row.boxes, row.captions, row.index, row.seed) for row in self.rows]
        return digest("pairs", FORMAT, str(self.folder.resolve()), rows, self.model.codec.digest(), self.model.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.model.kind.frame_shape(self.model.denoiser.config)
        return channels, height, 2 * width

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def caption(self, index: int) -> str:
        return self.rows[index // 2].captions[1 - index % 2]

    def latents(self, indices: range, advance: Progress) -> tuple[torch.Tensor, Unit]:
        codec, found = self.model.codec.to(self.device), []
        pixels = [image for pair in self._read(indices) for image in pair]
        for start in range(0, len(pixels), 2):
            encoded = [codec.encode_image(crop_and_resize(image, *self.model.size)).cpu() for image in pixels[start : start + 2]]
            found.append(torch.cat(encoded, -1))
            advance(1)
        return torch.cat([torch.empty(0, *self.shape), *found]), Unit(tuple(indices), digest([image.tobytes() for image in pixels]))

    def _read(self, indices: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index in indices:
            first, second = panels(self.folder, self.rows[index // 2])
            yield (second, first) if index % 2 else (first, second)
