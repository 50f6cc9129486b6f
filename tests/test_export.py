"""From a folder to a single file, to a teacher, to a student, to each format and back through the library that reads it."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from sidcli import distill, export
from sidcli.config import DistillConfig
from sidcli.errors import EnvironmentProblem, GateError, InputError, UsageError
from sidcli.formats import lora, single_file
from sidcli.formats.order import Order
from sidcli.outputs import check_export
from sidcli.prompts import open_prompts
from sidcli.sampler import Sampler, plan_for
from sidcli.sources import find
from sidcli.teachers import Model, Overrides, load
from tests import tiny, tiny_families
from tests.test_distill import Silent

CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd1": partial(tiny.write_sd, size=16),
    "sd2": tiny_families.write_sd2,
    "sdxl": tiny_families.write_sdxl,
}


def student_of(folder: Path, config: DistillConfig, teacher: str, **changes: object) -> Model:
    settings = dataclasses.replace(config, teacher=teacher, steps=2, **changes)
    known = Overrides(settings.prediction_type, settings.model_config, settings.width, settings.height)
    rhythm = distill.Rhythm(save=2, sample=2, log=1)
    model = load(find(teacher), known)
    result = distill.run(model, settings, open_prompts("general"), folder / "run", "cpu", rhythm, None, Silent())
    return load(find(str(result.run)))


def strip_header(file: Path) -> None:
    """Leave the tensors alone, as other programs write them."""
    save_file({name: value for name, value in load_file(file).items() if name != "v_pred"}, file)


def through_a_single_file(folder: Path, file: Path) -> Model:
    """A pipeline's folder written as a single file, and the model read again from there alone."""
    model = load(find(str(folder)))
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    networks = dict(zip(names, [model.unet, model.vae, *model.text_encoders], strict=False))
    single_file.write(file, networks, model.scheduler_config, {}, torch.float32)
    return load(find(str(file)))


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A pipeline that went into a single file and was read again from there alone."""
    folder = tmp_path_factory.mktemp(request.param)
    return through_a_single_file(FAMILIES[request.param](folder / "teacher"), folder / "teacher.safetensors")


@pytest.fixture(scope="module")
def student(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = DistillConfig(batch_size=2, micro_batch=2, lr_fake=1e-3, lr_generator=1e-3, precision="fp32", prompts="general")
    return student_of(tmp_path_factory.mktemp("student"), config, teacher.source.name)


@pytest.mark.check(20)
@pytest.mark.parametrize("form", export.FORMATS)
def test_every_family_goes_through_every_format_and_draws_the_same(
    teacher: Model, student: Model, form: str, tmp_path: Path
) -> None:
    done = export.run(student, form, tmp_path / "out", Order(teacher=teacher if form == "lora" else None), True, lambda count: None)
    assert done.difference is not None and done.difference <= 1, "in 1/255"
    assert json.loads((tmp_path / "out" / "sid.json").read_text())["t_init"] == 625
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arxiv:2406.01561" in card and "How to run it" in card


def test_stock_pipelines_run_the_folder_as_its_card_says(student: Model, tmp_path: Path) -> None:
    export.run(student, "diffusers", tmp_path / "out", Order(variant="fp16", dtype="fp16"), True, lambda count: None)
    kind = StableDiffusionXLPipeline if student.is_xl else StableDiffusionPipeline
    pipe = kind.from_pretrained(tmp_path / "out", variant="fp16", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = np.asarray(pipe("a dog", num_inference_steps=1, guidance_scale=0, generator=generator).images[0])
    ours = Sampler(student, CPU).images(["a dog"], [3], plan_for(student))[0].numpy()
    assert export.apart(theirs, ours) <= 8, "weights rounded to half precision"
    assert kind.__name__ in (tmp_path / "out" / "README.md").read_text()


def test_exported_files_may_be_read_by_others(student: Model, tmp_path: Path) -> None:
    export.run(student, "diffusers", tmp_path / "out", Order(), False, lambda count: None)
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()} == {usual}


def test_a_single_file_student_is_a_model_like_any_other(student: Model, tmp_path: Path) -> None:
    export.run(student, "single-file", tmp_path / "out", Order(), False, lambda count: None)
    again = load(find(str(tmp_path / "out")))
    assert again.is_student and again.card["t_init"] == 625
    assert export.apart(export.picture(again), export.picture(student)) <= 1
    assert again.source.folder == tmp_path / "out"
    workflow = json.loads((tmp_path / "out" / "comfyui_workflow.json").read_text())
    assert any("2.5017" in str(node["widgets_values"]) for node in workflow["nodes"])


def test_a_lora_of_full_rank_is_the_student_in_every_weight_that_it_can_change(teacher: Model, student: Model) -> None:
    whole = lora.merged(student, teacher, 10_000)
    wanted = dict(student.unet.named_parameters())
    for name, value in whole.unet.named_parameters():
        if value.ndim in (2, 4) and name.endswith(".weight"):
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    _, little = lora.layers(student.unet, teacher.unet, 1)
    _, much = lora.layers(student.unet, teacher.unet, 8)
    assert 0 < little < much <= 1


def test_an_export_that_draws_something_else_leaves_nothing_behind(
    student: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "picture", lambda model: np.zeros((8, 8, 3), np.uint8) + np.uint8(0))
    monkeypatch.setattr("sidcli.formats.diffusers_folder.draw", lambda *_: np.full((8, 8, 3), 9, np.uint8))
    with pytest.raises(GateError, match="9/255 apart"):
        export.run(student, "diffusers", tmp_path / "out", Order(), True, lambda count: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("width", "height"), [(128, 64), (96, 96)])
def test_a_teacher_distils_and_draws_at_another_size(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, width: int, height: int
) -> None:
    drawn = student_of(tmp_path, config, str(sd_folder), width=width, height=height)
    assert drawn.size == (height, width)
    done = export.run(drawn, "diffusers", tmp_path / "out", Order(), True, lambda count: None)
    assert done.difference is not None and done.difference <= 1
    assert export.picture(drawn).shape == (height, width, 3)


def test_a_teacher_of_256_pixels_distils_at_its_own_size(config: DistillConfig, tmp_path: Path) -> None:
    teacher = tiny.write_sd(tmp_path / "teacher", size=32)
    assert student_of(tmp_path, config, str(teacher)).size == (256, 256)


def test_overwrite_replaces_exports_and_nothing_else(tmp_path: Path) -> None:
    for kept in ("run/config.toml", "run/sid.json", "project/code.py"):
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).write_text("{}")
    for folder in ("run", "project"):
        with pytest.raises(EnvironmentProblem, match="is not an export"):
            check_export(tmp_path / folder, True)
    (tmp_path / "run" / "config.toml").unlink()
    check_export(tmp_path / "run", True)


def test_a_lora_is_taken_from_a_teacher_that_needs_to_be_described(config: DistillConfig, tmp_path: Path) -> None:
    folder = tiny_families.write_sd2(tmp_path / "teacher")
    model = load(find(str(folder)))
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    file = tmp_path / "bare.safetensors"
    single_file.write(file, networks, model.scheduler_config, {}, torch.float32)
    strip_header(file)
    described = {"model_config": str(folder), "prediction_type": "v_prediction"}
    student = student_of(tmp_path, config, str(file), **described)
    teacher = load(find(export.teacher_of(student)), Overrides(**{name: student.card["config"][name] for name in described}))
    done = export.run(student, "lora", tmp_path / "out", Order(teacher=teacher), True, lambda count: None)
    assert done.difference is not None and done.difference <= 1


def test_words_of_its_own_keep_a_student_out_of_single_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer of its own"):
        export.run(load(find("emoji")), "single-file", tmp_path / "out", Order(), True, lambda count: None)


def test_an_upload_needs_a_licence_which_the_card_then_names(student: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="under which licence"):
        export.licensed(student, None, needed=True)
    named = export.licensed(student, "openrail++", needed=True)
    export.run(named, "diffusers", tmp_path / "out", Order(), False, lambda count: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: openrail++" in card and "use-based restrictions" in card
