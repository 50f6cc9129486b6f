"""Errors that a user can fix. Each states what happened, with which value, and what to do next; its class defines the exit code.

SidError                 1  the run failed
|- UsageError            2  an option or a configuration is wrong
|- InputError            3  a model, prompt list or run folder was refused or not found
|  `- NothingKept        3  no pair of images passed the curation
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


class NothingKept(InputError):
    pass


class EnvironmentProblem(SidError):
    exit_code = 4


class GateError(SidError):
    exit_code = 5


class Interrupted(SidError):
    def __init__(self, signal_number: int, message: str, hint: str = ""):
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, and the second if the first ends with a colon; the class name if it is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def out_of_memory(error: BaseException | None) -> str | None:
    """Return the out-of-memory message of `error` or of an error that caused it, on one line; None if there is none.

    Errors of torch on a GPU and on the CPU, numpy, safetensors and Python are recognized by class name and message, because this
    module does not import these libraries.
    """
    known = "DefaultCPUAllocator|allocate.*memory|bad_alloc|ALLOC_FAILED|start new thread"
    while error is not None:
        words = str(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or re.search(known, words):
            line = next(iter(words.splitlines()), "")
            return re.sub(r"^\[enforce fail.*?DefaultCPUAllocator: ", "", line) or "no memory left"
        error = error.__cause__ or error.__context__
    return None
