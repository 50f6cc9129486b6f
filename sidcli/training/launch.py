"""`sid distill --processes N`: run the command in N processes on this machine, which train together.

For several machines use `accelerate launch -m sidcli distill ...` or torchrun, which set the same variables.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from sidcli.environment import variable
from sidcli.errors import SidError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals on which training saves and exits: Ctrl-C, a system shutdown, a batch scheduler's preemption, a closed terminal."""

GRACE_SECONDS = 60.0
"""Seconds that the other processes have to exit after one process has failed."""


Handler = Callable[[int, FrameType | None], Any] | int | None


def install_handlers(handler: Handler) -> dict[signal.Signals, Handler]:
    """Install a handler for the signals of STOPPING, and return the previous handlers. Under `nohup`, SIGHUP stays ignored.

    Python handles signals only in the main thread. In another thread nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore_handlers(before: dict[signal.Signals, Handler]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask Linux to send this child process SIGTERM when its parent dies, even by kill -9. Does nothing on other systems."""
    prctl, tell_me = getattr(ctypes.CDLL(None), "prctl", None), 1
    if prctl is not None:
        prctl(tell_me, signal.SIGTERM)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `sid ARGUMENTS` in `count` processes and forward signals to them. Returns the first exit code that is not 0, else 0.

    Raises SidError if a process was killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # By default each process would use every core.
    shared |= {"OMP_NUM_THREADS": variable("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))}
    distributed = []
    for rank in range(count):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # A separate process group, so that Ctrl-C reaches the process once, through `forward`, and not from the terminal as well.
        command = [sys.executable, "-m", "sidcli", *arguments]
        distributed.append(subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_die_with_parent))

    def forward(number: int, frame: FrameType | None) -> None:
        for process in distributed:
            if process.poll() is None:
                process.send_signal(number)

    before = install_handlers(forward)
    try:
        code = _wait(distributed)
    finally:
        restore_handlers(before)
    if code > 128 and code - 128 not in STOPPING:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
        likely = "; the system kills processes that use too much memory" if name == "SIGKILL" else ""
        raise SidError(f"a process of this command was killed by {name}{likely}", "run the same command to continue")
    return code


def _wait(distributed: list[subprocess.Popen[bytes]]) -> int:
    deadline = None
    while any(process.poll() is None for process in distributed):
        failed = [process for process in distributed if process.poll()]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline and time.monotonic() > deadline:
            for process in distributed:
                process.kill()
        time.sleep(0.1)
    codes = [process.returncode for process in distributed]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)
