"""The judge `oracle`: the reader of the emoji world, whose ground truth is exact. It is for tests and for the calibration of others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from sidcli.curation.judge import Pair, Verdict, in_batches, verdicts_of
from sidcli.emoji.identities import sheet_caption
from sidcli.emoji.reader import Reader, Reading
from sidcli.emoji.world import COLOR_LIST, NOUN_LIST, SIZE
from sidcli.errors import UsageError
from sidcli.metrics.transforms import crop_and_resize
from sidcli.progress import Progress, silent

ALMOST = 0.9
"""Score per share of the attributes that agree, if not all of them do. It is below 1, the score of full agreement."""
BATCH = 64
"""Pairs in one call of the reader."""


@cache
def _captions() -> dict[str, tuple[int, int]]:
    """Return the caption of every panel of the emoji world -> its noun and its color, as positions in NOUN_LIST and COLOR_LIST."""
    return {
        sheet_caption(noun, (color,)): (place, shade)
        for place, noun in enumerate(NOUN_LIST)
        for shade, color in enumerate(COLOR_LIST)
    }


def named(caption: str) -> tuple[int, int]:
    """Return the noun and the color that a caption names. Raises UsageError if it is not the caption of a panel of the emoji world."""
    if caption not in _captions():
        raise UsageError(
            f"the judge oracle knows the captions of the emoji world, such as {sheet_caption('cat', ('red',))!r}, not {caption!r}",
            "choose another judge",
        )
    return _captions()[caption]


def agreeing(first: Sequence[int], second: Sequence[int]) -> float:
    """Return 1 if all attributes agree, else ALMOST times the share of those that do."""
    share = float(np.mean(np.equal(first, second)))
    return 1.0 if share == 1.0 else ALMOST * share


class OracleJudge:
    """Reads noun, background, tint, outline and badge of both panels.

    `same` is 1 if nouns and identities agree, `caption` if nouns and backgrounds are those of the captions; otherwise they are below 1.
    """

    name = "oracle"
    unit = BATCH
    same_threshold = 1.0
    caption_threshold = 1.0

    def __init__(self, reader: Reader, device: torch.device):
        self.reader, self.device = reader.eval().to(device), device

    def read(self, panels: Sequence[np.ndarray]) -> list[Reading]:
        """Return what images uint8 [H, W, 3] of any size show."""
        fitted = [panel if panel.shape[:2] == (SIZE, SIZE) else crop_and_resize(panel, SIZE, SIZE) for panel in panels]
        return self.reader.read(torch.from_numpy(np.stack(fitted)).to(self.device))

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        return in_batches(pairs, BATCH, self._judge, advance)

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        wanted = [named(caption) for pair in pairs for caption in pair.captions]
        readings = self.read([panel for pair in pairs for panel in pair.panels])
        subjects = [(reading.noun, *reading.identity) for reading in readings]
        same = [agreeing(*subjects[place : place + 2]) for place in range(0, len(subjects), 2)]
        return verdicts_of(same, [agreeing(names, reading[:2]) for names, reading in zip(wanted, readings, strict=True)])
