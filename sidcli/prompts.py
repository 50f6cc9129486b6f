"""Prompt sources. A source answers one question: which prompt stands at position i? The answer is a function of (seed, i) alone.

- `emoji`: captions of the emoji world, endless;
- `general`: a grammar of everyday subjects, attributes, places, styles, light and lenses (`prompts/general.json`), over a million
  distinct prompts;
- a path: a .txt list, one prompt a line, shuffled anew each time it has been read through.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import sysconfig
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from sidcli.errors import InputError
from sidcli.randomness import numpy_generator

MAX_BYTES = 1 << 30
MAX_LINE = 10_000


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
    """A prompt file: UTF-8 text, one prompt a line; blank lines are skipped, a byte order mark and CRLF are fine.

    Raises InputError with file, line and byte for anything else.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file", "give a text file with one prompt a line")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path} has {status.st_size} bytes; prompt lists may have {MAX_BYTES}")
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the prompts {path}: {error.strerror}", "give a text file with one prompt a line") from error
    lines = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: byte {error.start} is not UTF-8", "save the list as UTF-8 text") from error
        if "\0" in text:
            raise InputError(f"{path}:{number}: a NUL character", "save the list as plain UTF-8 text")
        if len(text) > MAX_LINE:
            raise InputError(f"{path}:{number}: a prompt of {len(text)} characters; at most {MAX_LINE} are read")
        if text:
            lines.append(text)
    if not lines:
        raise InputError(f"{path} holds no prompt", "give a text file with one prompt a line")
    return PromptList(str(path), tuple(lines))


def open_prompts(source: str) -> Prompts:
    """`emoji`, `general`, or the path of a list. Raises InputError where there is no such source."""
    if source == "emoji":
        return EmojiPrompts()
    if source == "general":
        return Grammar.read(shipped_folder() / "general.json")
    return read_list(Path(source))
