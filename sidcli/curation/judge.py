"""What a judge is: it scores whether two panels of a sheet show the same subject, and whether their captions are true.

Pairs that pass are the training data of a model that sees a reference image (Diffusion Self-Distillation, arXiv 2411.18616).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from sidcli.progress import Progress, silent

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two panels of one sheet, images uint8 [H, W, 3] of one size.

    `subject` is the noun phrase of what both should show, and `captions` are those of each panel alone, for example "a key on a red
    background".
    """

    first: np.ndarray
    second: np.ndarray
    subject: str
    captions: tuple[str, str]

    @property
    def panels(self) -> tuple[np.ndarray, np.ndarray]:
        return self.first, self.second


@dataclass(frozen=True)
class Verdict:
    """The scores of a pair; higher is better. The scale is that of the judge.

    `same`: whether the panels show the same subject. `caption`: whether the captions are true, the lower score of the two panels.
    `words`: those of a vision language model; "" of other judges.
    """

    same: float
    caption: float
    words: str = ""


class Judge(Protocol):
    """Scores pairs. Up to rounding, a verdict depends on its pair alone and not on the other pairs of a call.

    Scores are stored after each `unit` pairs, so that an error or an interruption loses at most the scores of one unit.
    A pair passes if `same` is at least `same_threshold` and `caption` at least `caption_threshold`, which are defaults.
    """

    name: str
    unit: int
    same_threshold: float
    caption_threshold: float

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        """Return one verdict per pair, in order. `advance` is called with the number of pairs that were judged."""
        ...


def in_batches(items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], list[Made]], advance: Progress) -> list[Made]:
    """Return the results of `work`, for example the verdicts of pairs. It gets at most `size` items at a time."""
    made: list[Made] = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        made += work(part)
        advance(len(part))
    return made


def verdicts_of(same: Sequence[float], captions: Sequence[float]) -> list[Verdict]:
    """Return verdicts from the scores of pairs [B] and those of the captions of their panels [2 B], of which the lower one counts."""
    return [Verdict(alike, min(captions[2 * place : 2 * place + 2])) for place, alike in enumerate(same)]
