"""Errors a user can act on. Each says what happened, with which value, and what to do next; its class carries the exit code.

SidError                 1  the run failed
|- UsageError            2  an option or a configuration is wrong
|- InputError            3  a model, prompt list or run folder was refused or not found
|- EnvironmentProblem    4  device, memory, disk, output folder or lock
|- GateError             5  a verification or a quality gate failed
|- Interrupted           129, 130, 138, 143  stopped by a signal, after saving
"""

from __future__ import annotations

import re


class SidError(Exception):
    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SidError):
    exit_code = 2


class InputError(SidError):
    exit_code = 3


class EnvironmentProblem(SidError):
    exit_code = 4


class GateError(SidError):
    exit_code = 5


class Interrupted(SidError):
    def __init__(self, signal_number: int, message: str, hint: str = ""):
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with the next one after a colon; its name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def out_of_memory(error: BaseException | None) -> str | None:
    """What a library says, on one line, of memory that it did not get, be it the error itself or what led to it; None for others.

    Asked by class name and words, because this file imports neither torch nor what else allocates: torch on a GPU and on the CPU,
    numpy, safetensors, Python itself.
    """
    known = "DefaultCPUAllocator|allocate.*memory|bad_alloc|ALLOC_FAILED|start new thread"
    while error is not None:
        words = str(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or re.search(known, words):
            line = next(iter(words.splitlines()), "")
            return re.sub(r"^\[enforce fail.*?DefaultCPUAllocator: ", "", line) or "no memory left"
        error = error.__cause__ or error.__context__
    return None
