"""`--init`: a student starts from another student, a LoRA, or the difference of two models."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from sidcli import api
from sidcli.errors import InputError, SidError, UsageError
from sidcli.formats import export, lora
from sidcli.formats.card import license_of
from sidcli.formats.diffusers_folder import stock, write_student
from sidcli.formats.order import Order
from sidcli.models.loading import Description, Model, describe, load
from sidcli.models.sources import find
from sidcli.objectives import OBJECTIVES
from sidcli.progress import Silence
from sidcli.settings import DistillConfig
from sidcli.training import plan
from sidcli.training.initial import check, open_initial
from sidcli.training.request import Request
from tests import tiny, tiny_families, tiny_students
from tests.training.test_distill import Silent


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model, Path]:
    """A teacher, a student of it, and the student's folder."""
    folder = tmp_path_factory.mktemp("pair")
    teacher, student = tiny_students.make(folder, "sd1")
    write_student(folder / "student", student, student.card)
    return teacher, student, folder / "student"


def known(teacher: Model) -> Description:
    return describe(teacher.source)


def test_a_run_starts_from_the_weights_of_a_student_and_its_record_names_it(
    pair: tuple[Model, Model, Path], tmp_path: Path
) -> None:
    teacher, student, folder = pair
    for place, text in ((teacher.source.path, "of the teacher"), (folder, "of the student")):
        (place / "LICENSE.md").write_text(text)
        (place / "LICENSE-OTHER").write_text("of both")
    options = {"steps": 1, "batch_size": 2, "lr": 1e-12, "precision": "fp32", "prompts": "general"}
    result = api.distill(teacher.source.path, tmp_path / "run", init=folder, listener=Quiet(), **options)
    trained = load(find(str(result.run))).denoiser.state_dict()
    assert all(torch.allclose(value, trained[name], atol=1e-6) for name, value in student.denoiser.state_dict().items())
    assert any(not torch.allclose(value, trained[name], atol=1e-3) for name, value in teacher.denoiser.state_dict().items())
    told = json.loads((result.run / "student" / "sid.json").read_text())
    assert told["config"]["init"] == str(folder)
    (source,) = told["init"]
    texts = {file.name: file.read_text() for file in (result.run / "student").glob("LICENSE*")}
    assert texts == {"LICENSE.md": "of the teacher", "LICENSE-student.md": "of the student", "LICENSE-OTHER": "of both"}
    assert (source["name"], source["origin"]) == (str(folder), load(find(str(folder))).source.origin)

    moved = shutil.copytree(folder, tmp_path / "moved")
    api.distill(teacher.source.path, tmp_path / "run", init=moved, listener=Quiet(), **options | {"steps": 2})
    with pytest.raises(InputError, match="init: contents changed"):
        api.distill(teacher.source.path, tmp_path / "run", init=teacher.source.path, listener=Quiet(), **options | {"steps": 3})
    with pytest.raises(InputError, match=r"init: .* -> "):
        api.distill(teacher.source.path, tmp_path / "run", listener=Quiet(), **options | {"steps": 3})


class Quiet(Silence):
    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, record: dict[str, object]) -> None: ...


def test_a_model_card_states_the_license_of_a_model_that_the_student_started_from(
    pair: tuple[Model, Model, Path], tmp_path: Path
) -> None:
    _, student, folder = pair
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    sid_json = json.loads((other / "sid.json").read_text())
    sid_json["teacher"] = {key: value for key, value in sid_json["teacher"].items() if not key.startswith("license")}
    (other / "sid.json").write_text(json.dumps(sid_json))
    sources = open_initial(f"{other} - {folder}", student, Silence()).sources
    assert [source.get("license") for source in sources] == ["cc-by-nc-4.0", None]
    rail = {"name": "a/rail", "license": "openrail++", "license_link": "https://example.org/rail"}
    started = dataclasses.replace(student, card=student.card | {"init": [*sources, rail]})
    export.run(started, "diffusers", tmp_path / "out", Order(), False, lambda count: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"It is also a derivative of {other}, whose license is cc-by-nc-4.0." in card
    restricted = (
        "It is also a derivative of a/rail, whose license is [openrail++](https://example.org/rail). The use-based restrictions"
    )
    assert restricted in card and card.count("use-based restrictions") == 1
    assert f"| Started from | {other} and {folder} and a/rail |" in card


def test_licenses_are_kept_over_generations_and_a_damaged_model_card_has_none(
    pair: tuple[Model, Model, Path], tmp_path: Path
) -> None:
    teacher, student, _ = pair
    first = {"name": "first", "origin": "hub:a/first", "license": "cc-by-nc-4.0"}
    write_student(tmp_path / "second", student, student.card | {"init": [first]})
    sources = open_initial(str(tmp_path / "second"), teacher, Silence()).sources
    assert [source["name"] for source in sources] == [str(tmp_path / "second"), "first"] and sources[1] == first
    (tmp_path / "second" / "README.md").write_text("---\nlicense: [a\nfoo: : x\n---\n")
    assert license_of(tmp_path / "second") == {}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_lora_starts_at_the_teacher_with_it_merged_under_the_names_of_diffusers(family: str, tmp_path: Path) -> None:
    teacher, student = tiny_students.make(tmp_path, family)
    export.run(student, "lora", tmp_path / "lora", Order(rank=4, teacher=teacher), False, lambda count: None)
    check(str(tmp_path / "lora"), known(teacher), Silence())
    wanted = lora.merged(student, teacher, 4).denoiser.state_dict()
    found = open_initial(str(tmp_path / "lora"), teacher, Silence())
    assert found.weights.keys() == wanted.keys()
    assert all(torch.allclose(value, wanted[name], atol=1e-5) for name, value in found.weights.items())


def test_a_lora_with_kohyas_names_is_read_too_and_what_it_changes_beside_the_unet_is_said(
    pair: tuple[Model, Model, Path], tmp_path: Path
) -> None:
    teacher, _, _ = pair
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.randn(2, 8), f"{layer}.lora_B.weight": torch.randn(8, 2)}
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    texts = {f"{text}.lora_down.weight": torch.randn(2, 16), f"{text}.lora_up.weight": torch.randn(16, 2)}
    texts[f"{text}.alpha"] = torch.tensor(2.0)
    save_file(lora.kohya(weights, teacher.denoiser.config) | texts, tmp_path / "other.safetensors")
    heard = Silent()
    found = open_initial(str(tmp_path / "other.safetensors"), teacher, heard).weights
    for name, value in teacher.denoiser.state_dict().items():
        added = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"] if name == f"{layer}.weight" else 0
        assert torch.allclose(found[name], value + added, atol=1e-5)
    assert any("also changes text_encoder" in note for note in heard.notes)


def test_the_alpha_in_the_header_of_a_lora_scales_it(pair: tuple[Model, Model, Path], tmp_path: Path) -> None:
    teacher, _, _ = pair
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapted = copy.deepcopy(teacher.denoiser)
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False))
    weights = get_peft_model_state_dict(adapted)
    header = {"unet_lora_adapter_metadata": adapted.peft_config["default"].to_dict()}
    stock(teacher).save_lora_weights(tmp_path, unet_lora_layers=weights, **header)
    found = open_initial(str(tmp_path), teacher, Silence()).weights[f"{name}.weight"]
    added = 4 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    assert torch.allclose(found, teacher.denoiser.state_dict()[f"{name}.weight"] + added, atol=1e-5)


def test_a_difference_of_two_models_is_added_to_the_teacher(pair: tuple[Model, Model, Path], tmp_path: Path) -> None:
    teacher, student, folder = pair
    other = dataclasses.replace(teacher, denoiser=tiny_students.student_of(teacher).denoiser)
    with torch.no_grad():
        for value in other.denoiser.parameters():
            value.mul_(0.5)
    found = open_initial(f"{folder} - {teacher.source.path}", other, Silence()).weights
    for name, value in found.items():
        wanted = other.denoiser.state_dict()[name] + student.denoiser.state_dict()[name] - teacher.denoiser.state_dict()[name]
        assert torch.allclose(value, wanted, atol=1e-6)


def test_what_does_not_fit_the_teacher_is_refused_before_a_weight_is_read(pair: tuple[Model, Model, Path], tmp_path: Path) -> None:
    teacher = known(pair[0])
    wide = tiny_students.write_teacher(tmp_path / "xl", "sdxl")
    with pytest.raises(InputError, match="its UNet is not that of the teacher: cross_attention_dim is 40, not 16"):
        check(str(wide), teacher, Silence())
    with pytest.raises(UsageError, match="lacks the name of a model"):
        check("emoji - ", teacher, Silence())
    v = tiny_students.write_teacher(tmp_path / "v", "sd1", "v_prediction")
    with pytest.raises(InputError, match="predicts v_prediction, and the teacher predicts epsilon"):
        check(str(v), teacher, Silence())
    with pytest.raises(InputError, match="no model 'nowhere'"):
        check("nowhere", teacher, Silence())
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"cut\.safetensors is not a whole safetensors file"):
        check(str(tmp_path / "cut.safetensors"), teacher, Silence())
    with pytest.raises(UsageError, match="--init must be left out with --student-lora"):
        DistillConfig(init="emoji", student_lora=4)


def test_what_a_run_changes_in_the_sampling_of_the_student_that_it_starts_from_is_noted(
    pair: tuple[Model, Model, Path], tmp_path: Path
) -> None:
    teacher, student, folder = pair
    few = student.card | {"t_init": 999, "student_steps": 4, "config": {"objective": {"name": "tlcm"}}}
    write_student(tmp_path / "few", student, few)

    def notes(init: object, name: str = "sid", **settings: int) -> list[str]:
        said = Silent()
        config = DistillConfig(teacher=str(teacher.source.path), init=str(init), objective=OBJECTIVES[name].Settings(), **settings)
        plan.describe_teacher(config, said)
        return [note for note in said.notes if note.startswith("note: ")]

    four, one = "4 steps at t = 999, 749, 499, 249", "1 step at t = 625"
    options = "--student-steps and --t-init set the latter"
    said = f"note: --init {tmp_path / 'few'} draws in {four}, and the student of this run in {one}; {options}"
    assert notes(tmp_path / "few") == [said] and notes(f"{tmp_path / 'few'} - {folder}")[0].startswith("note: --init ")
    assert not notes(folder) and not notes(teacher.source.path)
    again = {"t_init": 999, "student_steps": 4}
    assert not notes(tmp_path / "few", "tlcm2", **again)
    wanted = "note: objective tlcm2 continues from a student of tlcm, and --init {} is {}".format
    assert notes(teacher.source.path, "tlcm2", **again) == [wanted(teacher.source.path, "no student")]
    write_student(tmp_path / "other", student, few | {"config": {"objective": {"name": "lcm"}}})
    assert notes(tmp_path / "other", "tlcm2", **again) == [wanted(tmp_path / "other", "a student of lcm")]


def test_a_second_stage_without_a_student_of_the_first_is_noted() -> None:
    def notes(**settings: str) -> tuple[str, ...]:
        return Request.of("someone/sd", None, "tlcm2", None, None, {}, None, None, "auto", None, settings).notes

    (said,) = notes()
    assert said.startswith("note: objective tlcm2 continues from a student of tlcm, and --init is not given") and not notes(
        init="a"
    )


def test_a_lora_of_another_model_is_refused(pair: tuple[Model, Model, Path], tmp_path: Path) -> None:
    large = tiny_families.write_sd2(tmp_path / "sd2")
    teacher = load(find(str(large)))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(2, 8), f"{layer}.lora_B.weight": torch.zeros(8, 2)}
    save_file(lora.kohya(weights, tiny.SD15_UNET | {"layers_per_block": 2}), tmp_path / "small.safetensors")
    with pytest.raises(SidError, match=r"small\.safetensors is not a LoRA for this teacher"):
        open_initial(str(tmp_path / "small.safetensors"), teacher, Silence())
