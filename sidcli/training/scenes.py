"""The prompts of all sheets of a run: from the built-in grammar, or with scenes that a language model writes (Diffusion
Self-Distillation, section 3.1.1 of arXiv 2411.18616).

What the model wrote is in scenes.jsonl, one sheet in each line, so that interrupted work resumes where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidcli.curation.questions import Ask, beginning
from sidcli.data.prompts import Prompts
from sidcli.data.sheets import SheetPrompt, sheet_of, sheet_prompt
from sidcli.errors import InputError
from sidcli.files import append_line, appended
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.printable import printable
from sidcli.progress import Listener, counted

FILE = "scenes.jsonl"
UNIT = 16
"""Sheets whose scenes are stored together."""
HINT = "check --set scenes_url and --set scenes_model"
LONGEST = 160
"""Maximum number of characters of a subject and of a scene."""
QUESTION = """Subject: {subject}
Describe one individual of this subject with the details by which it can be recognized, as a noun phrase of at most 15 words. Then write \
{count} scenes in which it could be, as different as possible: each says in at most 12 words where it is, in which light, and what it does \
there, and can follow the noun phrase in a sentence.
Write these lines and nothing else:
SUBJECT: the noun phrase
{lines}"""
LINE = re.compile(r"^[^a-z\n]*(subject|scene)[^a-z\n]*:\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)

Written = tuple[str, tuple[str, ...]]
"""A subject and the scenes of its panels."""


def sheet_prompts(
    settings: SelfDistillationSettings, prompts: Prompts, seed: int, folder: Path, listener: Listener
) -> list[SheetPrompt]:
    """Return the prompts of the sheets of a run, in order. The endpoint is asked for scenes that the folder lacks.

    Raises EnvironmentProblem if the endpoint does not answer, InputError if its model writes no scenes.
    """
    own = [sheet_prompt(prompts, seed, index, settings.panels) for index in range(settings.sheets)]
    if settings.scenes == "grammar":
        return own
    file = folder / FILE
    known = read_scenes(file, settings.panels)[: len(own)]
    if len(known) < len(own):
        ask_for_scenes(settings, own, known, file, listener)
    missing = known.count(None)
    if missing:
        listener.note(
            f"{counted(missing, 'sheet')} without scenes of {settings.scenes_model}; they have those of the built-in grammar"
        )
    return [sheet_of(*written) if written else usual for written, usual in zip(known, own, strict=True)]


def ask_for_scenes(
    settings: SelfDistillationSettings, own: Sequence[SheetPrompt], known: list[Written | None], file: Path, listener: Listener
) -> None:
    """Append the scenes of further sheets to `known` and to the file. None stands for an answer that is not of the requested form."""
    from sidcli.curation.endpoint import Chat

    count = settings.panels
    model = Chat(settings.scenes_url, settings.scenes_model, hint=HINT)

    def written(prompt: SheetPrompt, ask: Ask) -> str:
        lines = "\n".join(["SCENE: a scene"] * count)
        return ask((), QUESTION.format(subject=prompt.subject, count=count, lines=lines))

    file.parent.mkdir(parents=True, exist_ok=True)
    with listener.progress("write scenes", len(own) - len(known), "sheets") as advance:
        for start in range(len(known), len(own), UNIT):
            answers = model.each(own[start : start + UNIT], written, lambda words: scenes_of(words, count), advance)
            found = [scenes_of(words, count) for words in answers]
            if not any([*known, *found]):
                raise InputError(f"{settings.scenes_model} at {model.url} writes no scenes: {beginning(answers[0])}", HINT)
            for one in found:
                append_line(file, json.dumps(one and {"subject": one[0], "scenes": one[1]}))
            known += found


def scenes_of(words: str, count: int) -> Written | None:
    """Return the subject and the scenes in the words of a model; None if there is not one subject and `count` scenes, or if one of
    them is too long."""
    found: dict[str, list[str]] = {"subject": [], "scene": []}
    for kind, text in LINE.findall(words):
        found[kind.lower()].append(printable(text).strip("*_`\"' ").rstrip("."))
    texts = [*found["subject"], *found["scene"]]
    if len(found["subject"]) != 1 or len(found["scene"]) != count or max(map(len, texts)) > LONGEST:
        return None
    return found["subject"][0], tuple(found["scene"])


def read_scenes(file: Path, count: int) -> list[Written | None]:
    """Return the scenes in a file. Raises InputError if a line has not `count` scenes."""

    def parsed(line: str) -> Written | None:
        one: dict[str, Any] | None = json.loads(line)
        return None if one is None else (str(one["subject"]), tuple(map(str, one["scenes"])))

    known = appended(file, parsed)
    for number, written in enumerate(known, 1):
        if written and len(written[1]) != count:
            raise InputError(f"{file}: line {number} has not the scenes of {count} panels", f"restore it, or delete {file.parent}")
    return known
