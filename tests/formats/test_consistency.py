"""Students that draw by multistep consistency sampling: what sid draws, diffusers draws with LCMScheduler."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from sidcli.errors import InputError
from sidcli.formats import export
from sidcli.formats.export import apart
from sidcli.formats.order import FORMATS, Order
from sidcli.models.loading import Model, load
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from tests import tiny_students
from tests.cards import Card, is_near, ours
from tests.formats.test_export import check_command, described_student, meant, run_card
from tests.inprocess import sid

LCM: dict[str, Any] = {
    "method": "Latent consistency distillation (LCM, arXiv 2310.04378)",
    "t_init": 999,
    "student_steps": 4,
    "renoise": "fresh",
    "sampler": "lcm",
    "solver_steps": 50,
}


def drawn(model: Model, steps: int) -> np.ndarray:
    return Sampler(model, torch.device("cpu")).images(["a cat"], [3], plan_for(model, steps))[0]


@pytest.mark.check(20)
@pytest.mark.parametrize("family", tiny_students.FAMILIES)
@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_stock_diffusers_draws_what_sid_draws(form: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = tiny_students.make(tmp_path, family, (16, 40), **LCM)
    order = Order(rank=10_000, teacher=teacher if form == "lora" else None)
    done = export.run(student, form, tmp_path / "out", order, True, lambda count: None)
    assert done.difference is not None and done.difference <= 1
    card = Card(tmp_path / "out")
    assert card.body.strip().startswith("# 4-step ") and {"few-step", "arxiv:2310.04378"} <= set(card.data["tags"])
    assert card.facts["Timesteps"] == "999, 759, 499, 259"
    assert card.facts["Sampling"] == "multistep consistency sampling, in up to 50 steps"
    assert card.data["inference"]["parameters"] == {"num_inference_steps": 4, "height": 16, "width": 40, "guidance_scale": 0}
    assert is_near(run_card(card, teacher, tmp_path / "cat.png"), ours(meant(form, teacher, student)), "fp32")
    for command in card.commands():
        check_command(command, card, student, "fp32", monkeypatch)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_export_in_half_precision_draws_the_same_up_to_rounding(dtype: str, tmp_path: Path) -> None:
    _, student = tiny_students.make(tmp_path, "sd1", **LCM)
    done = export.run(student, "diffusers", tmp_path / "out", Order(dtype), True, lambda count: None)
    assert done.difference is not None and done.difference <= {"fp16": 4, "bf16": 16}[dtype]


@pytest.mark.check(20)
def test_any_number_of_steps_and_both_scales_without_guidance_are_the_same_in_both(tmp_path: Path) -> None:
    _, student = tiny_students.make(tmp_path, "sd2", **LCM)
    export.run(student, "diffusers", tmp_path / "out", Order(), False, lambda count: None)
    model = load(find(str(tmp_path / "out")))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for steps, scale in ((1, 0.0), (2, 1.0), (3, 0.0), (8, 1.0)):
        generator = torch.Generator("cpu").manual_seed(3)
        theirs = np.asarray(pipe("a cat", num_inference_steps=steps, guidance_scale=scale, generator=generator).images[0])
        images.append(drawn(model, steps))
        assert apart(images[-1], theirs) <= 2
        assert apart(images[-1], drawn(student, steps)) <= 1, "what was exported"
    assert all(apart(one, other) > 2 for one, other in itertools.pairwise(images))


def test_an_export_of_an_export_draws_the_same(tmp_path: Path) -> None:
    _, student = tiny_students.make(tmp_path, "sd1", **LCM)
    export.run(student, "diffusers", tmp_path / "out", Order(), False, lambda count: None)
    again = export.run(load(find(str(tmp_path / "out"))), "diffusers", tmp_path / "again", Order(), True, lambda count: None)
    assert again.difference is not None and again.difference <= 1
    one, other = (json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text()) for name in ("out", "again"))
    assert one == other and one["original_inference_steps"] == 50


def test_the_command_draws_in_the_wanted_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, student = tiny_students.make(tmp_path, "sd1", **LCM)
    export.run(student, "diffusers", tmp_path / "out", Order(), False, lambda count: None)
    monkeypatch.chdir(tmp_path)
    assert sid("sample", "a cat", "--model", "out", "--steps", 2, "--json", "-o", "cat.png", "--device", "cpu") == 0
    assert "2 steps at t = 999, 499" in capsys.readouterr().out
    assert sid("sample", "a cat", "--model", "out", "--steps", 51, "-o", "more.png", "--device", "cpu") == 2
    assert "out draws in at most 50 steps; --steps 51 is not possible" in capsys.readouterr().err


@pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if not form.has_scheduler])
def test_formats_without_a_scheduler_are_refused(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = described_student(tmp_path / "student", **LCM)
    assert sid("export", folder, "-o", tmp_path / "out", "--format", form) == 3
    said = capsys.readouterr().err
    assert f"student draws by multistep consistency sampling, which --format {form} does not include" in said
    assert "use --format diffusers or lora" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sampler": "ddpm"}, 'sampler is "ddpm"; it must be one of lcm'),
        ({"solver_steps": None}, "solver_steps is null; it must be a whole number"),
        ({"solver_steps": 30}, "solver_steps is 30; it must divide t_init [+] 1, 1000"),
        ({"student_steps": 51}, "student_steps is 51; it must be at most solver_steps, 50"),
    ],
)
def test_a_card_whose_steps_do_not_fit_is_refused(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = described_student(tmp_path / "student", **LCM | wrong)
    with pytest.raises(InputError, match=said):
        load(find(str(folder)))
