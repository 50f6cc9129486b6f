import dataclasses
import json
import os
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from sidcli import checkpoint, distill, export
from sidcli.config import DistillConfig, read_toml
from sidcli.engine import Engine, StepResult
from sidcli.errors import EnvironmentProblem, InputError, Interrupted, SidError, UsageError
from sidcli.files import locked
from sidcli.formats.order import Order
from sidcli.prompts import open_prompts
from sidcli.sampler import Sampler, plan_for
from sidcli.sources import find
from sidcli.teachers import load
from sidcli.text import Condition


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Any]:
        return nullcontext(lambda count: None)


class KillAt(Silent):
    """Sends this process a signal after a given step, as a person or a scheduler would."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.step, self.number = step, number

    def stepped(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


def run(folder: Path, config: DistillConfig, output: Path, listener: Silent | None = None, **more: Any) -> distill.Result:
    rhythm = distill.Rhythm(save=more.pop("save", 2), sample=2, log=1, eval=more.pop("eval_every", 0))
    prompts = open_prompts(config.prompts)
    return distill.run(load(find(str(folder))), config, prompts, output, "cpu", rhythm, more.get("resume"), listener or Silent())


def state(output: Path, step: int) -> dict[str, torch.Tensor]:
    folder = output / "checkpoints" / checkpoint.folder_name(step)
    return {f"{file.stem}/{name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.check(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_stopped_at_half_and_continued_equals_one_that_was_not(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, number: int
) -> None:
    whole = run(sd_folder, config, tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        run(sd_folder, config, tmp_path / "halves", KillAt(1, number), save=100)
    assert stopped.value.exit_code == 128 + number
    assert checkpoint.numbered(tmp_path / "halves" / "checkpoints") == [1]
    continued = Silent()
    run(sd_folder, config, tmp_path / "halves", continued)
    assert "continuing from step 1" in continued.notes
    one, two = state(whole.run, 4), state(tmp_path / "halves", 4)
    assert one.keys() == two.keys() and len(one) > 1000
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_student_equals_sid_sample_in_stock_diffusers(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, config, tmp_path / "run")
    pipe = StableDiffusionPipeline.from_pretrained(result.student)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    theirs = np.asarray(pipe("a cat", num_inference_steps=1, guidance_scale=0, generator=generator).images[0])
    model = load(find(str(tmp_path / "run")))
    sampler, plan = Sampler(model, torch.device("cpu")), plan_for(model)
    ours = sampler.decode(sampler.latents(["a cat"], sampler.noise([3]), plan))[0].numpy()
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1
    assert theirs.std() > 1


def test_the_student_is_the_average_and_differs_from_the_teacher(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, config, tmp_path / "run")
    student = load_file(result.student / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "average.safetensors")
    teacher = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(student[name], average[name]) for name in student)
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_a_run_folder_holds_what_the_readme_promises(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    run(sd_folder, config, tmp_path / "run")
    assert read_toml(tmp_path / "run" / "config.toml") == dataclasses.asdict(config)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["teacher"]["origin"] == str(sd_folder) and record["prompts"]["name"] == "general"
    samples = [*(f"{n:08d}.png" for n in (0, 2, 4)), "prompts.json", "teacher.png"]
    assert sorted(file.name for file in (tmp_path / "run" / "samples").iterdir()) == samples
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (
        "How to run the student" in page and json.loads((tmp_path / "run/samples/prompts.json").read_text())["prompts"][0] in page
    )
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_eval_every_measures_the_student_beside_the_teachers_cached_images_and_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "PROXY_IMAGES", 6)
    config = DistillConfig(teacher="emoji-teacher", prompts="emoji", steps=2, batch_size=2, micro_batch=2, precision="fp32")
    teacher = load(find("emoji-teacher"))
    arguments = (open_prompts("emoji"), tmp_path / "run", "cpu", distill.Rhythm(save=1, sample=5, log=1, eval=1), None)

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


class KillBeforeTheFirstStep(Silent):
    def progress(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Any]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return super().progress(what, total, unit)


@pytest.mark.check(4)
def test_a_signal_while_the_teacher_draws_for_eval_every_is_heard_before_it_has_drawn_all(tmp_path: Path) -> None:
    config = DistillConfig(teacher="emoji-teacher", prompts="emoji", steps=2, batch_size=2, micro_batch=2, precision="fp32")
    arguments = (open_prompts("emoji"), tmp_path / "run", "cpu", distill.Rhythm(save=1, sample=5, log=1, eval=1), None)
    with pytest.raises(Interrupted, match="stopped at step 0 of 2") as stopped:
        distill.run(load(find("emoji-teacher")), config, *arguments, KillBeforeTheFirstStep())
    assert stopped.value.exit_code == 138 and not list((tmp_path / "cache").rglob("*.png"))


def test_what_a_killed_run_left_half_written_is_cleared_away_by_the_next(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    run(sd_folder, dataclasses.replace(config, steps=2), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / ".tmp-1-abcd-step-00000003").mkdir()
    (tmp_path / "run" / "samples" / ".tmp-1-abcd-00000002.png").write_bytes(b"half")
    run(sd_folder, dataclasses.replace(config, steps=3), tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.check(9)
def test_a_changed_setting_is_refused_by_name_and_more_steps_are_not(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    run(sd_folder, dataclasses.replace(config, steps=2), tmp_path / "run")
    with pytest.raises(UsageError, match=r"lr_fake: 0\.001 -> 0\.002"):
        run(sd_folder, dataclasses.replace(config, lr_fake=2e-3), tmp_path / "run")
    assert run(sd_folder, dataclasses.replace(config, steps=3), tmp_path / "run").step == 3


def test_a_finished_run_started_again_does_nothing_and_says_the_same(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    first = run(sd_folder, config, tmp_path / "run")
    again = run(sd_folder, config, tmp_path / "run")
    assert (again.step, again.student) == (first.step, first.student)
    assert first.step == config.steps and again.images == 2 * config.steps * config.batch_size


@pytest.mark.check(12)
def test_a_folder_in_use_is_refused_with_the_process(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(EnvironmentProblem, match=str(os.getpid())):
        run(sd_folder, config, tmp_path / "run")


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
    real, left = Engine.advance, [times]

    def advance(self: Engine) -> StepResult:
        healthy = self.empty
        if self.step >= from_step and left[0] > 0:
            left[0] -= 1
            self.empty = Condition(torch.full_like(healthy.states, float("nan")))
        result = real(self)
        self.empty = healthy
        return result

    monkeypatch.setattr(Engine, "advance", advance)


@pytest.mark.check(10)
def test_a_run_that_stops_being_finite_returns_to_its_checkpoint_and_ends_as_if_nothing_had_happened(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, steps=6)
    run(sd_folder, config, tmp_path / "calm")
    poisoned(monkeypatch, from_step=3, times=3)
    listener = Silent()
    run(sd_folder, config, tmp_path / "shaken", listener)
    assert "6 updates in a row were not finite at step 6; back to step 2, once" in listener.notes
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


def test_a_few_step_student_runs_in_stock_diffusers(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, dataclasses.replace(config, student_steps=4), tmp_path / "run")
    pipe = StableDiffusionPipeline.from_pretrained(result.student)
    pipe.set_progress_bar_config(disable=True)
    model = load(find(str(tmp_path / "run")))
    sampler = Sampler(model, torch.device("cpu"))
    for steps in (1, 4):
        plan = plan_for(model, steps, None)
        ours = sampler.decode(sampler.latents(["a cat"], sampler.noise([3]), plan))[0].numpy()
        generator = torch.Generator("cpu").manual_seed(3)
        theirs = np.asarray(pipe("a cat", timesteps=list(plan.grid), guidance_scale=0, generator=generator).images[0])
        assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1, steps
    assert export.run(model, "diffusers", tmp_path / "export", Order(), True, lambda count: None).difference in (0, 1)
    with pytest.raises(UsageError, match="4 steps at most, not 5"):
        plan_for(model, 5, None)


def test_fresh_noise_between_steps_belongs_to_the_seed(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    run(sd_folder, dataclasses.replace(config, student_steps=2, renoise="fresh"), tmp_path / "run")
    model = load(find(str(tmp_path / "run")))
    sampler, plan = Sampler(model, torch.device("cpu")), plan_for(model)
    together = sampler.latents(["a cat", "a dog"], sampler.noise([3, 4], plan.noises), plan)
    alone = sampler.latents(["a dog"], sampler.noise([4], plan.noises), plan)
    assert plan.noises == 2
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.check(11)
def test_running_out_of_memory_names_the_switches_to_try(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Engine) -> StepResult:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 10 MiB free.")

    monkeypatch.setattr(Engine, "advance", full)
    with pytest.raises(EnvironmentProblem, match=r"Tried to allocate 20\.00 MiB") as stopped:
        run(sd_folder, config, tmp_path / "run")
    assert "--micro-batch" in stopped.value.hint and "--memory 24gb" in stopped.value.hint


def test_a_damaged_card_is_refused_with_its_file(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, dataclasses.replace(config, steps=1), tmp_path / "run")
    for content in ("{", "[]"):
        (result.student / "sid.json").write_text(content)
        with pytest.raises(InputError, match=r"sid\.json"):
            load(find(str(result.student)))


def test_a_student_cannot_be_distilled_again(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    result = run(sd_folder, dataclasses.replace(config, steps=1), tmp_path / "run")
    with pytest.raises(InputError, match="student already"):
        run(result.student, config, tmp_path / "again")
