"""How long work reports what is done, and how times are written."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work is done: by how much more, in the unit of the whole, parts of one included; `text` says where it stands.

    Several details in `text` are separated by ", ", the most important first.
    """

    def __call__(self, count: float, text: str = "") -> None: ...


def silent(count: float, text: str = "") -> None:
    """Progress that nobody watches."""


def duration(seconds: float) -> str:
    """A length of time to two digits or so: 45 s, 12 min, 2.5 h, 3.2 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
