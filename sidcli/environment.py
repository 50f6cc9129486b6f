"""Access to environment variables. No other module reads them.

A blank variable counts as unset. `prepare` removes variables that make libraries fail, such as `COLUMNS=abc`, before the libraries
are imported.
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
"""PLACES: variables that libraries would use even if blank. NUMBERS: variables that libraries parse as numbers."""
GROUP = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that `accelerate launch`, torchrun and `sid distill --processes` set in each process."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Group:
    """A group of cooperating processes: the rank of this process among `count`, and among the `local_count` on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def prepare() -> None:
    """Remove variables that libraries would misread or fail on, and turn off their messages. Call it before they are imported."""
    for name in PLACES:
        if variable(name) is None:
            os.environ.pop(name, None)
    for name in NUMBERS:
        if not re.fullmatch(r"0*[1-9]\d{0,5}", variable(name) or ""):
            os.environ.pop(name, None)
    if not os.path.isabs(variable("HOME") or ""):
        os.environ.pop("HOME", None)  # Path.home() then uses the user database
    if variable("WORLD_SIZE") in (None, "1"):  # there is no group, so these variables are stale
        for name in GROUP:
            os.environ.pop(name, None)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def variable(name: str) -> str | None:
    """Return the value of a variable, or None if it is unset or blank."""
    value = os.environ.get(name, "")
    return value if value.strip() else None


def flag(name: str) -> bool:
    """Return whether a variable is set to a value other than 0, false, no or off."""
    return (variable(name) or "0").strip().lower() not in ("0", "false", "no", "off")


def group() -> Group:
    """Return the group of this process. Raises EnvironmentProblem if the variables of a group are incomplete or inconsistent."""
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
    """Return the group of this process, or a group of this process alone if the variables of a group are invalid."""
    try:
        return group()
    except EnvironmentProblem:
        return Group()


def cache_folder() -> Path:
    """Return $SID_CACHE_DIR, else $XDG_CACHE_HOME/sid if that is absolute, else ~/.cache/sid. Expands `~` and variables in them.

    Raises EnvironmentProblem if SID_CACHE_DIR contains an unknown user or variable, or if the user has no home folder.
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
