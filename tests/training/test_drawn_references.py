"""`--references`: reference images that a student draws while another student is distilled from a model that takes them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sidcli import api, objectives, randomness
from sidcli.data.prompts import open_prompts
from sidcli.data.sheets import sheet_prompt
from sidcli.engine import Engine
from sidcli.errors import InputError, Interrupted, UsageError
from sidcli.formats.card import write_card
from sidcli.models.loading import Model, load
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find, fingerprint
from sidcli.objectives.base import Batch
from sidcli.progress import Silence
from sidcli.settings import DistillConfig, read_toml
from sidcli.training import plan
from sidcli.training.references import open_references
from sidcli.training.request import Request
from tests import tiny
from tests.inprocess import sid
from tests.training.test_distill import KillAt, Silent, state
from tests.training.test_self_distillation import SETTINGS, few_steps, run

__all__ = ["few_steps"]


@pytest.fixture(scope="module")
def folders(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny runs: a teacher `tuned` to take references, and students: one of `one` step, one of `two`, and one of another `seed`."""
    place, runs = tmp_path_factory.mktemp("references"), {}
    usual = DistillConfig(
        teacher="sd", prompts="general", steps=1, batch_size=2, micro_batch=2, lr_fake=1e-3, lr_generator=1e-3, precision="fp32"
    )
    made = {
        "tuned": dataclasses.replace(usual, objective=dataclasses.replace(SETTINGS, layout="frames"), t_min=0, t_max=1000),
        "one": usual,
        "two": dataclasses.replace(usual, student_steps=2, renoise="fresh"),
        "other": dataclasses.replace(usual, seed=1),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SID_CACHE_DIR", str(place / "cache"))
        patched.setattr("sidcli.engine.TUNED_STEPS", 2)
        for name, config in made.items():
            runs[name] = run(sd_folder, config, place / name).run
    return runs


@pytest.fixture
def drawing(folders: dict[str, Path], config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, teacher=str(folders["tuned"]), references=str(folders["one"]), steps=2)


def opened(config: DistillConfig) -> Engine:
    engine = Engine(load(find(config.teacher)), config, open_prompts(config.prompts), torch.device("cpu"))
    engine.references = open_references(engine, Silence())
    return engine


def batches(engine: Engine) -> list[Batch]:
    """The micro-batches of all phases of the first two steps."""
    found = []
    for step in range(2):
        engine.step = step
        for phase in engine.objective.phases(step):
            inputs = dataclasses.replace(phase.inputs, reuse=False)
            found += [batch for batch, _ in engine._batches(dataclasses.replace(phase, inputs=inputs), ())]
    return found


def drawn_directly(student: Path, config: DistillConfig, positions: range) -> torch.Tensor:
    """What a student draws, one image at a time, of the first scenes of sheets."""
    model = load(find(str(student)))
    sampler, own = Sampler(model, torch.device("cpu")), plan_for(model)
    found = []
    for position in positions:
        caption = sheet_prompt(open_prompts(config.prompts), config.seed, position, 2).captions[0]
        noise = [
            randomness.normal(model.latent_shape, config.seed, f"drawn reference {visit}", 0, [position])
            for visit in range(own.noises)
        ]
        found.append(sampler.latents([caption], noise, own))
    return torch.cat(found)


@pytest.mark.parametrize("student", ["one", "two"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_references_are_what_the_student_draws_of_the_first_scene_and_prompts_are_the_second_whatever_the_micro_batch(
    folders: dict[str, Path], drawing: DistillConfig, student: str, micro_batch: int
) -> None:
    config = dataclasses.replace(
        drawing, references=str(folders[student]), micro_batch=micro_batch, objective=objectives.Sid.Settings(dropout=0.0)
    )
    found = batches(opened(config))
    size, count = config.batch_size, 4
    assert len(found) == count * size // micro_batch
    references = torch.cat([batch.cond.reference for batch in found])
    texts = [text for batch in found for text in batch.prompts]
    scenes = [sheet_prompt(open_prompts("general"), config.seed, position, 2) for position in range(count * size)]
    assert texts == [scene.captions[1] for scene in scenes] and len({scene.subject for scene in scenes}) > 8
    torch.testing.assert_close(references, drawn_directly(folders[student], config, range(count * size)), rtol=1e-4, atol=1e-4)
    assert len({tuple(reference.flatten()[:3].tolist()) for reference in references}) == count * size
    noise = torch.cat([batch.drawing.noise[0] for batch in found if batch.drawing])
    assert torch.equal(noise, randomness.normal(noise.shape[1:], config.seed, "drawn reference 0", 0, range(count * size)))


@pytest.mark.parametrize("objective", ["sid", "dmd2", "vsd"])
def test_a_student_is_distilled_without_pairs_and_its_records_name_the_student_that_drew_the_references(
    folders: dict[str, Path], tmp_path: Path, objective: str
) -> None:
    given: dict[str, Any] = {"steps": 1, "batch_size": 2, "precision": "fp32", "prompts": "general", "objective": objective}
    teacher = shutil.copytree(folders["tuned"] / "student", tmp_path / "teacher")
    result = api.distill(teacher, tmp_path / "run", references=folders["one"], listener=Silence(), **given)
    assert load(find(str(result.run))).layout and read_toml(result.run / "config.toml")["data"] == ""
    wanted = {"name": str(folders["one"]), "fingerprint": fingerprint(find(str(folders["one"])))}
    for file in ("run.json", "student/sid.json"):
        record = json.loads((result.run / file).read_text())
        assert record["references"].items() >= wanted.items() and "data" not in record
    model = load(find(str(result.run)))
    write_card(tmp_path, model, model.card | {"format": "onnx", "dtype": "float32"}, "")
    assert f"| Training references | drawn by {folders['one']} |" in (tmp_path / "README.md").read_text()
    page = (result.run / "report.html").read_text()
    assert wanted["name"] in page and wanted["fingerprint"] in page
    assert "drawn reference" not in page and (result.run / "samples" / "00000001.png").is_file()


def test_a_killed_run_ends_in_the_same_bits(drawing: DistillConfig, tmp_path: Path) -> None:
    teacher = Path(drawing.teacher)
    whole = run(teacher, drawing, tmp_path / "whole").run
    with pytest.raises(Interrupted):
        run(teacher, drawing, tmp_path / "halves", KillAt(1))
    run(teacher, drawing, tmp_path / "halves")
    one, two = state(whole, 2), state(tmp_path / "halves", 2)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_continues_with_the_same_student_only_wherever_it_is(
    folders: dict[str, Path], drawing: DistillConfig, tmp_path: Path
) -> None:
    teacher = Path(drawing.teacher)
    folder = run(teacher, dataclasses.replace(drawing, steps=1), tmp_path / "run").run
    moved = dataclasses.replace(drawing, references=str(shutil.copytree(folders["one"], tmp_path / "moved")))
    assert run(teacher, moved, folder).step == 2
    longer = dataclasses.replace(drawing, steps=3)
    with pytest.raises(InputError, match=rf"references: .*moved -> {re.escape(str(folders['other']))}$"):
        run(teacher, dataclasses.replace(longer, references=str(folders["other"])), folder)
    with pytest.raises(InputError, match=r"references: .*moved -> none$"):
        run(teacher, dataclasses.replace(longer, references="", data=str(folders["tuned"])), folder)


def test_the_student_is_frozen_in_the_precision_of_the_frozen_teacher_and_its_vae_is_in_memory_once(
    drawing: DistillConfig,
) -> None:
    for bf16 in (False, True):
        engine = opened(dataclasses.replace(drawing, precision="bf16", teacher_bf16=bf16, offload_text=bf16))
        assert engine.references is not None
        student = engine.references.sampler.model
        weights = list(student.denoiser.parameters())
        kinds = {value.dtype for value in weights}
        assert kinds == {value.dtype for value in engine.teacher.parameters()} == {torch.bfloat16 if bf16 else torch.float32}
        assert not student.denoiser.training and not any(value.requires_grad for value in weights)
        assert student.vae is engine.sampler.model.vae and student.text_on_cpu == bf16
        engine.train_step()
        (batch, *_) = batches(engine)
        reference = batch.cond.reference
        assert reference.dtype == torch.float32 and not reference.requires_grad and reference.isfinite().all()


def test_students_that_cannot_draw_the_references_are_refused(
    folders: dict[str, Path], drawing: DistillConfig, sd_folder: Path, tmp_path: Path
) -> None:
    small = shutil.copytree(folders["one"] / "student", tmp_path / "small")
    described = json.loads((small / "unet" / "config.json").read_text())
    (small / "unet" / "config.json").write_text(json.dumps(described | {"sample_size": 16}))
    taking = run(Path(drawing.teacher), dataclasses.replace(drawing, steps=1), tmp_path / "taking").run
    refused = {
        str(sd_folder): "is not a student",
        str(taking): "takes a reference image itself",
        str(small): r"draws latents of 4 x 16 x 16, and .* takes 4 x 8 x 8",
        str(tmp_path / "nothing"): "no model",
    }
    for name, said in refused.items():
        config = dataclasses.replace(drawing, references=name)
        for start in (lambda config=config: plan.check(config, tmp_path, 2, Silent()), lambda config=config: opened(config)):
            with pytest.raises(InputError, match=said) as caught:
                start()
            assert caught.value.hint and "\n" not in caught.value.message
    assert opened(dataclasses.replace(drawing, references=str(small), width=64, height=64)).references, "in the size of the run"


def test_a_student_with_another_vae_is_refused(folders: dict[str, Path], drawing: DistillConfig, tmp_path: Path) -> None:
    other = shutil.copytree(folders["one"] / "student", tmp_path / "other")
    described = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(described | {"scaling_factor": 0.5}))
    with pytest.raises(InputError, match=r"its VAE is not that of"):
        run(Path(drawing.teacher), dataclasses.replace(drawing, references=str(other)), tmp_path / "one")
    shutil.copytree(tiny.write_two_levels(tmp_path / "sd") / "vae", other / "vae", dirs_exist_ok=True)
    opened(dataclasses.replace(drawing, references=str(other)))
    torch.manual_seed(9)
    load(find(str(other))).vae.apply(
        lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None
    ).save_pretrained(other / "vae")
    with pytest.raises(InputError, match=r"its VAE is not that of"):
        opened(dataclasses.replace(drawing, references=str(other)))


def test_references_are_refused_where_no_student_takes_them(
    folders: dict[str, Path], sd_folder: Path, drawing: DistillConfig, tmp_path: Path
) -> None:
    tuned, one = folders["tuned"], folders["one"]
    with pytest.raises(UsageError, match=rf"--references {one}: {sd_folder} takes no reference image"):
        api.distill(sd_folder, tmp_path / "run", references=one, listener=Silence())
    with pytest.raises(UsageError, match="takes no reference image"):
        run(sd_folder, drawing, tmp_path / "run")
    for name in ("self-distillation", "boot", "sida"):
        with pytest.raises(UsageError, match=f"--references {one}: objective {name} does not train on the reference images"):
            api.distill(sd_folder, tmp_path / "run", references=one, objective=name, data="", listener=Silence())
    with pytest.raises(UsageError, match="takes a reference image, and --data does not give pairs") as caught:
        run(tuned, dataclasses.replace(drawing, references=""), tmp_path / "run")
    assert "--references STUDENT" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_data_beside_references_is_a_usage_error(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--teacher", folders["tuned"], "--references", folders["one"], "-o", tmp_path / "run"]
    assert sid("distill", *given, "--data", folders["tuned"]) == 2
    said = capsys.readouterr().err
    assert f"--data {folders['tuned']} and --references {folders['one']} exclude each other" in " ".join(said.split())
    file = tmp_path / "own.toml"
    file.write_text(f'data = "{folders["tuned"]}"\n')
    with pytest.raises(UsageError, match=r"own\.toml: data .* exclude each other"):
        api.distill(folders["tuned"], tmp_path / "run", config=file, references=folders["one"], listener=Silence())
    file.write_text(f'references = "{folders["one"]}"\n')
    request = Request.of(str(folders["tuned"]), None, None, None, None, {}, None, None, "auto", file, {"prompts": "general"})
    resolved = request.before_path
    assert (resolved.references, resolved.data, request.notes) == (str(folders["one"]), "", ()), "prompts have an effect"


def test_subjects_are_those_of_the_prompts_of_a_file(drawing: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "subjects.txt").write_text("a dented tin rocket\na striped mug\n")
    kept = objectives.Sid.Settings(dropout=0.0)
    engine = opened(dataclasses.replace(drawing, prompts=str(tmp_path / "subjects.txt"), objective=kept))
    (batch, *_) = batches(engine)
    assert batch.drawing is not None
    for shown, text in zip(batch.drawing.prompts, batch.prompts, strict=True):
        subject = next(name for name in ("a dented tin rocket", "a striped mug") if shown.startswith(name))
        assert text.startswith(subject) and shown != text


def test_the_plan_counts_the_memory_and_the_operations_of_the_student(folders: dict[str, Path], drawing: DistillConfig) -> None:
    def made(**changes: Any) -> plan.Plan:
        return plan.make(dataclasses.replace(drawing, **changes), Path("run"), "cpu", 1, Silence())

    model: Model = load(find(str(folders["one"])))
    weights = sum(value.numel() for value in model.denoiser.parameters())
    text = sum(value.numel() for one in model.text_encoders for value in one.parameters())
    pairs, drawn, two = made(references="", data=str(folders["tuned"])), made(), made(references=str(folders["two"]))
    assert f"# references    drawn by {folders['one']} during the training" in drawn.lines()
    assert f"# references    images of the pairs in {folders['tuned']}" in pairs.lines()
    assert "reference student" not in pairs.device_memory | pairs.parameters
    assert drawn.parameters["reference student"] == weights
    assert drawn.device_memory["reference student"] == 4 * (weights + text)
    assert two.flops_per_image - pairs.flops_per_image == 2 * (drawn.flops_per_image - pairs.flops_per_image) > 0
    small = made(precision="bf16", teacher_bf16=True, offload_text=True)
    assert small.device_memory["reference student"] == 2 * weights
    assert (
        small.main_memory - made(precision="bf16", teacher_bf16=True, offload_text=True, references="", data="x").main_memory
        == 4 * text
    )
