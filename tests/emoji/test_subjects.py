"""The benchmark of subjects: which rows wait for which, and what a table shows. Processes that run beside each other."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sidcli.emoji import identities
from tests.benchmarks import beside, subjects
from tests.benchmarks.beside import Task, run_beside


def task(name: str, file: Path, after: str = "", code: int = 0) -> Task:
    """A task that appends its name to a file."""
    program = f"open({str(file)!r}, 'a').write({name!r}); raise SystemExit({code})"
    return Task(name, (sys.executable, "-c", program), after)


def test_a_task_starts_after_the_one_that_it_needs_and_not_if_that_failed(tmp_path: Path) -> None:
    file, seen = tmp_path / "names", list[str]()
    tasks = [task("c", file, "b"), task("b", file), task("f", file, "e"), task("e", file, code=1), task("h", file, "g")]
    failed, left = run_beside(tasks, 2, 1.0, ["g"], seen.append)
    assert failed == ["e"] and left == ["f"]
    written = file.read_text()
    assert sorted(written) == ["b", "c", "e", "h"] and written.index("b") < written.index("c")
    assert sorted(seen) == ["b", "c", "h"]


def given(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "sheets": 8,
        "sheet_steps": 2,
        "sheet_guidance": 2.0,
        "shared_noise": 0.5,
        "steps": 3,
        "lr": None,
        "student_steps": 3,
        "batch_size": 2,
    }
    values |= {"num": 4, "draw_steps": 2, "beside": 1, "minutes": 1.0, "only": None}
    return argparse.Namespace(output=tmp_path / "rows.jsonl", runs=tmp_path / "runs", **values | changes)


def row(name: str, kind: str, options: argparse.Namespace, **values: Any) -> str:
    return json.dumps({"name": name, "kind": kind, **subjects.settings_of(options), **values}) + "\n"


def test_every_row_waits_for_one_that_the_table_has() -> None:
    names = [cell.name for cell in subjects.CELLS]
    assert len(names) == len(set(names))
    assert all(cell.after in ("", *names[:place]) for place, cell in enumerate(subjects.CELLS))


def test_rows_with_the_same_settings_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = given(tmp_path)
    options.output.write_text(row("judge none", "judge", options) + row("text only", "teacher", given(tmp_path, num=5)))
    started: list[str] = []

    def run(tasks: list[Task], *_: Any) -> tuple[list[str], list[str]]:
        started.extend(task.name for task in tasks)
        return [], []

    monkeypatch.setattr(beside, "run_beside", run)
    subjects.TABLE.run(options)
    assert "judge none" not in started and "text only" in started


def test_the_tables_show_judges_and_models(tmp_path: Path) -> None:
    options, share = given(tmp_path), {"value": 0.25, "low": 0.2, "high": 0.3}
    options.output.write_text(
        row("judge none", "judge", options, pairs=8, good=2, kept=share, precision=share, recall=None)
        + row("frames, pairs of none", "tuned", options, identity=share, subject_text=share, copy=share, seconds=1.5)
    )
    shown = subjects.table(subjects.TABLE.rows(options))
    assert "| judge none | 8 | 2 | 0.250 [0.200, 0.300] | 0.250 [0.200, 0.300] |  |" in shown
    assert "| frames, pairs of none |  |" in shown and shown.endswith("| 1.500 |\n")


def test_several_judges_score_the_same_sheets_of_a_teacher(tmp_path: Path) -> None:
    options = given(tmp_path, device="cpu", precision="fp32", teacher="emoji-teacher")
    drawn = subjects.row_of(subjects.judged("none"), options)
    again = subjects.row_of(subjects.judged("features"), options)
    assert drawn["pairs"] == again["pairs"] == 8
    one, other = (subjects.folder_of(f"judge {judge}", options) / "sheets/00000000.png" for judge in ("none", "features"))
    assert one.read_bytes() == other.read_bytes()


def test_the_attributes_of_a_measurement_are_those_of_its_references(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for index in range(8):
        Image.fromarray(identities.render(identities.unknown(index).panels[1])).save(tmp_path / "model" / f"{index:06d}.png")
    assert all(share >= 0.75 for share in subjects.attributes(tmp_path).values())
