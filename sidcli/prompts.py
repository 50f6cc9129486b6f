"""Prompt sources. A source answers one question: which prompt stands at position i? The answer is a function of (seed, i) alone.

- `emoji`: captions of the emoji world, endless;
- `general`: a grammar of everyday subjects, attributes, places, styles, light and lenses (`prompts/general.json`), over a million
  distinct prompts;
- a path: a .txt list, one prompt a line, or a .json: COCO's captions or a list of strings; shuffled anew each time it has been
  read through.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sidcli.errors import InputError
from sidcli.randomness import numpy_generator

MAX_BYTES = 1 << 30
MAX_LINE = 10_000
JSON_HINT = "give COCO's captions_val2014.json or a JSON list of strings"


class Prompts(Protocol):
    """`name` for people, `digest` for the run record: equal digests give equal prompts."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def at(self, seed: int, position: int) -> str: ...


def shipped_folder() -> Path:
    """The folder `prompts/`: beside the package in a clone, under share/sid in an installation."""
    clone = Path(__file__).parent.parent / "prompts"
    return clone if (clone / "general.json").exists() else Path(sysconfig.get_path("data")) / "share" / "sid" / "prompts"


@dataclass(frozen=True)
class PromptList:
    """A user's own prompts, in an order that is a permutation per pass over the list."""

    name: str
    lines: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def at(self, seed: int, position: int) -> str:
        epoch, offset = divmod(position, len(self.lines))
        return self.lines[_permutation(len(self.lines), seed, epoch)[offset]]


@cache
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return numpy_generator(seed, "prompt order", epoch).permutation(length)


@dataclass(frozen=True)
class EmojiPrompts:
    """Captions of the emoji world's training split."""

    name: str = "emoji"
    digest: str = "emoji-1"

    def at(self, seed: int, position: int) -> str:
        from sidcli.emoji import world

        return world.caption(world.scene(world.PROMPT_SEED, position), seed, position, "train").text


@dataclass(frozen=True)
class Grammar:
    """Templates whose {slots} are filled from word lists, slots first and templates last."""

    name: str
    templates: tuple[str, ...]
    words: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, path: Path) -> Grammar:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(path.stem, tuple(content["templates"]), {slot: tuple(words) for slot, words in content["words"].items()})

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.templates, self.words], sort_keys=True).encode()).hexdigest()

    @property
    def count(self) -> int:
        """How many texts the templates can spell."""
        return sum(math.prod(len(words) for slot, words in self.words.items() if f"{{{slot}}}" in text) for text in self.templates)

    def at(self, seed: int, position: int) -> str:
        rng = numpy_generator(seed, "grammar", position)
        template = self.templates[rng.integers(len(self.templates))]
        return template.format(**{slot: words[rng.integers(len(words))] for slot, words in self.words.items()})


def read_list(path: Path) -> PromptList:
    """A prompt file: UTF-8 text, one prompt a line; blank lines are skipped, a byte order mark and CRLF are fine. Or a .json.

    Raises InputError with file, line and byte for anything else.
    """
    if path.suffix.lower() == ".json":
        return read_captions(path)
    lines = []
    for number, line in enumerate(_content(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: byte {error.start} is not UTF-8", "save the list as UTF-8 text") from error
        lines.append(_checked(text, f"{path}:{number}"))
    return _prompt_list(path, lines)


def read_captions(path: Path) -> PromptList:
    """COCO's captions_val2014.json, or a JSON list of strings. White space in a caption becomes single spaces.

    Of COCO's, one caption for each image, in the order of image ids: of its captions that are not blank, the one with the lowest id.

    Raises InputError with file and annotation for anything else.
    """
    try:
        content = json.loads(_content(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", JSON_HINT) from error
    if isinstance(content, list):
        return _prompt_list(path, [_caption(text, f"{path}: item {number}") for number, text in enumerate(content, 1)])
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise InputError(f"{path} has no list of annotations", JSON_HINT)
    for number, annotation in enumerate(annotations, 1):
        if not (isinstance(annotation, dict) and all(type(annotation.get(key)) is int for key in ("image_id", "id"))):
            raise InputError(f"{path}: annotation number {number} has no image_id and id that are whole numbers", JSON_HINT)
    captions: dict[int, str] = {}
    for annotation in sorted(annotations, key=itemgetter("image_id", "id")):
        if not captions.get(annotation["image_id"]):
            captions[annotation["image_id"]] = _caption(annotation.get("caption"), f"{path}: annotation {annotation['id']}")
    return _prompt_list(path, captions.values())


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file", "give a text file with one prompt a line")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path} has {status.st_size} bytes; prompt lists may have {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the prompts {path}: {reason}", "give a text file with one prompt a line") from error


def _caption(text: Any, place: str) -> str:
    """A text from JSON on one line. Raises InputError where it is none, or holds half a character (a lone surrogate)."""
    if not isinstance(text, str):
        raise InputError(f"{place} has no text", JSON_HINT)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: character {error.start} is half a surrogate pair", "save the list as UTF-8 text") from error
    return _checked(" ".join(text.split()), place)


def _checked(text: str, place: str) -> str:
    if "\0" in text:
        raise InputError(f"{place}: a NUL character", "save the list as plain UTF-8 text")
    if len(text) > MAX_LINE:
        raise InputError(f"{place}: a prompt of {len(text)} characters; at most {MAX_LINE} are read")
    return text


def _prompt_list(path: Path, texts: Iterable[str]) -> PromptList:
    """Of the texts that are not empty. Raises InputError where there is none."""
    lines = tuple(filter(None, texts))
    if not lines:
        raise InputError(f"{path} holds no prompt", "give a text file with one prompt a line")
    return PromptList(str(path), lines)


def open_prompts(source: str) -> Prompts:
    """`emoji`, `general`, or the path of a list. Raises InputError where there is no such source."""
    if source == "emoji":
        return EmojiPrompts()
    if source == "general":
        return Grammar.read(shipped_folder() / "general.json")
    return read_list(Path(source))
