"""The only room that knows rich. Results go to stdout, everything else to stderr; prompts and paths are never read as markup."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from rich.color import Color
from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sidcli.environment import group_or_alone
from sidcli.errors import EnvironmentProblem
from sidcli.printable import can_show, json_text, printable

if TYPE_CHECKING:
    from PIL import Image

LINE_SECONDS = 15.0


class Bystander(Terminal):
    """A terminal whose leaving ends nothing; rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Console:
    """One command's voice: for people, as one JSON object (`--json`), or nearly silent (`--quiet`)."""

    def __init__(self, as_json: bool = False, quiet: bool = False):
        self.as_json, self.quiet = as_json, quiet
        # Of several processes that train together one speaks; the others say only what went wrong with them.
        self.rank = group_or_alone().rank
        self.quiet |= self.rank > 0
        self.err = Bystander(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.out = Bystander(markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.live = self.err.is_terminal and not as_json and not self.quiet

    def say(self, line: Text | str) -> None:
        """A line for people. Where nobody can hear it, a pipe closed or a log on a full disk, the work goes on in silence."""
        try:
            self.err.print(line)
        except OSError:
            self.err.quiet = True

    def note(self, text: str) -> None:
        if not self.quiet:
            self.say(printable(text))

    def error(self, message: str, hint: str = "") -> None:
        """One line: what happened, and what to try."""
        message = f"process {self.rank}: {message}" if self.rank else message
        line = Text("error: ", style="bold red") + Text(printable(message))
        self.say(line + Text("; try: ", style="bold") + Text(printable(hint)) if hint else line)

    def result(self, lines: Sequence[str], data: dict[str, Any]) -> None:
        """`data` as one JSON object, or `lines` for people and scripts that read lines."""
        if self.rank:
            return
        with self.handing_over():
            if self.as_json:
                text = json_text(data)
                sys.stdout.write((text if can_show(sys.stdout, text) else json_text(data, only_ascii=True)) + "\n")
            else:
                for line in lines:
                    self.out.print(printable(line))

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """A reader of stdout that has left has had enough. Raises EnvironmentProblem where stdout is on a disk that is full."""
        try:
            yield
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that what is still to be flushed finds a place
            if not isinstance(error, BrokenPipeError):
                raise EnvironmentProblem(
                    f"stdout could not be written: {error.strerror}", "what went to files is complete; send the result elsewhere"
                ) from error

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.as_json:
            return
        title = printable(title)
        if self.out.is_terminal:
            table = Table(title=Text(title), title_justify="left")
            for index, name in enumerate(header):
                table.add_column(Text(printable(name)), justify="left" if index < 2 else "right")
            for row in rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            with self.handing_over():
                self.out.print(table)
            return
        # Markdown where nobody watches: it reads well in a log and pastes into a README.
        widths = [max(len(printable(row[column])) for row in [header, *rows]) for column in range(len(header))]
        lines = [title, "", header, ["-" * width for width in widths], *rows]
        for line in lines:
            cells = (
                (printable(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
                if not isinstance(line, str)
                else ()
            )
            with self.handing_over():
                self.out.print(line if isinstance(line, str) else f"| {' | '.join(cells)} |")

    def preview(self, picture: Image.Image) -> None:
        """A picture in the terminal: each character shows two pixels, one above the other. Nothing where there is no terminal, or one
        that lacks the character."""
        half = "\u2580"
        if not self.live or not can_show(sys.stderr, half):
            return
        width = min(picture.width, self.err.width)
        height = max(1, round(picture.height * width / picture.width / 2))
        pixels = picture.convert("RGB").resize((width, 2 * height)).tobytes()
        for row in range(height):
            line = Text(end="\n")
            for column in range(width):
                places = (3 * ((2 * row + below) * width + column) for below in (0, 1))
                upper, lower = (Color.from_rgb(*pixels[place : place + 3]) for place in places)
                line.append(half, Style(color=upper, bgcolor=lower))
            self.say(line)

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "") -> Iterator[Advance]:
        """A bar on a terminal, a line now and then elsewhere. The block calls `advance(count, text)`."""
        what = printable(what)
        if not self.live:
            yield Advance(self, None, None, what, total, unit)
            return
        amount = (
            (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit, markup=False))
        )
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.err) as bar:
            yield Advance(self, bar, bar.add_task(what, total=total, text=""), what, total, unit)


class Advance:
    """What a progress block calls: how much more is done, and what to say beside it."""

    def __init__(self, console: Console, bar: Progress | None, task: TaskID | None, what: str, total: int, unit: str):
        self.console, self.bar, self.task, self.what, self.total, self.unit = console, bar, task, what, total, unit
        self.done = self.first = 0
        self.spoken = self.begun = time.monotonic()

    def begin(self, done: int) -> None:
        """What was done before this command counts as done, but not for the time that is left."""
        self(done)
        self.first = done

    def left(self) -> str:
        took, made = time.monotonic() - self.begun, self.done - self.first
        return f"about {took / made * (self.total - self.done) / 60:.0f} min left" if made else ""

    def __call__(self, count: int, text: str = "") -> None:
        self.done += count
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, text=printable(text))
        elif time.monotonic() - self.spoken > LINE_SECONDS and not self.console.as_json:
            self.spoken = time.monotonic()
            amount = f"{self.done / 1e6:.0f}/{self.total / 1e6:.0f} MB" if self.unit == "bytes" else f"{self.done}/{self.total}"
            self.console.note(" ".join(part for part in (self.what, amount, text, self.left()) if part))


class DistillProgress:
    """Listens to a training run and shows it."""

    def __init__(self, console: Console, advance: Advance):
        self.console, self.advance = console, advance

    def started(self, step: int, steps: int) -> None:
        self.advance.begin(step)

    def stepped(self, record: dict[str, Any]) -> None:
        shown = {"img/s": "images_per_second", "fake": "fake_loss", "gen": "generator_loss", "ratio": "ratio", "GB": "memory_gb"}
        text = " ".join(f"{label} {record[key]:.3g}" for label, key in shown.items() if record.get(key) is not None)
        self.advance(record["step"] - self.advance.done, text)

    def note(self, text: str) -> None:
        self.console.note(text)

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        return self.console.progress(what, total, unit)
