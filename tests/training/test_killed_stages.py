"""The stages of Diffusion Self-Distillation under SIGKILL, with each judge: the same command, run again, ends in the same bits as one
that nobody disturbed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sidcli import api, engine
from sidcli.curation.clip import ClipJudge
from sidcli.curation.dino import DinoJudge
from sidcli.curation.endpoint import HttpJudge
from sidcli.curation.features import FeaturesJudge
from sidcli.curation.judge import Pair, Verdict
from sidcli.data import pairs as store
from sidcli.files import clear_leftovers
from sidcli.progress import Progress, silent
from sidcli.training import pairs, samples
from sidcli.training.distill import Intervals
from tests.commands import in_server
from tests.curation.test_endpoint import Endpoint
from tests.killing import killed_at
from tests.tiny_families import write_sdxl
from tests.training.test_distill import KillAt, Silent, state
from tests.training.test_self_distillation import Stage, StopIn, stage, tuning, written  # noqa: F401 (fixtures)

UNIT, SHEETS, STEPS = 2, 3, 2
JUDGES = {"none": pairs.Unjudged, "features": FeaturesJudge, "clip": ClipJudge, "dino": DinoJudge, "http": HttpJudge}
SETTINGS = {"sheets": SHEETS, "sheet_steps": 2, "pairs": "shared-attention", "copy": 1.0}
EVERY_STEP = Intervals(save=1, sample=9, log=1)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in units of two sheets and two pairs, of which three sheets are one and a half. Draw no samples, which cost a third of the
    time and which no stage reads."""
    monkeypatch.setattr(engine, "TUNED_STEPS", STEPS)
    monkeypatch.setattr(samples.Painter, "paint", lambda *_: None)
    monkeypatch.setattr(pairs, "UNIT", UNIT)
    for judge in JUDGES.values():
        monkeypatch.setattr(judge, "unit", UNIT)


@pytest.fixture
def options(stand_ins: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """The options of each judge. A model behind an endpoint answers by what the first image of a question is."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(body: dict[str, Any]) -> str:
        first = body["messages"][0]["content"][1]["image_url"]["url"]
        return f"ANSWER: {'YES' if sum(first.encode()) % 2 else 'NO'}"

    with Endpoint([answer]).running() as served:
        models = {name: {"judge_model": str(stand_ins[name])} for name in ("clip", "dino")}
        yield {name: {} for name in JUDGES} | models | {"http": {"judge_url": served.url, "judge_model": "some-vlm"}}


def command(teacher: Path, output: Path, asked: dict[str, Any], listener: Silent) -> Path:
    """`sid distill --objective self-distillation` of two steps that keeps every pair. Returns the run folder."""
    least = dict.fromkeys(("same", "caption"), "0" if asked["judge"] == "http" else "-1")
    more: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "lr": 1e-3, "precision": "fp32", "prompts": "general"}
    named = {"objective": "self-distillation", "objective_settings": SETTINGS | asked | least}
    return api.distill(teacher, output, **named, **more, device="cpu", intervals=EVERY_STEP, listener=listener).run


def killed(teacher: Path, output: Path, asked: dict[str, Any], listener: Silent) -> None:
    """The command in a fork of the server, with the units of this module."""
    with pytest.MonkeyPatch.context() as patch:
        small_units.__wrapped__(patch)  # type: ignore[attr-defined]
        command(teacher, output, asked, listener)


@pytest.mark.check(2)
@pytest.mark.parametrize(("family", "judge"), [*(("sd", judge) for judge in JUDGES), ("sdxl", "features"), ("sdxl", "dino")])
def test_a_command_that_is_killed_in_each_stage_and_run_again_ends_in_the_same_bits(
    family: str,
    judge: str,
    options: dict[str, dict[str, Any]],
    small_units: None,
    sd_folder: Path,
    sdxl_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, asked = {"sd": sd_folder, "sdxl": sdxl_folder}[family], {"judge": judge, **options[judge]}
    whole, other = tmp_path / "whole", tmp_path / "killed"
    command(teacher, whole, asked, Silent())
    moments: list[Silent] = [StopIn(title, UNIT + 0.5, signal.SIGKILL) for title in ("draw sheets", f"judge pairs ({judge})")]
    for done, listener in enumerate([*moments, KillAt(STEPS, signal.SIGKILL)]):
        ended = in_server(killed, teacher, other, asked, listener)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        sheets, scores = [*other.glob("pairs/sheets/*.png")], [*other.glob("pairs/scores-*.jsonl")]
        assert len(sheets) == (UNIT, SHEETS, SHEETS)[done]
        assert [len(file.read_text().splitlines()) for file in scores] == [[], [UNIT], [SHEETS]][done]
    command(teacher, other, asked, Silent())
    assert written(other / "pairs") == written(whole / "pairs")
    assert len(store.read_rows(other / "pairs")) == SHEETS
    one, two = state(whole, STEPS), state(other, STEPS)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert written(other / "student" / "unet") == written(whole / "student" / "unet")


def test_a_curation_that_is_killed_before_any_of_its_file_operations_ends_in_the_same_bits(
    stage: Stage,  # noqa: F811
    small_units: None,
    tmp_path: Path,
) -> None:
    stage.prepare()
    whole = written(stage.folder)
    drawn = tmp_path / "drawn"
    shutil.copytree(stage.folder / "sheets", drawn / "sheets")
    shutil.copy(stage.folder / "sheets.json", drawn)
    scores = set[int]()
    for operation in range(1, 200):
        shutil.rmtree(stage.folder)
        shutil.copytree(drawn, stage.folder)
        if not killed_at(stage.prepare, stage.folder, operation):
            break
        scores |= {len(file.read_text().splitlines()) for file in stage.folder.glob("scores-*")}
        stage.prepare()
        clear_leftovers(stage.folder)  # as the command does before the training
        assert written(stage.folder) == whole, f"killed before operation {operation}"
    assert scores == {1, 2, 3}, "also between two pairs of a unit"


@pytest.mark.parametrize("scored", range(SHEETS))
def test_pairs_are_judged_beside_the_same_others_wherever_a_kill_has_cut_the_scores(
    scored: int,
    stage: Stage,  # noqa: F811
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"judge": "features", "same": "-1", "caption": "-1"}
    judge, batches = FeaturesJudge.judge, list[tuple[tuple[str, str], ...]]()

    def judged(self: FeaturesJudge, some: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        batches.append(tuple(pair.captions for pair in some))
        return judge(self, some, advance)

    monkeypatch.setattr(FeaturesJudge, "judge", judged)
    stage.prepare(**asked)
    _trial, *whole = batches
    batches.clear()
    before = written(stage.folder)
    (file,) = stage.folder.glob("scores-*")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:scored]))
    (stage.folder / "curation.json").unlink()
    stage.prepare(**asked)
    assert batches == whole[scored // UNIT :], "a network's rounding depends on the size of the batch"
    assert written(stage.folder) == before
