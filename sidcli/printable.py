"""Text of others, such as prompts and paths, made safe to show."""

from __future__ import annotations

import json
from typing import Any


def printable(text: str, keep: str = "") -> str:
    """Control and direction-changing characters, line ends too, made visible, so that a prompt can drive neither a terminal nor a page.

    Those in `keep` stay as they are.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else f"\\u{ord(c):04x}" for c in text)


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON whose strings show letters of every script as they are, and escape what would drive a terminal or is half a character."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
