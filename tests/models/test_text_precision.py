"""`--text-precision bf16`: T5 and Gemma with half of their memory, on tiny random pipelines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine, check_teacher
from sidcli.errors import UsageError
from sidcli.models.loading import describe, load
from sidcli.models.sampler import Sampler
from sidcli.models.sources import find
from sidcli.objectives.regression import RegressionSettings
from sidcli.progress import Silence
from sidcli.settings import DistillConfig
from sidcli.training import plan
from sidcli.training.distill import open_data
from tests import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3
from tests.training.test_distill import Silent, run

FAMILIES = {
    "sd3": tiny_sd3.write_sd3,
    "flux": tiny_flux.write_flux,
    "pixart": tiny_pixart.write_pixart,
    "sana": tiny_sana.write_sana,
}
PROMPTS = ["a cat", "two dogs in a very long garden with red and yellow flowers", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("models") / request.param)


def settings(folder: Path, **more: object) -> DistillConfig:
    usual = describe(find(str(folder))).path.settings
    sizes = {"prompts": "general", "steps": 1, "batch_size": 2, "micro_batch": 1, "precision": "fp32"}
    return DistillConfig(teacher=str(folder), **{**usual, **sizes, **more})  # type: ignore[arg-type]


def test_the_states_of_a_language_model_in_bf16_are_float32_and_close_and_its_buffers_keep_their_precision(folder: Path) -> None:
    whole = Sampler(load(find(str(folder))), CPU).encode(PROMPTS)
    model = dataclasses.replace(load(find(str(folder))), text_bf16=True)
    half = Sampler(model, CPU).encode(PROMPTS)
    assert half.shapes == whole.shapes and half.states.dtype == torch.float32
    assert all(torch.equal(value, whole.added[name]) for name, value in half.added.items()), "CLIP computes in float32"
    apart = (half.states - whole.states).norm() / whole.states.norm()
    assert 0 < apart < 0.02
    language = model.networks[model.kind.language_model]
    assert {value.dtype for value in language.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in language.buffers() if value.is_floating_point()} <= {torch.float32}


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_plan_counts_half_of_the_memory_of_the_language_model_wherever_it_is(folder: Path, offloaded: bool) -> None:
    config = settings(folder, offload_text=offloaded)
    model = load(find(str(folder)))
    size = sum(value.numel() for value in model.networks[model.kind.language_model].parameters())
    one, half = (
        plan.make(dataclasses.replace(config, text_precision=precision), folder, "cpu", 1, Silence())
        for precision in ("fp32", "bf16")
    )
    texts = [made.main_memory if offloaded else made.device_memory["text encoder"] for made in (one, half)]
    assert texts[0] - texts[1] == 2 * size > 0
    assert len(model.texts) > 1 or texts[1] == texts[0] / 2
    assert one.disk == half.disk, "the student has the text encoders of the teacher in float32"


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_training_reads_prompts_in_bf16_wherever_the_text_encoders_are(folder: Path, offloaded: bool) -> None:
    config = settings(folder, text_precision="bf16", offload_text=offloaded)
    engine = Engine(load(find(str(folder))), config, open_prompts("general"), CPU)
    language = engine.sampler.model.networks[engine.kind.language_model]
    assert {value.dtype for value in language.parameters()} == {torch.bfloat16} and engine.empty.states.dtype == torch.float32
    assert all(torch.tensor(engine.train_step().numbers()[name]).isfinite() for name in ("fake_loss", "generator_loss"))


def test_a_student_has_the_exact_text_encoders_of_its_teacher_and_its_record_the_precision(folder: Path, tmp_path: Path) -> None:
    result = run(folder, settings(folder, text_precision="bf16"), tmp_path / "run")
    name = describe(find(str(folder))).kind.language_model
    one, two = (load_file(next((place / name).glob("*.safetensors"))) for place in (folder, result.student))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert 'text_precision = "bf16"\n' in (result.run / "config.toml").read_text()
    assert json.loads((result.student / "sid.json").read_text())["config"]["text_precision"] == "bf16"


def test_images_that_a_teacher_draws_from_states_of_another_precision_are_cached_apart(tmp_path: Path) -> None:
    folder = tiny_pixart.write_pixart(tmp_path / "pixart")
    drawn = []
    for precision in ("fp32", "bf16"):
        config = settings(folder, objective=RegressionSettings(), data="teacher", data_num=2, text_precision=precision)
        engine = Engine(load(find(str(folder))), config, open_prompts("general"), CPU)
        drawn.append(open_data(engine, None, tmp_path, "teacher", Silent()))
    one, half = drawn
    assert one.digest != half.digest and not torch.equal(one.at(0, 0)[0], half.at(0, 0)[0])


def test_models_without_a_language_model_refuse_another_precision_of_it(sd_folder: Path, tmp_path: Path) -> None:
    for folder in (sd_folder, tiny_sd3.write_sd3(tmp_path / "sd3", tiny_sd3.TEXTS[:2])):
        known = describe(find(str(folder)))
        check_teacher(known, settings(folder))
        with pytest.raises(UsageError, match=f"--text-precision bf16 is the precision of T5 or Gemma, and {folder} has neither"):
            check_teacher(known, settings(folder, text_precision="bf16"))
