"""Run commands in processes of their own, several at a time, each after the one that it needs, and tables whose rows they compute."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = str(Path(__file__).parents[2])
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Task:
    """A command and its name. It starts after the task `after` has ended without an error."""

    name: str
    command: tuple[str, ...]
    after: str = ""


def run_beside(
    tasks: Sequence[Task], beside: int, minutes: float, ended: Collection[str] = (), show: Callable[[str], None] = lambda _: None
) -> tuple[list[str], list[str]]:
    """Run tasks, at most `beside` at a time, and return the names of those that failed and of those that did not start.

    Tasks start in their order. None starts after `minutes`, or if the task that it needs failed or is neither in `tasks` nor in `ended`,
    the names of those that ended before. `show` is called with the name of each task that ends without an error. A process finds
    `sidcli` and `tests` from any folder.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))}
    until, done, queue = time.monotonic() + 60 * minutes, {"", *ended}, list(tasks)
    failed: list[str] = []
    working: dict[str, subprocess.Popen[bytes]] = {}
    while True:
        ready = [task for task in queue if task.after in done] if time.monotonic() < until else []
        for task in ready[: beside - len(working)]:
            queue.remove(task)
            working[task.name] = subprocess.Popen(task.command, env=environment)
        if not working:
            return failed, [task.name for task in queue]
        time.sleep(0.2)
        for name, process in list(working.items()):
            if process.poll() is None:
                continue
            del working[name]
            if process.returncode:
                failed.append(name)
            else:
                done.add(name)
                show(name)


def rows_with(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines that have these settings; none if there is no such file."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.items() >= settings.items()]


class Cell(Protocol):
    """A row of a table. `after` names the row that must be there before this one is computed, "" if there is none."""

    @property
    def name(self) -> str: ...
    @property
    def after(self) -> str: ...


@dataclass(frozen=True)
class Table:
    """The cells of a script, what computes the row of one, the settings that the rows of one table share, and the table as text."""

    cells: Sequence[Cell]
    row: Callable[[Any, argparse.Namespace], dict[str, Any]]
    settings: Callable[[argparse.Namespace], dict[str, Any]]
    text: Callable[[Sequence[dict[str, Any]]], str]

    def rows(self, given: argparse.Namespace) -> list[dict[str, Any]]:
        """Return the rows of the output with the given settings."""
        return rows_with(given.output, self.settings(given))

    def run(self, given: argparse.Namespace) -> tuple[list[str], list[str]]:
        """Compute the rows that are missing, each in a process of this script; return the names of failed and of not started ones."""
        ended = [row["name"] for row in self.rows(given)]
        asked = [cell for cell in self.cells if given.only is None or cell.name in given.only]
        tasks = [
            Task(cell.name, (sys.executable, *sys.argv, "--cell", cell.name), cell.after)
            for cell in asked
            if cell.name not in ended
        ]
        return run_beside(tasks, given.beside, given.minutes, ended, lambda _: print(self.text(self.rows(given)), flush=True))

    def main(self, given: argparse.Namespace) -> None:
        """Compute the row of `--cell`, or all rows, and print the table. Exits with an error if a row failed."""
        given.output.parent.mkdir(parents=True, exist_ok=True)
        if given.cell:
            row = self.row(next(cell for cell in self.cells if cell.name == given.cell), given)
            with given.output.open("a", encoding="utf-8") as results:
                results.write(json.dumps(row) + "\n")
            return
        failed, left = self.run(given)
        print(self.text(self.rows(given)))
        if left:
            print(f"not started: {', '.join(left)}")
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a table whose output is results/NAME.jsonl."""
    parser.add_argument("--only", nargs="+", help="names of rows; by default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--beside", type=int, default=1, help="rows at a time; more than one on a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no row starts after this time")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # what a process of its own computes
