"""Scores of drawings by a vision language model behind an endpoint: preservation of the reference's concept, and prompt following."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidcli.curation.endpoint import Chat
from sidcli.curation.questions import CONCEPT, HIGHEST, PROMPT, Ask, question_concept, question_prompt, score_of
from sidcli.files import read_bytes, write_json
from sidcli.progress import Progress, silent


@dataclass(frozen=True, eq=False)
class Drawing:
    """An image that shows the subject of a reference image, both uint8 [H, W, 3], for a prompt. `subject`: see `question_concept`."""

    image: np.ndarray
    reference: np.ndarray
    prompt: str
    subject: str = ""


@dataclass(frozen=True)
class Rating:
    """The scores of a drawing, 0 to 4: how well it preserves the concept of the reference, and how well it follows its prompt."""

    concept: int
    prompt: int


class Rater:
    """Asks two questions about each drawing. `chat` sends them; `name` identifies its address, its model and the questions.

    `unread` are the words of the last answer without a score, "" if there is none.
    """

    def __init__(self, chat: Chat):
        self.chat, self.unread = chat, ""
        self.name = " ".join([chat.url, chat.model, CONCEPT, PROMPT])

    def rate(self, count: int, drawing: Callable[[int], Drawing], folder: Path, advance: Progress = silent) -> list[Rating | None]:
        """Return the ratings of drawings 0 to `count` - 1; None where an answer, asked for twice, has no score.

        Each rating is kept in a file of `folder`, with the words of the model, and is not asked for again. Missing ones are. Raises
        EnvironmentProblem as `Chat` does.
        """
        known = [read_rating(_file(folder, index)) for index in range(count)]
        missing = [index for index, rating in enumerate(known) if rating is None]
        advance(count - len(missing))

        def rate(index: int, ask: Ask) -> Rating | None:
            shown = drawing(index)
            words = [
                ask([shown.reference, shown.image], question_concept(shown.subject)),
                ask([shown.image], question_prompt(shown.prompt)),
            ]
            concept, prompt = map(score_of, words)
            if concept is None or prompt is None:
                self.unread = words[0] if concept is None else words[1]
                return None
            write_json(_file(folder, index), {"concept": concept, "prompt": prompt, "words": words})
            return Rating(concept, prompt)

        for index, rating in zip(missing, self.chat.each(missing, rate, score_of, advance), strict=True):
            known[index] = rating
        return known


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"


def read_rating(file: Path) -> Rating | None:
    """Return the rating in a file, or None if the file is missing or damaged."""
    try:
        row = json.loads(read_bytes(file))
        scores = row["concept"], row["prompt"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return Rating(*scores) if all(score in range(HIGHEST + 1) for score in scores) else None
