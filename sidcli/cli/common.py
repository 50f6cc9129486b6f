"""What the commands share: the console and its errors, the device, models by name. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidcli.devices import pick_device
from sidcli.environment import flag
from sidcli.errors import EnvironmentProblem, Interrupted, UsageError, out_of_memory
from sidcli.settings import PREDICTIONS

if TYPE_CHECKING:
    import torch

    from sidcli.cli.console import Console
    from sidcli.models.loading import Description, Model, Overrides


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


def launch_processes(processes: int, device: str) -> int:
    """Run this command in several processes. Raises EnvironmentProblem where there are fewer GPUs, before any of them is started."""
    if device != "cpu":
        from sidcli.distributed import check_cards

        check_cards(pick_device(device).type, processes)
    from sidcli.training.launch import launch

    return launch(processes, sys.argv[1:])


def choose_device(name: str, console: Console) -> torch.device:
    """The device by name, before anything is looked for or downloaded: work for nothing would be worse than an error."""
    device = pick_device(name)
    if name == "auto":
        console.note(f"--device auto: {device}")
    return device


def describe_model(name: str, **overrides: Any) -> Description:
    """What is known of a model before its weights are read or downloaded."""
    checked = check_overrides(**overrides)
    from sidcli.models.loading import describe, quiet_libraries
    from sidcli.models.sources import find

    quiet_libraries()
    return describe(find(name, descriptions_only=True), checked)


def check_overrides(**overrides: Any) -> Overrides:
    if overrides.get("prediction_type", "auto") not in PREDICTIONS:
        raise UsageError(f"--prediction-type must be one of {', '.join(PREDICTIONS)}, not {overrides['prediction_type']!r}")
    from sidcli.models.loading import Overrides

    return Overrides(**overrides)


def load_model(name: str, console: Console, **overrides: Any) -> Model:
    checked = check_overrides(**overrides)
    console.note(f"loading {name}")
    from sidcli.models.loading import load, quiet_libraries
    from sidcli.models.sources import find

    quiet_libraries()
    return load(find(name, console), checked, console)
