"""Diffusion Self-Distillation in three stages (sheets, curation, tuning), and its distillation to one step."""

import dataclasses
import html
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidcli import api, curation, engine, objectives
from sidcli.data import pairs as store
from sidcli.data.prompts import open_prompts
from sidcli.errors import InputError, Interrupted, UsageError
from sidcli.models.loading import load
from sidcli.models.reference import layout_of
from sidcli.models.sources import find
from sidcli.objectives import self_distillation
from sidcli.progress import Progress
from sidcli.settings import DistillConfig
from sidcli.training import distill
from sidcli.training.request import check_objective
from tests.training.test_distill import KillAt, Silent, state

SETTINGS = objectives.SelfDistillation.Settings(
    sheets=3, sheet_steps=2, judge="none", pairs="shared-attention", copy=2.0, text_dropout=0.3, reference_dropout=0.3
)
MEASURED = distill.Intervals(eval=1)
STAGES = ("draw sheets", "judge pairs (features)")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TUNED_STEPS", 2)


@pytest.fixture
def tuning(config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, objective=SETTINGS, t_min=0, t_max=1000, steps=2)


def run(teacher: Path, config: DistillConfig, output: Path, listener: Silent | None = None) -> distill.Result:
    intervals = distill.Intervals(save=1, sample=9, log=1)
    prompts = open_prompts(config.prompts)
    return distill.run(load(find(str(teacher))), config, prompts, output, "cpu", intervals, None, listener or Silent())


class StopIn(Silent):
    """Sends this process a signal in a stage before the training, after some of its items."""

    def __init__(self, stage: str, after: float) -> None:
        super().__init__()
        self.stage, self.after = stage, after

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "") -> Iterator[Progress]:  # type: ignore[override]
        done = 0.0

        def advance(amount: float, text: str = "") -> None:
            nonlocal done
            done += amount
            if what == self.stage and done >= self.after:
                os.kill(os.getpid(), signal.SIGTERM)

        yield advance


def written(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def tuned(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> Path:
    return run(sd_folder, tuning, tmp_path / "tuned").run


def test_the_stages_end_in_a_model_that_draws_the_subject_of_a_reference(tuned: Path, tmp_path: Path) -> None:
    rows = store.read_rows(tuned / "pairs")
    assert len(rows) == 3 and all(row.kept for row in rows)
    assert len({row.subject for row in rows}) > 1 and all(one != other for one, other in (row.captions for row in rows))
    assert json.loads((tuned / "pairs" / "curation.json").read_text())["counts"] == {"kept": 3}
    model = load(find(str(tuned)))
    assert not model.is_student and layout_of(model.denoiser.config) and model.card["guidance"] == 2.0
    files = []
    for number in (1, 2):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((64, 64, 3), 90 * number, np.uint8)).save(files[-1])
    first, second = (api.sample("a cat", tuned, reference=file, steps=2).images[0] for file in files)
    assert first.size == (64, 64), "only the second frame is drawn"
    assert np.asarray(first).tolist() != np.asarray(second).tolist()
    page = (tuned / "report.html").read_text()
    assert "model with a reference image, tuned from" in page and "Pairs of images of one subject" in page
    assert f'sid sample "a cat" --reference reference.png --model {tuned}' in html.unescape(page)
    with Image.open(tuned / "samples" / "00000002.png") as picture:
        assert picture.size == (8 * 64, 2 * 64), "the references above what was drawn from them"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_stopped_in_a_stage_continues_bit_for_bit(
    sd_folder: Path, tuning: DistillConfig, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidcli.training.pairs.UNIT", 1)
    judged = dataclasses.replace(SETTINGS, judge="features", same="-2", caption="-1e9")
    tuning = dataclasses.replace(tuning, objective=judged)
    whole = run(sd_folder, tuning, tmp_path / "whole").run
    with pytest.raises(Interrupted):
        run(sd_folder, tuning, tmp_path / "halves", StopIn(stage, 1.5))
    folder = tmp_path / "halves" / "pairs"
    done = [*folder.glob("sheets/*.png")] if stage == STAGES[0] else next(folder.glob("scores-*")).read_text().splitlines()
    assert len(done) == 1, "of three"
    with pytest.raises(Interrupted):
        run(sd_folder, tuning, tmp_path / "halves", KillAt(1))
    run(sd_folder, tuning, tmp_path / "halves")
    assert written(tmp_path / "halves" / "pairs") == written(whole / "pairs")
    one, two = state(whole, 2), state(tmp_path / "halves", 2)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_line_of_scores_that_a_crash_cut_off_is_judged_again(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> None:
    folder = run(sd_folder, tuning, tmp_path / "run").run / "pairs"
    before = written(folder)
    (scores,) = folder.glob("scores-none-*.jsonl")
    scores.write_bytes(scores.read_bytes()[:-20])
    run(sd_folder, tuning, tmp_path / "run")
    assert written(folder) == before


def test_other_thresholds_need_no_new_sheets_and_no_new_scores(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, tuning, tmp_path / "run")
    scores = sorted(row.copy for row in store.read_rows(result.run / "pairs") if row.copy is not None)
    stricter = dataclasses.replace(SETTINGS, copy=scores[-1])
    shutil.rmtree(result.run / "checkpoints"), shutil.rmtree(result.run / "student")
    heard = StopIn("draw sheets", 0)
    run(sd_folder, dataclasses.replace(tuning, objective=stricter), tmp_path / "run", heard)
    rows = store.read_rows(result.run / "pairs")
    assert [row.reason for row in rows if not row.kept] == ["copy"] and len(rows) == 3
    assert any("2 of 3 kept by judge none (67%); rejected: 1 copy" in note for note in heard.notes)


@pytest.mark.parametrize(("pairs", "panels", "size"), [("grid", 4, (128, 128)), ("shared-attention", 2, (128, 64))])
def test_sheets_have_the_panels_that_were_asked_for(
    sd_folder: Path, tuning: DistillConfig, tmp_path: Path, pairs: str, panels: int, size: tuple[int, int]
) -> None:
    asked = dataclasses.replace(SETTINGS, pairs=pairs, panels=panels, sheets=1, cut=0.0)
    folder = run(sd_folder, dataclasses.replace(tuning, objective=asked, steps=1), tmp_path / "run").run / "pairs"
    with Image.open(folder / "sheets" / "00000000.png") as sheet:
        assert sheet.size == size
    rows = store.read_rows(folder)
    assert len(rows) == panels * (panels - 1) // 2
    assert len({box for row in rows for box in row.boxes}) == panels


def test_the_panels_of_a_shared_attention_depend_on_each_other(sd: Any, config: DistillConfig) -> None:
    from sidcli.training import pairs as stage

    made = engine.Engine(sd, dataclasses.replace(config, objective=SETTINGS), open_prompts("general"), torch.device("cpu"))
    x = torch.randn(2, *made.latent_shape[:2], made.frame_width)
    t, cond = torch.tensor([500, 500]), made.sampler.encode(["a cat", "a dog"])
    with torch.no_grad():
        alone = made.kind.denoise(made.teacher, x, t, cond)
        with stage.shared_attention(made, 2):
            shared = made.kind.denoise(made.teacher, x, t, cond)
        assert torch.equal(made.kind.denoise(made.teacher, x, t, cond), alone), "afterwards the teacher is as before"
    assert (shared - alone).abs().max() > 1e-3


def test_a_folder_that_holds_sheets_of_other_settings_is_refused(tuned: Path, sd_folder: Path, tuning: DistillConfig) -> None:
    shutil.rmtree(tuned / "checkpoints"), shutil.rmtree(tuned / "student")
    other = dataclasses.replace(tuning, objective=dataclasses.replace(SETTINGS, sheet_guidance=9.0))
    with pytest.raises(InputError, match=r"holds sheets of other settings: guidance: 3\.0 -> 9\.0"):
        run(sd_folder, other, tuned)


def test_a_run_of_which_no_pair_is_kept_says_how_to_go_on(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> None:
    strict = dataclasses.replace(SETTINGS, pairs="grid", copy=0.0)
    with pytest.raises(InputError) as caught:
        run(sd_folder, dataclasses.replace(tuning, objective=strict), tmp_path / "run")
    assert "none of 3 pairs is kept" in caught.value.message and "shared-attention" in str(caught.value.hint)
    assert (tmp_path / "run" / "pairs" / "examples.png").is_file()


@pytest.mark.parametrize("objective", ["sid", "vsd"])
def test_a_tuned_model_is_the_teacher_of_a_one_step_student_that_takes_references(
    tuned: Path, config: DistillConfig, tmp_path: Path, objective: str
) -> None:
    method = objectives.OBJECTIVES[objective].Settings()
    one_step = dataclasses.replace(config, teacher=str(tuned), objective=method, data=str(tuned), steps=2)
    check_objective(one_step)
    result = run(tuned, one_step, tmp_path / "one")
    student = load(find(str(result.run)))
    assert student.is_student and student.layout
    Image.fromarray(np.full((80, 60, 3), 90, np.uint8)).save(tmp_path / "reference.png")
    drawn = api.sample("a cat", result.run, reference=tmp_path / "reference.png")
    assert drawn.plan.steps == 1 and drawn.images[0].size == (64, 64)


def test_a_tuned_lora_leaves_with_its_reference_weights(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, dataclasses.replace(tuning, student_lora=2), tmp_path / "run")
    model = load(find(str(result.run)))
    added = model.denoiser.conv_in.weight[:, 4:]
    assert layout_of(model.denoiser.config) and added.abs().max() > 0
    assert not any("lora" in name for name in model.denoiser.state_dict())


def test_references_and_pairs_are_refused_where_they_do_not_belong(
    tuned: Path, sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="takes a reference image, and --data does not give pairs"):
        run(tuned, config, tmp_path / "one")
    with pytest.raises(UsageError, match=r"holds pairs with reference images, and .* takes none"):
        run(sd_folder, dataclasses.replace(config, data=str(tuned)), tmp_path / "two")
    with pytest.raises(UsageError, match=r"holds no pairs\.jsonl"):
        check_objective(dataclasses.replace(config, objective=SETTINGS, data=str(tmp_path)))
    with pytest.raises(UsageError, match="draws the subject of a reference image, and none is given"):
        api.sample("a cat", tuned, steps=1)
    with pytest.raises(UsageError, match="--eval-every 1 does not measure models that take a reference image"):
        api.distill(
            sd_folder, tmp_path / "five", objective_settings={"sheets": 1}, objective="self-distillation", intervals=MEASURED
        )
    with pytest.raises(InputError, match="takes a reference image already"):
        run(tuned, dataclasses.replace(config, objective=SETTINGS), tmp_path / "three")
    with pytest.raises(UsageError, match=r"objective regression trains on images, and .* takes a reference image"):
        method = objectives.Regression.Settings()
        run(tuned, dataclasses.replace(config, objective=method, data="teacher"), tmp_path / "four")
    reference = tuned / "pairs" / "sheets" / "00000000.png"
    with pytest.raises(UsageError, match="takes no reference image"):
        api.sample("a cat", sd_folder, reference=reference, steps=1)


def test_a_one_step_student_with_references_leaves_as_a_graph_that_draws_the_same(
    tuned: Path, config: DistillConfig, tmp_path: Path
) -> None:
    one_step = dataclasses.replace(config, teacher=str(tuned), data=str(tuned), steps=1)
    student = run(tuned, one_step, tmp_path / "one").run
    exported = api.export(student, tmp_path / "onnx", "onnx", listener=api.SILENT)
    assert exported.difference is not None and exported.difference <= 1
    reference = tmp_path / "reference.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(reference)
    drawn = [api.sample("a cat", one, reference=reference, seed=3).images[0] for one in (student, tmp_path / "onnx")]
    assert np.abs(np.subtract(*(np.asarray(image, np.int16) for image in drawn))).max() <= 1
    with pytest.raises(UsageError, match="draws the subject of a reference image, and none is given"):
        api.sample("a cat", tmp_path / "onnx")
    with pytest.raises(InputError, match="takes a reference image, which --format diffusers does not support"):
        api.export(student, tmp_path / "folder", "diffusers", listener=api.SILENT)


def test_the_objective_has_the_judges_that_there_are() -> None:
    assert set(self_distillation.JUDGES) == {*curation.JUDGES, "none"}


@pytest.mark.parametrize("layout", self_distillation.LAYOUTS)
def test_the_gradient_is_that_of_the_error_of_both_images_with_the_weight_of_the_reference(
    sd: Any, config: DistillConfig, layout: str
) -> None:
    settings = dataclasses.replace(SETTINGS, layout=layout, reference_weight=0.25)
    made = engine.Engine(sd, dataclasses.replace(config, objective=settings), open_prompts("general"), torch.device("cpu"))
    torch.manual_seed(0)
    channels, height, width = made.kind.frame_shape(made.teacher.config)
    canvases = torch.randn(4, channels, height, 2 * width)
    made.data = SimpleNamespace(at=lambda seed, position: (canvases[position], f"caption {position}"))  # type: ignore[assignment]
    (phase,) = made.objective.phases(0)
    batch = made._on_device(made.draw_batch(phase.inputs, 0, range(4)))
    drop_text, drop_reference = (torch.tensor(drops) for drops in made._drops(phase.inputs, range(4)))
    assert batch.prompts == [f"caption {place}" if not drop else "" for place, drop in enumerate(drop_text.tolist())]
    assert torch.equal(batch.reference, canvases[..., :width] * ~drop_reference.view(-1, 1, 1, 1))  # type: ignore[arg-type]
    noise = torch.randn_like(batch.noise).double().requires_grad_()
    error = (noise - batch.noise.double()).square()
    if layout == "channels":
        assert torch.equal(batch.samples, canvases[..., width:])  # type: ignore[arg-type]
        loss = error.sum() / 4
    else:
        assert torch.equal(batch.samples, canvases)  # type: ignore[arg-type]
        loss = (0.25 * error[..., :width].sum() + error[..., width:].sum()) / 4
    (expected,) = torch.autograd.grad(loss, noise)
    gradient, values = phase.gradient(made.nets, noise.detach().float(), batch)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(values["generator_loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_pairs_of_which_none_was_kept_and_damaged_folders_of_pairs_are_refused_in_one_line(
    sd_folder: Path, tuned: Path, tuning: DistillConfig, tmp_path: Path
) -> None:
    rows = [dataclasses.replace(row, kept=False) for row in store.read_rows(tuned / "pairs")]
    store.write_rows(tuned / "pairs", rows)
    with pytest.raises(InputError, match="has no pair that was kept"):
        run(sd_folder, dataclasses.replace(tuning, data=str(tuned)), tmp_path / "other")
    (tuned / "pairs" / "sheets.json").unlink()
    with pytest.raises(InputError, match=r"holds sheets and no sheets\.json"):
        run(sd_folder, dataclasses.replace(tuning, steps=3), tuned)


def test_a_judge_that_cannot_be_opened_is_refused_before_a_sheet_is_drawn(
    sd_folder: Path, tuning: DistillConfig, tmp_path: Path
) -> None:
    asked = dataclasses.replace(SETTINGS, judge="http")
    with pytest.raises(UsageError, match="the judge http needs url and model"):
        run(sd_folder, dataclasses.replace(tuning, objective=asked), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.png"))


def test_the_card_of_a_student_with_references_says_how_to_draw_with_it(tuned: Path, config: DistillConfig, tmp_path: Path) -> None:
    one_step = dataclasses.replace(config, teacher=str(tuned), data=str(tuned), steps=1)
    text = (run(tuned, one_step, tmp_path / "one").student / "README.md").read_text()
    assert 'sid sample "a cat" --reference reference.png --model FOLDER' in text and "DiffusionPipeline" not in text
