"""Captions in tables: one column of a .csv, .tsv or .jsonl, or of a list of objects in a .json, read row by row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sidcli.errors import InputError, UsageError
from sidcli.files import size_of

COLUMNS = ("caption", "captions", "text", "prompt", "prompts", "title", "description", "sentence", "comment")
"""Names that a column of captions usually has. The first of them that a table has is read; case does not matter."""
DELIMITED, LINES = (".csv", ".tsv", ".tab"), (".jsonl", ".ndjson")
SUFFIXES = (*DELIMITED, *LINES)
BINARY = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".gz", ".zip", ".zst")
MARKUP = (".yaml", ".yml", ".xml", ".html", ".toml")
DELIMITERS = ",;\t|"
MAX_ROW = 1 << 20
"""Bytes of a line of a table."""
TABLE_HINT = "give a .csv, .tsv or .jsonl with a caption column, or a text file with one prompt per line"


@dataclass(frozen=True)
class Table:
    """`texts` yields, row by row, where a row is and what its column holds: a string, None for nothing, or what is no caption.

    `column` is the one of `columns` that is read; both are empty for rows that are strings.
    """

    column: str
    columns: tuple[str, ...]
    texts: Iterator[tuple[str, Any]]

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.columns if name != self.column)


def numbered_lines(path: Path, most: int, hint: str) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their numbers, without their ends, one at a time, so that neither a long line nor many fill the memory.

    A line ends at LF, CRLF or CR and nowhere else: U+2028, form feeds and such are characters of a line. A byte order mark is dropped.
    Raises OSError, and InputError with line and byte for a line of more than `most` bytes and for what is not UTF-8.
    """
    # As Latin-1 each byte is a character: Python finds the ends of lines, and where it stands is where UTF-8 breaks.
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


def check_kind(path: Path) -> None:
    """Raises InputError for a file whose name says that it is neither text nor a table that is read."""
    if path.suffix.lower() in (*BINARY, *MARKUP):
        raise InputError(f"{path}: cannot read prompts from {path.suffix} files", "save the captions as .csv, .jsonl or .txt")


def open_table(path: Path, wanted: str, most: int) -> Table:
    """A .jsonl, or else a table of delimited fields, of at most `most` bytes; `wanted` names its column, "" stands for the usual ones.

    Raises OSError, InputError with file and line for what is no table, UsageError where it lacks the column.
    """
    size_of(path, most)
    lines = numbered_lines(path, MAX_ROW, TABLE_HINT)
    return _of_lines(path, lines, wanted) if path.suffix.lower() in LINES else _of_fields(path, lines, wanted)


def of_rows(path: Path, rows: Iterable[tuple[str, Any]], wanted: str) -> Table:
    """A table of (place, row), where a row is an object of JSON, or a string; the first one decides."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return Table("", (), rows)
    rows = chain([first], rows)
    if not isinstance(first[1], dict):
        if wanted:
            raise UsageError(f"--column {wanted}: {first[0]} is not an object with columns", "leave --column out")
        return Table("", (), rows)
    columns = tuple(first[1])
    column = columns[_choose(path, columns, wanted)]
    return Table(column, columns, _values(rows, column))


def _values(rows: Iterable[tuple[str, Any]], column: str) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        if not isinstance(row, dict) or column not in row:
            raise InputError(f"{place} has no {column!r}", "give every row the same columns")
        yield place, row[column]


def _of_lines(path: Path, lines: Iterable[tuple[int, str]], wanted: str) -> Table:
    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in lines:
            if not line.strip():
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
    index = _choose(path, columns, wanted)

    def texts() -> Iterator[tuple[str, str]]:
        for place, row in rows:
            if not row:  # an empty line
                continue
            if len(row) != len(columns):
                raise InputError(
                    f"{place}: the row has {len(row)} fields, the header {len(columns)}",
                    f"quote texts that contain {_shown(delimiter)}, or save the captions as .txt, one per line",
                )
            yield place, row[index]

    return Table(columns[index], columns, texts())


def _records(path: Path, lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Fields of each record, with the file and the line that it begins at: a quoted field may go on over several lines."""
    number = 0

    def content() -> Iterator[str]:
        nonlocal number
        for number, line in lines:  # noqa: B007 - where the reader stands
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
    """Of the usual delimiters the one at which a column of captions shows in the first row, else the most frequent one."""

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
    """Where the wanted column is, by its very name or else whatever the case; "" stands for the first of the usual names."""
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
    """What the first lines of a text, blank ones left out, are instead: "JSON", "a table with the columns ..."; empty for prompts.

    A first line counts as a header if it has a usual name among several and the lines after it have as many fields.
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
