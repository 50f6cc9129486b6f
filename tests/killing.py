"""Work in a child process that is killed before its n-th operation on files: every moment at which a crash could find a writer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Events that Python tells its audit hooks."""


def killed_at(work: Callable[[], object], root: Path, operation: int) -> bool:
    """Do the work in a child that is killed before its n-th operation on files below `root`; False if it had fewer."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in WRITING and str(root) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (status != 0) and (status == 0 or os.WTERMSIG(status) == signal.SIGKILL)
    return status != 0
