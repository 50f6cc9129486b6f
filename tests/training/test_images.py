"""Runs that train on images: what they record, that they continue, and what they refuse."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sidcli import api, objectives
from sidcli.data.captioned import open_captioned
from sidcli.data.prompts import open_prompts
from sidcli.errors import InputError, Interrupted
from sidcli.models.loading import load
from sidcli.models.sources import find, read_card
from sidcli.settings import DistillConfig
from sidcli.training import distill
from tests.data.test_captioned import shard
from tests.data.test_latents import images
from tests.inprocess import sid
from tests.training.test_distill import Heard, KillAt, Silent, state

SIDA = objectives.Sida.Settings(frozen_images=0, gan_images=4)


def run(folder: Path, config: DistillConfig, output: Path, listener: Silent | None = None) -> distill.Result:
    given = open_captioned(config.data) if config.data not in ("", "teacher") else None
    intervals = distill.Intervals(save=2, sample=9, log=1)
    return distill.run(
        load(find(str(folder))),
        config,
        open_prompts(config.prompts),
        output,
        "cpu",
        intervals,
        None,
        listener or Silent(),
        images=given,
    )


METHODS: dict[str, tuple[Any, str, set[str]]] = {
    "sida": (SIDA, "SiDA (arXiv 2410.14919)", {"discriminator_loss", "adversarial_loss"}),
    "regression": (objectives.Regression.Settings(), "Regression on", {"generator_loss"}),
    "lcm": (objectives.Lcm.Settings(), "Latent consistency distillation (LCM", {"generator_loss"}),
    "scflow": (objectives.Scflow.Settings(joined_images=0), "Self-corrected flow", {"discriminator_loss", "backward_loss"}),
    "act": (objectives.Act.Settings(), "Adversarial consistency training (ACT", {"discriminator_loss", "adversarial_loss"}),
}
"""Settings, start of the method in the card, and measurements that are positive in each step."""


@pytest.mark.parametrize("name", METHODS)
def test_a_run_on_the_teachers_images_goes_on_from_a_checkpoint_bit_for_bit(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, name: str
) -> None:
    objective, method, positive = METHODS[name]
    drawn = dataclasses.replace(config, objective=objective, data="teacher", data_num=3, steps=3)
    heard = Heard()
    whole = run(sd_folder, drawn, tmp_path / "whole", heard)
    with pytest.raises(Interrupted):
        run(sd_folder, drawn, tmp_path / "halves", KillAt(1))
    continued = Heard()
    run(sd_folder, drawn, tmp_path / "halves", continued)
    one, two = state(whole.run, 3), state(tmp_path / "halves", 3)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError, match="made with other settings: data_num: 3 -> 2"):
        run(sd_folder, dataclasses.replace(drawn, data_num=2), tmp_path / "halves", continued)
    bar = "teacher images to train on"
    assert sum(count for what, count, _ in heard.drawn if what == bar) == pytest.approx(3)
    assert not any(what == bar for what, _, _ in continued.drawn), "the images are drawn once for all runs"
    assert "5 steps, guidance 7.5: 3 images to train on" in "\n".join(heard.notes)

    record = json.loads((whole.run / "run.json").read_text())["data"]
    assert record["images"] == 3 and record["name"].endswith("5 steps, guidance 7.5") and len(record["digest"]) == 64
    card = read_card(find(str(whole.run)))
    assert card["data"] == f"3 images of {record['name']}" and card["method"].startswith(method)
    measured = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert len(measured) == 3 and all(line[key] > 0 for line in measured for key in positive)


def test_a_run_continues_with_the_same_images_in_another_place_and_refuses_others(
    sd_folder: Path, config: DistillConfig, tmp_path: Path
) -> None:
    folder = images(tmp_path / "set", 4)
    (folder / "3.png").write_bytes(b"")
    settings = dataclasses.replace(config, objective=SIDA, data=str(folder), steps=1)
    heard = Silent()
    run(sd_folder, settings, tmp_path / "run", heard)
    assert any(line.startswith("1 image not used: 3.png (") for line in heard.notes)
    shutil.copytree(folder, tmp_path / "copy")
    longer = dataclasses.replace(settings, data=str(tmp_path / "copy"), steps=2)
    assert run(sd_folder, longer, tmp_path / "run").step == 2
    more = dataclasses.replace(longer, steps=3)
    (tmp_path / "copy" / "1.txt").write_text("another caption")
    with pytest.raises(InputError, match="made with other settings: data: contents changed"):
        run(sd_folder, more, tmp_path / "run")
    with pytest.raises(InputError, match="made with other settings: data: contents changed"):
        run(sd_folder, dataclasses.replace(more, data=str(folder), data_num=2), tmp_path / "run")
    with pytest.raises(InputError, match=r"made with other settings: data: .*copy -> teacher"):
        run(sd_folder, dataclasses.replace(more, data="teacher"), tmp_path / "run")
    plain = dataclasses.replace(more, objective=objectives.Sid.Settings(), data="")
    with pytest.raises(InputError, match=r"objective: sida -> sid; data: .*copy -> "):
        run(sd_folder, plain, tmp_path / "run")


def test_dmd2_trains_on_the_images_of_a_shard(sd_folder: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "set", 3)
    file = shard(tmp_path / "a.tar", {path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    settings: dict[str, Any] = {"batch_size": 2, "device": "cpu", "gan": 0.001, "fake_updates": 2, "data": file}
    done = api.distill(sd_folder, tmp_path / "run", objective="dmd2", steps=1, **settings, listener=api.SILENT)
    saved = state(done.run, 1)
    assert "fake_score/discriminator.layers.0.weight" in saved and not any("average/discriminator" in name for name in saved)
    more = api.distill(sd_folder, tmp_path / "run", objective="dmd2", steps=2, **settings, listener=api.SILENT)
    assert (more.step, more.taken) == (2, 1)
    assert read_card(find(str(done.run)))["method"] == "DMD2 (arXiv 2405.14867)"


def test_a_plan_checks_the_images_too(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "set", 1)
    command = ["distill", "--teacher", sd_folder, "--objective", "sida", "--dry-run", "--device", "cpu", "--data"]
    assert sid(*command, folder) == 0
    assert f'data = "{folder}"' in capsys.readouterr().out
    assert sid(*command, folder, "--data-num", 2) == 0
    assert "--data-num 2: only 1 image has a caption" in capsys.readouterr().err
    (folder / "0.txt").unlink()
    assert sid(*command, folder) == 3
    assert "has 1 image, none with a caption" in capsys.readouterr().err


def test_the_teacher_draws_the_pairs_of_regression_at_the_guidance_scale_of_the_run(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "device": "cpu", "data": "teacher", "data_num": 2, "guidance": 3.0}
    done = api.distill(sd_folder, tmp_path / "run", objective="regression", steps=1, **settings, listener=api.SILENT)
    assert json.loads((done.run / "run.json").read_text())["data"]["name"].endswith("5 steps, guidance 3")
    command = ["distill", "--teacher", sd_folder, "--objective", "regression", "--data", "teacher", "--dry-run", "--device", "cpu"]
    assert sid(*command, "--guidance", 1) == 0
    half = capsys.readouterr().out
    assert sid(*command, "--guidance", 2) == 0
    drawing = [float(out.split("the teacher draws first, ")[1].split(" TFLOP")[0]) for out in (half, capsys.readouterr().out)]
    assert drawing[1] == pytest.approx(2 * drawing[0], rel=0.01)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_student_of_lcm_draws_in_diffusers_in_the_number_of_steps_of_the_run(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: int
) -> None:
    folder = images(tmp_path / "set", 2)
    command = ["distill", "--teacher", sd_folder, "--objective", "lcm", "--data", folder, "--steps", 2, "--batch-size", 2]
    more = ["--student-lora", lora, "--lr", "1e-3", "--device", "cpu", "-o", tmp_path / "run", "--quiet"]
    assert sid(*command, *more) == 0
    card = read_card(find(str(tmp_path / "run")))
    assert {name: card[name] for name in ("t_init", "student_steps", "renoise", "sampler", "solver_steps")} == {
        "t_init": 999,
        "student_steps": 4,
        "renoise": "fresh",
        "sampler": "lcm",
        "solver_steps": 50,
    }
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    theirs = np.asarray(pipe("a cat", num_inference_steps=4, guidance_scale=0, generator=generator).images[0])
    ours = api.sample("a cat", tmp_path / "run", seed=3, device="cpu", listener=api.SILENT).images[0]
    assert np.abs(theirs.astype(int) - np.asarray(ours).astype(int)).max() <= 2
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "num_inference_steps=4, guidance_scale=0" in page
