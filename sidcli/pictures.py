"""Images to look at: grids, labelled contact sheets, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from sidcli.files import atomic_file
from sidcli.printable import printable


def save_png(picture: Image.Image, file: Path, info: PngImagePlugin.PngInfo | None = None) -> None:
    with atomic_file(file) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 0, cell: int = 128) -> Image.Image:
    """Pictures in rows with a line of text under each; labels that do not fit are cut."""
    columns = columns or min(len(pictures), max(1, round(len(pictures) ** 0.5 * 1.25)))
    rows = -(-len(pictures) // columns)
    font = ImageFont.load_default(10)
    sheet = Image.new("RGB", (columns * (cell + 6) + 6, rows * (cell + 20) + 6), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=False)):
        left, top = 6 + index % columns * (cell + 6), 6 + index // columns * (cell + 20)
        sheet.paste(
            picture.resize((cell, cell), Image.Resampling.LANCZOS if picture.width > cell else Image.Resampling.NEAREST),
            (left, top),
        )
        text = printable(label)
        while text and font.getlength(text) > cell:
            text = text[:-1]
        pen.text((left, top + cell + 2), text, fill="black", font=font)
    return sheet


def grid(rows: Sequence[Tensor]) -> Image.Image:
    """Images uint8 [n, H, W, 3] per row -> one picture, `rows` under each other."""
    return Image.fromarray(torch.cat([torch.cat(list(row), 1) for row in rows], 0).numpy())
