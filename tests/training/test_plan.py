"""`--dry-run`: a plan from JSON files alone, for any architecture."""

import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import UNet2DConditionModel

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.models.kind import Cond
from sidcli.models.loading import Model, load
from sidcli.models.sources import find
from sidcli.models.unet import UNET
from sidcli.objectives.sid import SidSettings
from sidcli.progress import Silence
from sidcli.settings import MEMORY, DistillConfig
from sidcli.training import checkpoint, plan
from sidcli.training.gpus import parse_gpu
from tests import REPOSITORY, tiny


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of SD 1.5's size without a single weight."""
    return tiny.write_sd15_configs(tmp_path_factory.mktemp("sd15"))


def on_device(made: plan.Plan) -> float:
    """GB that a GPU would hold: all but this program itself."""
    return (made.peak - made.device_memory.get("this program", 0)) / 1e9


def visit(name: str) -> dict[str, Any]:
    """What a check of the GPU visit measured on an H200."""
    file = REPOSITORY / "tests" / "benchmarks" / "results" / "gpu-visit-h200.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return next(row["values"] for row in rows if row["name"] == name)


@pytest.mark.parametrize(("memory", "limit"), [("24gb", 24.0), ("12gb", 12.0), pytest.param("fast", 80.0, marks=pytest.mark.soak)])
def test_the_plan_of_sd15_is_what_a_gpu_used_and_fits_the_card_that_its_recipe_is_named_after(
    sd15_folder: Path, memory: str, limit: float
) -> None:
    config = DistillConfig(teacher=str(sd15_folder), prompts="general", **MEMORY[memory])
    made = plan.make(config, Path("run"), "cuda", 1, Silence())
    measured = visit(f"sd15 {memory}")
    assert made.parameters["teacher"] == 859_520_964 and made.config.precision == "bf16"
    assert made.config.micro_batch == measured["micro_batch"]
    assert on_device(made) == pytest.approx(measured["peak_gb"], rel=0.06)
    assert on_device(made) < (1 - plan.RESERVE) * limit
    seconds = plan.estimated_seconds(plan.GPUS["h200"], made.config, 1, made.flops_per_image, 686)
    assert seconds == pytest.approx(made.config.steps * 512 / measured["images_per_second_at_512"], rel=0.2)


def test_guidance_costs_eighteen_forwards_an_image_and_none_eleven(sd_folder: Path) -> None:
    guided = DistillConfig(teacher=str(sd_folder), prompts="general")
    plain = dataclasses.replace(guided, objective=SidSettings(kappa1=1.0, kappa2=1.0, kappa3=1.0, kappa4=1.0))
    one, other = (plan.make(config, Path("run"), "cpu", 1, Silence()).flops_per_image for config in (guided, plain))
    assert one / other == pytest.approx(18 / 11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_what_a_forward_pass_really_keeps(sd: Model, config: DistillConfig, precision: str) -> None:
    kept: dict[int, int] = {}
    config = dataclasses.replace(config, precision=precision)
    engine = Engine(sd, config, open_prompts("general"), torch.device("cpu"))
    weights = {value.untyped_storage().data_ptr() for value in engine.roles["generator"].net.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    x, t, cond = torch.randn(4, *sd.latent_shape), torch.full((4,), 500), engine.sampler.encode(["a cat"] * 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), engine.arithmetic.autocast("cpu"):
        alive = UNET.denoise(engine.roles["generator"].net, x, t, cond)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sd.denoiser.config)
    counted, _ = plan.activations(unet, 4, config, Cond(torch.empty(1, 77, 32, device="meta")), trained=True)
    assert alive.requires_grad and counted == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize(
    "option", ["gradient_checkpointing", "split_backward", "offload_average", "offload_optimizer", "offload_text"]
)
def test_every_memory_option_makes_the_plan_smaller(sd_folder: Path, option: str) -> None:
    plain = DistillConfig(teacher=str(sd_folder), prompts="general", micro_batch=1)
    assert planned(dataclasses.replace(plain, **{option: True})) < planned(plain)  # type: ignore[arg-type]


def test_each_lora_makes_the_plan_smaller(sd15_folder: Path) -> None:
    # Adapters keep activations of their own, which only the weights of a real model outweigh.
    plain = DistillConfig(teacher=str(sd15_folder), prompts="general", micro_batch=1)
    fake, both = dataclasses.replace(plain, fake_lora=4), dataclasses.replace(plain, fake_lora=4, student_lora=4)
    assert planned(both) < planned(fake) < planned(plain)


def planned(config: DistillConfig) -> float:
    return on_device(plan.make(config, Path("run"), "cpu", 1, Silence()))


def test_time_is_known_once_the_run_folder_has_measured_a_rate(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder), steps=100)
    assert plan.make(config, tmp_path, "cpu", 1, Silence()).seconds is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "images_per_second": 8.0}) + "\n")
    assert plan.make(config, tmp_path, "cpu", 1, Silence()).seconds == 50.0


def test_a_process_computes_no_more_at_once_than_its_share_of_the_batch(sd_folder: Path, config: DistillConfig) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder))
    alone, four = (plan.make(config, Path("run"), "cpu", processes, Silence()) for processes in (1, 4))
    assert "# batch         4 = micro-batch 1 x accumulation 1 x 4 processes" in four.lines()
    assert four.device_memory["activations"] < alone.device_memory["activations"]
    with pytest.raises(UsageError, match="batch-size 4 does not split over 3 processes"):
        plan.make(config, Path("run"), "cpu", 3, Silence())


def test_a_plan_is_a_config_file(sd_folder: Path, config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder))
    text = "\n".join(plan.make(config, tmp_path, "cpu", 1, Silence()).lines())
    assert tomllib.loads(text) == dataclasses.asdict(config)


def test_a_gpu_is_planned_for_that_is_not_here(sd_folder: Path, config: DistillConfig) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder), precision="auto")
    for device, gpu in (("cuda", None), ("auto", parse_gpu("rtx-4090")), ("auto", parse_gpu("24 GB"))):
        made = plan.make(config, Path("run"), device, 1, Silence(), gpu=gpu)
        assert made.device == "cuda" and made.config.precision == "bf16" and "RTX 4090" in made.estimates
        assert any("fits" in line for line in made.lines()) == (gpu is not None)
    assert not plan.make(config, Path("run"), "cpu", 1, Silence()).estimates


def test_an_amount_of_memory_has_the_times_of_gpus_of_that_size_alone(sd_folder: Path, config: DistillConfig) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder))

    def titles(text: str) -> list[str]:
        return list(plan.make(config, Path("run"), "auto", 1, Silence(), gpu=parse_gpu(text)).estimates)

    assert titles("24gb") == ["RTX 3090", "RTX 4090", "L4"] and titles("80GB") == ["A100 80 GB", "H100"] and not titles("16gb")
    lines = plan.make(config, Path("run"), "auto", 1, Silence(), gpu=parse_gpu("16gb")).lines()
    assert any(line.startswith("# time ") and "not known" in line for line in lines)


@pytest.mark.parametrize("text", ["gtx", "", "24", "-1gb", "nangb"])
def test_a_gpu_that_is_not_known_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(UsageError, match=f"--plan-for: unknown GPU '{text}'") as refused:
        parse_gpu(text)
    assert "rtx-4090" in refused.value.hint


@pytest.mark.parametrize("text", ["0gb", "0.0 GB", "10001gb", "9" * 400 + "gb"])
def test_an_amount_of_memory_that_no_gpu_has_is_refused_with_its_limits(text: str) -> None:
    with pytest.raises(UsageError, match=f"--plan-for must be more than 0 GB and at most 10000 GB, not {text}"):
        parse_gpu(text)


def test_the_recipe_and_the_micro_batch_are_the_largest_that_fit(sd_folder: Path) -> None:
    base = DistillConfig(teacher=str(sd_folder), prompts="general", batch_size=16)
    large, small = candidates = [dataclasses.replace(base, micro_batch=2, split_backward=split) for split in (False, True)]

    def chosen(fits: DistillConfig) -> DistillConfig:
        """What is chosen for a GPU on which `fits` just fits."""
        peak = plan.make(fits, Path("run"), "cuda", 1, Silence()).peak
        gpu = plan.Gpu("a GPU", 1.001 * peak / 1e9 / (1 - plan.RESERVE), 0.0)
        return plan.choose(dict(zip(("large", "small"), candidates, strict=True)), "auto", Silence(), gpu)

    assert chosen(dataclasses.replace(large, micro_batch=4)).micro_batch == 4
    assert chosen(small) == small


def test_what_a_run_cannot_have_is_told_from_descriptions_alone(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, teacher=str(sd_folder))
    size = plan.Sizes.of(plan.describe_teacher(config, Silence()), config)
    engine = Engine(load(find(str(sd_folder))), config, open_prompts("general"), torch.device("cpu"))
    assert size.state(config) == engine.state_bytes
    plan.check(config, tmp_path / "run", 2, Silence())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: mock.Mock(free=2 * size.state(config) + size.student + 1))
    with pytest.raises(
        EnvironmentProblem, match=r"run has [\d.]+ MB of disk space free; the run needs .* \(3 checkpoints of"
    ) as refused:
        plan.check(config, tmp_path / "run", 2, Silence())
    assert refused.value.hint.startswith("--keep-checkpoints 1 needs")
    plan.check(config, tmp_path / "run", 1, Silence())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentProblem, match="--fake-lora needs peft") as missing:
        plan.check(dataclasses.replace(config, fake_lora=4), tmp_path / "run", 1, Silence())
    assert missing.value.hint == "pip install peft"
