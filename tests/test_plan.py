"""`--dry-run`: a plan from JSON files alone, for any architecture."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sidcli import plan
from sidcli.config import MEMORY, DistillConfig
from sidcli.engine import Engine
from sidcli.errors import UsageError
from sidcli.hub import Silence
from sidcli.prompts import open_prompts
from sidcli.teachers import Model
from sidcli.text import Condition, denoise
from tests import tiny


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of SD 1.5's size without a single weight."""
    return tiny.write_sd15_configs(tmp_path_factory.mktemp("sd15"))


def on_device(made: plan.Plan) -> float:
    """GB that a card would hold: all but this program itself."""
    return (made.peak - made.device_memory["this program"]) / 1e9


@pytest.mark.parametrize(("memory", "limit"), [("24gb", 22.0), ("12gb", 11.0)])
def test_sd15_fits_the_card_that_a_memory_recipe_is_named_after(sd15_folder: Path, memory: str, limit: float) -> None:
    config = DistillConfig(teacher=str(sd15_folder), prompts="general", precision="bf16", **MEMORY[memory])
    made = plan.make(config, Path("run"), "cpu", 1, Silence())
    assert made.parameters["teacher"] == 859_520_964
    assert 5.0 < on_device(made) < limit


def test_guidance_costs_eighteen_forwards_an_image_and_none_eleven(sd_folder: Path) -> None:
    guided = DistillConfig(teacher=str(sd_folder), prompts="general")
    plain = dataclasses.replace(guided, kappa1=1.0, kappa2=1.0, kappa3=1.0, kappa4=1.0)
    one, other = (plan.make(config, Path("run"), "cpu", 1, Silence()).flops_per_image for config in (guided, plain))
    assert one / other == pytest.approx(18 / 11)


def test_the_plan_counts_what_a_forward_pass_really_keeps(sd: Model, config: DistillConfig) -> None:
    kept: dict[int, int] = {}
    engine = Engine(sd, config, open_prompts("general"), torch.device("cpu"))
    weights = {value.untyped_storage().data_ptr() for value in engine.generator.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    x, t, told = torch.randn(4, *sd.latent_shape), torch.full((4,), 500), engine.sampler.encode(["a cat"] * 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        alive = denoise(engine.generator, x, t, told)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sd.unet.config)
    counted = plan.activations(unet, 4, config, Condition(torch.empty(1, 77, 32, device="meta")), trained=True)
    assert alive.requires_grad and counted == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize(
    "option", ["gradient_checkpointing", "split_backward", "offload_average", "offload_optimizer", "fake_lora"]
)
def test_every_memory_option_makes_the_plan_smaller(sd_folder: Path, option: str) -> None:
    config = DistillConfig(teacher=str(sd_folder), prompts="general")
    saving = dataclasses.replace(config, **{option: 4 if option == "fake_lora" else True})
    plain, less = (on_device(plan.make(settings, Path("run"), "cpu", 1, Silence())) for settings in (config, saving))
    assert less < plain


def test_time_is_known_once_the_run_folder_has_measured_a_rate(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder), steps=100)
    assert plan.make(config, tmp_path, "cpu", 1, Silence()).seconds is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "images_per_second": 8.0}) + "\n")
    assert plan.make(config, tmp_path, "cpu", 1, Silence()).seconds == 50.0


def test_a_process_computes_no_more_at_once_than_its_share_of_the_batch(sd_folder: Path, config: DistillConfig) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder))
    alone, four = (plan.make(config, Path("run"), "cpu", processes, Silence()) for processes in (1, 4))
    assert "batch         4 = micro-batch 1 x 1 in turn x 4 processes" in four.lines()
    assert four.device_memory["activations"] < alone.device_memory["activations"]
    with pytest.raises(UsageError, match="batch-size 4 does not split over 3 processes"):
        plan.make(config, Path("run"), "cpu", 3, Silence())
