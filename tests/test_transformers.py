"""Trainings of each family of transformers, all weights and LoRAs: killed and run again, and by two processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from sidcli.training import checkpoint
from sidcli.training.samples import Painter
from tests import inprocess, tiny_flux, tiny_pixart, tiny_sana, tiny_sd3
from tests.commands import Ended, in_server, ranks
from tests.test_parallel import assert_same, command, state

FAMILIES = {
    "sd3": tiny_sd3.write_sd3,
    "flux": tiny_flux.write_flux,
    "pixart": tiny_pixart.write_pixart,
    "sana": tiny_sana.write_sana,
}
# A student on a LoRA has a small gradient at first, which would be one of rounding errors with a small learning rate.
TRAINED = {"all weights": [], "loras": ["--student-lora", "2", "--fake-lora", "2", "--lr", "0.1"]}


@dataclass(frozen=True)
class Whole:
    """A run of two steps that one process has made without an interruption."""

    teacher: Path
    options: Sequence[str]
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    family, trained = request.param
    folder = tmp_path_factory.mktemp("whole")
    teacher, output = FAMILIES[family](folder / family), folder / "run"
    options = ["--batch-size", "4", "--save-every", "1", *TRAINED[trained]]
    done = ended(command(teacher, output, *options))
    assert done.returncode == 0, done.stderr
    return Whole(teacher, options, state(output))


def ended(words: Sequence[str], killed_after: int = 0, **environment: str) -> Ended:
    """Run `python WORDS`, a command of sid, in a fork of the server, which can be killed; see `distil`."""
    return in_server(distil, words[2:], killed_after, **environment)


def distil(words: Sequence[str], killed_after: int) -> None:
    """Run `sid WORDS` in this process, which is killed as soon as the checkpoint of a step is written, while it trains the next step.

    It draws no samples, and Gemma reads a shorter instruction: each letter is a token of a tiny Gemma.
    """
    real = checkpoint.write

    def write(root: Path, step: int, *more: Any) -> Path:
        folder = real(root, step, *more)
        if step == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return folder

    shorter = patch("sidcli.models.sana.instruction", lambda: "Enhance: ")
    with shorter, patch.object(Painter, "paint"), patch.object(checkpoint, "write", write):
        sys.exit(inprocess.sid(*words))


@pytest.mark.check(2)
@pytest.mark.parametrize(
    "whole",
    [pytest.param((family, trained), id=f"{family}, {trained}") for family in FAMILIES for trained in TRAINED],
    indirect=True,
)
def test_a_training_killed_after_a_checkpoint_and_run_again_ends_as_one_that_was_not(whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = command(whole.teacher, output, *whole.options)
    assert ended(words, killed_after=1).returncode == -signal.SIGKILL
    assert checkpoint.numbered(output / "checkpoints") == [1] and not (output / "student").exists()
    again = ended(words)
    assert again.returncode == 0 and "continuing from step 1" in again.stderr, again.stderr
    found = state(output)
    assert found.keys() == whole.state.keys()
    assert [name for name, value in whole.state.items() if not torch.equal(value, found[name])] == []


@pytest.mark.parametrize(
    ("whole", "more"),
    [
        *(pytest.param((family, "all weights"), ["--shard"], id=f"{family}, sharded") for family in FAMILIES),
        pytest.param(("sd3", "loras"), [], id="sd3, loras"),
        # Adapters are no part of what differs between the families: their blocks are.
        *(pytest.param((family, "loras"), [], id=f"{family}, loras", marks=pytest.mark.soak) for family in list(FAMILIES)[1:]),
    ],
    indirect=["whole"],
)
def test_two_processes_of_small_pieces_train_what_one_trains(whole: Whole, more: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = command(whole.teacher, output, *whole.options, "--micro-batch", "1", *more)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda group: ended(words, **group), ranks(2)))
    assert [one.returncode for one in both] == [0, 0], [one.stderr for one in both]
    assert_same(whole.state, state(output), whole.teacher)
