"""Text of others, such as prompts and paths, made safe to show, and streams that can show it."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, TextIO


def prepare_streams() -> None:
    """Give a process its three streams: a closed one becomes the null device, whose number the next file would otherwise get, and a
    character that the encoding of an output lacks is written as an escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def can_show(stream: TextIO, text: str) -> bool:
    """Whether the encoding of a stream has every character of a text."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, keep: str = "") -> str:
    """Control and direction-changing characters, line ends too, made visible, so that a prompt can drive neither a terminal nor a page.

    Those in `keep` stay as they are.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else f"\\u{ord(c):04x}" for c in text)


def json_text(content: Any, indent: int | None = None, only_ascii: bool = False) -> str:
    """JSON whose strings show letters of every script as they are, unless `only_ascii`, and escape what would drive a terminal or is
    half a character."""
    text = json.dumps(content, ensure_ascii=only_ascii, indent=indent)
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
