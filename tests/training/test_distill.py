import dataclasses
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine, Measurements
from sidcli.errors import EnvironmentProblem, InputError, Interrupted, SidError, UsageError
from sidcli.files import check_unlocked, locked
from sidcli.formats import export
from sidcli.formats.order import Order
from sidcli.models.kind import Cond
from sidcli.models.loading import Model, load
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find, read_card
from sidcli.progress import silent
from sidcli.report.page import Commands
from sidcli.report.run import run_sections
from sidcli.settings import DistillConfig, flat, read_toml
from sidcli.training import checkpoint, distill, proxy, run_folder, samples
from tests import REPOSITORY
from tests.inprocess import sid
from tests.training.test_checkpoint import rewritten


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Any]:
        return nullcontext(silent)


class KillAt(Silent):
    """Sends this process a signal after a given step, as a person or a scheduler would."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.step, self.number = step, number

    def stepped(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


def run(folder: Path, config: DistillConfig, output: Path, listener: Silent | None = None, **more: Any) -> distill.Result:
    intervals = distill.Intervals(
        save=more.pop("save", 2), sample=2, log=more.pop("logged_every", 1), eval=more.pop("eval_every", 0)
    )
    prompts = open_prompts(config.prompts)
    return distill.run(load(find(str(folder))), config, prompts, output, "cpu", intervals, more.get("resume"), listener or Silent())


FINISHED: list[Path] = []
"""The run of `whole`, made by the first test that asks for it, under the settings that all tests have."""


@pytest.fixture
def whole(sd_folder: Path, config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nobody disturbed, to be read."""
    if not FINISHED:
        FINISHED.append(run(sd_folder, config, tmp_path_factory.mktemp("whole") / "run").run)
    return FINISHED[0]


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(whole, tmp_path / "run")


def state(output: Path, step: int) -> dict[str, torch.Tensor]:
    folder = output / "checkpoints" / checkpoint.folder_name(step)
    return {f"{file.stem}/{name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.check(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_stopped_at_half_and_continued_equals_one_that_was_not(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, whole: Path, number: int
) -> None:
    with pytest.raises(Interrupted) as stopped:
        run(sd_folder, config, tmp_path / "halves", KillAt(1, number), save=100)
    assert stopped.value.exit_code == 128 + number
    assert checkpoint.numbered(tmp_path / "halves" / "checkpoints") == [1]
    continued = Silent()
    run(sd_folder, config, tmp_path / "halves", continued)
    assert "continuing from step 1" in continued.notes
    one, two = state(whole, 4), state(tmp_path / "halves", 4)
    assert one.keys() == two.keys() and len(one) > 1000
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (run / "checkpoints" / "step-00000004" / "manifest.json" for run in (whole, tmp_path / "halves"))
    assert first.read_bytes() == second.read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_student_equals_sid_sample_in_stock_diffusers(whole: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(whole / "student")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    theirs = np.asarray(pipe("a cat", num_inference_steps=1, guidance_scale=0, generator=generator).images[0])
    model = load(find(str(whole)))
    sampler, plan = Sampler(model, torch.device("cpu")), plan_for(model)
    ours = sampler.decode(sampler.latents(["a cat"], sampler.noise([3]), plan), ["a cat"], [3])[0]
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1
    assert theirs.std() > 1


def test_the_student_is_the_average_and_differs_from_the_teacher(sd_folder: Path, whole: Path) -> None:
    student = load_file(whole / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(whole / "checkpoints" / "step-00000004" / "average.safetensors")
    teacher = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(student[name], average[name]) for name in student)
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_a_run_folder_holds_what_the_readme_promises(sd_folder: Path, config: DistillConfig, whole: Path) -> None:
    assert read_toml(whole / "config.toml") == dataclasses.asdict(config)
    record = json.loads((whole / "run.json").read_text())
    assert record["teacher"]["origin"] == str(sd_folder) and record["prompts"]["name"] == "general"
    names = [*(f"{n:08d}.png" for n in (0, 2, 4)), "prompts.json", "teacher.png"]
    assert sorted(file.name for file in (whole / "samples").iterdir()) == names
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "How to run the student" in page and json.loads((whole / "samples/prompts.json").read_text())["prompts"][0] in page
    assert not list(whole.rglob(".tmp-*"))


class Heard(Silent):
    """Keeps what a run reports while it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, float, str]] = []

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Any]:
        return nullcontext(lambda count, text="": self.drawn.append((what, count, text)))


def test_the_first_step_does_not_wait_for_the_teachers_samples_and_drawing_them_is_shown_step_by_step(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    heard = Heard()
    there: list[tuple[int, bool]] = []

    def stepped(record: dict[str, Any]) -> None:
        there.append((record["step"], (tmp_path / "run" / "samples" / "teacher.png").exists()))

    heard.stepped = stepped  # type: ignore[method-assign]
    run(sd_folder, config, tmp_path / "run", heard)
    assert there == [(1, False), (2, False), (3, True), (4, True)]
    teachers = [(count, text) for what, count, text in heard.drawn if what == "teacher samples"]
    # Eight images in micro-batches of four, each of five steps and the decoder.
    assert len(teachers) == 2 * 6 and teachers[2][1] == "step 3/5"
    assert sum(count for count, _ in teachers) == pytest.approx(samples.GRID_IMAGES)
    students = [count for what, count, _ in heard.drawn if what == "samples"]
    assert sum(students) == pytest.approx(3 * samples.GRID_IMAGES)


def test_a_continued_run_keeps_the_prompts_of_its_samples(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    run(sd_folder, dataclasses.replace(config, steps=2), tmp_path / "run")
    file = tmp_path / "run" / "samples" / "prompts.json"
    of_before = [f"a fries number {index}" for index in range(samples.GRID_IMAGES)]
    file.write_text(json.dumps({"prompts": of_before, "seeds": list(range(samples.GRID_IMAGES))}))
    run(sd_folder, config, tmp_path / "run")
    assert json.loads(file.read_text())["prompts"] == of_before


def test_samples_of_the_emoji_world_have_correct_captions() -> None:
    config = DistillConfig(teacher="emoji-teacher", prompts="emoji", batch_size=2, micro_batch=2, precision="fp32")
    engine = Engine(load(find("emoji-teacher")), config, open_prompts("emoji"), torch.device("cpu"))
    trained, shown = samples.prompts_for(engine, 0, samples.GRID_IMAGES), samples.sample_prompts(engine, Path("none"))
    assert trained[:3] == ["a fries on a gray background", "bread on gray", "a heart on a gray background"]
    assert shown == ["fries on a gray background", *trained[1:]]


def test_a_run_says_what_it_is_about_to_do_and_when_it_is_finished(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    first, again = Silent(), Silent()
    run(sd_folder, dataclasses.replace(config, micro_batch=2), tmp_path / "run", first)
    assert first.notes[:2] == [
        f"output: {tmp_path / 'run'}; progress: {tmp_path / 'run' / 'report.html'}",
        "4 steps of 4 images (micro-batch 2, accumulation 2, 1 process), cpu, fp32",
    ]
    assert run(sd_folder, config, tmp_path / "run", again).taken == 0
    assert f"{tmp_path / 'run'} is finished after 4 steps; train longer with a higher --steps" in again.notes


def test_run_json_tells_when_by_which_command_and_on_what_a_run_was_made(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = iter(range(1, 9))
    monkeypatch.setattr(run_folder, "now", lambda: f"2026-11-{next(days):02d}T10:00:00Z")
    arguments = (open_prompts("general"), tmp_path / "run", "cpu", distill.Intervals(save=2, sample=9, log=1), None)
    record = tmp_path / "run" / "run.json"

    class Look(KillAt):
        found: dict[str, Any]

        def stepped(self, step: dict[str, Any]) -> None:
            self.found = json.loads(record.read_text())
            super().stepped(step)

    look = Look(2)
    with pytest.raises(Interrupted):
        distill.run(load(find(str(sd_folder))), config, *arguments, look, command="sid distill --steps 4")
    begun = {"started": "2026-11-01T10:00:00Z", "finished": None, "command": "sid distill --steps 4", "device": "cpu"}
    assert look.found.items() >= begun.items() and look.found["cores"] >= 1
    assert look.found["hardware"] == look.found["processor"] != ""
    distill.run(load(find(str(sd_folder))), config, *arguments, Silent(), command="sid distill")
    done = json.loads(record.read_text())
    assert done.items() >= {"started": "2026-11-01T10:00:00Z", "finished": "2026-11-02T10:00:00Z", "command": "sid distill"}.items()
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and done["seconds"] == seconds[-1] > seconds[1]
    assert "2026-11-01 10:00 UTC" in (tmp_path / "run" / "report.html").read_text()
    distill.run(load(find(str(sd_folder))), config, *arguments, Silent(), command="sid distill --quiet")
    assert json.loads(record.read_text()) == done, "nothing was trained"


def test_an_image_count_is_steps_times_batch_size_wherever_it_stands(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, fake_updates=2, fake_warmup=1)
    result = run(sd_folder, config, tmp_path / "run")
    images = config.steps * config.batch_size
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = {
        "result": result.images,
        "metrics.jsonl": last["images"],
        "run.json": json.loads((tmp_path / "run" / "run.json").read_text())["images"],
        "sid.json": json.loads((result.student / "sid.json").read_text())["images"],
    }
    assert found == dict.fromkeys(found, images)
    assert f"{images} training images per network" in (tmp_path / "run" / "report.html").read_text()
    assert last["images_per_second"] == pytest.approx(images / last["seconds"], rel=0.2)
    shipped = read_card(find("emoji"))
    assert shipped["images"] == shipped["steps_trained"] * shipped["config"]["batch_size"]
    results = REPOSITORY / "tests" / "benchmarks" / "results"
    rows = [json.loads(line) for file in results.glob("*.jsonl") for line in file.read_text().splitlines()]
    trained = [row for row in rows if {"steps", "images"} <= row.keys()]
    assert trained and all(row["images"] == row["steps"] * row.get("batch_size", 16) for row in trained)


def test_the_command_that_the_page_of_a_run_gives_for_measuring_it_works(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, stand_ins: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run(sd_folder, dataclasses.replace(config, teacher=str(sd_folder), steps=1), tmp_path / "run")
    (commands,) = (one for one in run_sections(tmp_path / "run") if isinstance(one, Commands))
    line = next(line for _, line in commands.commands if "captions.txt" in line)
    (tmp_path / "captions.txt").write_text("".join(f"a cat of {index} years\n" for index in range(20)))
    words = shlex.split(line.replace("captions.txt", str(tmp_path / "captions.txt")))[1:]
    networks = ("--inception", stand_ins["inception"], "--clip-model", stand_ins["clip"])
    assert sid(*words, *networks, "--json") == 0
    models = json.loads(capfd.readouterr().out)["models"]
    assert [(model["model"], model["n"]) for model in models] == [(str(tmp_path / "run"), 20), (str(sd_folder), 20)]
    assert models[0]["metrics"].keys() == {"fid_teacher", "clip"}


def test_eval_every_measures_the_student_beside_the_teachers_cached_images_and_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "PROXY_IMAGES", 6)
    monkeypatch.setattr(proxy, "DIVERSITY_IMAGES", 2)
    config = DistillConfig(teacher="emoji-teacher", prompts="emoji", steps=2, batch_size=2, micro_batch=2, precision="fp32")
    teacher = load(find("emoji-teacher"))
    arguments = (open_prompts("emoji"), tmp_path / "run", "cpu", distill.Intervals(save=1, sample=5, log=1, eval=1), None)

    def measured() -> dict[int, float]:
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        proxies = [line for line in lines if "proxy_cmmd" in line]
        assert len({line["step"] for line in proxies}) == len(proxies)
        return {line["step"]: line["proxy_clip"] for line in proxies}

    distill.run(teacher, config, *arguments, Silent())
    first = measured()
    page = (tmp_path / "run" / "report.html").read_text()
    assert list(first) == [0, 1, 2] and "CMMD, proxy" in page
    goal = json.loads((tmp_path / "run" / "proxy.json").read_text())
    assert goal["images"] == 6 and f"have a CLIP score of {goal['teacher_clip']:.4f}" in page
    before = [file.read_text() for file in (tmp_path / "cache").rglob("times.jsonl")]
    listener = Silent()
    distill.run(load(find("emoji-teacher")), dataclasses.replace(config, steps=3), *arguments, listener)
    again = measured()
    assert list(again) == [0, 1, 2, 3] and again[2] == pytest.approx(first[2], abs=1e-5)
    assert [file.read_text() for file in (tmp_path / "cache").rglob("times.jsonl")] == before, (
        "the teacher's images come from the cache"
    )
    assert any(note.startswith("step 3: CMMD to the teacher") for note in listener.notes)
    distill.run(
        load(find("emoji-teacher")), dataclasses.replace(config, steps=3), *arguments[:3], distill.Intervals(1, 5), None, Silent()
    )
    assert measured() == again, "what is not measured again is kept"


class KillBeforeTheFirstStep(Silent):
    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Any]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return super().progress(what, total, unit)


@pytest.mark.check(4)
def test_a_signal_while_the_teacher_draws_for_eval_every_is_heard_before_it_has_drawn_all(tmp_path: Path) -> None:
    config = DistillConfig(teacher="emoji-teacher", prompts="emoji", steps=2, batch_size=2, micro_batch=2, precision="fp32")
    arguments = (open_prompts("emoji"), tmp_path / "run", "cpu", distill.Intervals(save=1, sample=5, log=1, eval=1), None)
    with pytest.raises(Interrupted, match="interrupted; nothing to save at step 0") as stopped:
        distill.run(load(find("emoji-teacher")), config, *arguments, KillBeforeTheFirstStep())
    assert stopped.value.exit_code == 138 and not list((tmp_path / "cache").rglob("*.png"))


def test_what_a_killed_run_left_half_written_is_cleared_away_by_the_next(
    sd_folder: Path, config: DistillConfig, finished: Path
) -> None:
    (finished / "checkpoints" / ".tmp-1-abcd-step-00000003").mkdir()
    (finished / "samples" / ".tmp-1-abcd-00000002.png").write_bytes(b"half")
    run(sd_folder, dataclasses.replace(config, steps=5), finished)
    assert not list(finished.rglob(".tmp-*"))


@pytest.mark.check(9)
def test_a_changed_setting_is_refused_by_name_and_more_steps_are_not(
    sd_folder: Path, config: DistillConfig, finished: Path
) -> None:
    for change in ({"lr_fake": 2e-3}, {"seed": 1}, {"prediction_type": "epsilon"}):
        ((name, value),) = change.items()
        with pytest.raises(InputError, match=rf"{name}: {getattr(config, name)} -> {value}$") as refused:
            run(sd_folder, dataclasses.replace(config, **change), finished)
        assert refused.value.exit_code == 3
    assert run(sd_folder, dataclasses.replace(config, steps=5), finished).step == 5
    with pytest.raises(UsageError, match="is beyond --steps 1"):
        run(sd_folder, dataclasses.replace(config, steps=1), finished)


@pytest.mark.check(9)
def test_prompts_and_teachers_are_compared_by_their_content(
    sd_folder: Path, v_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    teacher = shutil.copytree(sd_folder, tmp_path / "teacher")
    config = dataclasses.replace(config, prompts=str(prompts), steps=1)
    run(teacher, config, tmp_path / "run")
    prompts.write_text("a cat\na horse\n")
    with pytest.raises(InputError, match=r"prompts: contents changed$"):
        run(teacher, config, tmp_path / "run")
    prompts.write_text("a cat\n\na dog\n")
    assert run(teacher, config, tmp_path / "run").step == 1, "the same prompts, however they are spaced"
    moved = dataclasses.replace(config, prompts=str(shutil.copy(prompts, tmp_path / "moved.txt")), teacher="moved")
    assert run(teacher, moved, tmp_path / "run").step == 1, "the same prompts and teacher, wherever they are"
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match=r"teacher: contents changed$"):
        run(teacher, config, tmp_path / "run")


def test_what_another_version_has_written_is_refused_and_not_begun_anew(
    sd_folder: Path, config: DistillConfig, finished: Path
) -> None:
    record = finished / "run.json"
    whole = record.read_text()
    record.write_text(whole.replace('"format": 1', '"format": 9'))
    with pytest.raises(checkpoint.UnknownFormat, match="a run folder of format 9; this version of sid has format 1"):
        run(sd_folder, config, finished)
    record.write_text(whole)
    folder = finished / "checkpoints" / "step-00000004"
    rewritten(folder, format=9)
    with pytest.raises(checkpoint.UnknownFormat, match="checkpoint format 9"):
        run(sd_folder, config, finished)
    rewritten(folder, format=checkpoint.FORMAT, config={**dataclasses.asdict(config), "future": 3})
    with pytest.raises(InputError, match="future: 3 -> a setting that this version of sid does not know"):
        run(sd_folder, config, finished)
    for objective in ({"name": "dmd2", "guidance": 3.0}, "dmd2"):
        rewritten(folder, config={**dataclasses.asdict(config), "objective": objective})
        with pytest.raises(InputError, match=r"made with other settings: objective: dmd2 -> sid$"):
            run(sd_folder, config, finished)


def test_a_run_continues_from_a_checkpoint_of_format_3_and_ends_the_same(
    sd_folder: Path, config: DistillConfig, finished: Path
) -> None:
    end = state(finished, 4)
    folder = finished / "checkpoints" / "step-00000002"
    shutil.rmtree(folder.with_name("step-00000004"))
    (folder / "optimizer_fake_score.safetensors").rename(folder / "optimizer_fake.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        name.replace("fake_score", "fake") if "optimizer" in name else name: entry for name, entry in manifest["files"].items()
    }
    saved = flat(manifest["config"])
    del saved["objective"], saved["student_lora"]
    rewritten(folder, format=3, config=saved, files=files)
    listener = Silent()
    run(sd_folder, config, finished, listener)
    assert "continuing from step 2" in listener.notes
    assert all(torch.equal(value, end[name]) for name, value in state(finished, 4).items())


def test_a_run_continued_from_an_older_checkpoint_sets_the_newer_ones_aside_and_ends_the_same(
    sd_folder: Path, config: DistillConfig, finished: Path
) -> None:
    end = state(finished, 4)
    checkpoints = finished / "checkpoints"
    with pytest.raises(Interrupted):
        run(sd_folder, dataclasses.replace(config, steps=6), finished, KillAt(5), save=9)
    listener = Silent()
    resume = checkpoints / "step-00000004"
    run(sd_folder, dataclasses.replace(config, steps=6), finished, listener, resume=resume)
    assert any(note.startswith("set aside: ") and "step-00000005" in note for note in listener.notes)
    assert all(torch.equal(value, end[name]) for name, value in state(finished, 4).items())
    lines = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


@pytest.mark.check(6)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_resuming_that_one_is_refused(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, whole: Path
) -> None:
    run(sd_folder, dataclasses.replace(config, steps=3), tmp_path / "run", save=1)
    broken = tmp_path / "run" / "checkpoints" / "step-00000003"
    (broken / "average.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"average\.safetensors is damaged") as refused:
        run(sd_folder, config, tmp_path / "run", resume=broken)
    assert refused.value.exit_code == 3
    listener = Silent()
    run(sd_folder, config, tmp_path / "run", listener, save=1)
    assert [note for note in listener.notes if "skipped" in note] == [
        f"skipped: {broken / 'average.safetensors'} is damaged or missing"
    ]
    assert "continuing from step 2" in listener.notes
    one, two = state(whole, 4), state(tmp_path / "run", 4)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_is_written_when_the_last_one_is_too_long_ago(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    found = []

    class Watch(Silent):
        def stepped(self, record: dict[str, Any]) -> None:
            found.append(sorted(checkpoint.numbered(tmp_path / "run" / "checkpoints")))

    intervals = distill.Intervals(save=100, sample=100, save_seconds=0)
    arguments = (open_prompts("general"), tmp_path / "run", "cpu", intervals, None, Watch())
    result = distill.run(load(find(str(sd_folder))), config, *arguments)
    assert found[3] in ([1, 2], [1, 2, 3], [2, 3]) and 0 < result.saving < result.seconds


def test_what_is_saved_is_the_state_of_its_step_while_the_training_goes_on(sd: Model, config: DistillConfig) -> None:
    engine = Engine(sd, config, open_prompts("general"), torch.device("cpu"))
    engine.train_step()
    seen, kept = engine.tensors(), engine.tensors(copy=True)
    before = {name: value.clone() for name, value in seen["generator"].items()}
    assert engine.state_bytes == pytest.approx(checkpoint.bytes_of(kept), rel=0.01)
    engine.train_step()
    assert any(not torch.equal(seen["generator"][name], before[name]) for name in before), "what is not a copy moves on"
    assert all(torch.equal(kept["generator"][name], before[name]) for name in before)


def test_where_memory_has_no_room_for_a_copy_the_training_waits_and_saves_the_same(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = run(sd_folder, config, tmp_path / "roomy", save=1)
    little = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    real = checkpoint.save_tensors

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)  # in which a training that does not wait takes its next step
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    tight = run(sd_folder, config, tmp_path / "tight", save=1)
    for step in (3, 4):
        one, two = state(roomy.run, step), state(tight.run, step)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class KillAtTheStart(Silent):
    def started(self, step: int, steps: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.check(4)
def test_a_signal_before_the_first_step_leaves_without_one(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="interrupted; nothing to save at step 0") as stopped:
        run(sd_folder, config, tmp_path / "run", KillAtTheStart())
    assert stopped.value.exit_code == 143
    assert not list((tmp_path / "run").rglob("*.png")) and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.check(4)
def test_a_signal_while_the_student_is_painted_saves_the_step_and_the_picture_is_made_by_the_next(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = samples.Painter.paint

    def paint(self: samples.Painter, student: Model) -> None:
        if self.engine.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(self, student)

    monkeypatch.setattr(samples.Painter, "paint", paint)
    with pytest.raises(Interrupted, match="interrupted; saved step 2 of 4"):
        run(sd_folder, config, tmp_path / "run", save=100)
    picture = tmp_path / "run" / "samples" / "00000002.png"
    assert checkpoint.numbered(tmp_path / "run" / "checkpoints") == [2] and not picture.exists()
    monkeypatch.undo()
    run(sd_folder, config, tmp_path / "run")
    assert picture.read_bytes() == (whole / "samples" / "00000002.png").read_bytes()
    one, two = state(whole, 4), state(tmp_path / "run", 4)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.check(4)
def test_a_signal_at_the_last_step_leaves_with_its_code_and_the_next_command_only_finishes(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="interrupted; saved step 4 of 4") as stopped:
        run(sd_folder, config, tmp_path / "run", KillAt(4))
    assert stopped.value.exit_code == 143 and not (tmp_path / "run" / "student").exists()
    saved = state(tmp_path / "run", 4)
    result = run(sd_folder, config, tmp_path / "run")
    assert result.student.is_dir() and (tmp_path / "run" / "samples" / "00000004.png").is_file()
    assert all(torch.equal(value, saved[name]) for name, value in state(tmp_path / "run", 4).items())


@pytest.mark.check(28)
@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_link_in_a_run_folder_is_not_written_through(sd_folder: Path, config: DistillConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format": 1}')
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(EnvironmentProblem, match=rf"{name} is a link; sid does not write through links"):
        run(sd_folder, config, tmp_path / "run")
    assert not (tmp_path / "outside").exists()


def test_a_finished_run_started_again_does_nothing_and_says_the_same(
    sd_folder: Path, config: DistillConfig, finished: Path
) -> None:
    again = run(sd_folder, config, finished)
    assert (again.taken, again.step, again.student) == (0, config.steps, finished / "student")
    assert again.images == config.steps * config.batch_size


@pytest.mark.check(12)
def test_a_folder_in_use_is_refused_with_the_process(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(EnvironmentProblem, match=str(os.getpid())):
            run(sd_folder, config, tmp_path / "run")
        with pytest.raises(EnvironmentProblem, match=str(os.getpid())):
            check_unlocked(tmp_path / "run")
    check_unlocked(tmp_path / "run")
    check_unlocked(tmp_path / "none")


@pytest.mark.check(10)
def test_a_diverging_run_stops_with_the_step_and_a_finite_checkpoint(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    wild = dataclasses.replace(config, lr_fake=1e20, lr_generator=1e20, steps=50)
    with pytest.raises(SidError, match="at step") as stopped:
        run(sd_folder, wild, tmp_path / "run", save=1)
    assert stopped.value.exit_code == 1
    found, _ = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is None or all(value.isfinite().all() for value in state(tmp_path / "run", found.step).values())


def poisoned(monkeypatch: pytest.MonkeyPatch, from_step: int, times: float) -> None:
    """From a step on, for a number of steps, the engine computes with values that are not finite."""
    real, left = Engine.train_step, [times]

    def train_step(self: Engine) -> Measurements:
        healthy = self.empty
        if self.step >= from_step and left[0] > 0:
            left[0] -= 1
            self.empty = Cond(torch.full_like(healthy.states, float("nan")))
        result = real(self)
        self.empty = healthy
        return result

    monkeypatch.setattr(Engine, "train_step", train_step)


@pytest.mark.check(10)
def test_a_run_that_stops_being_finite_returns_to_its_checkpoint_and_ends_as_if_nothing_had_happened(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, steps=6)
    run(sd_folder, config, tmp_path / "calm")
    poisoned(monkeypatch, from_step=3, times=3)
    listener = Silent()
    run(sd_folder, config, tmp_path / "shaken", listener)
    assert "3 updates of a network in a row were not finite at step 6; back to step 2, once" in listener.notes
    one, two = state(tmp_path / "calm", 6), state(tmp_path / "shaken", 6)
    assert all(torch.equal(one[name], two[name]) for name in one)
    records = [json.loads(line) for line in (tmp_path / "shaken" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_stops_being_finite_again_ends_with_advice(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, from_step=3, times=float("inf"))
    with pytest.raises(SidError, match="at step 6, again") as stopped:
        run(sd_folder, dataclasses.replace(config, steps=20), tmp_path / "run")
    assert stopped.value.exit_code == 1 and "--lr-fake" in stopped.value.hint


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_whose_student_was_never_updated_fails(sd_folder: Path, config: DistillConfig, tmp_path: Path, steps: int) -> None:
    config = dataclasses.replace(config, steps=steps, objective=dataclasses.replace(config.objective, kappa3=1e38))
    with pytest.raises(SidError, match=f"the training diverged: {steps} updates of a network in a row"):
        run(sd_folder, config, tmp_path / "run", logged_every=10)
    assert not (tmp_path / "run" / "student").exists()


def test_a_warm_up_that_leaves_no_step_to_the_student_is_refused(config: DistillConfig) -> None:
    with pytest.raises(UsageError, match="--fake-warmup must be at least 0 and below --steps 6, not 6"):
        dataclasses.replace(config, steps=6, fake_warmup=6)


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_a_student_whose_checkpoints_are_gone_is_never_replaced_by_a_new_training(
    sd_folder: Path, config: DistillConfig, finished: Path, damage: str
) -> None:
    before = (finished / "student/unet/diffusion_pytorch_model.safetensors").read_bytes()
    for folder in (finished / "checkpoints").iterdir():
        if damage == "removed":
            shutil.rmtree(folder)
        else:
            (folder / "manifest.json").write_text("{")
    for settings in (config, dataclasses.replace(config, seed=1)):
        with pytest.raises(InputError, match="holds a student, but no checkpoint") as refused:
            run(sd_folder, settings, finished)
        assert "choose another --output" in refused.value.hint
    assert (finished / "student/unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_few_step_student_runs_in_stock_diffusers(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, dataclasses.replace(config, student_steps=4), tmp_path / "run")
    pipe = StableDiffusionPipeline.from_pretrained(result.student)
    pipe.set_progress_bar_config(disable=True)
    model = load(find(str(tmp_path / "run")))
    sampler = Sampler(model, torch.device("cpu"))
    for steps in (1, 4):
        plan = plan_for(model, steps, None)
        ours = sampler.decode(sampler.latents(["a cat"], sampler.noise([3]), plan), ["a cat"], [3])[0]
        generator = torch.Generator("cpu").manual_seed(3)
        theirs = np.asarray(pipe("a cat", timesteps=list(plan.grid), guidance_scale=0, generator=generator).images[0])
        assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1, steps
    assert export.run(model, "diffusers", tmp_path / "export", Order(), True, lambda count: None).difference in (0, 1)
    with pytest.raises(UsageError, match="at most 4 steps; --steps 5"):
        plan_for(model, 5, None)


def test_fresh_noise_between_steps_belongs_to_the_seed(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    run(sd_folder, dataclasses.replace(config, student_steps=2, renoise="fresh"), tmp_path / "run")
    model = load(find(str(tmp_path / "run")))
    sampler, plan = Sampler(model, torch.device("cpu")), plan_for(model)
    together = sampler.latents(["a cat", "a dog"], sampler.noise([3, 4], plan.noises), plan)
    alone = sampler.latents(["a dog"], sampler.noise([4], plan.noises), plan)
    assert plan.noises == 2
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def full_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 10 MiB free.")


@pytest.mark.check(11)
@pytest.mark.parametrize(
    ("ask", "said"),
    [(full_gpu, r"Tried to allocate 20\.00 MiB"), (lambda: torch.empty(1 << 46), "you tried to allocate 281474976710656 bytes")],
)
def test_running_out_of_memory_keeps_the_last_checkpoint_and_names_the_switches_to_try(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object], said: str
) -> None:
    real = Engine.train_step

    def train_step(self: Engine) -> Measurements:
        if self.step == 2:
            ask()
        return real(self)

    monkeypatch.setattr(Engine, "train_step", train_step)
    with pytest.raises(EnvironmentProblem, match=said) as stopped:
        run(sd_folder, config, tmp_path / "run", save=1)
    assert stopped.value.exit_code == 4
    assert "--micro-batch" in stopped.value.hint and "--memory 24gb" in stopped.value.hint
    found, problems = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == 2 and not problems


def test_a_damaged_card_is_refused_with_its_file(finished: Path) -> None:
    for content in ("{", "[]"):
        (finished / "student" / "sid.json").write_text(content)
        with pytest.raises(InputError, match=r"sid\.json"):
            load(find(str(finished / "student")))


def test_a_student_cannot_be_distilled_again(config: DistillConfig, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(InputError, match="student already"):
        run(whole / "student", config, tmp_path / "again")
