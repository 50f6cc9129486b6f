"""Streams that are closed, or that cannot show a path: the work is done all the same."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidcli.cli import main
from sidcli.printable import can_show, prepare_streams
from tests import REPOSITORY
from tests.commands import in_server
from tests.inprocess import sid

COMMANDS = [
    ["--version"],
    ["sample", "a cat", "-o", "cat.png"],
    ["sample", "a cat", "a dog", "-o", "two", "--json", "--quiet"],
    ["export", "emoji", "-o", "student", "--no-verify"],
    ["eval", "emoji", "--num", "4", "--accuracy", "--device", "cpu", "--json"],
    ["eval", "emoji", "--num", "4", "--accuracy", "--device", "cpu", "--latex", "--quiet"],
    ["distill", "--dry-run"],
    ["sample"],
]


def each(commands: list[list[str]], closed: list[int], cwd: Path) -> None:
    """Run commands in a process that was begun with closed streams, which Python knows as None."""
    os.chdir(cwd)
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    codes = []
    for arguments in commands:
        sys.argv = ["sid", *arguments]
        try:
            main()
        except SystemExit as end:
            codes.append(end.code or 0)
    Path("codes.json").write_text(json.dumps(codes))


@pytest.mark.check(17)
@pytest.mark.parametrize("closed", [[1], [0, 1, 2]], ids=["stdout", "all"])
def test_closed_streams_change_neither_the_work_nor_the_exit_codes(tmp_path: Path, closed: list[int]) -> None:
    done = in_server(each, COMMANDS, closed, tmp_path)
    assert "Traceback" not in done.stderr + done.stdout
    assert json.loads((tmp_path / "codes.json").read_text()) == [0, 0, 0, 0, 0, 0, 0, 2], done.stderr
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    assert names >= {"cat.png", "two/000000.png", "two/000001.png", "two/sheet.png"}
    assert (tmp_path / "student" / "model_index.json").is_file()


@pytest.mark.check(17)
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["sample"], 2)])
def test_a_process_begun_with_closed_streams_ends_with_its_code(arguments: list[str], code: int, closed: str) -> None:
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-m", "sidcli", *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and done.stdout == ""


@contextmanager
def ascii_stdout() -> Iterator[io.BytesIO]:
    """What is written meanwhile to a stdout that knows ASCII alone."""
    written, before = io.BytesIO(), sys.stdout
    sys.stdout = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    try:
        yield written
    finally:
        sys.stdout = before


def test_a_result_that_the_encoding_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ascii_stdout() as written:
        assert sid("sample", "a cat", "-o", "k\u00e4t.png", "-q") == 0
        assert written.getvalue() == rb"k\xe4t.png" + b"\n"
    with ascii_stdout() as written:
        assert sid("sample", "a cat \U0001f431", "-o", "\U0001f431.png", "-q", "--json") == 0
        (image,) = json.loads(written.getvalue())["images"]
        assert image["prompt"] == "a cat \U0001f431" and image["file"] == "\U0001f431.png"
    with ascii_stdout() as written:
        assert sid("export", "emoji", "-o", "\u00e9tudiant", "--no-verify", "-q") == 0
        assert written.getvalue() == rb"\xe9tudiant" + b"\n"
    assert {file.name for file in tmp_path.iterdir()} >= {"\u00e9tudiant", "\U0001f431.png", "k\u00e4t.png"}


def test_a_stream_shows_what_its_encoding_has() -> None:
    with ascii_stdout() as written:
        assert can_show(sys.stdout, "a cat") and not can_show(sys.stdout, "\u2580")
        prepare_streams()
        print("\u2580 \U0001f431")
        assert written.getvalue() == rb"\u2580 \U0001f431" + b"\n"
