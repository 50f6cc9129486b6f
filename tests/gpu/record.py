"""Results of a GPU visit: one JSON line per check, written as soon as the check ends."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a check measured. `ok` is None where nothing is to be passed, only reported."""

    values: dict[str, Any]
    ok: bool | None = None
    bound: str = ""


class Skipped(Exception):
    """The check cannot run here; its text says why."""


Check = Callable[[], Outcome]


def append(file: Path, record: dict[str, Any]) -> None:
    """Append one line with a single write, so that several processes may share the file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


def read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def run_checks(file: Path, part: str, checks: dict[str, Check], names: Sequence[str]) -> None:
    """Run the named checks in turn. A check that raises is recorded as failed and the next one runs."""
    for name in names:
        append(file, {"part": part, "name": name, "event": "started"})
        started = time.monotonic()
        record: dict[str, Any] = {"part": part, "name": name, "event": "done"}
        try:
            outcome = checks[name]()
            record |= {"ok": outcome.ok, "bound": outcome.bound, "values": outcome.values}
        except Skipped as reason:
            record |= {"ok": None, "bound": "", "values": {"skipped": str(reason)}}
        except Exception as error:
            last = traceback.format_exc().strip().splitlines()
            record |= {
                "ok": False,
                "bound": "",
                "values": {"error": f"{type(error).__name__}: {error}"[:2000], "trace": last[-14:]},
            }
        record["seconds"] = round(time.monotonic() - started, 2)
        append(file, record)
