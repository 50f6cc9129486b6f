"""The parts of the GPU visit that train the emoji models: which processes they start, and what they keep."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.gpu import visit as module
from tests.gpu.record import read

TRAIN, MEASURE, BOARD = "sidcli.emoji.train", "tests.gpu.measure", "tests.benchmarks.leaderboard"
SUBJECTS, FLOW = "tests.benchmarks.subjects", "tests.benchmarks.flow"


class Visit(module.Visit):
    """A visit that starts `command` in the place of its processes. A training leaves a UNet and a log."""

    command = ("true",)

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        self.asked = [*getattr(self, "asked", []), (name, *map(str, arguments))]
        if name == TRAIN and arguments[0] == "sheets":
            for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
                file = Path(str(arguments[2])) / f"sheets/{part}.safetensors"
                file.parent.mkdir(parents=True)
                file.write_text(part)
        elif name == TRAIN and arguments[0] == "flow":
            folder = Path(str(arguments[2]))
            (folder / "flow/transformer").mkdir(parents=True)
            (folder / "flow/transformer/diffusion_pytorch_model.safetensors").write_text("weights")
            (folder / "flow.log.jsonl").write_text('{"step": 50}\n')
        elif name == TRAIN:
            folder = Path(str(arguments[2]))
            (folder / "teacher-more/unet").mkdir(parents=True)
            (folder / "teacher-more/unet/diffusion_pytorch_model.safetensors").write_text("weights")
            (folder / "teacher-more.log.jsonl").write_text('{"step": 50}\n{"step": 60}\n')
        if name == MEASURE:
            self.kept = (self.output / "teacher.safetensors").read_text()
        return subprocess.Popen(self.command, start_new_session=True)


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Visit:
    monkeypatch.setenv("SID_VISIT_QUIET", "")
    monkeypatch.setenv("SID_CACHE_DIR", "")
    return Visit(tmp_path, "cuda", False, 9.0)


def test_the_teacher_is_kept_before_it_is_measured_beside_the_shipped_one(visit: Visit) -> None:
    visit.train_teacher(330.0)
    training, first, second = visit.asked
    assert training[:2] == (TRAIN, "teacher-more") and training[-4:] == ("--device", "cuda", "--seconds", "330.0")
    assert [words[0] for words in (first, second)] == [MEASURE] * 2
    assert first[3:5] == second[3:5] == ("guidance", "2000") and first[6:] == second[6:] == module.SCALES
    assert Path(first[5]).name == "teacher-more" and second[5] == "emoji-teacher"
    assert visit.kept == "weights"
    assert [(record["name"], record["ok"], record["values"]["step"]) for record in read(visit.file)] == [("training", True, 60)]


def test_a_teacher_whose_training_failed_is_not_measured(visit: Visit) -> None:
    visit.command = ("false",)
    visit.train_teacher(1.0)
    assert [words[0] for words in visit.asked] == [TRAIN]
    assert [(record["name"], record["ok"]) for record in read(visit.file)] == [("training", False)]


def test_a_part_that_has_no_time_left_is_stopped_and_neither_passes_nor_fails(visit: Visit) -> None:
    visit.command = ("sleep", "1000000")
    visit.deadline = time.monotonic()
    (visit.output / "leaderboard.jsonl").write_text(json.dumps({"objective": "sid"}) + "\n")
    visit.fill_leaderboard()
    cells, rows = read(visit.file)
    assert cells["ok"] is None and cells["values"] == {"not_done": "not done in time"}
    assert rows["ok"] is None and rows["values"] == {"rows": 1}


def test_no_cell_of_the_leaderboard_starts_when_too_little_time_is_left_to_end_it(visit: Visit) -> None:
    visit.fill_leaderboard()
    (words,) = visit.asked
    assert words[0] == BOARD and "--beside" in words
    assert float(words[words.index("--minutes") + 1]) == pytest.approx((540 - module.LAST_CELLS) / 60, abs=0.1)
    assert words[words.index("--output") + 1] == str(visit.output / "leaderboard.jsonl")


def test_the_teacher_of_sheets_is_kept_and_then_tuned(visit: Visit) -> None:
    visit.tune_subjects()
    training, rows = visit.asked
    assert training[:2] == (TRAIN, "sheets") and rows[0] == SUBJECTS
    assert float(training[training.index("--seconds") + 1]) == pytest.approx(540 * module.SHEETS_SHARE, abs=5)
    assert rows[rows.index("--teacher") + 1] == str(Path(training[3]) / "sheets")
    assert rows[rows.index("--output") + 1] == str(visit.output / "subjects.jsonl")
    kept = {file.name: file.read_text() for file in visit.output.glob("sheets-*.safetensors")}
    assert kept == {
        "sheets-unet.safetensors": "unet/diffusion_pytorch_model",
        "sheets-text.safetensors": "text_encoder/model",
    }


def test_a_teacher_of_sheets_whose_training_failed_is_not_tuned(visit: Visit) -> None:
    visit.command = ("false",)
    visit.tune_subjects()
    assert [words[0] for words in visit.asked] == [TRAIN]


def test_the_teacher_of_flow_matching_is_kept_and_then_distilled(visit: Visit) -> None:
    visit.train_flow()
    training, rows = visit.asked
    assert training[:2] == (TRAIN, "flow") and rows[0] == FLOW
    assert float(training[training.index("--seconds") + 1]) == pytest.approx(540 * module.FLOW_SHARE, abs=5)
    assert rows[rows.index("--teacher") + 1] == str(Path(training[3]) / "flow")
    assert rows[rows.index("--output") + 1] == str(visit.output / "flow.jsonl")
    assert (visit.output / "flow.safetensors").read_text() == "weights"
    trained, measured = read(visit.file)
    assert trained["values"] == {"step": 50} and measured["ok"] is True


def test_a_teacher_of_flow_matching_whose_training_failed_is_not_distilled(visit: Visit) -> None:
    visit.command = ("false",)
    visit.train_flow()
    assert [words[0] for words in visit.asked] == [TRAIN]
