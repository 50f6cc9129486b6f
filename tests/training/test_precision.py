"""The arithmetic of a run: float32, or what a short measurement finds faster."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sidcli.data.prompts import open_prompts
from sidcli.engine import FP32, Arithmetic, Engine
from sidcli.models.loading import Model
from sidcli.progress import Silence
from sidcli.settings import DistillConfig
from sidcli.training import precision

CPU = torch.device("cpu")


def test_a_cpu_without_bf16_units_computes_in_float32_unmeasured(
    sd: Model, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda: False)
    auto = dataclasses.replace(config, precision="auto")
    assert precision.choose(sd, auto, CPU, tmp_path / "run.json", Silence()) == (FP32, {})


def test_a_cpu_with_bf16_units_computes_as_the_fastest_measured_candidate(
    sd: Model, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda: True)
    auto, record = dataclasses.replace(config, precision="auto"), tmp_path / "run.json"
    chosen, seconds = precision.choose(sd, auto, CPU, record, Silence())
    assert set(seconds) == {"fp32", "bf16", "bf16, math attention"} and all(value > 0 for value in seconds.values())
    assert seconds[chosen.name] == min(seconds.values())
    assert not any(value.requires_grad for value in sd.denoiser.parameters()), "the teacher is frozen again"
    named, unmeasured = precision.choose(sd, dataclasses.replace(config, precision="bf16"), CPU, record, Silence())
    assert named == Arithmetic(bf16=True) and not unmeasured, "a named precision is not measured"


def test_other_work_during_a_part_of_the_measurement_does_not_decide_it(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Arithmetic] = []

    def timed(net: object, inputs: object, arithmetic: Arithmetic, advance: object) -> float:
        passes.append(arithmetic)
        busy = 100.0 if len(passes) <= precision.REPEATS else 0.0
        return 2.0 + precision.CANDIDATES.index(arithmetic) + busy

    monkeypatch.setattr(precision, "_pass", timed)
    assert list(precision.measure(sd, 2, Silence()).values()) == [1.0, 1.5, 2.0]
    assert len(passes) == precision.REPEATS * len(precision.CANDIDATES)


def test_a_continued_run_keeps_its_arithmetic(
    sd: Model, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda: False)
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"device": "cpu", "bf16": True, "attention": "math", "seconds_per_image": {"fp32": 2.0}}))
    auto = dataclasses.replace(config, precision="auto")
    kept = precision.choose(sd, auto, CPU, record, Silence())
    assert kept == (Arithmetic(bf16=True, attention="math"), {"fp32": 2.0})
    record.write_text(json.dumps({"device": "cuda", "bf16": True}))
    assert precision.choose(sd, auto, CPU, record, Silence())[0] == FP32, "a run of a GPU is measured anew on a CPU"


@pytest.mark.parametrize("recompute", [False, True])
def test_math_attention_computes_the_same_step_up_to_rounding(recompute: bool, sd: Model, config: DistillConfig) -> None:
    settings = dataclasses.replace(config, gradient_checkpointing=recompute)
    losses = []
    for arithmetic in (Arithmetic(bf16=True), Arithmetic(bf16=True, attention="math")):
        engine = Engine(sd, settings, open_prompts("general"), CPU, arithmetic)
        losses.append(engine.train_step().numbers())
    # The generator's loss is a sum of terms of both signs that is near zero, so that rounding changes much of it.
    for name, tolerance in (("fake_loss", 0.005), ("ratio", 0.05), ("sample_std", 0.005), ("generator_loss", 0.3)):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=tolerance), name
    assert losses[0] != losses[1], "another kernel rounds differently"


def test_training_leaves_out_the_attention_of_cudnn(sd: Model, config: DistillConfig) -> None:
    engine, seen = Engine(sd, config, open_prompts("general"), CPU), []
    engine.teacher.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    engine.train_step()
    assert seen and not any(seen), "its backward pass returns NaN"
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
