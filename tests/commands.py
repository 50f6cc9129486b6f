"""Running `sid`: in a fork of this process, which has every library in memory and needs no time for imports, or in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidcli import cli, console, distill, evaluate, export, scores

REPOSITORY = Path(__file__).parent.parent
LOADED = (console, distill, evaluate, export, scores)
"""What commands import only when they run; imported here so that no fork does."""


@dataclass(frozen=True)
class Ended:
    """A finished command. `returncode` is negative for a signal. `grown` is the growth of its memory and `read` what it read from files,
    both in megabytes of 10^6 bytes: measures of its work that do not depend on what else the machine does."""

    returncode: int
    stdout: str
    stderr: str
    grown: float
    read: float


def in_a_child(work: Callable[[], object]) -> Ended:
    """Run `work` in a fork of this process. Its stdin is an empty pipe that stays open."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        child = os.fork()
        if child == 0:
            _work(work, place)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its counters can be read until it is waited for
        _, read = _counters(child)
        _, status, used = os.wait4(child, 0)
        size, read_before = map(int, (place / "before").read_text().split())
        texts = [(place / stream).read_text(errors="replace") for stream in ("stdout", "stderr")]
    grown = used.ru_maxrss * 1024 - size
    return Ended(os.waitstatus_to_exitcode(status), *texts, grown / 1e6, (read - read_before) / 1e6)


def sid(*arguments: object, cwd: Path | None = None, **environment: str) -> Ended:
    """Run `sid ARGUMENTS` in a fork, in the folder `cwd`."""

    def command() -> None:
        if cwd is not None:
            os.chdir(cwd)
        os.environ.update(environment)
        sys.argv = ["sid", *map(str, arguments)]
        cli.main()

    return in_a_child(command)


def process(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `sid ARGUMENTS` in a process of its own, for settings that libraries read when they are imported."""
    command = [sys.executable, "-m", "sidcli", *map(str, arguments)]
    settings = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings)


def _counters(process: int | str) -> tuple[int, int]:
    """Bytes of memory (0 for a process that has ended) and bytes read so far."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    read = next(line for line in Path(f"/proc/{process}/io").read_text().splitlines() if line.startswith("rchar"))
    return pages * os.sysconf("SC_PAGE_SIZE"), int(read.split()[1])


def _work(work: Callable[[], object], place: Path) -> None:
    """The child: never returns."""
    code: object = 0
    try:
        (place / "before").write_text(" ".join(map(str, _counters("self"))))
        os.dup2(os.pipe()[0], 0)
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)
