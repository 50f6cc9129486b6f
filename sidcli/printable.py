"""Text of others, such as prompts and paths, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """Control and direction-changing characters made visible, so that a prompt can drive neither a terminal nor a page."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)
