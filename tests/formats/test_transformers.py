"""LoRAs and single files of students of transformers, read by stock diffusers as their model cards say."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from sidcli.errors import InputError
from sidcli.formats import export, lora, transformer_file
from sidcli.formats.order import Order
from sidcli.models.ldm import arranged, located
from sidcli.models.loading import Model, load
from sidcli.models.overrides import Overrides
from sidcli.models.sources import find
from sidcli.progress import Silence
from sidcli.settings import DistillConfig
from sidcli.training.initial import check, open_initial
from tests import tiny_flux, tiny_sana, tiny_sd3, tiny_students
from tests.cards import Card, is_near, ours
from tests.inprocess import sid
from tests.training.test_distill import run
from tests.training.test_initial import known

WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd3": tiny_sd3.write_sd3,
    "sd3-without-t5": lambda folder: tiny_sd3.write_sd3(folder, tiny_sd3.TEXTS[:2]),
    "dev": tiny_flux.write_flux,
    "schnell": lambda folder: tiny_flux.write_flux(folder, dev=False),
    "sana": tiny_sana.write_sana,
    "sana-with-positions": lambda folder: tiny_sana.write_sana(folder, positions=1.0),
}


def make(folder: Path, name: str, side: int = 0, **card: Any) -> tuple[Model, Model]:
    """A teacher in a folder, and a student of it whose weights all differ; `side` is that of its images in pixels, 0 the teacher's."""
    source = find(str(WRITERS[name](folder / "teacher")))
    teacher = load(source, Overrides(height=side, width=side))
    told = {"t_init": 1000, "shift": teacher.path.shift, "config": {"objective": {"name": "sid"}}}
    return load(source), tiny_students.student_of(teacher, **told | card)


def exported(student: Model, form: str, folder: Path, order: Order) -> export.Exported:
    return export.run(student, form, folder, order, True, lambda count: None)


def image_of(card: Card, teacher: Model, at: Path) -> np.ndarray:
    """The image that the Python of a card draws."""
    return card.draw({"FOLDER": card.folder, "TEACHER": teacher.source.path}, at)


@pytest.mark.check(20)
@pytest.mark.parametrize(
    ("name", "dtype", "side", "steps"),
    [
        *((name, "fp32", 0, 1) for name in WRITERS),
        *(("sd3", dtype, 0, 1) for dtype in ("fp16", "bf16")),
        *((name, "fp32", 64, 4) for name in ("sd3", "dev", "sana-with-positions")),
    ],
)
def test_the_stock_pipeline_reads_a_lora_and_draws_what_sid_draws_as_its_card_says(
    tmp_path: Path, name: str, dtype: str, side: int, steps: int
) -> None:
    teacher, student = make(tmp_path, name, side, student_steps=steps)
    done = exported(student, "lora", tmp_path / "out", Order(dtype, rank=10_000, teacher=teacher))
    assert done.difference is not None and done.difference <= {"fp32": 1, "fp16": 4, "bf16": 16}[dtype], "in 1/255"
    card, meant = Card(tmp_path / "out"), lora.merged(student, teacher, 10_000)
    assert card.facts["Format"] == f"lora, {dtype}" and card.data["library_name"] == "diffusers"
    assert is_near(image_of(card, teacher, tmp_path / "cat.png"), ours(meant), dtype)
    assert not is_near(ours(dataclasses.replace(teacher, card=student.card)), ours(meant), "bf16")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == [lora.WEIGHTS]
    weights = load_file(tmp_path / "out" / lora.WEIGHTS)
    ranks = {len(value) for key, value in weights.items() if key.endswith(".lora_A.weight")}
    assert all(key.startswith("transformer.") for key in weights) and ranks == {32}, "one rank, also in layers of 8 channels"


@pytest.mark.parametrize("name", ["sd3", "dev", "sana"])
def test_a_student_trained_as_a_lora_leaves_as_one_of_its_rank_in_its_layers_alone(
    tmp_path: Path, config: DistillConfig, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    trained = {"batch_size": 2, "micro_batch": 2, "steps": 2, "lr_generator": 0.01, "student_lora": 3, "fake_lora": 4}
    path: dict[str, Any] = {"t_init": 1000, "t_min": 0, "t_max": 1000}
    folder = WRITERS[name](tmp_path / "teacher")
    run(folder, dataclasses.replace(config, teacher=str(folder), **trained, **path), tmp_path / "run")
    assert sid("export", tmp_path / "run", "--format", "lora", "-o", tmp_path / "lora", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["difference_255"] <= 1 and done["lora_loss_255"] <= 1
    assert "keeps 100.00% of the difference" in (tmp_path / "lora" / "README.md").read_text()
    weights = load_file(tmp_path / "lora" / lora.WEIGHTS)
    layers = {key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")}
    targets = load(find(str(folder))).kind.lora_targets
    assert layers and all(layer.endswith(targets) for layer in layers)
    assert {len(weights[f"{layer}.lora_A.weight"]) for layer in layers} == {3}


def test_a_lora_that_the_stock_pipeline_does_not_draw_with_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = make(tmp_path, "sd3")
    exported(student, "diffusers", tmp_path / "student", Order())
    monkeypatch.setattr(StableDiffusion3Pipeline, "load_lora_weights", lambda *_: None)
    command = ["export", tmp_path / "student", "--format", "lora", "--teacher", teacher.source.path, "-o", tmp_path / "out"]
    assert sid(*command) == 5
    assert "the export draws another image" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_student_with_the_weights_of_its_teacher_has_no_lora(tmp_path: Path) -> None:
    teacher, student = make(tmp_path, "sd3")
    same = student.with_denoiser(teacher.denoiser)
    with pytest.raises(InputError, match="the student has the weights of its teacher"):
        exported(same, "lora", tmp_path / "out", Order(teacher=teacher))


@pytest.mark.parametrize("name", ["sd3", "dev", "sana"])
def test_a_lora_starts_a_student_at_the_teacher_with_it_merged(tmp_path: Path, name: str) -> None:
    teacher, student = make(tmp_path, name)
    exported(student, "lora", tmp_path / "lora", Order(rank=4, teacher=teacher))
    check(str(tmp_path / "lora"), known(teacher), Silence())
    wanted = lora.merged(student, teacher, 4).denoiser.state_dict()
    found = open_initial(str(tmp_path / "lora"), teacher, Silence()).weights
    assert found.keys() == wanted.keys() and all(torch.allclose(value, wanted[key], atol=1e-6) for key, value in found.items())


def test_the_alpha_of_a_layer_in_a_lora_of_flux_scales_it(tmp_path: Path) -> None:
    teacher, layer = load(find(str(WRITERS["dev"](tmp_path / "teacher")))), "transformer_blocks.0.attn.to_q"
    pair = {f"transformer.{layer}.lora_A.weight": torch.randn(2, 32), f"transformer.{layer}.lora_B.weight": torch.randn(32, 2)}
    save_file(pair | {f"transformer.{layer}.alpha": torch.tensor(8.0)}, tmp_path / "lora.safetensors")
    found = open_initial(str(tmp_path / "lora.safetensors"), teacher, Silence()).weights
    down, up = pair.values()
    for key, value in teacher.denoiser.state_dict().items():
        added = 4 * up @ down if key == f"{layer}.weight" else 0
        assert torch.allclose(found[key], value + added, atol=1e-5), key


@pytest.mark.check(20)
@pytest.mark.parametrize(("dtype", "side", "steps"), [("fp32", 0, 1), ("fp16", 0, 1), ("bf16", 0, 1), ("fp32", 64, 4)])
def test_diffusers_reads_every_weight_of_a_single_file_of_stable_diffusion_3_and_draws_what_sid_draws(
    tmp_path: Path, dtype: str, side: int, steps: int
) -> None:
    teacher, student = make(tmp_path, "sd3", side, student_steps=steps)
    done = exported(student, "single-file", tmp_path / "out", Order(dtype))
    assert done.difference is not None and done.difference <= {"fp32": 1, "fp16": 4, "bf16": 16}[dtype], "in 1/255"
    options = {"config": str(tmp_path / "out"), "subfolder": "transformer", "local_files_only": True}
    again = SD3Transformer2DModel.from_single_file(str(tmp_path / "out" / transformer_file.FILE), **options).state_dict()
    kind = Order(dtype).torch_dtype
    for key, value in student.denoiser.state_dict().items():
        assert torch.equal(again.pop(key), value.to(kind).float()), key
    assert not again
    content = load_file(tmp_path / "out" / transformer_file.FILE)
    assert all(key.startswith("model.diffusion_model.") and value.dtype == kind for key, value in content.items())
    if dtype == "fp32":
        assert is_near(image_of(Card(tmp_path / "out"), teacher, tmp_path / "cat.png"), ours(student), dtype)


def original(student: Model) -> dict[str, torch.Tensor]:
    """The weights of a transformer under the names of the original code."""
    weights = student.denoiser.state_dict()
    places = located(student.kind.places(student.denoiser.config), weights, student.kind.title)
    return arranged(weights, places, torch.float32)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_the_converter_of_diffusers_reads_every_weight_of_a_transformer_of_flux_under_its_original_names(
    tmp_path: Path, name: str
) -> None:
    _, student = make(tmp_path, name)
    # The converter knows the width of published models only; the tiny ones have 32 channels.
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    known_width: dict[str, Any] = {"torch": torch}
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), known_width)
    content = original(student)
    again = known_width["convert_flux_transformer_checkpoint_to_diffusers"](content)
    for key, value in student.denoiser.state_dict().items():
        assert torch.equal(again.pop(key), value), key
    assert not again and not content, "every tensor of the file has its place"


@pytest.mark.soak  # the smallest transformer of that width has 480 million weights
def test_diffusers_reads_every_weight_of_a_single_file_of_the_width_of_flux(tmp_path: Path) -> None:
    _, student = make(tmp_path, "dev")
    sizes = {"num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    wide: Any = FluxTransformer2DModel.from_config({**student.denoiser.config, **sizes})
    wide.register_to_config(sample_size=8)
    done = exported(student.with_denoiser(wide), "single-file", tmp_path / "out", Order())
    assert done.difference is not None and done.difference <= 1
    options = {"config": str(tmp_path / "out"), "subfolder": "transformer", "local_files_only": True}
    again = FluxTransformer2DModel.from_single_file(str(tmp_path / "out" / transformer_file.FILE), **options).state_dict()
    assert again.keys() == wide.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in wide.state_dict().items())


def test_a_single_file_of_another_width_than_that_of_flux_is_refused_before_a_weight_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, student = make(tmp_path, "dev")
    exported(student, "diffusers", tmp_path / "student", Order())
    assert sid("export", tmp_path / "student", "--format", "single-file", "-o", tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert "programs read single files of transformers of 3072 channels, and this one has 32" in said and "loading" not in said


def test_the_cards_of_published_sizes_say_how_comfyui_draws(tmp_path: Path) -> None:
    _, student = make(tmp_path / "sd3", "sd3", student_steps=4)
    assert "ComfyUI" not in transformer_file.usage(student, Order())
    student.denoiser.register_to_config(attention_head_dim=64, num_attention_heads=3)
    said = transformer_file.usage(student, Order())
    assert "`models/diffusion_models`" in said and "ManualSigmas (`1.000000, 0.900000, 0.750000, 0.500000, 0`)." in said
    _, student = make(tmp_path / "dev", "dev")
    teacher = load(find(str(tmp_path / "dev" / "teacher")))
    student.denoiser.register_to_config(
        num_attention_heads=24,
        attention_head_dim=128,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        axes_dims_rope=(16, 56, 56),
    )
    lora.write(tmp_path, student, Order(rank=2, teacher=teacher))
    said = (tmp_path / "README.md").read_text()
    assert f"put `{lora.WEIGHTS}` into `models/loras`" in said and "ManualSigmas (`1.000000, 0`), and FluxGuidance (1)." in said


@pytest.mark.parametrize(("name", "form"), [("sd3", "single-file"), ("sd3", "lora"), ("dev", "lora"), ("sana", "lora")])
def test_the_disk_that_an_export_needs_is_what_it_takes(tmp_path: Path, name: str, form: str) -> None:
    teacher, student = make(tmp_path, name)
    order = Order("fp16", rank=3, teacher=teacher)
    exported(student, form, tmp_path / "out", order)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    taken = sum(value.numel() * value.element_size() for value in load_file(file).values())
    assert export.space(student.kind, student.networks, form, order) == taken
