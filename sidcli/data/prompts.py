"""Prompt sources. A source returns the prompt at position i, which is a function of (seed, i) alone.

- `emoji`: captions of the emoji world, endless; `emoji-nouns`: the same, but every second prompt on average is a noun alone;
- `general`: a grammar of everyday subjects, attributes, places, styles, light and lenses (`prompts/general.json`), over a million
  distinct prompts;
- a path: a .txt list with one prompt per line; a .csv, .tsv or .jsonl, from which one column is read; or a .json with COCO's
  captions, a list of strings, or a list of objects. The order is shuffled again for each pass over the list.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import numpy as np

from sidcli.data.tables import SUFFIXES, Table, check_kind, looks_like_table, numbered_lines, of_rows, open_table
from sidcli.errors import InputError, UsageError
from sidcli.files import read_bytes, size_of
from sidcli.progress import counted
from sidcli.randomness import numpy_generator

BUILT_IN = ("general", "emoji", "emoji-nouns")
"""Names of the prompt sources that are no files."""
MAX_BYTES = 1 << 30
MAX_JSON = 1 << 27
"""Maximum size of a .json in bytes; it is read as a whole. COCO's largest file, the captions of train2014, has half this size."""
MAX_LINE = 10_000
"""Maximum number of characters of a prompt."""
MAX_LINE_BYTES = 4 * MAX_LINE
HEAD = 3
"""Number of lines that are checked to detect a table in a text file."""
TEXT_HINT = "give a text file with one prompt a line"
JSON_HINT = "give COCO's captions_val2014.json or a JSON list of strings or of objects; JSON Lines are named .jsonl"


TYPE_HINT = 'write the caption as a string in ""; --column NAME reads another column of a table'
JSON_KINDS = ((bool, "a truth value"), ((int, float), "a number"), (list, "a list"), (dict, "an object"))
"""Python types of the values of JSON that are no texts, and their names. A bool is an int in Python and therefore comes first."""


class Prompts(Protocol):
    """A prompt source. `name` is for messages, `digest` for the run record; sources with equal digests return equal prompts."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def at(self, seed: int, position: int) -> str: ...


def shipped_folder() -> Path:
    """Return the folder `prompts/` of the repository, or its copy `sidcli/prompt_lists/` in an installed package."""
    package = Path(__file__).parent.parent
    installed = package / "prompt_lists"
    return installed if installed.is_dir() else package.parent / "prompts"


@dataclass(frozen=True, eq=False)
class PromptList:
    """The prompts of a user's file. Each pass over the list uses a new permutation.

    `text` holds all prompts in UTF-8, each ended by a line feed, and `ends` the positions of the line feeds. Ten million prompts of
    50 bytes take 0.6 GB; as Python strings they would take 1.1 GB. `blank` is the number of skipped blank lines or captions.
    `column` says which column of a table was read.
    """

    name: str
    text: bytearray
    ends: np.ndarray
    blank: int
    column: str = ""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) + 1 if index else 0
        return self.text[start : int(self.ends[index])].decode()

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(memoryview(self.text)[:-1]).hexdigest()

    @property
    def note(self) -> str:
        """A message on the column that was read and the number of skipped blank lines; empty if there is nothing to report."""
        skipped = f"{counted(self.blank, 'blank line')} skipped" if self.blank else ""
        said = "; ".join(part for part in (self.column, skipped) if part)
        return f"{self.name}: {said}" if said else ""

    def at(self, seed: int, position: int) -> str:
        epoch, offset = divmod(position, len(self))
        return self[int(permutation(len(self), seed, "prompt order", epoch)[offset])]

    def first(self, count: int) -> list[str]:
        return [self[index] for index in range(min(count, len(self)))]

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self.first(len(self)))


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    """Return the order of a list in pass `epoch` over it: a permutation of range(length), drawn from a random stream."""
    return numpy_generator(seed, stream, epoch).permutation(length)


@dataclass(frozen=True)
class EmojiPrompts:
    """Captions of the emoji world's training split. A share `bare` of the prompts is a noun alone, such as "a key"."""

    name: str = "emoji"
    digest: str = "emoji-1"
    bare: float = 0.0

    def at(self, seed: int, position: int) -> str:
        from sidcli.emoji import world

        if self.bare:
            rng = numpy_generator(seed, "bare nouns", position)
            if rng.random() < self.bare:
                return world.bare_caption(int(rng.integers(len(world.NOUN_LIST))))
        return world.caption(world.scene(world.PROMPT_SEED, position), seed, position, "train").text


@dataclass(frozen=True)
class Grammar:
    """Prompt templates and the word lists that fill their {slots}. A template is drawn first, then one word for each slot."""

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
        """Number of texts that the templates can produce."""
        return sum(math.prod(len(words) for slot, words in self.words.items() if f"{{{slot}}}" in text) for text in self.templates)

    def at(self, seed: int, position: int) -> str:
        rng = numpy_generator(seed, "grammar", position)
        template = self.templates[rng.integers(len(self.templates))]
        return template.format(**{slot: words[rng.integers(len(words))] for slot, words in self.words.items()})


def read_list(path: Path, column: str = "") -> PromptList:
    """Read a prompt file: a .json, a table, or UTF-8 text with one prompt per line. A byte order mark and CRLF are allowed.

    From a .csv, .tsv or .jsonl, or from any text file if `column` is given, one column is read: `column`, or by default the first
    column with a usual name (`tables.COLUMNS`). White space in a caption of a table becomes single spaces. Blank lines are skipped.

    Raises InputError with file and line if the file is invalid, UsageError if the column does not exist or if there is no file but
    a built-in source of this name, which is endless.
    """
    if str(path) in BUILT_IN and not path.exists():
        raise UsageError(f"--prompts {path} names built-in prompts for training, which have no end", "--prompts FILE")
    check_kind(path)
    if path.suffix.lower() == ".json":
        return read_captions(path, column)
    try:
        if column or path.suffix.lower() in SUFFIXES:
            return _of_table(path, open_table(path, column, MAX_BYTES))
        size_of(path, MAX_BYTES)
        return _prompt_list(path, _lines(path))
    except OSError as error:
        raise InputError(f"cannot read the prompts {path}: {error.strerror}", TEXT_HINT) from error


def _of_table(path: Path, table: Table) -> PromptList:
    others = ", ".join(name[:40] for name in table.others[:8]) + (", ..." if len(table.others) > 8 else "")
    chosen = f"using column {table.column!r} (others: {others})" if others else ""
    return _prompt_list(path, ("" if text is None else one_line(text, place) for place, text in table.texts), chosen)


def _lines(path: Path) -> Iterator[str]:
    """Yield the prompts of a text file. Raises InputError if its first lines look like a table."""
    head: list[str] = []
    for number, line in numbered_lines(path, MAX_LINE_BYTES, TEXT_HINT):
        text = _checked(line.strip(), f"{path}:{number}")
        if text and len(head) < HEAD:
            head.append(text)
            if len(head) == HEAD:
                _check_text(path, head)
        yield text
    if len(head) < HEAD:
        _check_text(path, head)


def _check_text(path: Path, head: Sequence[str]) -> None:
    if kind := looks_like_table(head):
        raise InputError(f"{path} looks like {kind}, not like one prompt per line", "rename it to .csv, .tsv, .jsonl or .json")


def read_captions(path: Path, column: str = "") -> PromptList:
    """Read COCO's captions_val2014.json, or a JSON list of strings or of objects. White space in a caption becomes single spaces.

    From COCO's file, one caption per image is read, in the order of image ids: the non-blank caption with the lowest id.

    Raises InputError with file and annotation if the file is invalid, UsageError if `column` is given for COCO's file.
    """
    try:
        content = json.loads(read_bytes(path, MAX_JSON))
    except OSError as error:
        raise InputError(f"cannot read the prompts {path}: {error.strerror}", JSON_HINT) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", JSON_HINT) from error
    if isinstance(content, list):
        return _of_table(path, of_rows(path, ((f"{path}: item {number}", row) for number, row in enumerate(content, 1)), column))
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise InputError(f"{path} is neither a list nor COCO's captions, an object with a list of annotations", JSON_HINT)
    if column:
        raise UsageError(f"--column {column}: {path} has COCO's layout, whose captions are read", "leave --column out")
    for number, annotation in enumerate(annotations, 1):
        if not (isinstance(annotation, dict) and all(type(annotation.get(key)) is int for key in ("image_id", "id"))):
            raise InputError(f"{path}: annotation number {number} has no image_id and id that are whole numbers", JSON_HINT)
    captions: dict[int, str] = {}
    for annotation in sorted(annotations, key=itemgetter("image_id", "id")):
        if not captions.get(annotation["image_id"]):
            captions[annotation["image_id"]] = one_line(annotation.get("caption"), f"{path}: annotation {annotation['id']}")
    return _prompt_list(path, captions.values())


def one_line(text: Any, place: str) -> str:
    """Return a caption as one line; white space becomes single spaces.

    Raises InputError, naming the `place`, if it is not a string, is too long, or contains a NUL character or a lone surrogate.
    """
    if text is None:
        raise InputError(f"{place} has no text", JSON_HINT)
    if not isinstance(text, str):
        kind = next(name for types, name in JSON_KINDS if isinstance(text, types))
        raise InputError(
            f"{place}: the caption is {kind}, {shorten(json.dumps(text), 60, placeholder=' ...')}, not a text", TYPE_HINT
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: character {error.start} is half a surrogate pair", "save the list as UTF-8 text") from error
    return _checked(" ".join(text.split()), place)


def _checked(text: str, place: str) -> str:
    if "\0" in text:
        raise InputError(f"{place}: a NUL character", "save the list as plain UTF-8 text")
    if len(text) > MAX_LINE:
        raise InputError(f"{place}: a prompt of {len(text)} characters; at most {MAX_LINE} are read", "shorten it")
    return text


def _prompt_list(path: Path, texts: Iterable[str], column: str = "") -> PromptList:
    """Return a list of the non-empty texts. `column` says which column was read. Raises InputError if all texts are empty."""
    content, ends, blank = bytearray(), array("q"), 0
    for text in texts:
        if text:
            content += text.encode()
            ends.append(len(content))
            content += b"\n"
        else:
            blank += 1
    if not ends:
        if column:
            raise InputError(f"{path} holds no prompt; {column}", "--column NAME reads another one")
        raise InputError(f"{path} holds no prompt", TEXT_HINT)
    return PromptList(str(path), content, np.frombuffer(ends, np.int64), blank, column)


def open_prompts(source: str, column: str = "") -> Prompts:
    """Open a prompt source of BUILT_IN, or the list at a path, from which `column` is read.

    Raises InputError if the source does not exist, UsageError if `column` is given for a source without columns.
    """
    if column and source in BUILT_IN:
        raise UsageError(f"--column {column}: the prompts {source!r} have no columns", "--prompts FILE, or leave --column out")
    if source == "emoji":
        return EmojiPrompts()
    if source == "emoji-nouns":
        return EmojiPrompts("emoji-nouns", "emoji-nouns-1", 0.5)
    if source == "general":
        return Grammar.read(shipped_folder() / "general.json")
    return read_list(Path(source), column)
