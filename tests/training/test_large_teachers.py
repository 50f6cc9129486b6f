"""Teachers of many weights: student and fake score are LoRAs on one frozen teacher unless something else is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sidcli.models.loading import describe
from sidcli.models.sources import find
from sidcli.models.transformer import LARGE, Transformer
from sidcli.progress import Silence
from sidcli.settings import FITTED, LORAS, MEMORY, DistillConfig
from sidcli.training import plan, request
from sidcli.training.gpus import Gpu
from tests import tiny_sd3
from tests.benchmarks.plans import write_description
from tests.inprocess import sid

CHOSEN = (
    "--student-lora 64 --fake-lora 64 by default, on the frozen teacher in bf16; --student-lora 0 --fake-lora 0 trains all weights"
)
NONE = {"student_lora": 0, "fake_lora": 0, "teacher_bf16": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.write_sd3(tmp_path_factory.mktemp("models") / "sd3", ("text_encoder",))


@pytest.fixture
def large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher that counts as large."""
    monkeypatch.setattr(Transformer, "lora_above", 1000)
    return folder


def planned(capsys: pytest.CaptureFixture[str], teacher: Path, *more: object) -> tuple[dict[str, Any], str]:
    """The three settings in the plan of a run, and what the terminal says."""
    given = ["--teacher", teacher, "--prompts", "general", "--device", "cpu", "--dry-run", "--json", *more]
    assert sid("distill", *given) == 0
    said = capsys.readouterr()
    config = json.loads(said.out)["config"]
    return {name: config[name] for name in LORAS}, said.err


def test_a_large_teacher_gets_two_loras_and_the_terminal_says_so_in_one_line_and_how_to_train_all_weights(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = planned(capsys, large, "-o", tmp_path / "run")
    assert found == LORAS == {"student_lora": 64, "fake_lora": 64, "teacher_bf16": True}
    assert [line for line in said.splitlines() if "lora" in line] == [f"{large} is large: {CHOSEN}"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--student-lora", "0", "--fake-lora", "0"], NONE),
        (["--student-lora", "0"], {"student_lora": 0, "fake_lora": 64, "teacher_bf16": True}),
        (["--student-lora", "8", "--fake-lora", "4"], {"student_lora": 8, "fake_lora": 4, "teacher_bf16": True}),
        (["--no-teacher-bf16"], {"student_lora": 64, "fake_lora": 64, "teacher_bf16": False}),
        (["--shard"], NONE),
        (["--objective", "regression", "--data", "teacher"], {"student_lora": 64, "fake_lora": 0, "teacher_bf16": True}),
    ],
)
def test_a_given_rank_replaces_that_of_a_large_teacher_and_zero_trains_all_weights(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], wanted: dict[str, Any]
) -> None:
    found, said = planned(capsys, large, "-o", tmp_path / "run", *options)
    assert found == wanted
    is_chosen = wanted["student_lora"] == 64 or wanted["fake_lora"] == 64
    assert ("is large: --" in said) == is_chosen


def test_a_student_that_starts_at_another_model_trains_all_its_weights(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(capsys, large, "-o", tmp_path / "run", "--init", large) == (NONE, "")


def test_a_continued_run_of_a_large_teacher_keeps_the_ranks_it_began_with(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for begun in (NONE, {"student_lora": 8, "fake_lora": 4, "teacher_bf16": True}):
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in begun.items()]
        (tmp_path / "run" / "config.toml").write_text("".join(lines))
        for memory in ("auto", "fast", "16gb"):
            assert planned(capsys, large, "-o", tmp_path / "run", "--memory", memory) == (begun, "")


def test_a_run_that_is_continued_without_its_ranks_or_repeated_from_its_config_file_has_the_same_ranks(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--steps", "1", "--batch-size", "2", "--prompts", "general", "--device", "cpu", "--precision", "fp32"]
    assert sid("distill", "--teacher", large, "-o", tmp_path / "run", *small, "--student-lora", "2", "--fake-lora", "2") == 0
    assert sid("distill", "--teacher", large, "-o", tmp_path / "run", *small) == 0, "the same ranks as before"
    assert "finished" in capsys.readouterr().err
    assert planned(capsys, large, "-o", tmp_path / "other", "--config", tmp_path / "run" / "config.toml")[0] == {
        "student_lora": 2,
        "fake_lora": 2,
        "teacher_bf16": True,
    }


def test_a_transformer_is_large_above_its_limit_and_a_unet_never_is(
    folder: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = describe(find(str(folder)))
    config = DistillConfig(teacher=str(folder), prompts="general")
    weights = plan.Sizes.of(known, config).weights
    for limit, is_large in ((weights, False), (weights - 1, True)):
        monkeypatch.setattr(Transformer, "lora_above", limit)
        assert plan.is_large(known) == is_large
    assert not plan.is_large(describe(find(str(sd_folder)))) and describe(find(str(sd_folder))).kind.lora_above == math.inf
    monkeypatch.setattr(Transformer, "lora_above", LARGE)
    assert planned(capsys, folder, "-o", tmp_path / "run") == (NONE, "")


@pytest.mark.parametrize(("name", "is_large"), [("SD 3.5 medium", True), ("SANA 1.6B", True), ("PixArt-Sigma", False)])
def test_published_models_are_large_or_not(name: str, is_large: bool, tmp_path: Path) -> None:
    assert plan.is_large(describe(find(str(write_description(tmp_path / "model", name))))) == is_large


@pytest.mark.parametrize("name", FITTED)
def test_an_amount_of_memory_selects_the_first_recipe_that_fits_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    teacher = DistillConfig(teacher=str(folder), prompts="general", batch_size=8, t_init=1000)
    needed = {
        memory: plan.make(DistillConfig(**{**vars(teacher), **recipe}), tmp_path, "cuda", 1, Silence()).peak / 1e9
        for memory, recipe in MEMORY.items()
    }
    wanted = {"16gb": "12gb", "48gb": "24gb", "80gb": "fast"}[name]
    asked = []

    def parsed(text: str) -> Gpu:
        """A GPU of less memory than the text says, into which the networks of a tiny teacher do not all fit."""
        asked.append(text)
        return Gpu("a GPU", 1.00001 * needed[wanted] / (1 - plan.RESERVE), 0.0)

    assert needed["fast"] > needed["24gb"] > needed["12gb"]
    monkeypatch.setattr(request, "parse_gpu", parsed)
    _, said = planned(capsys, folder, "-o", tmp_path / "run", "--batch-size", "8", "--memory", name)
    assert f"memory: recipe {wanted}, micro-batch {MEMORY[wanted].get('micro_batch', 8)} (" in said and asked == [name]


def test_a_given_micro_batch_stays_where_memory_has_room_for_a_larger_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["-o", tmp_path / "run", "--batch-size", "8", "--memory", "16gb"]
    for options, wanted in (([], 8), (["--micro-batch", "2"], 2)):
        _, said = planned(capsys, folder, *place, *options)
        assert f"memory: recipe fast, micro-batch {wanted} (" in said


def test_an_unknown_amount_of_memory_is_refused_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert sid("distill", "--memory", "20gb", "--dry-run") == 2
    assert "--memory must be one of auto, fast, 24gb, 12gb, 16gb, 48gb, 80gb, not '20gb'" in capsys.readouterr().err
