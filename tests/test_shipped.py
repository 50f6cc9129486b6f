"""The models inside the package do what the README says of them, on a small sample."""

from pathlib import Path

import pytest
import torch

from sidcli import evaluate
from sidcli.emoji import world
from sidcli.metrics.accuracy import Accuracy
from sidcli.metrics.features import EmojiExtractor
from sidcli.sampler import Sampler, draw, plan_for
from sidcli.sources import WEIGHTS, find
from sidcli.teachers import load

CPU = torch.device("cpu")
ALL = evaluate.Metrics(True, True, True)


def test_all_shipped_weights_together_stay_below_60_megabytes() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 60e6


def test_every_shipped_file_is_data_and_not_code() -> None:
    suffixes = {file.suffix for file in WEIGHTS.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}


def test_the_classifier_names_fresh_scenes() -> None:
    accuracy = Accuracy(EmojiExtractor())
    scenes = [world.scene(987, index) for index in range(300)]
    accuracy.add(torch.stack([torch.from_numpy(world.render(scene)) for scene in scenes]), scenes)
    assert accuracy.nouns >= 294 and accuracy.colours >= 297


def test_the_clip_score_falls_when_captions_are_shuffled() -> None:
    row = evaluate.measure_scenes(CPU, ALL, 100, False)
    from sidcli.metrics.clip_score import ClipScore

    scenes, prompts, _ = evaluate.protocol(100, 0)
    shuffled = ClipScore(True, CPU)
    shuffled.add(torch.stack([torch.from_numpy(world.render(scene)) for scene in scenes]), prompts[1:] + prompts[:1])
    assert row.clip is not None and row.clip > shuffled.value + 0.3


def test_the_shipped_student_draws_what_it_is_asked_for() -> None:
    student = load(find("emoji"))
    row, shown = evaluate.measure(student, plan_for(student), CPU, ALL, 100, 0, False, 50, lambda _: None)
    assert row.noun_accuracy is not None and row.noun_accuracy > 0.7
    assert row.colour_accuracy is not None and row.colour_accuracy > 0.9
    assert shown.shape == (evaluate.SHOWN, 64, 64, 3)


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch() -> None:
    student = load(find("emoji"))
    sampler, plan = Sampler(student, CPU), plan_for(student)
    prompts, seeds = ["a cat", "a dog on red", "a bus"], [5, 6, 7]
    together = torch.cat(list(draw(sampler, plan, prompts, seeds, 3, lambda _: None)))
    alone = torch.cat(list(draw(sampler, plan, prompts, seeds, 1, lambda _: None)))
    assert (together.int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["emoji", "emoji-teacher"])
def test_the_shipped_folders_open_in_stock_diffusers(name: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    # Stored in half precision; transformers 5 would keep the text encoder so unless told otherwise.
    pipe = StableDiffusionPipeline.from_pretrained(find(name).path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = (
        {"num_inference_steps": 1, "guidance_scale": 0} if name == "emoji" else {"num_inference_steps": 2, "guidance_scale": 2.0}
    )
    assert pipe("a cat", **options).images[0].size == (64, 64)
