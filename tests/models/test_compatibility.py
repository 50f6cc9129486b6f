"""Which entries of a model's JSON files are computed, and which are refused because they would change the image unseen."""

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from sidcli.errors import InputError
from sidcli.models import compatibility
from sidcli.models.compatibility import ACCEPTED, PIPELINES, SCHEDULERS, SUPPORTED_VALUES
from sidcli.models.drawing import Plan
from sidcli.models.loading import describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler
from sidcli.models.sources import find
from tests import tiny_families

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"


@pytest.fixture(scope="module")
def copies(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("copies")
    return {"sd": Path(shutil.copytree(sd_folder, root / "sd")), "xl": tiny_families.write_sdxl(root / "xl")}


@pytest.fixture
def restored(copies: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """The folders of a module, whose JSON files a test may change."""
    before = {file: file.read_bytes() for folder in copies.values() for file in folder.rglob("*.json")}
    yield copies
    for file, content in before.items():
        file.write_bytes(content)


def change(file: Path, **entries: object) -> None:
    """Set entries of a JSON object; `...` removes one."""
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def refusal(folder: Path, overrides: Overrides | None = None) -> str:
    with pytest.raises(InputError) as caught:
        describe(find(str(folder)), overrides)
    assert caught.value.hint and "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("component", "kind"),
    [("unet", UNet2DConditionModel), ("vae", AutoencoderKL), *(("scheduler", getattr(diffusers, name)) for name in SCHEDULERS)],
)
def test_every_entry_that_diffusers_knows_is_either_computed_or_required_to_do_nothing(component: str, kind: type) -> None:
    parameters = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
    assert parameters <= ACCEPTED[component] | set(SUPPORTED_VALUES[component])
    assert ACCEPTED[component].isdisjoint(SUPPORTED_VALUES[component])


def test_pipelines_are_those_of_diffusers() -> None:
    assert set(PIPELINES) <= set(dir(diffusers))


@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, '"FlowMatchEulerDiscreteScheduler" is not supported: flow'),
        (INDEX, {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, "flow matching"),
        (INDEX, {"_class_name": "StableDiffusionXLPipeline"}, "is of a StableDiffusionXLPipeline and names no text_encoder_2"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, 'the scheduler "EDMEulerScheduler" is not supported'),
        (SCHEDULER, {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, 'timestep_type is "continuous"'),
        (SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas is true"),
        (SCHEDULER, {"variance_type": "learned_range"}, 'variance_type is "learned_range"'),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction type 'flow_prediction'"),
        (SCHEDULER, {"beta_start": ...}, "beta_start is missing: nothing says which noise"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, more than"),
        (SCHEDULER, {"num_train_timesteps": "1000"}, 'num_train_timesteps is "1000"; it must be'),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas is not a list of 1000 numbers"),
        (SCHEDULER, {"beta_end": 12}, "beta_end is 12; it must be between 0 and 1"),
        (SCHEDULER, {"beta_start": -0.001}, "beta_start is -0.001; it must be between 0 and 1"),
        (VAE, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "latents_mean is [0.1, 0.1, 0.1, 0.1]"),
        (VAE, {"shift_factor": 0.1}, "shift_factor is 0.1"),
        (VAE, {"out_channels": 6}, "out_channels is 6, which is not supported: sid draws RGB images"),
        (VAE, {"scaling_factor": None}, "scaling_factor is null; it must be a positive number"),
        (VAE, {"latent_channels": 16}, "takes latents of 4 channels, its VAE gives 16"),
        (VAE, {"sample_size": None}, "sample_size is null, which is not an image size"),
        (VAE, {"block_out_channels": ...}, "vae/config.json: block_out_channels is missing"),
        (
            VAE,
            {"up_block_types": ["UpDecoderBlock2D"] * 2},
            "vae/config.json does not describe a network that generates images: it turns latents",
        ),
        (UNET, {"num_class_embeds": 10}, "num_class_embeds is 10, which is not supported: class labels"),
        (UNET, {"class_embed_type": "projection"}, 'class_embed_type is "projection"'),
        (UNET, {"addition_embed_type": "image"}, "image embeddings are an input"),
        (UNET, {"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 32}, "image embeddings are an input"),
        (UNET, {"time_cond_proj_dim": 256}, "the guidance scale is an input"),
        (UNET, {"attention_type": "gated"}, "boxes and phrases"),
        (UNET, {"dual_cross_attention": True}, "dual_cross_attention is true"),
        (UNET, {"out_channels": 8}, "out_channels is 8 where in_channels is 4: a learned variance"),
        (UNET, {"addition_embed_type": "text_time"}, 'addition_embed_type is "text_time", but the model has no text_encoder_2'),
        (
            UNET,
            {"norm_num_groups": 7},
            "unet/config.json does not describe a network that generates images: ValueError: num_channels",
        ),
        (UNET, {"down_block_types": ["DownBlock3D"] * 4}, "unet/config.json does not describe a network that generates images"),
        (UNET, {"layers_per_block": [1, 1, 1, 10**9]}, "layers_per_block is [1, 1, 1, 1000000000]; 10 layers at most"),
        (UNET, {"transformer_layers_per_block": [[1], [10**9]]}, "40 layers at most are built"),
        (VAE, {"block_out_channels": [8] * 10**5}, "block_out_channels has 100000 values, 16 at most are read"),
        (TEXT, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; 100 layers at most are built"),
        (TEXT, {"use_attention_mask": True}, "use_attention_mask is true"),
        (TEXT, {"model_type": "t5"}, 'model_type is "t5"'),
        (TEXT, {"num_attention_heads": 3}, "text_encoder/config.json does not describe a network that generates images"),
        (TEXT, {"hidden_size": ...}, "text_encoder/config.json: hidden_size is missing"),
        (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet, a ControlNetModel"),
        (INDEX, {"_class_name": "StableDiffusionLDM3DPipeline"}, "is a StableDiffusionLDM3DPipeline, which is not supported"),
        (INDEX, {"tokenizer": ["transformers", "T5Tokenizer"]}, "its tokenizer is a T5Tokenizer, not a CLIPTokenizer"),
        (INDEX, {"scheduler": ...}, "model_index.json names no scheduler"),
    ],
)
def test_what_would_change_the_image_and_is_not_computed_is_refused_by_name(
    file: str, entries: dict, said: str, restored: dict[str, Path]
) -> None:
    change(restored["sd"] / file, **entries)
    assert said in refusal(restored["sd"])


@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        (UNET, {"addition_embed_type": None}, "addition_embed_type is null, but the model has a text_encoder_2"),
        (UNET, {"projection_class_embeddings_input_dim": 5 * 8 + 20}, "gives 68: an aesthetic score is an input"),
        (UNET, {"projection_class_embeddings_input_dim": 100}, "prompt and image sizes give 68"),
        ("text_encoder_2/config.json", {"eos_token_id": 7}, "has eos_token_id 7"),
        (INDEX, {"tokenizer_2": ...}, "names no tokenizer_2"),
    ],
)
def test_the_parts_of_sdxl_must_fit_together(file: str, entries: dict, said: str, restored: dict[str, Path]) -> None:
    change(restored["xl"] / file, **entries)
    assert said.replace("gives", "give") in refusal(restored["xl"])


@pytest.mark.parametrize(
    "entries",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "LCMScheduler", "timestep_scaling": 10.0},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "discrete", "use_flow_sigmas": False},
        {"_class_name": ..., "clip_sample": True, "thresholding": True},
    ],
)
def test_entries_that_only_choose_how_diffusers_samples_pass(entries: dict, restored: dict[str, Path]) -> None:
    plain = describe(find(str(restored["sd"]))).path
    change(restored["sd"] / SCHEDULER, **entries)
    assert torch.equal(describe(find(str(restored["sd"]))).path.abar, plain.abar)


def test_an_entry_of_a_later_diffusers_passes_at_its_default_value_alone(
    restored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later:
        def __init__(self, tilt: float = 0.5, sizes: tuple[int, ...] = (1, 2)): ...

    monkeypatch.setattr(diffusers, "AutoencoderKL", Later)
    compatibility.check_entries("vae", "vae", {"tilt": 0.5, "sizes": [1, 2], "of another program": 1})
    with pytest.raises(InputError, match=r"vae: tilt is 0.7, which is not supported"):
        compatibility.check_entries("vae", "vae", {"tilt": 0.7})


def test_entries_that_the_unet_itself_computes_draw_as_in_stock_diffusers(restored: dict[str, Path]) -> None:
    change(
        restored["sd"] / UNET,
        center_input_sample=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        resnet_out_scale_factor=1.5,
        mid_block_scale_factor=2,
        time_embedding_act_fn="silu",
        cross_attention_dim=[32] * 2,
    )
    ours = Sampler(load(find(str(restored["sd"]))), torch.device("cpu")).images(["a cat"], [5], Plan(2, 3.0))[0]
    pipe = StableDiffusionPipeline.from_pretrained(restored["sd"])
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    theirs = np.asarray(
        pipe("a cat", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(5)).images[0]
    )
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_a_model_without_a_size_draws_at_the_size_that_is_wished(restored: dict[str, Path]) -> None:
    change(restored["sd"] / UNET, sample_size=None)
    folder = find(str(restored["sd"]))
    assert "unet/config.json: sample_size is null, which is not an image size" in refusal(restored["sd"])
    assert "sample_size is null" in refusal(restored["sd"], Overrides(width=64))
    assert load(folder, Overrides(width=64, height=32)).size == (32, 64)


def test_the_size_that_the_first_diffusers_wrote_is_read_as_stock_pipelines_read_it(restored: dict[str, Path]) -> None:
    change(restored["sd"] / UNET, _diffusers_version="0.6.0", sample_size=32)
    assert describe(find(str(restored["sd"]))).size == (512, 512)
    change(restored["sd"] / UNET, _diffusers_version="0.10.0")
    assert describe(find(str(restored["sd"]))).size == (256, 256)
