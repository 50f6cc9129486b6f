"""The models inside the package do what the README says of them, on a small sample."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sidcli.emoji import world
from sidcli.evaluation.protocols import emoji_captions, scenes
from sidcli.formats.export import apart
from sidcli.metrics.features import EmojiFeatures
from sidcli.models import loading
from sidcli.models.drawing import draw
from sidcli.models.loading import describe, load
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import EMBEDDED, WEIGHTS, find, fingerprint
from sidcli.progress import silent

CPU = torch.device("cpu")


def test_all_shipped_weights_together_stay_below_60_megabytes() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 60e6


def test_the_shipped_models_pass_the_rehearsal_that_commands_spare_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EMBEDDED:
        describe(dataclasses.replace(find(name), origin="a copy"))
    monkeypatch.setattr(loading, "rehearse", lambda *_: pytest.fail("rehearsed"))
    for name in EMBEDDED:
        describe(find(name))


def test_every_shipped_file_is_data_and_not_code() -> None:
    suffixes = {file.suffix for file in WEIGHTS.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}


def named(images: list[np.ndarray], scenes: list[world.Scene]) -> tuple[float, float]:
    """Shares of images whose noun and whose color the classifier names."""
    look = EmojiFeatures()
    nouns, colors = look.answers(look(images))
    right = [
        (world.NOUN_LIST[a] == scene.noun, world.COLOR_LIST[b] == scene.color)
        for a, b, scene in zip(nouns, colors, scenes, strict=True)
    ]
    return tuple(np.mean(right, axis=0))  # type: ignore[return-value]


def test_the_classifier_names_fresh_scenes() -> None:
    scenes = [world.scene(987, index) for index in range(300)]
    nouns, colors = named([world.render(scene) for scene in scenes], scenes)
    assert nouns >= 0.98 and colors >= 0.99


def test_the_shipped_student_draws_what_it_is_asked_for() -> None:
    student, asked = load(find("emoji")), scenes(100)
    plan = plan_for(student)
    drawn = draw(Sampler(student, CPU), plan, emoji_captions(100), range(100), 50, silent)
    nouns, colors = named([image for images in drawn for image in images], asked)
    assert nouns > 0.7 and colors > 0.9


@pytest.mark.check(19)
def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch() -> None:
    student = load(find("emoji"))
    sampler, plan = Sampler(student, CPU), plan_for(student)
    prompts, seeds = ["a cat", "a dog on red", "a bus"], [5, 6, 7]
    together = np.concatenate(list(draw(sampler, plan, prompts, seeds, 3, silent)))
    alone = np.concatenate(list(draw(sampler, plan, prompts, seeds, 1, silent)))
    assert apart(together, alone) <= 1


def test_the_shipped_teacher_opens_in_stock_diffusers_and_lends_the_student_its_parts() -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    # Stored in half precision; transformers 5 would keep the text encoder so unless told otherwise.
    pipe = StableDiffusionPipeline.from_pretrained(find("emoji-teacher").path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=2, guidance_scale=2.0).images[0].size == (64, 64)
    student = find("emoji")
    assert [student.part(name).parent.name for name in ("unet", "scheduler", "vae", "tokenizer")] == ["student"] * 2 + [
        "teacher"
    ] * 2
    assert UNet2DConditionModel.from_pretrained(student.part("unet")).config.sample_size == 16


def test_the_shipped_student_goes_by_the_content_of_what_it_shares(tmp_path: Path) -> None:
    shared = shutil.copytree(find("emoji-teacher").path, tmp_path / "teacher")
    student = dataclasses.replace(find("emoji"), base=shared)
    before = fingerprint(student)
    assert before == fingerprint(find("emoji"))
    config = shared / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    assert fingerprint(student) != before
