# ruff: noqa: E402 (the environment and the modules that libraries find are set before they are imported)
from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "100"
# Two workers with two threads each would wait for each other on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# diffusers and peft import bitsandbytes if it is installed, which takes seconds. Tests that need it import it themselves.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
import diffusers.quantizers  # noqa: F401
import peft  # noqa: F401
import torch
from peft.import_utils import is_bnb_available

is_bnb_available()  # peft keeps the answer: the first adapter of each process would import it
del sys.modules["bitsandbytes"]

from sidcli.evaluation import emoji_reference
from sidcli.models import sampler
from sidcli.models.loading import Model, load, quiet_libraries
from sidcli.models.sources import find
from sidcli.settings import PRESETS, DistillConfig
from tests import checks, tiny

quiet_libraries()
LONGEST = [
    f"test_{name}"
    for name in ("export", "parallel", "distill", "hostile", "reliability", "evaluate", "hub", "outputs", "cli", "engine", "api")
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Numbers of checks travel with the reports, so that they arrive from other processes too."""
    # A worker takes whole files in this order: the longest ones first, so that no worker is left with one of them at the end.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        item.user_properties += [("check", number) for mark in item.iter_markers("check") for number in mark.args]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what libraries and collection left is never garbage: looking through it again and again takes a tenth of the time
    if commands := sys.modules.get("tests.commands"):
        commands.start_server()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = checks.table(
        [report for kind in ("passed", "failed", "error", "skipped", "") for report in terminalreporter.getreports(kind)]
    )
    if lines:
        terminalreporter.section("checks of reliability")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline of the classes of SD 1.5, with two levels and a small vocabulary."""
    return tiny.write_two_levels(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, predicting v."""
    return tiny.write_two_levels(tmp_path_factory.mktemp("models") / "v", "v_prediction")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks in the place of those that metrics look with, in the files that they come in."""
    from tests.stand_ins import write_clip, write_dino, write_inception

    folder = tmp_path_factory.mktemp("nets")
    return {
        "inception": write_inception(folder / "inception-2015-12-05.pt"),
        "clip": write_clip(folder / "clip"),
        "dino": write_dino(folder / "dino"),
    }


@pytest.fixture
def sd(sd_folder: Path) -> Model:
    return load(find(str(sd_folder)))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches of a test belong to that test, and arithmetic repeats bit for bit."""
    monkeypatch.setenv("SID_CACHE_DIR", str(tmp_path / "cache"))
    yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def few_teacher_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher draws in 5 steps instead of 50 unless it is told how many: each training draws with its teacher."""
    monkeypatch.setattr(sampler, "TEACHER_STEPS", 5)


@pytest.fixture
def small_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training on the emoji world takes batches of 2 images instead of 16 unless it is told how many."""
    monkeypatch.setitem(PRESETS["emoji"], "batch_size", 2)
    monkeypatch.setitem(PRESETS["emoji"], "micro_batch", 2)


@pytest.fixture(autouse=True)
def few_reference_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emoji protocol compares with 600 scenes instead of 10,000, whose features each test would compute again."""
    monkeypatch.setattr(emoji_reference, "SCENES", 600)


@pytest.fixture
def config() -> DistillConfig:
    """Settings at which a tiny pipeline moves visibly in a few steps."""
    return DistillConfig(
        teacher="sd", prompts="general", steps=4, batch_size=4, micro_batch=4, lr_fake=1e-3, lr_generator=1e-3, precision="fp32"
    )
