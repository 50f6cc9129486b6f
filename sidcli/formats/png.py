"""The chunks of a PNG file (PNG specification, third edition, section 5): what a stranger's file holds beside its pixels is skipped."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 1 << 17
"""Encoders write at least 8 kB of pixels per chunk, so this is enough for 1 GB."""


class _Chunk(NamedTuple):
    """Its type, and where it starts and ends in the file, with length and checksum."""

    kind: bytes
    start: int
    end: int


def _chunks(file: BinaryIO) -> Iterator[_Chunk]:
    """Chunks in order, up to the first that is cut short or has no valid type; none of a file of another format."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        return
    start = len(SIGNATURE)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        end = start + length + 12
        if end > size or not kind.isalpha():
            return
        yield _Chunk(kind, start, end)
        start = end
        file.seek(start)


def pixels_only(file: BinaryIO) -> BinaryIO:
    """A PNG as it would be with its critical chunks alone, which decide about the pixels; a file of another format as it is.

    Pillow refuses a PNG with large texts or color profiles. Nothing is copied: the result reads from `file`. What follows the last
    valid chunk stays where it is, for Pillow to complain about.
    """
    parts, end = [(0, len(SIGNATURE))], len(SIGNATURE)
    for chunk in islice(_chunks(file), MAX_CHUNKS):
        end = chunk.end
        if chunk.kind[:1].isupper():
            if parts[-1][1] == chunk.start:
                parts[-1] = (parts[-1][0], chunk.end)
            else:
                parts.append((chunk.start, chunk.end))
    if end == len(SIGNATURE):
        file.seek(0)
        return file
    return io.BufferedReader(_Parts(file, [*parts, (end, file.seek(0, io.SEEK_END))]))


class _Parts(io.RawIOBase):
    """Ranges of bytes of a file, read as one file."""

    def __init__(self, file: BinaryIO, ranges: list[tuple[int, int]]) -> None:
        self.file, self.ranges, self.position = file, ranges, 0
        self.starts, self.size = [], 0
        for start, end in ranges:
            self.starts.append(self.size)
            self.size += end - start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number = bisect_right(self.starts, self.position) - 1
        start, end = self.ranges[number]
        start += self.position - self.starts[number]
        self.file.seek(start)
        content = self.file.read(min(len(buffer), max(0, end - start)))
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def text_before_pixels(file: BinaryIO, keyword: str, most: int) -> str | None:
    """The uncompressed iTXt chunk of a keyword, if one of at most so many bytes stands before the pixels; None for other files."""
    # Keyword, a null byte, no compression (two bytes), no language, no translated keyword (a null byte each).
    start = keyword.encode("latin-1") + bytes(5)
    for chunk in islice(_chunks(file), MAX_CHUNKS):
        if chunk.kind == b"IDAT":
            return None
        if chunk.kind == b"iTXt" and chunk.end - chunk.start <= most:
            file.seek(chunk.start + 8)
            content = file.read(chunk.end - chunk.start - 12)
            if content.startswith(start):
                return content.removeprefix(start).decode("utf-8", "replace")
    return None
