"""Pairs of images of one subject, for models that take a reference image (Diffusion Self-Distillation, arXiv 2411.18616).

A folder of pairs holds `pairs.jsonl`, one pair in each line, and the sheets from which the images are cut:

    pairs.jsonl   {"sheet": "sheets/00000000.png", "boxes": [[0, 0, 64, 64], [64, 0, 128, 64]], "subject": "key",
                   "captions": ["a key on a red background", ...], "seed": 0, "index": 0, "same": 0.93, "caption": 0.8, "copy": 0.1,
                   "cut": 0.9, "words": "", "kept": true, "reason": ""}
    sheets/       images of several panels

Rejected pairs stay in the file with their scores, so that other thresholds need no new sheets. This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidcli.errors import InputError
from sidcli.files import atomic_file, read_bytes
from sidcli.progress import counted

ROWS = "pairs.jsonl"
MAX_ROWS = 1 << 30
"""Maximum size of pairs.jsonl in bytes."""
HINT = "give a folder that `sid distill --objective self-distillation` wrote, runs/NAME or runs/NAME/pairs"

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a panel in pixels."""


@dataclass(frozen=True)
class PairRow:
    """A pair of panels of a sheet, with the scores of its curation. Either image may be the reference of the other."""

    sheet: str
    boxes: tuple[Box, Box]
    subject: str
    captions: tuple[str, str]
    seed: int
    index: int
    """Number of the sheet."""
    same: float | None = None
    caption: float | None = None
    copy: float | None = None
    cut: float | None = None
    words: str = ""
    """What a vision language model said about the pair."""
    kept: bool = True
    reason: str = ""
    """The gate that rejected the pair; "" of a kept pair."""


def folder_of(place: str) -> Path | None:
    """Return the folder of pairs at a place, which is that folder or a run folder; None if there is none."""
    folders = (Path(place), Path(place) / "pairs")
    return next((folder for folder in folders if place and (folder / ROWS).is_file()), None)


def lines_of(rows: Sequence[PairRow]) -> bytes:
    """Return the content of pairs.jsonl."""
    return "".join(f"{json.dumps(asdict(row))}\n" for row in rows).encode()


def write_rows(folder: Path, rows: Sequence[PairRow]) -> None:
    with atomic_file(folder / ROWS) as temporary:
        temporary.write_bytes(lines_of(rows))


def difference(found: bytes, wrote: Sequence[PairRow]) -> str:
    """Return in words how the content of pairs.jsonl differs from the pairs that sid wrote: their number, or the first that differs."""
    lines = found.splitlines()
    if len(lines) != len(wrote):
        return f"it has {counted(len(lines), 'line')} instead of {len(wrote)}"
    changed = [number for number, (line, row) in enumerate(zip(lines, wrote, strict=True)) if line != lines_of([row]).rstrip()]
    if not changed:
        return "its line ends differ"
    number = changed[0]
    try:
        before, now = asdict(wrote[number]), asdict(_row(json.loads(lines[number])))
        what = ", ".join(f"{name}: {before[name]} -> {value}" for name, value in now.items() if value != before[name])
    except (ValueError, TypeError, KeyError, RecursionError):
        what = "not a pair"
    more = f", and {counted(len(changed) - 1, 'other line')}" if len(changed) > 1 else ""
    return f"line {number + 1} has {what or 'another spelling'}{more}"


def read_rows(folder: Path) -> list[PairRow]:
    """Return the pairs of a folder. Raises InputError, naming file and line, if a line is not a pair."""
    file = folder / ROWS
    rows = []
    for number, line in enumerate(read_bytes(file, MAX_ROWS).splitlines(), 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{file}, line {number} is not a pair: {type(error).__name__} {error}", HINT) from error
    return rows


def _row(content: dict[str, Any]) -> PairRow:
    (first, second), (one, other) = content["boxes"], content["captions"]
    boxes = tuple(int(side) for side in first), tuple(int(side) for side in second)
    sheet = content["sheet"]
    if not all(isinstance(text, str) for text in (sheet, one, other, content["subject"])):
        raise ValueError("a name or a text is not a text")
    if Path(sheet).is_absolute() or ".." in Path(sheet).parts:
        raise ValueError(f"{sheet!r} is outside of the folder")
    if any(len(box) != 4 or box[0] >= box[2] or box[1] >= box[3] or min(box) < 0 for box in boxes):
        raise ValueError(f"boxes {content['boxes']} are not two panels")
    return PairRow(**{**content, "boxes": boxes, "captions": (one, other)})
