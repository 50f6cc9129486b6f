"""sid.json and sid.card: every entry that sid reads is checked where the card is read, and the error names file, entry and value."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidcli.errors import InputError
from sidcli.formats import export
from sidcli.formats.diffusers_folder import write_student
from sidcli.formats.order import Order
from sidcli.models.card import in_header
from sidcli.models.loading import describe, load
from sidcli.models.sampler import plan_for
from sidcli.models.sources import find
from sidcli.progress import Silence
from tests import tiny_students
from tests.inprocess import sid

STUDENT = {"kind": "student", "t_init": 625, "student_steps": 1, "renoise": "ddim", "teacher": {"origin": "hub:a/b"}, "config": {}}
GRAPH = {"format": "onnx", "latent_shape": [4, 8, 8], "size": [64, 64], "multiple": 0, "tokens": [77]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": 5}, "kind is 5; it must be one of student, teacher"),
    ({"kind": "students"}, 'kind is "students"; it must be one of student, teacher'),
    ({"t_init": -1}, "t_init is -1; it must be a whole number from 1 to 100000"),
    ({"t_init": 0}, "t_init is 0; it must be a whole number from 1 to 100000"),
    ({"t_init": 625.5}, "t_init is 625.5; it must be a whole number from 1 to 100000"),
    ({"t_init": True}, "t_init is true; it must be a whole number from 1 to 100000"),
    ({"t_init": "625"}, 't_init is "625"; it must be a whole number from 1 to 100000'),
    ({"t_init": 10**9}, "t_init is 1000000000; it must be a whole number from 1 to 100000"),
    ({"student_steps": 0}, "student_steps is 0; it must be a whole number from 1 to 99999"),
    ({"student_steps": "x"}, 'student_steps is "x"; it must be a whole number from 1 to 99999'),
    ({"student_steps": 626}, "student_steps is 626; it must be at most t_init, 625"),
    ({"renoise": "foo"}, 'renoise is "foo"; it must be one of ddim, fixed, fresh'),
    ({"guidance": float("nan")}, "guidance is NaN; it must be a finite number"),
    ({"guidance": "x"}, 'guidance is "x"; it must be a finite number'),
    ({"teacher": "sd"}, 'teacher is "sd"; it must be a JSON object of texts'),
    ({"teacher": {"origin": 5}}, 'teacher is {"origin": 5}; it must be a JSON object of texts'),
    ({"config": [1]}, "config is [1]; it must be a JSON object"),
    ({"config": {"width": "x"}}, 'config.width is "x"; it must be a whole number from 0 to 65536'),
    ({"config": {"objective": "sid"}}, 'config.objective is "sid"; it must be a JSON object'),
    ({"config": {"objective": {"kappa1": "x"}}}, 'config.objective.kappa1 is "x"; it must be a finite number'),
    ({"config": {"kappa1": None}}, "config.kappa1 is null; it must be a finite number"),
    ({"init": "a model"}, 'init is "a model"; it must be a list of JSON objects of texts, each with a name'),
    ({"init": [{"license": "mit"}]}, "init is [{"),
]
WRONG_GRAPHS: list[tuple[object, str]] = [
    ([], "graph is []; it must be a JSON object"),
    ({}, "graph.format is missing; it must be one of onnx, openvino, torch-export"),
    (GRAPH | {"format": "pt"}, 'graph.format is "pt"; it must be one of onnx, openvino, torch-export'),
    (GRAPH | {"latent_shape": [4, 8]}, "graph.latent_shape is [4, 8]; it must be a list of three positive whole numbers"),
    (GRAPH | {"size": "64"}, 'graph.size is "64"; it must be a list of two positive whole numbers'),
    (
        GRAPH | {"size": [4, 4]},
        "graph.size is [4, 4]; it must be a multiple of the height and width of graph.latent_shape, [4, 8, 8]",
    ),
    (GRAPH | {"multiple": -8}, "graph.multiple is -8; it must be a whole number from 0 to 65536"),
    (GRAPH | {"tokens": [0]}, "graph.tokens is [0]; it must be a list of one or two positive whole numbers"),
    (GRAPH, "graph.tokens is [77]; it must have one number for each tokenizer in the folder, 0"),
]


@pytest.fixture(scope="module")
def folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path_factory.mktemp("cards") / "student"))


@pytest.mark.check(23)
@pytest.mark.parametrize(("entries", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_an_invalid_entry_of_a_card_is_refused_in_a_folder_and_in_a_header(
    entries: dict[str, Any], said: str, folder: Path
) -> None:
    (folder / "sid.json").write_text(json.dumps(STUDENT | entries))
    with pytest.raises(InputError) as caught:
        describe(find(str(folder)))
    assert caught.value.message.startswith(f"{folder / 'sid.json'}: {said}")
    with pytest.raises(InputError) as caught:
        in_header(Path("some.safetensors"), {"sid.card": json.dumps(STUDENT | entries)})
    assert caught.value.message.startswith(f"sid.card in the header of some.safetensors: {said}")


@pytest.mark.check(23)
@pytest.mark.parametrize("missing", ["kind", "t_init"])
def test_a_card_without_a_required_entry_is_refused(missing: str, folder: Path) -> None:
    (folder / "sid.json").write_text(json.dumps({key: value for key, value in STUDENT.items() if key != missing}))
    with pytest.raises(InputError, match=rf"sid\.json: {missing} is missing"):
        describe(find(str(folder)))


@pytest.mark.check(23)
def test_a_student_starts_at_a_timestep_of_its_schedule(folder: Path) -> None:
    (folder / "sid.json").write_text(json.dumps(STUDENT | {"t_init": 999}))
    assert plan_for(describe(find(str(folder)))).grid == (999,)
    (folder / "sid.json").write_text(json.dumps(STUDENT | {"t_init": 1000}))
    with pytest.raises(InputError, match=r"sid\.json: t_init is 1000; it must be below 1000"):
        describe(find(str(folder)))


@pytest.mark.check(23)
@pytest.mark.parametrize(("graph", "said"), WRONG_GRAPHS, ids=[said[:40] for _, said in WRONG_GRAPHS])
def test_an_invalid_description_of_graphs_is_refused(
    graph: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "generator.onnx").touch()
    (tmp_path / "sid.json").write_text(json.dumps(STUDENT | {"graph": graph}))
    assert sid("sample", "a cat", "--model", tmp_path, "-o", tmp_path / "x.png") == 3
    assert f"{tmp_path / 'sid.json'}: {said}" in capsys.readouterr().err


@pytest.mark.check(24)
def test_a_single_file_with_a_damaged_card_is_not_drawn_as_a_teacher(tmp_path: Path) -> None:
    _, student = tiny_students.make(tmp_path, "sd1")
    export.run(student, "single-file", tmp_path / "out", Order(), False, lambda count: None)
    file = tmp_path / "out" / "student.safetensors"
    assert load(find(str(file))).is_student
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    for card, said in (("{", "is damaged: Expecting property name"), ("[]", "is damaged: not a JSON object")):
        save_file(load_file(file), file, metadata | {"sid.card": card})
        with pytest.raises(InputError, match=said) as caught:
            load(find(str(file)))
        assert caught.value.message.startswith(f"sid.card in the header of {file}")


class Notes(Silence):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_a_folder_with_the_scheduler_of_a_student_and_no_card_is_noted(sd_folder: Path, tmp_path: Path) -> None:
    model = load(find(str(sd_folder)))
    told, silent = Notes(), Notes()
    write_student(tmp_path / "student", model, STUDENT)
    assert describe(find(str(tmp_path / "student")), None, silent).is_student and describe(find(str(sd_folder)), None, silent)
    assert silent.texts == []
    (tmp_path / "student" / "sid.json").unlink()
    assert not describe(find(str(tmp_path / "student")), None, told).is_student
    (note,) = told.texts
    assert "the scheduler of a student that starts at timestep 625, but no sid.json" in note
    (tmp_path / "student" / "sid.json").write_text(note[note.index("{") : note.index("}") + 1])
    assert plan_for(describe(find(str(tmp_path / "student")))) == plan_for(dataclasses.replace(model, card=STUDENT))


def test_a_folder_with_the_scheduler_of_a_consistency_student_and_no_card_is_noted(sd_folder: Path, tmp_path: Path) -> None:
    teacher, told = shutil.copytree(sd_folder, tmp_path / "student"), Notes()
    file = teacher / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "LCMScheduler"}))
    assert not describe(find(str(teacher)), None, told).is_student
    assert [note for note in told.texts if "LCMScheduler" in note and "it is read as a teacher" in note] == told.texts != []


def test_a_card_that_contradicts_the_scheduler_of_a_student_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    write_student(tmp_path / "student", load(find(str(sd_folder))), STUDENT)
    file = tmp_path / "student" / "sid.json"
    for changes, said in (({"kind": "teacher"}, "kind is 'teacher'"), ({"t_init": 500}, "t_init is 500")):
        file.write_text(json.dumps(STUDENT | changes))
        with pytest.raises(InputError) as refused:
            describe(find(str(tmp_path / "student")))
        assert refused.value.message == (
            f"{file}: {said}, but the scheduler of the model is that of a student that starts at timestep 625"
        )
        assert "625" in refused.value.hint
    teacher = shutil.copytree(sd_folder, tmp_path / "teacher")
    (teacher / "sid.json").write_text('{"kind": "teacher"}')
    assert not describe(find(str(teacher))).is_student, "its scheduler has the timesteps of a teacher"
