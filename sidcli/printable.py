"""Escaping of untrusted text, such as prompts and paths, for output, and setup of the standard streams."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, TextIO


def prepare_streams() -> None:
    """Prepare stdin, stdout and stderr.

    A closed stream is opened on the null device, because the next opened file would otherwise get its descriptor. Characters that
    the encoding of stdout or stderr lacks are written as escapes.
    """
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


def with_article(name: str) -> str:
    """Return the name of a class with its indefinite article: an AutoencoderTiny, a UNet2DModel."""
    return f"{'an' if name[:1] in tuple('AEIOaeio') else 'a'} {name}"


def can_show(stream: TextIO, text: str) -> bool:
    """Return whether the encoding of a stream has every character of a text."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, keep: str = "") -> str:
    """Return a text with control and direction-changing characters, line ends included, as escapes.

    A prompt then cannot control a terminal or a web page. Characters in `keep` are not escaped.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else f"\\u{ord(c):04x}" for c in text)


def json_text(content: Any, indent: int | None = None, only_ascii: bool = False) -> str:
    """Return JSON that keeps letters of every script, unless `only_ascii`, and escapes control characters and lone surrogates."""
    text = json.dumps(content, ensure_ascii=only_ascii, indent=indent)
    lines = (
        line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        for line in text.split("\n")
    )
    return "\n".join(lines)
