"""The console, the only module that uses rich. Results go to stdout, other output to stderr. Prompts and paths are never markup."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console as Terminal
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sidcli.environment import group_or_alone
from sidcli.errors import EnvironmentProblem, SidError
from sidcli.printable import can_show, json_text, printable
from sidcli.progress import duration, in_words

if TYPE_CHECKING:
    from PIL import Image

LINE_SECONDS = 15.0
"""Seconds between progress lines if there is no terminal."""
BAR_SECONDS = 1.0
"""Seconds after which a task gets a progress bar."""


class PipeSafeTerminal(Terminal):
    """A rich console that continues after a broken pipe; rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Console:
    """Output of one command: text, one JSON object (`--json`), or results only (`--quiet`)."""

    def __init__(self, as_json: bool = False, quiet: bool = False):
        self.as_json, self.quiet = as_json, quiet
        # In a group of processes only rank 0 prints; the other processes print only their errors.
        self.rank = group_or_alone().rank
        self.quiet |= self.rank > 0
        self.err = PipeSafeTerminal(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.out = PipeSafeTerminal(markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.live = self.err.is_terminal and not as_json and not self.quiet
        self.bars: Bars | None = None
        self.noted: set[str] = set()

    def say(self, line: Text | str) -> None:
        """Print a line to stderr. If that fails, because a pipe is closed or a disk is full, turn the output off and continue."""
        try:
            self.err.print(line)
        except OSError:
            self.err.quiet = True

    def note(self, text: str) -> None:
        """Print a message to stderr, once. A model or a folder that is named twice is read twice, with the same messages."""
        if not self.quiet and text not in self.noted:
            self.noted.add(text)
            self.say(printable(text))

    def error(self, error: SidError) -> None:
        """Print one line with the message and the hint of an error; with --json print them as an object."""
        message, hint = f"process {self.rank}: {error.message}" if self.rank else error.message, error.hint
        if self.as_json:
            said = {"type": type(error).__name__, "message": message, "hint": hint, "exit_code": error.exit_code}
            self.say(json_text({"error": said}))
            return
        line = Text("error: ", style="bold red") + Text(printable(message))
        self.say(line + Text("; try: ", style="bold") + Text(printable(hint)) if hint else line)

    def result(self, lines: Sequence[str], data: dict[str, Any]) -> None:
        """Print `data` as one JSON object with --json, else `lines`."""
        if self.rank:
            return
        with self.writing_stdout():
            if self.as_json:
                text = json_text(data)
                sys.stdout.write((text if can_show(sys.stdout, text) else json_text(data, only_ascii=True)) + "\n")
            else:
                for line in lines:
                    self.out.print(printable(line))

    @contextmanager
    def writing_stdout(self) -> Iterator[None]:
        """Context for writes to stdout. Ignores a closed pipe. Raises EnvironmentProblem for other errors, such as a full disk."""
        try:
            yield
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit succeeds
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
            with self.writing_stdout():
                self.out.print(table)
            return
        # Markdown if stdout is not a terminal: it is readable in a log and can be pasted into a README.
        header, *rows = ([printable(cell).replace("|", r"\|") for cell in row] for row in [header, *rows])
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [title, "", header, ["-" * width for width in widths], *rows]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True)) if not isinstance(line, str) else ()
            with self.writing_stdout():
                self.out.print(line if isinstance(line, str) else f"| {' | '.join(cells)} |")

    def preview(self, picture: Image.Image) -> None:
        """Show a picture in the terminal; each character shows two pixels, one above the other.

        Prints a note instead if there is no terminal, or if its encoding lacks the character.
        """
        half = "\u2580"
        if not self.live or not can_show(sys.stderr, half):
            self.note("no preview: stderr is not a terminal that shows block characters")
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
        """Context with a bar on a terminal, else with a line every LINE_SECONDS. Contexts may be nested.

        The caller reports completed work with `advance(count, text)`.
        """
        if not self.live:
            yield Advance(self, what, total, unit)
        elif self.bars is not None:
            advance = Advance(self, what, total, unit, self.bars)
            try:
                yield advance
            finally:
                advance.remove()
        else:
            with Bars(Line(self.err), console=self.err, transient=True) as self.bars:
                try:
                    yield Advance(self, what, total, unit, self.bars)
                finally:
                    self.bars = None


class Bars(Progress):
    """Progress bars of tasks, without tasks that started less than BAR_SECONDS ago."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        return super().make_tasks_table([task for task in tasks if (task.elapsed or 0.0) >= BAR_SECONDS])


class Line(ProgressColumn):
    """Column that shows a task on one line of a terminal of any width: name, bar, and the details that fit."""

    def __init__(self, terminal: Terminal):
        super().__init__()
        self.terminal = terminal

    def render(self, task: Task) -> Table:
        advance: Advance = task.fields["advance"]
        width = self.terminal.width - 1
        what = advance.what if cell_len(advance.what) <= width // 3 else set_cell_size(advance.what, width // 3 - 1) + "\u2026"
        bar = max(5, min(40, (width - 20) // 5))
        details = fitting(advance.details(), width - cell_len(what) - bar - 2)
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(what), ProgressBar(advance.total, advance.done, width=bar), Text(details, no_wrap=True, overflow="ellipsis")
        )
        return line


def fitting(details: Sequence[str], width: int) -> str:
    """Return the first details that fit into `width` columns, joined by commas; always at least one detail."""
    while len(details) > 1 and cell_len(", ".join(details)) > width:
        details = details[:-1]
    return ", ".join(details)


class Advance:
    """Progress callback of a `progress` context: adds completed work and sets the text beside it."""

    def __init__(self, console: Console, what: str, total: int, unit: str, bars: Bars | None = None):
        self.console, self.what, self.total, self.unit, self.bars = console, printable(what), total, unit, bars
        self.done = 0.0
        self.text = ""
        self.spoken = time.monotonic()
        self.counted_from: tuple[float, float] | None = None
        """Time of the first call, and the work completed then. Rates are measured from there, because the first call warms up."""
        self.task = bars.add_task(self.what, total=total, advance=self) if bars else None

    def begin(self, done: int) -> None:
        """Set the work that was completed before this command."""
        self.done = done
        self.show()

    def remove(self) -> None:
        if self.bars is not None and self.task is not None:
            self.bars.remove_task(self.task)

    def details(self) -> list[str]:
        """Return the completed work, the time left, the rate and the last text of the context, the most important first."""
        done = min(self.total, int(self.done + 1e-6))  # fractions of images sum to integers up to a rounding error
        is_bytes = self.unit == "bytes"
        amount = f"{done / 1e6:.0f}/{self.total / 1e6:.0f} MB" if is_bytes else f"{done}/{self.total} {self.unit}".rstrip()
        since, before = self.counted_from or (0.0, self.done)
        took, made, left = time.monotonic() - since, self.done - before, self.total - self.done
        remaining = f"{duration(took / made * left)} left" if made > 1e-6 and left > 1e-6 else ""
        speed = f"{made / took / 1e6:.1f} MB/s" if is_bytes and made > 1e-6 and took else ""
        return [part for part in (amount, remaining, speed, *self.text.split(", ")) if part]

    def __call__(self, count: float, text: str = "") -> None:
        self.done += count
        self.text = printable(text)
        if self.counted_from is None and count:
            self.counted_from = time.monotonic(), self.done
        self.show()

    def show(self) -> None:
        if self.bars is not None and self.task is not None:
            self.bars.update(self.task, completed=self.done)
        elif time.monotonic() - self.spoken > LINE_SECONDS and not self.console.as_json:
            self.spoken = time.monotonic()
            self.console.note(f"{self.what}: {', '.join(self.details())}")


class DistillProgress:
    """Listener that shows a training run as a bar, from the start of the run to the end of the context."""

    def __init__(self, console: Console):
        self.console, self.blocks = console, ExitStack()
        self.advance: Advance | None = None

    def __enter__(self) -> DistillProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.blocks.close()

    def started(self, step: int, steps: int) -> None:
        self.advance = self.blocks.enter_context(self.console.progress("distill", steps, "steps"))
        self.advance.begin(step)

    def stepped(self, record: dict[str, Any]) -> None:
        if self.advance is not None:
            self.advance(record["step"] - self.advance.done, in_words(record))

    def note(self, text: str) -> None:
        self.console.note(text)

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        return self.console.progress(what, total, unit)
