"""Read the vocabulary of a spiece.model: the file format of SentencePiece, a message of Protocol Buffers."""

from __future__ import annotations

import struct
from collections.abc import Iterator

PIECES, NORMALIZER = 1, 3
"""Fields of the message: a piece for each token, and the specification of the normalizer."""
TEXT, SCORE, CHARSMAP = 1, 2, 2
"""Fields of a piece, and of the specification of the normalizer."""
VARINT, EIGHT_BYTES, SIZED, FOUR_BYTES = 0, 1, 2, 5
"""Wire types of Protocol Buffers."""


def parse(content: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Return the pieces with their scores, in the order of their ids, and the compiled map of characters of the normalizer.

    Raises ValueError if the content is not such a message or has no pieces.
    """
    pieces, charsmap = [], b""
    for field, value in _fields(content):
        if field == PIECES:
            piece = dict(_fields(value))
            score = piece.get(SCORE, bytes(4))
            if len(score) != 4:
                raise ValueError("the score of a piece is not a float")
            pieces.append((piece.get(TEXT, b"").decode(), struct.unpack("<f", score)[0]))
        elif field == NORMALIZER:
            charsmap = dict(_fields(value)).get(CHARSMAP, b"")
    if not pieces:
        raise ValueError("the message has no pieces")
    return pieces, charsmap


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each field of a message; the content of an integer is empty."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size = {VARINT: 0, EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(key & 7)
        if key & 7 == VARINT:
            _, at = _varint(message, at)
        elif key & 7 == SIZED:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError("the message is damaged")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the integer that starts at the position `at`, and the position behind it."""
    value = 0
    for index in range(10):
        if at + index >= len(message):
            break
        byte = message[at + index]
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise ValueError("the message is damaged")
