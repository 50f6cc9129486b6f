"""Which models are taken for teachers, which are refused and why, and what is known of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from sidcli.errors import InputError, UsageError
from sidcli.models.drawing import Plan
from sidcli.models.loading import describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler
from sidcli.models.sources import find
from tests import tiny_families


@pytest.fixture
def copied(sd_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.check(23)
@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        ("model_index.json", {"_class_name": None}, r"model_index\.json has no _class_name"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "its vae is an AutoencoderTiny, not an AutoencoderKL"),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, "brings code of its own"),
        ("model_index.json", {"_class_name": "CogView4Pipeline"}, "is a CogView4Pipeline, which is not supported"),
        ("model_index.json", {"unet": ["diffusers", "MyUNet"]}, "its unet is a MyUNet, not a UNet2DConditionModel"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text_encoder"),
        ("unet/config.json", {"auto_map": {"AutoModel": "mine.Model"}}, "brings code of its own"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels in: an inpainting or editing model"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction type 'sample' is not supported"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, 'beta_start is "x"; it must be a number'),
        ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim 64 does not match the text encoders' width 32"),
    ],
)
def test_a_model_that_cannot_teach_is_refused_with_the_reason(copied: Path, file: str, entries: dict, said: str) -> None:
    change(copied / file, **entries)
    with pytest.raises(InputError, match=said):
        load(find(str(copied)))


def test_a_folder_cannot_choose_how_its_text_encoder_is_computed(copied: Path) -> None:
    change(
        copied / "text_encoder" / "config.json",
        attn_implementation="someone/their-kernel",
        _attn_implementation="someone/their-kernel",
    )
    assert load(find(str(copied))).text_encoders[0].config._attn_implementation == "sdpa"


@pytest.mark.check(21)
def test_weights_in_pickles_are_not_read_even_where_there_is_nothing_else(copied: Path) -> None:
    (copied / "unet" / "diffusion_pytorch_model.safetensors").rename(copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load(find(str(copied)))


def test_exported_graphs_are_no_model(copied: Path) -> None:
    facts = {"format": "onnx", "size": [64, 64], "latent_shape": [4, 8, 8], "multiple": 0, "tokens": [77]}
    (copied / "sid.json").write_text(json.dumps({"kind": "student", "t_init": 625, "graph": facts}))
    with pytest.raises(InputError, match="which only draw"):
        load(find(str(copied)))


def test_half_precision_files_serve_where_there_are_no_others(copied: Path) -> None:
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        (copied / f"{name}.safetensors").rename(copied / f"{name}.fp16.safetensors")
    assert load(find(str(copied))).denoiser.dtype == torch.float32


def test_what_the_user_says_about_the_prediction_wins(copied: Path) -> None:
    assert describe(find(str(copied))).path.prediction == "epsilon"
    assert describe(find(str(copied)), Overrides("v_prediction")).path.prediction == "v_prediction"


@pytest.mark.parametrize(("width", "height", "size"), [(0, 0, (64, 64)), (128, 0, (64, 128)), (96, 80, (80, 96))])
def test_a_model_draws_at_the_size_that_is_wished(copied: Path, width: int, height: int, size: tuple[int, int]) -> None:
    model = load(find(str(copied)), Overrides(width=width, height=height))
    assert model.size == size and describe(find(str(copied)), Overrides(width=width, height=height)).size == size
    assert Sampler(model, torch.device("cpu")).images(["a cat"], [0], Plan(1, grid=(625,))).shape == (1, *size, 3)


@pytest.mark.parametrize(
    ("plan", "texts"),
    [
        (Plan(1, grid=(625,)), ["", ""]),
        (Plan(2, grid=(625, 312)), ["step 1/2", "step 2/2", ""]),
        (Plan(3, 2.0), ["step 1/3", "step 2/3", "step 3/3", ""]),
    ],
)
def test_drawing_reports_each_denoising_step_and_the_decoder_as_parts_of_the_batch(
    copied: Path, plan: Plan, texts: list[str]
) -> None:
    heard: list[tuple[float, str]] = []
    sampler = Sampler(load(find(str(copied))), torch.device("cpu"))
    sampler.images(["a cat", "a dog"], [0, 1], plan, lambda count, text="": heard.append((count, text)))
    assert [text for _, text in heard] == texts
    assert [count for count, _ in heard] == pytest.approx([2 / len(texts)] * len(texts))


def test_a_size_that_the_vae_cannot_make_is_refused(copied: Path) -> None:
    with pytest.raises(UsageError, match="--height must be a multiple of 8, in which this model draws, and at most 8192, not 60"):
        load(find(str(copied)), Overrides(height=60))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
def test_an_sdxl_teacher_draws_what_its_stock_pipeline_draws(width: int, height: int, tmp_path: Path) -> None:
    folder = tiny_families.write_sdxl(tmp_path / "xl")
    model = load(find(str(folder)), Overrides(width=width, height=height))
    ours = Sampler(model, torch.device("cpu")).images(["a cat"], [5], Plan(4, 3.0))[0]
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    theirs = np.asarray(
        pipe("a cat", num_inference_steps=4, guidance_scale=3.0, generator=generator, width=width, height=height).images[0]
    )
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
