"""The device that a command computes on, by its name on the command line."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.progress import Listener

if TYPE_CHECKING:
    import torch


def check_name(wanted: str) -> None:
    """Raises UsageError, without a look at the machine, for a name that no device has."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:INDEX, not {wanted!r}")


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:i`. Raises UsageError for another name, EnvironmentProblem for a device this machine lacks."""
    check_name(wanted)
    import torch  # which takes seconds; a wrong name is to be heard at once

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(f"no device {wanted}: {torch.cuda.device_count()} CUDA devices here", "use --device cpu or auto")
    return device


def choose_device(name: str, listener: Listener) -> torch.device:
    """The same, and the listener is told which device `auto` stands for."""
    device = pick_device(name)
    if name == "auto":
        listener.note(f"--device auto: {device}")
    return device


def processor() -> str:
    """The CPU's model name, as far as the system tells."""
    try:
        named = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
