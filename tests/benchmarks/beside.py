"""Run commands in processes of their own, several at a time, each after the one that it needs; the rows that they leave in a file."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])


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
