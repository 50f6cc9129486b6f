"""Image grids, labelled contact sheets, and PNG files."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sidcli.files import atomic_file
from sidcli.printable import printable

FONT = Path(__file__).with_name("fonts") / "DejaVuSans.ttf"
"""The Latin, Greek and Cyrillic letters of DejaVu Sans, extracted with fonttools. Other letters are drawn as boxes."""
GAP = 6
LABEL_LINES = 24
"""Maximum number of lines of a label. A prompt that a text encoder does not truncate needs fewer lines."""


def save_png(picture: Image.Image, file: Path, info: PngImagePlugin.PngInfo | None = None, replace: bool = True) -> None:
    with atomic_file(file, replace) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 0) -> Image.Image:
    """Return a sheet of pictures in rows. The label of a picture is below it, in as many lines as needed.

    If `columns` is 0, `columns_for` chooses the number of columns so that the last row has few gaps. Pictures keep their aspect
    ratio: large pictures are shrunk, small pictures are enlarged by an integer factor.
    """
    columns = columns or columns_for(len(pictures))
    cell = 128 if max(max(picture.size) for picture in pictures) <= 128 else 256
    font = ImageFont.truetype(FONT, 11 if cell == 128 else 13)
    line = sum(font.getmetrics())
    texts = [wrapped(label, font, cell) for label in labels[: len(pictures)]]
    texts += [[]] * (len(pictures) - len(texts))
    shown = [fitted(picture, cell) for picture in pictures]
    rows = [range(first, min(first + columns, len(shown))) for first in range(0, len(shown), columns)]
    heights = [max(shown[index].height for index in row) for row in rows]
    lines = [max(len(texts[index]) for index in row) for row in rows]
    below = [GAP + number * line + (GAP if number else 0) for number in lines]
    sheet = Image.new("RGB", (columns * (cell + GAP) + GAP, sum(heights) + sum(below) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for row, height, more in zip(rows, heights, below, strict=True):
        for column, index in enumerate(row):
            picture, left = shown[index], GAP + column * (cell + GAP)
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + (height - picture.height) // 2))
            for number, text in enumerate(texts[index]):
                pen.text((left, top + height + GAP // 2 + number * line), text, fill="black", font=font)
        top += height + more
    return sheet


def columns_for(count: int) -> int:
    """Return the number of columns for `count` pictures: the number near 5/4 sqrt(count) that leaves the fewest gaps."""
    ideal = 1.25 * count**0.5
    candidates = range(math.ceil(count**0.5), max(2, int(1.44 * ideal)) + 1)
    return min(candidates, key=lambda columns: (-count % columns, abs(columns - ideal)))


def fitted(picture: Image.Image, cell: int) -> Image.Image:
    """Resize a picture to fit into a square of `cell` pixels: shrink a large picture, enlarge a small
    picture by an integer factor."""
    longest = max(picture.size)
    if longest > cell:
        return picture.resize(
            (max(1, picture.width * cell // longest), max(1, picture.height * cell // longest)), Image.Resampling.LANCZOS
        )
    factor = cell // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return the lines of a text, each at most `width` pixels wide, broken between words if possible.

    A text of more than LABEL_LINES lines is cut and ends in an ellipsis.
    """
    lines = [""]
    for word in unicodedata.normalize("NFC", printable(text)).split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > LABEL_LINES:
            last = lines[LABEL_LINES - 1]
            while last and font.getlength(f"{last}\u2026") > width:
                last = last[:-1]
            return [*lines[: LABEL_LINES - 1], f"{last}\u2026"]
    return lines if lines != [""] else []


def grid(rows: Sequence[np.ndarray]) -> Image.Image:
    """Return one picture of all images: the images uint8 [n, H, W, 3] of a row side by side, the rows below each other."""
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows], 0))
