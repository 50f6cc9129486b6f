"""Environment variables, read in this module alone.

A variable that is blank counts as unset. `prepare` removes what the libraries would fail on, such as `COLUMNS=abc`, before they are
imported.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sidcli.errors import EnvironmentProblem

PLACES = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "TORCH_HOME", "TMPDIR")
NUMBERS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "COLUMNS", "LINES", "TERMINAL_WIDTH"),
    *("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"),
)
"""Variables that libraries read, taking a blank one literally, and those that they expect to be numbers."""
GROUP = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch`, torchrun and `sid distill --processes` tell each process."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Group:
    """Processes that work together: this one's rank among `count`, and among the `local_count` of this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def prepare() -> None:
    """Remove variables that libraries would take literally or fail on, and quiet the libraries; call it before they are imported."""
    for name in PLACES:
        if variable(name) is None:
            os.environ.pop(name, None)
    for name in NUMBERS:
        if not re.fullmatch(r"0*[1-9]\d{0,5}", variable(name) or ""):
            os.environ.pop(name, None)
    if not os.path.isabs(variable("HOME") or ""):
        os.environ.pop("HOME", None)  # then the user database knows it
    if variable("WORLD_SIZE") in (None, "1"):  # a process alone; the others are left over from elsewhere
        for name in GROUP:
            os.environ.pop(name, None)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def variable(name: str) -> str | None:
    """The value of a variable; None for one that is unset or blank."""
    value = os.environ.get(name, "")
    return value if value.strip() else None


def flag(name: str) -> bool:
    """Whether a variable switches something on: set, and not to 0, false, no or off."""
    return (variable(name) or "0").strip().lower() not in ("0", "false", "no", "off")


def group() -> Group:
    """The group of this process. Raises EnvironmentProblem where the variables of one are incomplete or contradict each other."""
    if variable("WORLD_SIZE") in (None, "1"):
        return Group()
    count, rank, local_rank, _ = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    if variable("MASTER_ADDR") is None:
        raise _no_group(f"WORLD_SIZE={count}, but MASTER_ADDR is not set")
    if rank >= count:
        raise _no_group(f"RANK={rank}, but WORLD_SIZE={count}")
    return Group(rank, count, local_rank, 1 if variable("LOCAL_WORLD_SIZE") is None else _number("LOCAL_WORLD_SIZE"))


def _number(name: str) -> int:
    value = variable(name)
    if value is None:
        raise _no_group(f"WORLD_SIZE={variable('WORLD_SIZE')}, but {name} is not set")
    if not re.fullmatch(r"\d{1,9}", value.strip()):
        raise _no_group(f"{name}={value} is not a whole number")
    return int(value)


def _no_group(reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(reason, "unset WORLD_SIZE, or start the processes with --processes, accelerate launch or torchrun")


def group_or_alone() -> Group:
    """The group of this process; this process alone where the variables of a group are incomplete."""
    try:
        return group()
    except EnvironmentProblem:
        return Group()


def cache_folder() -> Path:
    """$SID_CACHE_DIR, else $XDG_CACHE_HOME/sid if that is absolute, else ~/.cache/sid; `~` and variables in them are expanded.

    Raises EnvironmentProblem where SID_CACHE_DIR has a user or a variable that is not known, and for a user without a home folder.
    """
    own, shared = _expanded("SID_CACHE_DIR"), _expanded("XDG_CACHE_HOME")
    if own:
        if re.match(r"~|.*\$(\w|\{)", own) and not Path(own).exists():
            raise EnvironmentProblem(f"SID_CACHE_DIR is {own!r}, which cannot be expanded", "set it to the path of a folder")
        return Path(own).absolute()
    if shared and os.path.isabs(shared):
        return Path(shared) / "sid"
    try:
        return Path.home() / ".cache" / "sid"
    except RuntimeError as error:
        raise EnvironmentProblem("no place for the cache: this user has no home folder", "set SID_CACHE_DIR to a folder") from error


def _expanded(name: str) -> str:
    return os.path.expanduser(os.path.expandvars(variable(name) or ""))
