"""Diffusion Self-Distillation in three stages (sheets, curation, tuning), and its distillation to one step."""

import collections
import dataclasses
import hashlib
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

from sidcli import api, engine, objectives
from sidcli.curation import endpoint
from sidcli.curation.features import FeaturesJudge
from sidcli.data import pair_images
from sidcli.data import pairs as store
from sidcli.data.prompts import open_prompts
from sidcli.data.sheets import sheet_prompt
from sidcli.errors import EnvironmentProblem, InputError, Interrupted, UsageError
from sidcli.models.loading import load
from sidcli.models.reference import layout_of
from sidcli.models.sources import find
from sidcli.objectives import self_distillation
from sidcli.progress import Progress
from sidcli.settings import DistillConfig, differences
from sidcli.training import distill, pairs
from sidcli.training.request import Request, check_objective, pairs_of_run
from tests.curation.test_endpoint import Endpoint
from tests.inprocess import sid
from tests.training.test_distill import KillAt, Silent, state

SETTINGS = objectives.SelfDistillation.Settings(
    sheets=3, sheet_steps=2, judge="none", pairs="shared-attention", copy=1.0, caption_dropout=0.3, reference_dropout=0.3
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

    def __init__(self, stage: str, after: float, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.stage, self.after, self.number = stage, after, number

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "") -> Iterator[Progress]:  # type: ignore[override]
        done = 0.0

        def advance(amount: float, text: str = "") -> None:
            nonlocal done
            done += amount
            if what == self.stage and done >= self.after:
                os.kill(os.getpid(), self.number)

        yield advance


def written(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def tuned(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> Path:
    return run(sd_folder, tuning, tmp_path / "tuned").run


class Stage:
    """The stages before the training of a run, sheets and curation, on a tiny teacher."""

    def __init__(self, teacher: Any, config: DistillConfig, folder: Path):
        self.folder, self.config = folder, config
        self.engine = engine.Engine(teacher, config, open_prompts(config.prompts), torch.device("cpu"))

    def prepare(self, **settings: Any) -> list[str]:
        """Return the notes of the stages with these settings of the objective."""
        self.engine.config, heard = dataclasses.replace(self.config, objective=dataclasses.replace(SETTINGS, **settings)), Silent()
        pairs.prepare(self.engine, self.folder, "a fingerprint", heard)
        return heard.notes


@pytest.fixture
def stage(sd: Any, tuning: DistillConfig, tmp_path: Path) -> Stage:
    return Stage(sd, tuning, tmp_path / "pairs")


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
    two = api.sample(["a cat", "a cat"], tuned, reference=[files[0], Image.open(files[1])], steps=2, listener=Silent())
    first, second = two.images
    assert first.size == (64, 64), "only the second frame is drawn"
    assert np.asarray(first).tolist() != np.asarray(second).tolist()
    assert [one.reference["file"] for one in two.drawn if one.reference] == ["1.png", None]
    one = api.sample("a cat", tuned, reference=files[0], steps=2, output=tmp_path / "out.png", listener=Silent())
    record = {"file": "1.png", "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest()}
    with Image.open(tmp_path / "out.png") as opened:
        assert json.loads(opened.text["sid"])["reference"] == record  # type: ignore[attr-defined]
        assert np.abs(np.subtract(np.asarray(opened, np.int16), np.asarray(first, np.int16))).max() <= 1
    assert one.as_dict()["images"][0]["reference"] == record
    for prompts, given, said in (
        (["a cat"] * 3, files, "2 reference images for 3 prompts"),
        (["a cat"], [], "0 reference images for 1 prompt"),
        (["a cat"], 5, "reference must be a path, a PIL image, or a list"),
    ):
        with pytest.raises(UsageError, match=said):
            api.sample(prompts, tuned, reference=given, steps=2)  # type: ignore[arg-type]
    shown = [part for file in files for part in ("--reference", file)]
    assert sid("sample", "a cat", "a dog", *shown, "--model", tuned, "--steps", 2, "-o", tmp_path / "two") == 0
    kept = [json.loads(Image.open(file).text["sid"])["reference"]["file"] for file in sorted((tmp_path / "two").glob("0*.png"))]  # type: ignore[attr-defined]
    assert kept == ["1.png", "2.png"]
    with pytest.raises(InputError, match="is not a student") as caught:
        api.export(tuned, tmp_path / "export", "onnx", listener=api.SILENT)
    assert f"sid distill --teacher {tuned}" in caught.value.hint
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
    monkeypatch.setattr(FeaturesJudge, "unit", 1)
    judged = dataclasses.replace(SETTINGS, judge="features", same="-1", caption="-1")
    tuning = dataclasses.replace(tuning, objective=judged)
    whole = run(sd_folder, tuning, tmp_path / "whole").run
    folder = tmp_path / "halves" / "pairs"
    with pytest.raises(Interrupted) as caught:
        run(sd_folder, tuning, tmp_path / "halves", StopIn(stage, 1.5))
    assert caught.value.message == f"interrupted before the first step; the sheets and scores in {folder} are kept"
    assert caught.value.hint == "run the same command to continue" and caught.value.exit_code == 128 + signal.SIGTERM
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
    assert any("2 of 3 kept by judge none (67%); rejected by gate: copy 1" in note for note in heard.notes)


@pytest.mark.parametrize(("kind", "panels", "size"), [("grid", 4, (128, 128)), ("shared-attention", 2, (128, 64))])
def test_sheets_have_the_panels_that_were_asked_for(
    sd_folder: Path, tuning: DistillConfig, tmp_path: Path, kind: str, panels: int, size: tuple[int, int]
) -> None:
    asked = dataclasses.replace(SETTINGS, pairs=kind, panels=panels, sheets=1, cut=0.0)
    folder = run(sd_folder, dataclasses.replace(tuning, objective=asked, steps=1), tmp_path / "run").run / "pairs"
    with Image.open(folder / "sheets" / "00000000.png") as sheet:
        assert sheet.size == size
    rows = store.read_rows(folder)
    assert len(rows) == panels * (panels - 1) // 2
    assert len({box for row in rows for box in row.boxes}) == panels


def test_the_panels_of_a_shared_attention_depend_on_each_other(sd: Any, config: DistillConfig) -> None:
    made = engine.Engine(sd, dataclasses.replace(config, objective=SETTINGS), open_prompts("general"), torch.device("cpu"))
    x = torch.randn(2, *made.latent_shape[:2], made.frame_width)
    t, cond = torch.tensor([500, 500]), made.sampler.encode(["a cat", "a dog"])
    with torch.no_grad():
        alone = made.kind.denoise(made.teacher, x, t, cond)
        with pairs.shared_attention(made, 2):
            shared = made.kind.denoise(made.teacher, x, t, cond)
        assert torch.equal(made.kind.denoise(made.teacher, x, t, cond), alone), "afterwards the teacher is as before"
    assert (shared - alone).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 2])
def test_panels_share_the_set_part_of_the_variance_of_their_noise_and_each_panel_keeps_variance_one(rows: int) -> None:
    panels = pairs.panels_of(pairs.sheet_noise((4, 16, 16), rows, 0.8, 3, range(40)), rows).unflatten(0, (40, -1)).flatten(2)
    assert torch.allclose(panels.var(), torch.tensor(1.0), atol=0.03)
    for other in range(1, 2 * rows):
        assert torch.allclose((panels[:, 0] * panels[:, other]).mean(), torch.tensor(0.8), atol=0.03)
    some = pairs.panels_of(pairs.sheet_noise((4, 16, 16), rows, 0.8, 3, range(5, 7)), rows)
    assert torch.equal(some.unflatten(0, (2, -1)).flatten(2), panels[5:7]), (
        "the noise of a sheet does not depend on the other sheets"
    )


def test_without_shared_noise_the_panels_are_independent() -> None:
    left, right = pairs.panels_of(pairs.sheet_noise((4, 16, 16), 1, 0.0, 3, range(40)), 1).unflatten(0, (40, 2)).unbind(1)
    assert abs(float((left * right).mean())) < 0.03


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.5), (0.5, 0.0)])
def test_sheets_of_other_shared_noise_are_refused(stage: Stage, first: float, then: float) -> None:
    stage.prepare(shared_noise=first)
    with pytest.raises(InputError, match=rf"holds sheets of other settings: shared noise: {first or None} -> {then or None}"):
        stage.prepare(shared_noise=then)


def test_a_folder_that_holds_sheets_of_other_settings_is_refused(tuned: Path, sd_folder: Path, tuning: DistillConfig) -> None:
    shutil.rmtree(tuned / "checkpoints"), shutil.rmtree(tuned / "student")
    other = dataclasses.replace(tuning, objective=dataclasses.replace(SETTINGS, sheet_guidance=9.0))
    with pytest.raises(InputError, match=r"holds sheets of other settings: guidance: 3\.0 -> 9\.0"):
        run(sd_folder, other, tuned)


def test_a_run_of_which_no_pair_is_kept_says_how_to_go_on(sd_folder: Path, tuning: DistillConfig, tmp_path: Path) -> None:
    strict = dataclasses.replace(SETTINGS, pairs="grid", judge="features", same="1")
    with pytest.raises(InputError) as caught:
        run(sd_folder, dataclasses.replace(tuning, objective=strict), tmp_path / "run")
    assert "none of 3 pairs is kept; rejected by gate: same 3; " in caught.value.message
    assert caught.value.hint.startswith(
        "a lower --set same, or another --set judge; --set pairs=shared-attention in a new --output"
    )
    assert (tmp_path / "run" / "pairs" / "examples.png").is_file()


def test_a_yield_below_2_percent_is_a_note_with_the_rejections_by_gate_and_the_ways_to_more_pairs() -> None:
    counts = collections.Counter({"kept": 3, "same": 190, "cut": 7})
    said, ways = pairs.few(dataclasses.replace(SETTINGS, pairs="grid"), counts, 200, Path("pairs"))
    assert said == "only 3 of 200 pairs are kept; rejected by gate: same 190, cut 7; pairs/examples.png shows some"
    wanted = [
        "a lower --set same, or another --set judge",
        "a lower --set cut",
        "--set pairs=shared-attention",
        "--set shared_noise=0.8",
        "more --set sheets",
    ]
    assert [way.split(" in a new ")[0] for way in ways.split("; ")] == wanted
    assert "shared-attention" not in pairs.few(SETTINGS, counts, 200, Path("pairs"))[1]
    assert "shared_noise" not in pairs.few(dataclasses.replace(SETTINGS, shared_noise=0.5), counts, 200, Path("pairs"))[1]


def test_few_kept_pairs_are_a_warning(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "FEW", 1.1)
    assert any(note.startswith("warning: only 3 of 3 pairs are kept; ") for note in stage.prepare())


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


def test_a_student_trains_on_the_pairs_of_its_teacher_also_if_those_are_of_another_run(
    tuned: Path, sd_folder: Path, tuning: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tuned.parent)
    other = run(sd_folder, dataclasses.replace(tuning, data=tuned.name, steps=1), tmp_path / "other").run
    monkeypatch.chdir("/")
    assert not (other / "pairs").exists()
    for teacher in (tuned, other):
        asked = Request.of(str(teacher), None, "sid", None, None, {}, None, None, "auto", None, {})
        assert Path(asked.before_path.data) == tuned / "pairs"
    assert pairs_of_run(str(sd_folder)) is None


def test_a_run_of_a_version_without_weighting_continues_with_the_loss_of_that_version(tuning: DistillConfig) -> None:
    older = dataclasses.asdict(tuning)
    del older["objective"]["weighting"]
    assert differences(older, tuning) == ["weighting: uniform -> debiased"]
    same = dataclasses.replace(tuning.objective, weighting="uniform")  # type: ignore[type-var]
    assert differences(older, dataclasses.replace(tuning, objective=same)) == []


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
    reference = tuned / "pairs" / "sheets" / "00000000.png"
    with pytest.raises(UsageError, match="takes no reference image"):
        api.sample("a cat", sd_folder, reference=reference, steps=1)


UNABLE = [name for name in objectives.OBJECTIVES if name not in ("sid", "vsd", "dmd2", "self-distillation")]


def test_an_objective_that_cannot_use_references_refuses_a_teacher_with_them_before_it_asks_for_images(
    tuned: Path, tmp_path: Path
) -> None:
    for name in UNABLE:
        for data in ("", "teacher"):
            with pytest.raises(UsageError) as caught:
                api.distill(tuned, tmp_path / "run", objective=name, listener=Silent(), data=data)
            said = f"{tuned} takes a reference image, and objective {name} does not distill such a teacher"
            assert (caught.value.message, caught.value.hint) == (said, "--objective sid, vsd, or dmd2 without its GAN")


def test_dmd2_with_its_gan_refuses_a_teacher_with_references(tuned: Path, config: DistillConfig) -> None:
    from sidcli.engine import check_teacher

    gan = objectives.Dmd2.Settings(gan=0.001)
    with pytest.raises(UsageError, match="objective dmd2 does not distill such a teacher"):
        check_teacher(load(find(str(tuned))), dataclasses.replace(config, objective=gan, data="x"))


@pytest.mark.parametrize("layout", ["diptych", "frames"])
def test_a_one_step_student_with_references_leaves_as_a_graph_that_draws_the_same(
    layout: str, sd_folder: Path, tuning: DistillConfig, config: DistillConfig, tmp_path: Path
) -> None:
    objective = dataclasses.replace(SETTINGS, layout=layout)
    tuned = run(sd_folder, dataclasses.replace(tuning, objective=objective), tmp_path / "tuned").run
    one_step = dataclasses.replace(config, teacher=str(tuned), data=str(tuned), steps=1)
    student = run(tuned, one_step, tmp_path / "one").run
    for form in ("onnx", "openvino", "torch-export"):
        exported = api.export(student, tmp_path / form, form, listener=api.SILENT)
        assert exported.difference is not None and exported.difference <= 1, form
    reference = tmp_path / "reference.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(reference)
    first, *others = (
        np.asarray(api.sample("a cat", one, reference=reference, seed=3).images[0], np.int16)
        for one in (student, tmp_path / "onnx", tmp_path / "openvino")
    )
    assert max(np.abs(first - other).max() for other in others) <= 1
    with pytest.raises(UsageError, match="draws the subject of a reference image, and none is given"):
        api.sample("a cat", tmp_path / "onnx")
    for form in ("diffusers", "single-file", "lora"):
        with pytest.raises(InputError, match=f"takes a reference image, which --format {form} does not support"):
            api.export(student, tmp_path / "folder", form, listener=api.SILENT)


def test_several_references_show_one_subject_for_one_prompt(
    tuned: Path, sd_folder: Path, tuning: DistillConfig, tmp_path: Path
) -> None:
    files = [tmp_path / f"{number}.png" for number in (1, 2, 3)]
    for number, file in enumerate(files):
        Image.fromarray(np.full((70, 64, 3), 40 + 90 * number, np.uint8)).save(file)
    frames = dataclasses.replace(tuning, objective=dataclasses.replace(SETTINGS, layout="frames"), steps=1, data=str(tuned))
    taking_several = run(sd_folder, frames, tmp_path / "frames").run
    model = load(find(str(taking_several)))
    torch.nn.init.normal_(model.denoiser.conv_in.weight, std=0.1)

    def draw(shown: list[Path], **options: Any) -> np.ndarray:
        return np.asarray(api.sample("a cat", model, reference=shown, steps=2, listener=Silent(), **options).images[0], np.int16)

    one, three, other = draw(files[:1]), draw(files), draw([files[0]] * 3)
    assert one.shape == three.shape == (64, 64, 3)
    assert not np.array_equal(one, three) and not np.array_equal(three, other)
    assert np.array_equal(draw(files[:1]), one), "the model takes one reference again"
    assert not np.array_equal(draw(files, reference_guidance=3.0), three)
    shown = [part for file in files for part in ("--reference", file)]
    assert sid("sample", "a cat", *shown, "--model", taking_several, "--steps", 2, "-o", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as image:
        record = json.loads(image.text["sid"])["reference"]  # type: ignore[attr-defined]
    assert [one["file"] for one in record] == ["1.png", "2.png", "3.png"]
    with pytest.raises(UsageError, match="takes one reference image for an image, and 3 are given"):
        api.sample("a cat", tuned, reference=files, steps=1, listener=Silent())


@pytest.mark.parametrize("weighting", self_distillation.WEIGHTINGS)
@pytest.mark.parametrize("layout", self_distillation.LAYOUTS)
def test_the_gradient_is_that_of_the_error_of_both_images_with_the_weights_of_noise_and_reference(
    sd: Any, config: DistillConfig, layout: str, weighting: str
) -> None:
    settings = dataclasses.replace(SETTINGS, layout=layout, reference_weight=0.25, weighting=weighting)
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
    if weighting == "debiased":
        of_signal = torch.as_tensor(sd.path.abar)[batch.t].double()
        error = error * ((1 - of_signal) / of_signal).sqrt().clamp(max=10.0).view(-1, 1, 1, 1)
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


# Settings that cannot work are refused before a sheet is drawn


NUMBERS = [name for name, value in dataclasses.asdict(SETTINGS).items() if type(value) in (int, float)]


@pytest.mark.parametrize("value", [-1000001, 10**9])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*, not {value}"):
        dataclasses.replace(SETTINGS, **{name: type(getattr(SETTINGS, name))(value)})


@pytest.mark.parametrize("name", ["same", "caption"])
@pytest.mark.parametrize(
    ("judge", "value", "least"), [("features", "2", -1), ("clip", "-1.5", -1), ("http", "-0.5", 0), ("oracle", "1.01", 0)]
)
def test_a_threshold_that_no_score_of_the_judge_or_every_score_passes_is_refused(
    name: str, judge: str, value: str, least: int
) -> None:
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(SETTINGS, judge=judge, **{name: value})
    assert caught.value.message == f"{name} must be auto or a number from {least} to 1 with the judge {judge}, not {value!r}"
    for number in ("nan", "much"):
        with pytest.raises(UsageError, match=f"{name} must be auto or a number"):
            dataclasses.replace(SETTINGS, judge=judge, **{name: number})


def test_sheets_are_not_drawn_in_more_steps_than_the_teacher_has_timesteps(config: DistillConfig) -> None:
    made = dataclasses.replace(config, objective=dataclasses.replace(SETTINGS, sheet_steps=60))
    with pytest.raises(UsageError, match="sheet_steps must be at most 50, the timesteps of the teacher, not 60"):
        objectives.SelfDistillation(made, 50)


def test_a_judge_that_does_not_know_the_captions_or_lacks_an_option_is_refused_before_the_teacher_is_read(
    config: DistillConfig,
) -> None:
    def check(judge: str, prompts: str, data: str = "") -> None:
        asked = dataclasses.replace(SETTINGS, judge=judge)
        check_objective(dataclasses.replace(config, objective=asked, prompts=prompts, t_min=0, t_max=1000, data=data))

    with pytest.raises(UsageError) as caught:
        check("oracle", "general")
    assert "emoji world only, and --prompts is general" in caught.value.message and "--prompts emoji" in caught.value.hint
    check("oracle", "emoji-nouns")
    with pytest.raises(UsageError, match="the judge http needs url and model"):
        check("http", "general")
    check("none", "general")


def test_a_judge_whose_model_is_missing_is_refused_before_a_sheet_is_drawn(stage: Stage, tmp_path: Path) -> None:
    for judge in ("dino", "clip", "vlm"):
        with pytest.raises(InputError) as caught:
            stage.prepare(judge=judge, judge_model=str(tmp_path / "absent"))
        assert str(tmp_path / "absent") in caught.value.message and "--set judge_model" in caught.value.hint, judge
    assert not list(stage.folder.rglob("*.png"))


@pytest.mark.parametrize("judge", ["dino", "clip", "vlm"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_dry_run_refuses_a_missing_model_of_the_judge_as_the_run_does(
    judge: str, is_there: bool, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_there:  # a folder that holds no model
        (tmp_path / "model").mkdir()
    command = ["distill", "--teacher", sd_folder, "--objective", "self-distillation", "--set", f"judge={judge}"]
    command += ["--set", f"judge_model={tmp_path / 'model'}", "--set", "sheets=1", "--device", "cpu", "-o", tmp_path / "run"]
    said = []
    for more in ([], ["--dry-run"]):
        assert sid(*command, *more) == 3
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]
    assert str(tmp_path / "model") in said[0] and "--set judge_model" in said[0] and not (tmp_path / "run").exists()


def test_the_time_of_a_dry_run_says_what_it_leaves_out(sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", "--teacher", sd_folder, "--plan-for", "24gb"]
    for more, said in (
        (["--objective", "self-distillation"], "without sheets, curation and samples"),
        (["--objective", "lcm", "--data", "teacher"], "without the teacher's images and samples"),
        ([], "without samples"),
    ):
        assert sid(*command, *more) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# time")]
        assert lines and all(line.endswith(f" (estimate, {said})") for line in lines)


def test_an_endpoint_that_fails_is_noticed_before_the_sheets_and_later_costs_no_score_that_is_there(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint([b"<html>Welcome</html>"]).running() as served:
        asked = {"judge": "http", "judge_url": served.url, "judge_model": "some-vlm", "sheets": 5}
        with pytest.raises(EnvironmentProblem, match="answered without words of a model: <html>Welcome"):
            stage.prepare(**asked)
        assert not list(stage.folder.rglob("*.png")) and len(served.requests) == 2

        served.answers = ["ANSWER: YES"] * (3 + 4 * 3) + [b"<html>Busy</html>"]  # the trial pair and one unit
        with pytest.raises(EnvironmentProblem, match=f"{served.url}/chat/completions answered without words .*Busy"):
            stage.prepare(**asked)
        (file,) = stage.folder.glob("scores-http-*.jsonl")
        assert len(file.read_text().splitlines()) == 4

        served.answers, served.requests = ["ANSWER: YES"], []
        stage.prepare(**asked)
        assert len(served.requests) == 3, "one pair was left, and no sheet to draw"
    assert len(store.read_rows(stage.folder)) == 5


ROCKET = "SUBJECT: a dented tin rocket with a red fin.\nSCENE: on a beach at noon\n- Scene: **flying over a city at night**"


def test_a_language_model_writes_the_scenes_of_sheets_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    second = sheet_prompt(open_prompts("general"), stage.config.seed, 1, 2).subject
    with Endpoint([lambda body: "SUBJECT: a cat" if f"Subject: {second}" in json.dumps(body) else ROCKET]).running() as served:
        asked = {"scenes": "http", "scenes_url": served.url, "scenes_model": "some-llm"}
        notes = stage.prepare(**asked)
        assert "1 sheet without scenes of some-llm; they have those of the built-in grammar" in notes
        assert len(served.requests) == 4, "an answer that cannot be read is asked for once more"
        rows = store.read_rows(stage.folder)
        assert [row.subject == "a dented tin rocket with a red fin" for row in rows] == [True, False, True]
        subject = rows[0].subject
        assert rows[0].captions == (f"{subject} on a beach at noon", f"{subject} flying over a city at night")
        (message,) = served.requests[0][2]["messages"]
        assert "write 2 scenes" in str(message["content"])
        served.requests.clear()
        before = written(stage.folder)
        lines = (stage.folder / "scenes.jsonl").read_text().splitlines(keepends=True)
        (stage.folder / "scenes.jsonl").write_text("".join(lines) + '{"subject": "a c')
        stage.prepare(**asked)
        assert not served.requests and written(stage.folder) == before
        with pytest.raises(InputError, match="scenes: some-llm -> other-llm"):
            stage.prepare(**asked | {"scenes_model": "other-llm"})


def test_a_model_that_writes_no_scenes_is_an_error_before_a_sheet_is_drawn(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint(["Hello! How can I help you?"]).running() as served:
        with pytest.raises(InputError, match=r"some-llm at .* writes no scenes: Hello! How can I help you\?") as caught:
            stage.prepare(scenes="http", scenes_url=served.url, scenes_model="some-llm")
        assert "--set scenes_url" in caught.value.hint
    assert not list(stage.folder.rglob("*.png"))
    with pytest.raises(UsageError, match="needs an endpoint and a model"):
        dataclasses.replace(SETTINGS, scenes="http")
    with pytest.raises(UsageError, match="other scenes than those of the emoji world"):
        asked = dataclasses.replace(SETTINGS, scenes="http", scenes_url="http://here", scenes_model="x")
        check_objective(dataclasses.replace(stage.config, objective=asked, prompts="emoji", t_min=0, t_max=1000))


# What is in the folder


def test_a_damaged_sheet_is_drawn_again(stage: Stage) -> None:
    stage.prepare()
    before = written(stage.folder)
    sheets = [stage.folder / "sheets" / f"{index:08d}.png" for index in range(3)]
    sheets[0].write_bytes(sheets[0].read_bytes()[:-40])
    content = bytearray(sheets[1].read_bytes())
    content[len(content) // 2] ^= 1
    sheets[1].write_bytes(content)
    Image.new("RGB", (8, 8)).save(sheets[2])
    with pytest.raises(InputError, match="00000000\\.png is not a PNG image: ") as caught:
        pair_images.panels(stage.folder, store.read_rows(stage.folder)[0])
    assert "run the command of its run folder again" in caught.value.hint
    names = ", ".join(f"sheets/{index:08d}.png" for index in range(3))
    assert f"drawn again, because they are damaged: {names} in {stage.folder}" in stage.prepare()
    assert written(stage.folder) == before


EDITS = {
    "line 2 has kept: True -> False": lambda lines: [lines[0], lines[1].replace('"kept": true', '"kept": false'), lines[2]],
    "line 1 has same: 0.0 -> 0.5, and 2 other lines": lambda lines: [line.replace('"same": 0.0', '"same": 0.5') for line in lines],
    "it has 2 lines instead of 3": lambda lines: lines[:2],
    "line 3 has not a pair": lambda lines: [*lines[:2], "{"],
    "line 3 has another spelling": lambda lines: [*lines[:2], lines[2].replace('", "', '","')],
    "its line ends differ": lambda lines: [f"{line}\r" for line in lines],
}
"""What is said about edited lines of pairs.jsonl -> the edit."""


def test_edited_pairs_are_not_overwritten(stage: Stage) -> None:
    stage.prepare()
    file, before = stage.folder / "pairs.jsonl", written(stage.folder)
    for said, edit in EDITS.items():
        edited = "".join(f"{line}\n" for line in edit(before["pairs.jsonl"].decode().splitlines())).encode()
        file.write_bytes(edited)
        for copy in (SETTINGS.copy, 0.02):
            with pytest.raises(InputError) as caught:
                stage.prepare(copy=copy)
            assert caught.value.message == f"{file} was edited since sid wrote it: {said}"
            assert "delete it to write it again" in caught.value.hint and f"copy {stage.folder} and give" in caught.value.hint
        assert file.read_bytes() == edited
    file.unlink()
    stage.prepare()
    assert written(stage.folder) == before


@pytest.mark.parametrize("sheets", [2, 3, 5])
def test_edited_scores_are_not_used(stage: Stage, sheets: int) -> None:
    stage.prepare()
    (file,) = stage.folder.glob("scores-*.jsonl")
    file.write_text(file.read_text().replace('"cut": 1.0', '"cut": 0.1'))
    with pytest.raises(InputError, match=rf"{file.name} was edited since sid wrote it"):
        stage.prepare(sheets=sheets)


def test_more_sheets_are_added_to_those_that_are_there_and_fewer_leave_the_rest_unused(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Stage(stage.engine.sampler.model, stage.config, tmp_path / "whole")
    whole.prepare(sheets=20)
    wanted = written(whole.folder)
    stage.prepare(sheets=16)
    append = pairs.append_line

    def append_two_more(file: Path, line: str) -> None:
        append(file, line)
        if len(file.read_text().splitlines()) == 18:
            raise Interrupted(signal.SIGTERM, "stopped")

    monkeypatch.setattr(pairs, "append_line", append_two_more)
    with pytest.raises(Interrupted):
        stage.prepare(sheets=20)
    monkeypatch.undo()
    for sheets in (20, 16, 20):
        stage.prepare(sheets=sheets)
        assert len(store.read_rows(stage.folder)) == sheets
    assert written(stage.folder) == wanted


def test_a_damaged_record_of_the_pairs_is_an_error_that_says_what_to_delete_and_a_missing_one_is_written_again(
    stage: Stage,
) -> None:
    stage.prepare()
    before = written(stage.folder)
    for name in ("sheets.json", "curation.json"):
        for content in ("{", "[]", ""):
            (stage.folder / name).write_text(content)
            with pytest.raises(InputError, match=rf"{name} is damaged: ") as caught:
                stage.prepare()
            assert f"delete {stage.folder}" in caught.value.hint
        (stage.folder / name).write_bytes(before[name])
    (stage.folder / "curation.json").unlink()
    stage.prepare()
    assert written(stage.folder) == before


@pytest.mark.parametrize("count", ["x", -1, None, 1e9, 2])
def test_a_record_with_another_number_of_pairs_does_not_match_the_scores(stage: Stage, count: object) -> None:
    stage.prepare()
    record = stage.folder / "curation.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"pairs": count}))
    with pytest.raises(InputError, match="was edited since sid wrote it"):
        stage.prepare()


def test_settings_and_files_of_a_curation_have_the_same_names(stage: Stage) -> None:
    stage.prepare()
    row = json.loads((stage.folder / "pairs.jsonl").read_text().splitlines()[0])
    record = json.loads((stage.folder / "curation.json").read_text())
    (file,) = stage.folder.glob("scores-*.jsonl")
    gates = ["same", "caption", "copy", "cut"]
    assert list(record["gates"]) == gates and all(hasattr(SETTINGS, gate) and gate in row for gate in gates)
    assert set(json.loads(file.read_text().splitlines()[0])) == {*gates, "words"}


def test_an_emoji_teacher_with_the_prompts_of_a_user_is_not_measured_against_the_oracle(
    tuning: DistillConfig, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a dragon over London\n")
    own = dataclasses.replace(tuning, teacher="emoji-teacher", prompts=str(tmp_path / "prompts.txt"))
    emoji = Stage(load(find("emoji-teacher")), own, tmp_path / "pairs")
    asked = {"sheet_steps": 1, "cut": 0.0, "pairs": "grid"}
    emoji.prepare(sheets=1, **asked)
    assert "oracle" not in json.loads((tmp_path / "pairs" / "curation.json").read_text())
    with pytest.raises(UsageError, match="the judge oracle knows the captions of the emoji world"):
        emoji.prepare(judge="oracle", sheets=2, **asked)
