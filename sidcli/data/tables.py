"""Captions in tables: one column of a .csv, .tsv or .jsonl, or of a list of objects in a .json, read row by row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from sidcli.errors import InputError, UsageError
from sidcli.files import size_of
from sidcli.progress import counted

COLUMNS = ("caption", "captions", "text", "prompt", "prompts", "title", "description", "sentence", "comment")
"""Usual names of caption columns. The first name in this list that a table has is read, ignoring case."""
DELIMITED, LINES = (".csv", ".tsv", ".tab"), (".jsonl", ".ndjson")
SUFFIXES = (*DELIMITED, *LINES)
BINARY = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".gz", ".zip", ".zst")
MARKUP = (".yaml", ".yml", ".xml", ".html", ".toml")
DELIMITERS = ",;\t|"
MAX_ROW = 1 << 20
"""Maximum size of a line of a table, in bytes."""
BLANK = object()
"""The row of a blank line. It is not None, which is a value of JSON."""
TABLE_HINT = "give a .csv, .tsv or .jsonl with a caption column, or a text file with one prompt per line"


@dataclass(frozen=True)
class Table:
    """A table of which one column is read. `texts` yields the location and the value of each row.

    A value is a string, None for an empty value, or of another type, which is invalid as a caption. `column` is the name of the
    column that is read, one of `columns`; both are empty if the rows are strings.
    """

    column: str
    columns: tuple[str, ...]
    texts: Iterator[tuple[str, Any]]

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.columns if name != self.column)


def numbered_lines(path: Path, most: int, hint: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers, without line ends. Neither long lines nor long files fill the memory.

    A line ends only at LF, CRLF or CR; U+2028 and form feeds are characters of a line. A byte order mark is dropped. Raises
    OSError, and InputError with line and byte if a line has more than `most` bytes or is not UTF-8.
    """
    # In Latin-1 each byte is a character: Python splits the file into lines, and a UTF-8 error is located by line and byte.
    with path.open(encoding="latin-1") as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            content = line.removesuffix("\n").encode("latin-1")
            if len(content) > most:
                raise InputError(f"{path}:{number}: more than {most} bytes without an end of line", hint)
            if number == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: byte {error.start} is not UTF-8", "save the list as UTF-8 text") from error


def check_column(column: str | None, prompts: object) -> None:
    """Raises UsageError if a column is given without a prompt file."""
    if column and not prompts:
        raise UsageError(f"--column {column} names a column of --prompts, which is not given", "--prompts FILE")


def check_kind(path: Path) -> None:
    """Raises InputError if the suffix of the file is that of a format that is not supported."""
    if path.suffix.lower() in (*BINARY, *MARKUP):
        raise InputError(f"{path}: cannot read prompts from {path.suffix} files", "save the captions as .csv, .jsonl or .txt")


def open_table(path: Path, wanted: str, most: int) -> Table:
    """Open a .jsonl, or else a table of delimited fields, of at most `most` bytes. `wanted` names the column; "": a usual name.

    Raises OSError, InputError with file and line if the file is not a table, UsageError if it does not have the column.
    """
    size_of(path, most)
    lines = numbered_lines(path, MAX_ROW, TABLE_HINT)
    return _of_lines(path, lines, wanted) if path.suffix.lower() in LINES else _of_fields(path, lines, wanted)


def of_rows(path: Path, rows: Iterable[tuple[str, Any]], wanted: str) -> Table:
    """Return a table of pairs (location, row). The first row that is not BLANK decides whether rows are JSON objects or strings."""
    rows, before = iter(rows), 0
    first = next(rows, None)
    while first is not None and first[1] is BLANK:
        first, before = next(rows, None), before + 1
    if first is None:
        return Table("", (), rows)
    rows = chain(repeat((first[0], BLANK), before), [first], rows)
    if not isinstance(first[1], dict):
        if wanted:
            raise UsageError(f"--column {wanted}: {first[0]} is not an object with columns", "leave --column out")
        return Table("", (), ((place, None if row is BLANK else row) for place, row in rows))
    columns = tuple(first[1])
    column = columns[_choose(path, columns, wanted)]
    return Table(column, columns, _values(rows, column))


def _values(rows: Iterable[tuple[str, Any]], column: str) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        if row is BLANK:
            yield place, None
            continue
        if not isinstance(row, dict) or column not in row:
            raise InputError(f"{place} has no {column!r}", "give every row the same columns")
        yield place, row[column]


def _of_lines(path: Path, lines: Iterable[tuple[int, str]], wanted: str) -> Table:
    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in lines:
            if not line.strip():
                yield f"{path}:{number}", BLANK
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number} is not JSON: {error}", "write one JSON object per line") from error
            yield f"{path}:{number}", row

    return of_rows(path, rows(), wanted)


def _of_fields(path: Path, lines: Iterator[tuple[int, str]], wanted: str) -> Table:
    first = next((line for line in lines if line[1].strip()), (1, ""))
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else _delimiter(first[1], wanted)
    rows = _records(path, chain([first], lines), delimiter)
    _, names = next(rows, ("", []))
    if not names:
        return Table("", (), iter(()))
    columns = tuple(name.strip() for name in names)
    if path.suffix.lower() not in DELIMITED and (len(columns) == 1 or not _found(columns, wanted)):
        raise UsageError(
            f"--column {wanted}: {path} is a text with one prompt per line and has no such column",
            "leave --column out; a table has the suffix .csv, .tsv or .jsonl",
        )
    index = _choose(path, columns, wanted)

    def texts() -> Iterator[tuple[str, str]]:
        for place, row in rows:
            if len(row) <= 1 and not "".join(row).strip():  # a blank line
                yield place, ""
                continue
            if len(row) != len(columns):
                raise InputError(
                    f"{place}: the row has {counted(len(row), 'field')}, the header {len(columns)}",
                    f"quote texts that contain {_shown(delimiter)}, or save the captions as .txt, one per line",
                )
            yield place, row[index]

    return Table(columns[index], columns, texts())


def _records(path: Path, lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields of each record with its file and first line. A quoted field may span several lines."""
    number = 0

    def content() -> Iterator[str]:
        nonlocal number
        for number, line in lines:  # noqa: B007 - read by the enclosing function
            yield line + "\n"

    reader = csv.reader(content(), delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        begun = number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}:{max(begun, 1)}: {error}", 'write a " inside of a quoted field as ""') from error
        if row is None:
            return
        yield f"{path}:{begun}", row


def _delimiter(header: str, wanted: str) -> str:
    """Return the delimiter that splits the header into columns with a caption column, else the delimiter with the most columns."""

    def rank(delimiter: str) -> tuple[bool, int]:
        names = _names(header, delimiter)
        return bool(_found(names, wanted)), len(names)

    return max(DELIMITERS, key=rank)


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
    except csv.Error:
        return []


def _found(columns: Sequence[str], wanted: str) -> list[int]:
    """Return the indices of the wanted column, by exact name, else ignoring case; "" stands for the first usual name found."""
    exact = [index for index, name in enumerate(columns) if wanted and name == wanted]
    if exact:
        return exact
    plain = [name.strip().casefold() for name in columns]
    for usual in [wanted.strip().casefold()] if wanted else COLUMNS:
        found = [index for index, name in enumerate(plain) if name == usual]
        if found:
            return found
    return []


def _choose(path: Path, columns: Sequence[str], wanted: str) -> int:
    found = _found(columns, wanted)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(repr(name[:40]) for name in columns[:20]) + (", ..." if len(columns) > 20 else "")
    if found:
        raise InputError(f"{path} has {len(found)} columns named {columns[found[0]]!r}: {listed}", "give each column its own name")
    if wanted:
        raise UsageError(f"--column {wanted}: {path} has the columns {listed}", "--column with one of them")
    raise InputError(
        f"{path} has no caption column; its columns are {listed}",
        "--column NAME; or, without a header row, save the captions as .txt, one per line",
    )


def _shown(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f"a {delimiter!r}"


def looks_like_table(lines: Sequence[str]) -> str:
    """Return "JSON" or "a table with the columns ..." if the first non-blank lines of a text look like it, "" if they are prompts.

    The first line counts as a header if it has several names, one of them a usual name, and all other lines have as many fields.
    """
    if not lines:
        return ""
    first, others = lines[0], lines[1:]
    if first in ("{", "["):
        return "JSON"
    if first.startswith(("{", "[")):
        try:
            json.loads(first)
            return "JSON"
        except (ValueError, RecursionError):
            pass
    for delimiter in DELIMITERS:
        names = _names(first, delimiter)
        is_header = len(names) > 1 and all(re.fullmatch(r"[\w .-]{1,40}", name) for name in names) and _found(names, "")
        if is_header and others and all(len(_names(line, delimiter)) == len(names) for line in others):
            return f"a table with the columns {', '.join(map(repr, names))}"
    return ""
