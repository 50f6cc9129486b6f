"""Listeners that receive the progress of work, and text forms of records and durations."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Progress(Protocol):
    """Callback for completed work: `count` is the additional work in units of the total, fractions allowed; `text` describes the
    current state.

    Several details in `text` are separated by ", ", the most important first.
    """

    def __call__(self, count: float, text: str = "") -> None: ...


def silent(count: float, text: str = "") -> None:
    """Progress callback that does nothing."""


class Listener(Protocol):
    """Receiver of notes and progress, such as a terminal or a notebook."""

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
    """A listener of a training run: `started` is called once, `stepped` after each step with the last record."""

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
    """Return the text that a progress bar shows for the record of a training step."""
    return ", ".join(form.format(record[name]) for name, form in SHOWN.items() if record.get(name) is not None)


def plural(number: float, noun: str) -> str:
    """Return a noun in the plural unless the number is 1: image, images; process, processes."""
    return noun if number == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number} {plural(number, noun)}"


def duration(seconds: float) -> str:
    """Return a duration as text with about two digits: 45 s, 12 min, 2.5 h, 3.2 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
