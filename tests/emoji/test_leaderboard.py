"""The leaderboard's script: which cells start when, and which rows belong to a table."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import beside, leaderboard
from tests.benchmarks.leaderboard import Entry

ENTRIES = (Entry("sid", ("--objective", "sid")), Entry("vsd", ("--objective", "vsd")))


def given(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {"tflops": 1.0, "batch_size": 4, "num": 20, "seeds": [0, 1], "beside": 2, "minutes": 1.0}
    return argparse.Namespace(output=tmp_path / "rows.jsonl", **values | changes)


def row(name: str, seed: int, **changes: Any) -> str:
    values = {"objective": name, "seed": seed, "images used": "none", "steps": 3, "budget": 1.0, "batch_size": 4, "n": 20}
    values |= {"options": f"--objective {name}", "fid": 1.0, "fid_teacher": 1.0, "clip": 0.5, "noun": 0.5, "bare_noun": 0.5}
    return json.dumps(values | {"coverage": 0.5} | changes) + "\n"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The cells in the order of their start. Each process ends at its second poll; vsd with seed 0 fails."""
    order: list[tuple[str, str]] = []
    running: set[object] = set()

    class Process:
        def __init__(self, command: list[str], **_: object):
            self.name, self.seed = command[-2:]
            order.append((self.name, self.seed))
            self.polls = 0
            running.add(self)
            assert len(running) <= 2

        def poll(self) -> int | None:
            self.polls += 1
            if self.polls < 2:
                return None
            running.discard(self)
            self.returncode = int((self.name, self.seed) == ("vsd", "0"))
            if self.name and not self.returncode:
                with (tmp_path / "rows.jsonl").open("a") as rows:
                    rows.write(row(self.name, int(self.seed)))
            return self.returncode

    monkeypatch.setattr(beside.subprocess, "Popen", Process)
    monkeypatch.setattr(beside.time, "sleep", lambda _: None)
    return order


def test_cells_start_in_the_order_of_the_seeds_and_one_that_fails_stops_no_other(
    tmp_path: Path, started: list[tuple[str, str]]
) -> None:
    assert leaderboard.run_cells(ENTRIES, given(tmp_path)) == ["vsd 0"]
    assert started == [("", ""), ("sid", "0"), ("vsd", "0"), ("sid", "1"), ("vsd", "1")]
    assert len(leaderboard.rows_of(given(tmp_path), ENTRIES)) == 3


def test_a_cell_with_a_row_is_not_started_again(tmp_path: Path, started: list[tuple[str, str]]) -> None:
    (tmp_path / "rows.jsonl").write_text(row("sid", 0) + row("vsd", 1))
    leaderboard.run_cells(ENTRIES, given(tmp_path, seeds=[0]))
    assert started == [("", ""), ("vsd", "0")]


def test_no_cell_starts_after_the_given_minutes(
    tmp_path: Path, started: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert leaderboard.run_cells(ENTRIES, given(tmp_path, minutes=0.0)) == []
    assert started == [] and "not started within 0 minutes: 4 cells" in capsys.readouterr().out


def test_a_table_has_rows_of_one_budget_and_one_learning_rate(tmp_path: Path) -> None:
    faster = leaderboard.with_rate(ENTRIES[0], 2e-4)
    assert faster.options == ("--objective", "sid", "--lr", "0.0002")
    assert leaderboard.with_rate(faster, 1e-3) == faster
    (tmp_path / "rows.jsonl").write_text(
        row("sid", 0) + row("sid", 0, budget=2.0) + row("sid", 1, options=" ".join(faster.options))
    )
    assert [found["seed"] for found in leaderboard.rows_of(given(tmp_path), ENTRIES)] == [0]
    assert [found["seed"] for found in leaderboard.rows_of(given(tmp_path), [faster])] == [1]


def test_a_command_runs_in_this_process_and_returns_its_json_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard.sys, "argv", ["before"])

    def command() -> None:
        print('{"said": 1}')
        raise SystemExit(int("bad" in leaderboard.sys.argv))

    monkeypatch.setattr(leaderboard, "run_command", command)
    assert leaderboard.sid("eval", 3) == {"said": 1}
    with pytest.raises(RuntimeError, match="exit code 1 of sid bad --json"):
        leaderboard.sid("bad")
