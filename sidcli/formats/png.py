"""The chunks of PNG files from unknown sources (PNG specification, third edition, section 5). Chunks that do not define pixels are
skipped."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RECORD_BYTES = 1 << 16
"""Number of bytes at the start of a file that are searched for the record of `sid`, which has at most 40,000 bytes."""
MAX_CHUNKS = 1 << 17
"""Maximum number of chunks that are read. Encoders write at least 8 kB of pixels per chunk, so this is enough for 1 GB."""


class _Chunk(NamedTuple):
    """A chunk: its type, and its start and end in the file, including length and checksum."""

    kind: bytes
    start: int
    end: int


def _chunks(file: BinaryIO) -> Iterator[_Chunk]:
    """Yield the chunks in order, up to the first chunk that is truncated or has no valid type. Yield nothing for other formats."""
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
    """Return a PNG file reduced to the chunks that define the pixels: the critical ones, and tRNS, the transparency of modes without alpha.
    A file of another format is returned unchanged.

    Pillow refuses a PNG with large texts or color profiles. Nothing is copied: the result reads from `file`. Bytes after the last
    valid chunk are kept, so that Pillow reports them as an error.
    """
    parts, end = [(0, len(SIGNATURE))], len(SIGNATURE)
    for chunk in islice(_chunks(file), MAX_CHUNKS):
        end = chunk.end
        if chunk.kind[:1].isupper() or chunk.kind == b"tRNS":
            if parts[-1][1] == chunk.start:
                parts[-1] = (parts[-1][0], chunk.end)
            else:
                parts.append((chunk.start, chunk.end))
    if end == len(SIGNATURE):
        file.seek(0)
        return file
    return io.BufferedReader(_Parts(file, [*parts, (end, file.seek(0, io.SEEK_END))]))


class _Parts(io.RawIOBase):
    """A file object that reads several byte ranges of a file as one file."""

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
    """Return the text of the first uncompressed iTXt chunk with this keyword and at most `most` bytes.

    Returns None if there is no chunk before the pixels that matches, or the file has another format.
    """
    # The keyword, a null byte, two zero bytes (no compression), no language and no translated keyword (a null byte each).
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
