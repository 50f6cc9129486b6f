"""FLUX.1 from its folder to a student that the stock pipeline draws with, on tiny random pipelines."""

import dataclasses
import inspect
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from sidcli.errors import UsageError
from sidcli.models.drawing import Plan
from sidcli.models.flux import FLUX, with_guidance
from sidcli.models.loading import Model, describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from sidcli.objectives.base import FAKE, GENERATOR, TEACHER
from sidcli.progress import Silence
from sidcli.settings import DistillConfig, strategy
from sidcli.training import plan
from tests import tiny_flux
from tests.inprocess import sid
from tests.models.test_compatibility import change, refusal
from tests.models.test_sd3 import FLOW, INDEX, SCHEDULER, apart, as_student, built, drawn, stock
from tests.training.test_distill import run

NETWORK = "transformer/config.json"
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_flux(tmp_path_factory.mktemp("models") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_flux(tmp_path_factory.mktemp("models") / "schnell", dev=False)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of its folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "flux")


@pytest.fixture
def flux(folder: Path) -> Model:
    return load(find(str(folder)))


@pytest.fixture
def settings(config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, teacher="flux", steps=2, batch_size=2, micro_batch=2, **FLOW)


@pytest.mark.parametrize(("width", "height", "guidance"), [(32, 32, 3.5), (48, 40, 1.5)])
def test_the_guidance_scale_of_dev_is_an_input_as_in_the_stock_pipeline(
    folder: Path, width: int, height: int, guidance: float
) -> None:
    model = load(find(str(folder)), Overrides(width=width, height=height))
    theirs = stock(folder, num_inference_steps=4, guidance_scale=guidance, width=width, height=height)
    assert apart(drawn(model, Plan(4, guidance)), theirs) <= 1
    assert apart(drawn(model, Plan(4, 1.0)), theirs) > 0 and plan_for(model).guidance == 3.5


def test_schnell_draws_without_guidance_as_the_stock_pipeline_does(schnell: Path) -> None:
    model = load(find(str(schnell)))
    theirs = stock(schnell, num_inference_steps=4, guidance_scale=0, max_sequence_length=256, **SIZE)
    assert apart(drawn(model, plan_for(model, 4)), theirs) <= 1
    assert Sampler(model, torch.device("cpu")).encode([""]).states.shape == (1, 256, 48)
    assert model.path.teacher_grid(4) == (1000, 750, 500, 250) and plan_for(model).guidance == 1.0


@pytest.mark.parametrize(("side", "tokens"), [(32, 16), (64, 64), (512, 4096)])
def test_the_shift_of_the_timesteps_follows_from_the_size_of_the_image(folder: Path, side: int, tokens: int) -> None:
    found = describe(find(str(folder)), Overrides(width=side, height=side)).path
    assert found.sampling["shift"] == pytest.approx(math.exp(calculate_shift(tokens)), abs=1e-8)


def test_a_guidance_scale_above_0_takes_one_row_and_others_combine_two_predictions(flux: Model) -> None:
    encode, calls = Sampler(flux, torch.device("cpu")).encode, []

    def denoise(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        calls.append((len(x), cond.added["guidance"].flatten().tolist()))
        return FLUX.denoise(flux.denoiser, x, t, cond)

    x, t = torch.randn(2, *flux.latent_shape), torch.tensor([999.5, 20.25])
    cond, empty = encode(["a cat", "a dog"]), encode([""])
    assert cond.states.shape == (2, 512, 48)
    found = FLUX.guided(denoise, x, t, cond, empty, (3.5, 3.5, 1.0, 0.0, -1.0))
    assert calls == [(2, [3.5] * 2), (2, [1.0] * 2), (2, [1.0] * 2), (4, [1.0] * 4)]
    assert FLUX.rows(flux.denoiser.config, (3.5, 3.5, 1.0, 0.0, -1.0)) == 1 + 1 + 1 + 2
    plain, nothing = denoise(x, t, cond), denoise(x, t, empty.expand(2))
    wanted = [denoise(x, t, with_guidance(cond, 3.5))] * 2 + [plain, nothing, nothing - (plain - nothing)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[2])


def test_the_student_runs_at_an_input_of_1_and_the_teacher_at_its_guidance_scale(flux: Model, settings: DistillConfig) -> None:
    engine, scales = built(flux, settings, "sid", **strategy("long", 3.5)), {}
    for role, net in {TEACHER: engine.teacher, **{name: engine.roles[name].net for name in (FAKE, GENERATOR)}}.items():
        net.register_forward_pre_hook(lambda _, inputs, role=role: scales.setdefault(role, set()).update(inputs[-1].tolist()))
    engine.train_step()
    assert scales == {TEACHER: {3.5}, FAKE: {1.0}, GENERATOR: {1.0}}


SAVING = {"gradient_checkpointing": True, "split_backward": True, "micro_batch": 1}


@pytest.mark.parametrize(("steps", "options"), [(1, {}), (4, {"student_lora": 4, "fake_lora": 4, **SAVING})])
def test_the_stock_pipeline_draws_with_a_student_as_sid_does(
    folder: Path, settings: DistillConfig, tmp_path: Path, steps: int, options: dict[str, Any]
) -> None:
    result = run(folder, dataclasses.replace(settings, student_steps=steps, **options), tmp_path / "run")
    student = load(find(str(result.run)))
    how = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if steps == 4 else {"num_inference_steps": 1}
    assert plan_for(student).in_diffusers == how
    image = drawn(student)
    assert apart(image, stock(result.student, guidance_scale=1, **how, **SIZE)) <= 1
    assert apart(image, drawn(load(find(str(folder))), Plan(1, grid=(1000.0,)))) > 0, "the student has learned"
    with pytest.raises(UsageError, match="draws in one size: its timesteps depend on it"):
        load(find(str(result.run)), Overrides(height=64, width=64))
    said = "height=32, width=32, guidance_scale=1"
    assert said in (result.student / "README.md").read_text() and said in (result.run / "report.html").read_text()


def test_a_student_of_schnell_is_exported_for_the_stock_pipeline(schnell: Path, tmp_path: Path) -> None:
    student = as_student(shutil.copytree(schnell, tmp_path / "student"), shift=1.0)
    assert sid("export", student, "--format", "diffusers", "-o", tmp_path / "out") == 0
    said = 'pipe("a cat", num_inference_steps=1, height=32, width=32, guidance_scale=0, max_sequence_length=256)'
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_a_size_draws_128_latents_a_side_as_the_stock_pipeline_does(copied: Path) -> None:
    change(copied / NETWORK, sample_size=...)
    known = describe(find(str(copied)))
    assert known.size == (512, 512) and known.kind.latent_shape(known.denoiser_config) == (16, 128, 128)
    assert FLUX.call_options(known.denoiser_config, known.size) == {"guidance_scale": 1}


def test_a_discriminator_reads_a_map_of_the_middle_block(flux: Model) -> None:
    cond = Sampler(flux, torch.device("cpu")).encode(["a", "b"])
    for wanted in ((2, 32, 4, 4), (2,)):
        with FLUX.features(flux.denoiser) as found:
            FLUX.denoise(flux.denoiser, torch.randn(2, *flux.latent_shape), torch.tensor([900.0, 20.0]), cond)
        assert found[0].shape == wanted
        FLUX.add_head(flux.denoiser)


def test_every_target_of_an_adapter_and_every_block_is_in_the_transformer(flux: Model) -> None:
    names = [name for name, _ in flux.denoiser.named_modules()]
    assert all(any(name.endswith(f".{target}") for name in names) for target in FLUX.lora_targets)
    double, single = FLUX.recomputed()
    assert [type(block) for block in FLUX.blocks(flux.denoiser)] == [double, single, single]


def test_a_dry_run_counts_guidance_as_one_row_of_dev_and_as_two_of_schnell(
    folder: Path, schnell: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sid("distill", "--teacher", folder, "--prompts", "general", "--device", "cpu", "--dry-run") == 0
    assert "\nt_init = 1000\n" in capsys.readouterr().out
    for teacher, forwards in ((folder, 11), (schnell, 18)):
        config = DistillConfig(teacher=str(teacher), prompts="general", **FLOW)
        assert plan.forwards_per_image(config, plan.describe_teacher(config, Silence())) == forwards


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (SCHEDULER, {"base_shift": "a"}, 'base_shift is "a"; it must be a number'),
        (SCHEDULER, {"max_shift": 9000.0, "max_image_seq_len": 300}, "images of 16 tokens have a shift"),
        (SCHEDULER, {"time_shift_type": "linear"}, 'time_shift_type is "linear", which is not supported'),
        (SCHEDULER, {"shift_terminal": 0.02}, "shift_terminal is 0.02, which is not supported"),
        (NETWORK, {"sample_size": 9}, "sample_size is 9, a height of 36 pixels; it must be a multiple of 8"),
        (NETWORK, {"patch_size": 2}, "patch_size is 2, which is not supported"),
        (NETWORK, {"in_channels": 384}, "takes latents of 96 channels, its VAE gives 16"),
        (NETWORK, {"out_channels": 16}, "out_channels is 16 where in_channels is 64"),
        (NETWORK, {"joint_attention_dim": 56}, "joint_attention_dim is 56, and the states of T5 have width 48"),
        (NETWORK, {"pooled_projection_dim": 24}, "pooled_projection_dim is 24, and the CLIP text encoder gives 16"),
        (NETWORK, {"axes_dims_rope": [4, 4, 4]}, "does not describe a network that generates images"),
        (NETWORK, {"num_single_layers": 10**6}, "120 layers at most are built"),
        (INDEX, {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
        (INDEX, {"_class_name": "FluxFillPipeline"}, "is a FluxFillPipeline, which is not supported"),
    ],
)
def test_a_description_that_is_not_computed_is_refused(copied: Path, file: str, entries: dict[str, Any], message: str) -> None:
    change(copied / file, **entries)
    assert message in refusal(copied)


@pytest.mark.parametrize(
    ("component", "kind"),
    [("transformer", FluxTransformer2DModel), ("vae", AutoencoderKL), ("scheduler", FlowMatchEulerDiscreteScheduler)],
)
def test_every_entry_that_diffusers_knows_is_either_accepted_or_has_its_supported_values(component: str, kind: Any) -> None:
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    accepted, values = FLUX.rules.accepted[component], set(FLUX.rules.values[component])
    assert known <= accepted | values and accepted.isdisjoint(values)
