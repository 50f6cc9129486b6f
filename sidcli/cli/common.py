"""What the commands share: the console and its errors, several processes. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sidcli.devices import pick_device
from sidcli.environment import flag, group
from sidcli.errors import EnvironmentProblem, Interrupted, UsageError, out_of_memory

if TYPE_CHECKING:
    from sidcli.cli.console import Console


def check_column(column: str | None, prompts: Path | None) -> None:
    if column and not prompts:
        raise UsageError(f"--column {column} names a column of --prompts, which is not given", "--prompts FILE")


@contextmanager
def open_console(
    as_json: bool, quiet: bool, stopped: tuple[str, str], smaller: str, unused: Sequence[str] = ("bitsandbytes", "peft")
) -> Iterator[Console]:
    """The console of a command; libraries are told to keep quiet before any of them is imported.

    Raises Interrupted for a signal, with what `stopped` says: what is left of the work, and how to go on. Raises EnvironmentProblem
    where memory runs out, with what would be `smaller`.
    """
    for name in unused:  # diffusers and transformers import these where they find them, which takes seconds
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if not flag("SID_DEBUG"):
        logging.disable()  # what libraries advise about their extras, or say of errors that we report ourselves
    from sidcli.cli.console import Console

    try:
        yield Console(as_json, quiet)
    except SystemExit as stop:  # of the handler of signals, or of a training that is told twice
        raise Interrupted(int(str(stop.code)) - 128, f"stopped; {stopped[0]}", stopped[1]) from stop
    except EnvironmentProblem:  # which says already what to do
        raise
    except Exception as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise EnvironmentProblem(f"out of memory: {said}", smaller) from error


def launch_processes(processes: int, device: str) -> None:
    """Run this command in several processes and exit with their code; return if one is asked for, or in one of several.

    Raises EnvironmentProblem where there are fewer GPUs, before any process is started.
    """
    if processes == 1 or group().count > 1:
        return
    if device != "cpu":
        from sidcli.distributed import check_cards

        check_cards(pick_device(device).type, processes)
    from sidcli.training.launch import launch

    sys.exit(launch(processes, sys.argv[1:]))
