"""Functions that the commands share: console, errors and processes. Large libraries are imported only when they are needed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sidcli.devices import pick_device
from sidcli.environment import flag, group
from sidcli.errors import EnvironmentProblem, Interrupted, out_of_memory

if TYPE_CHECKING:
    from sidcli.cli.console import Console

IMPORTERS = ("diffusers", "transformers")
"""Libraries that import optional packages if they are installed, which takes seconds. They look for these packages when they are
loaded, and fail later if one that they found is blocked then."""


@contextmanager
def open_console(
    as_json: bool, quiet: bool, stopped: tuple[str, str], smaller: str, unused: Sequence[str] = ("bitsandbytes", "peft")
) -> Iterator[Console]:
    """Context with the console of a command. Messages of libraries are turned off before the libraries are imported.

    Raises Interrupted on a signal with the texts `stopped`: what is left of the work, and how to continue. Raises
    EnvironmentProblem if memory runs out, with the hint `smaller`. `unused` are modules whose import is blocked, unless a library that
    would import them is loaded already.
    """
    if sys.modules.keys().isdisjoint(IMPORTERS):
        for name in unused:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if not flag("SID_DEBUG"):
        logging.disable()  # messages on optional packages, and on errors that sid reports itself
    from sidcli.cli.console import Console

    try:
        yield Console(as_json, quiet)
    except SystemExit as stop:  # raised by the signal handler, or on the second signal of a training run
        raise Interrupted(int(str(stop.code)) - 128, f"stopped; {stopped[0]}", stopped[1]) from stop
    except EnvironmentProblem:  # already has a hint
        raise
    except Exception as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise EnvironmentProblem(f"out of memory: {said}", smaller) from error


def launch_processes(processes: int, device: str) -> None:
    """Run this command in `processes` processes and exit with their code. Returns if `processes` is 1, or inside a group.

    Raises EnvironmentProblem if there are fewer GPUs, before any process is started.
    """
    if group().count > 1 or processes == 1:
        return
    if device != "cpu":
        from sidcli.distributed import check_cards

        check_cards(pick_device(device).type, processes)
    from sidcli.training.launch import launch

    sys.exit(launch(processes, sys.argv[1:]))
