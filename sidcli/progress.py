"""Who is told about the progress of work, and how times are written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Progress(Protocol):
    """Called as work is done: by how much more, in the unit of the whole, parts of one included; `text` says where it stands.

    Several details in `text` are separated by ", ", the most important first.
    """

    def __call__(self, count: float, text: str = "") -> None: ...


def silent(count: float, text: str = "") -> None:
    """Progress that nobody watches."""


class Listener(Protocol):
    """Who is told what happens: a terminal, a notebook, or nobody."""

    def note(self, text: str) -> None: ...
    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Progress]: ...


class Silence:
    """A listener that shows nothing."""

    def note(self, text: str) -> None: ...

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Progress]:
        return nullcontext(silent)

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, record: dict[str, Any]) -> None: ...


class RunListener(Listener, Protocol):
    """A listener of a training run: `started` once, `stepped` with the last record after each step."""

    def started(self, step: int, steps: int) -> None: ...
    def stepped(self, record: dict[str, Any]) -> None: ...


SHOWN = {
    "images_per_second": "{:.3g} img/s",
    "fake_loss": "fake {:.3g}",
    "generator_loss": "gen {:.3g}",
    "ratio": "ratio {:.3g}",
    "memory_gb": "{:.3g} GB",
}


def in_words(record: Mapping[str, Any]) -> str:
    """What a bar shows of a training step's record."""
    return ", ".join(form.format(record[name]) for name, form in SHOWN.items() if record.get(name) is not None)


def duration(seconds: float) -> str:
    """A length of time to two digits or so: 45 s, 12 min, 2.5 h, 3.2 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
