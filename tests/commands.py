"""Running `sid`: in a fork of this process, which has every library in memory and needs no time for imports, or in a new process."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from multiprocessing import forkserver, util
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import torch
from diffusers.utils import hub_utils
from huggingface_hub import constants

from sidcli.cli import console, main
from sidcli.evaluation import run as evaluate
from sidcli.evaluation import scores
from sidcli.formats import export
from sidcli.models import sampler
from sidcli.models.loading import describe
from sidcli.models.sources import find
from sidcli.training import distill
from tests import REPOSITORY
from tests.namespaces import mount_small_disk

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.conftest", __name__])
LOADED = (console, distill, evaluate, export, scores)
"""What commands import only when they run; imported here so that no fork does."""
describe(find("emoji-teacher"))  # its classes are imported at their first use, for which each fork would need a second


def _fork(_: bytes, command: Sequence[bytes | str], kept: Sequence[int]) -> int:
    """Run `python -c CODE` in a fork with these open files, in the place of a new process."""
    if child := os.fork():
        return child
    first = 3
    for number in sorted(kept):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
    try:
        exec(command[-1])  # until this process ends
    finally:
        os._exit(0)


def start_server() -> None:
    """Start the server as a fork of this process, which must not have computed a gradient yet: PyTorch computes none in a fork of a
    process that has. A new process would need 14 seconds for the imports."""
    with patch.object(util, "spawnv_passfds", _fork):
        forkserver.ensure_running()


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
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            (place / "before").write_text(" ".join(map(str, _counters("self"))))
            _run(work, *(os.open(place / stream, os.O_WRONLY | os.O_CREAT) for stream in ("stdout", "stderr")))
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its counters can be read until it is waited for
        _, read = _counters(child)
        _, status, used = os.wait4(child, 0)
        size, read_before = map(int, (place / "before").read_text().split())
        texts = [(place / stream).read_text(errors="replace") for stream in ("stdout", "stderr")]
    grown = used.ru_maxrss * 1024 - size
    return Ended(os.waitstatus_to_exitcode(status), *texts, grown / 1e6, (read - read_before) / 1e6)


def sid(*arguments: object, cwd: Path | None = None, **environment: str) -> Ended:
    """Run `sid ARGUMENTS`, a command that trains nothing, in a fork, in the folder `cwd`."""
    return in_a_child(_command(arguments, cwd, environment))


class Running:
    """A `sid` command that runs beside this process, in a session of its own. It is used like subprocess.Popen.

    It is a fork of a server that has every library in memory.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path,
        stdout: Path | None = None,
        stderr: Path | None = None,
        disk: int = 0,
        **environment: str,
    ):
        """`stdout` and `stderr`: existing files, pipes or terminals to write to. `disk`: kilobytes of a disk of its own at `cwd`."""
        self._place = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = stdout or Path(self._place.name) / "stdout", stderr or Path(self._place.name) / "stderr"
        for stream in {self.stdout, self.stderr} - {stdout, stderr}:
            stream.touch()
        words = [str(argument) for argument in arguments]
        settings = dict(os.environ) | environment
        self._process = SERVER.Process(
            target=_served, args=(words, str(cwd), disk, settings, str(self.stdout), str(self.stderr), sampler.TEACHER_STEPS)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Wait for the end. Returns stdout and stderr."""
        self.wait()
        return self.stdout.read_text(errors="replace"), self.stderr.read_text(errors="replace")


def from_server(*arguments: object, cwd: Path | None = None, **environment: str) -> Ended:
    """Run `sid ARGUMENTS` in a fork of the server, as every command that trains must. Its growth and what it reads are not measured."""
    running = Running(*arguments, cwd=cwd or Path.cwd(), **environment)
    said = running.communicate()
    assert running.returncode is not None
    return Ended(running.returncode, *said, nan, nan)


def together(count: int, *arguments: object, cwd: Path) -> list[Running]:
    """Start `sid ARGUMENTS` in so many forks of the server, with the variables that a launcher would set."""
    return [Running(*arguments, cwd=cwd, **environment) for environment in ranks(count)]


def ranks(count: int) -> list[dict[str, str]]:
    """The variables that a launcher would set for each process of a group of so many."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def in_server(work: Callable[..., object], *arguments: object, **environment: str) -> Ended:
    """Call a function of a module in a fork of the server."""
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name, stream) for stream in ("stdout", "stderr")]
        process = SERVER.Process(target=_working, args=(work, arguments, dict(os.environ) | environment, *map(str, streams)))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Ended(process.exitcode, *(stream.read_text(errors="replace") for stream in streams), nan, nan)


def _working(work: Callable[..., object], arguments: Sequence[object], settings: dict[str, str], *streams: str) -> None:
    _take(settings)
    _run(lambda: work(*arguments), *(os.open(stream, os.O_WRONLY | os.O_CREAT) for stream in streams))


def _take(settings: dict[str, str]) -> None:
    """Replace the environment. The hub's library reads it when it is imported; it is told to read it again."""
    os.environ.clear()
    os.environ.update(settings)
    importlib.reload(constants)
    hub_utils.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE


def _served(words: list[str], cwd: str, disk: int, settings: dict[str, str], stdout: str, stderr: str, teacher_steps: int) -> None:
    """A child of the server."""
    os.setsid()
    if disk:
        mount_small_disk(Path(cwd), disk)
    _take(settings)
    sampler.TEACHER_STEPS = teacher_steps
    _run(_command(words, Path(cwd), {}), *(os.open(stream, os.O_WRONLY) for stream in (stdout, stderr)))


def process(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `sid ARGUMENTS` in a process of its own, for settings that libraries read when they are imported."""
    command = [sys.executable, "-m", "sidcli", *map(str, arguments)]
    settings = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings)


def _command(arguments: Sequence[object], cwd: Path | None, environment: dict[str, str]) -> Callable[[], None]:
    def command() -> None:
        if cwd is not None:
            os.chdir(cwd)
        os.environ.update(environment)
        sys.argv = ["sid", *map(str, arguments)]
        main()

    return command


def _counters(process: int | str) -> tuple[int, int]:
    """Bytes of memory (0 for a process that has ended) and bytes read so far."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    read = next(line for line in Path(f"/proc/{process}/io").read_text().splitlines() if line.startswith("rchar"))
    return pages * os.sysconf("SC_PAGE_SIZE"), int(read.split()[1])


def _run(work: Callable[[], object], stdout: int, stderr: int) -> NoReturn:
    """The child: it does the work with an empty pipe as stdin and these descriptors, and never returns."""
    code: object = 0
    try:
        # A fork renews PyTorch's pool of threads at its first use, without a lock: before there is a second thread.
        torch.set_num_threads(1)
        os.dup2(os.pipe()[0], 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with suppress(OSError):  # a reader that has left
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)
