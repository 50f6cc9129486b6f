"""A run that gets worse says so while it runs, and --keep-best writes the student from before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidcli.data.prompts import open_prompts
from sidcli.errors import UsageError
from sidcli.models.loading import load
from sidcli.models.sources import find
from sidcli.settings import DistillConfig
from sidcli.training import checkpoint, distill, proxy, run_folder, samples
from tests.training.test_distill import Silent

CONFIG = DistillConfig(
    teacher="emoji-teacher",
    prompts="emoji",
    steps=5,
    batch_size=2,
    micro_batch=2,
    lr_fake=1e-4,
    lr_generator=3e-4,
    ema_images=0.0,
    precision="fp32",
)
"""A learning rate, for so small batches, at which the student gets worse from the second step on."""


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "PROXY_IMAGES", 8)
    monkeypatch.setattr(proxy, "DIVERSITY_IMAGES", 2)
    monkeypatch.setattr(samples, "GRID_IMAGES", 2)


def run(output: Path, config: DistillConfig = CONFIG, resume: Path | None = None, **more: object) -> list[str]:
    listener = Silent()
    intervals = distill.Intervals(**{"save": 100, "sample": 100, "log": 1, "eval": 1, "keep": 1} | more)  # type: ignore[arg-type]
    distill.run(load(find("emoji-teacher")), config, open_prompts("emoji"), output, "cpu", intervals, resume, listener)
    return listener.notes


def student_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.usefixtures("few_images")
def test_a_run_that_gets_worse_is_noticed_and_keep_best_writes_the_student_from_before(tmp_path: Path) -> None:
    output = tmp_path / "run"
    notes = run(output, dataclasses.replace(CONFIG, steps=3), keep_best=True)
    notes += run(output, keep_best=True)
    warnings = [note for note in notes if note.startswith("warning: the student has been getting worse since step ")]
    values = measured(output)
    best = min(values, key=lambda step: values[step])
    assert warnings and best < 3 and list(values) == [1, 2, 3, 4, 5]
    assert sorted(checkpoint.numbered(output / "checkpoints")) == [best, 5]
    kept = load_file(output / "checkpoints" / checkpoint.folder_name(best) / "average.safetensors")
    student = student_of(output)
    assert all(torch.equal(kept[name], value) for name, value in student.items())
    record, card = json.loads((output / "run.json").read_text()), json.loads((output / "student" / "sid.json").read_text())
    assert record["student"]["step"] == best and "lowest CMMD" in record["student"]["reason"] and record["steps"] == 5
    assert card["steps_trained"] == best
    page = (output / "report.html").read_text()
    assert "getting worse" in page and f"The student is that of step {best}" in page

    run(output)
    assert not torch.equal(student_of(output)["conv_in.weight"], student["conv_in.weight"]), "without the option, the last step"
    assert json.loads((output / "run.json").read_text())["student"] == {"step": 5, "reason": "the last step"}


def measured(output: Path) -> dict[int, float]:
    """CMMD to the teacher of each trained student that was measured, by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["proxy_cmmd"] for line in lines if line.get("proxy_cmmd") is not None and line["step"]}


def written(output: Path) -> int:
    """The step of the student that a run wrote."""
    return json.loads((output / "student" / "sid.json").read_text())["steps_trained"]


@pytest.mark.usefixtures("few_images")
def test_a_run_that_goes_on_from_an_older_checkpoint_still_writes_the_best_student_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "PROXY_IMAGES", 3)
    output, config, keeping = tmp_path / "run", dataclasses.replace(CONFIG, steps=3), {"keep_best": True, "save": 1, "keep": 3}
    run(output, config, **keeping)
    before, student, checkpoints = measured(output), student_of(output), output / "checkpoints"
    assert min(before, key=lambda step: before[step]) == written(output) == 1
    notes = run(output, config, checkpoints / checkpoint.folder_name(2), **keeping)
    assert any(note.startswith("set aside: ") for note in notes) and sorted(checkpoint.numbered(checkpoints)) == [1, 2, 3]
    assert measured(output) == before and written(output) == 1
    assert all(torch.equal(value, student[name]) for name, value in student_of(output).items())


def test_keep_best_needs_measurements() -> None:
    with pytest.raises(UsageError, match="--keep-best selects by the measurements of --eval-every, which is 0"):
        distill.Intervals(keep_best=True)


def test_the_measurements_of_a_step_are_dropped_only_if_they_are_made_again() -> None:
    intervals, config = distill.Intervals(eval=50), dataclasses.replace(CONFIG, steps=300)
    assert [run_folder.is_measured(step, intervals, config) for step in (0, 50, 130, 300)] == [True, True, False, True]
    assert not run_folder.is_measured(50, distill.Intervals(), config)
