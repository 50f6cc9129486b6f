"""A command in this process, which has its libraries loaded already; what it prints is pytest's to capture."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sidcli.cli import main
from sidcli.training.launch import STOPPING


@contextmanager
def _as_before() -> Iterator[None]:
    """Puts back what a command changes in its process: handlers of signals, logging, libraries that it hides."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    modules, arguments = dict(sys.modules), sys.argv
    try:
        yield
    finally:
        sys.argv = arguments
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in [name for name, module in sys.modules.items() if module is None and name not in modules]:
            del sys.modules[name]


def sid(*arguments: object) -> int:
    """Run `sid ARGUMENTS`; its exit code."""
    with _as_before(), pytest.raises(SystemExit) as ended:
        sys.argv = ["sid", *map(str, arguments)]
        main()
    return int(str(ended.value.code or 0))
