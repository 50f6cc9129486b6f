"""Odd environment variables: each one counts as unset or ends in one line."""

import os
from pathlib import Path

import pytest

from sidcli.environment import GROUP, NUMBERS, PLACES, Group, cache_folder, flag, group, group_or_alone, prepare
from sidcli.errors import EnvironmentProblem
from tests.inprocess import sid

WHOLE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_whole_group_is_read_and_a_process_alone_is_one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {})
    assert group() == Group(0, 1, 0, 1)
    put(monkeypatch, WHOLE)
    prepare()
    assert group() == group_or_alone() == Group(3, 4, 1, 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert group().local_count == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc is not a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 is not a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK=3, but WORLD_SIZE=0"),
        ({"RANK": ""}, "WORLD_SIZE=4, but RANK is not set"),
        ({"RANK": "4"}, "RANK=4, but WORLD_SIZE=4"),
        ({"LOCAL_RANK": " "}, "WORLD_SIZE=4, but LOCAL_RANK is not set"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE=two is not a whole number"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=4, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "tcp://29500"}, "MASTER_PORT=tcp://29500 is not a whole number"),
    ],
)
def test_half_a_group_is_refused_by_commands_that_share_work_and_ignored_by_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, str], said: str
) -> None:
    put(monkeypatch, WHOLE | changed)
    for command in ("distill", "eval"):
        assert sid(command) == 4
        assert capsys.readouterr().err.startswith(f"error: {said}; try: unset WORLD_SIZE")
    assert group_or_alone() == Group()
    assert sid("sample") == 2 and "no prompt given" in capsys.readouterr().err


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}])
def test_what_is_left_over_of_a_group_silences_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: dict[str, str]
) -> None:
    put(monkeypatch, WHOLE | {"WORLD_SIZE": ""} | size)
    assert sid("sample", "--steps", "0", "a cat") == 2
    assert "error: --steps must be at least 1" in capsys.readouterr().err
    assert not [name for name in GROUP if name in os.environ]  # nor does a library find it


def test_blank_places_and_numbers_that_are_none_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, dict.fromkeys(PLACES, " ") | {"HOME": "~"} | dict.fromkeys(NUMBERS, "abc") | {"OMP_NUM_THREADS": "0"})
    prepare()
    assert not [name for name in (*PLACES, *NUMBERS, "HOME") if name in os.environ]
    put(monkeypatch, {"HF_HOME": "~/hub", "OMP_NUM_THREADS": "3", "COLUMNS": "080", "HOME": "/home/me"})
    prepare()
    assert [os.environ[name] for name in ("HF_HOME", "OMP_NUM_THREADS", "COLUMNS", "HOME")] == ["~/hub", "3", "080", "/home/me"]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"SID_CACHE_DIR": "/data/sid", "XDG_CACHE_HOME": "/data"}, "/data/sid"),
        ({"SID_CACHE_DIR": "~/$SPACE/sid", "SPACE": "scratch"}, "/home/me/scratch/sid"),
        ({"SID_CACHE_DIR": "kept"}, "{cwd}/kept"),
        ({"SID_CACHE_DIR": " ", "XDG_CACHE_HOME": "$HOME/tmp"}, "/home/me/tmp/sid"),
        ({"SID_CACHE_DIR": "", "XDG_CACHE_HOME": "relative"}, "/home/me/.cache/sid"),
        ({"SID_CACHE_DIR": "", "XDG_CACHE_HOME": "$NOSUCH/x"}, "/home/me/.cache/sid"),
        ({"SID_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/sid"),
    ],
)
def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str) -> None:
    put(monkeypatch, {"HOME": "/home/me"} | variables)
    assert cache_folder() == Path(wanted.format(cwd=Path.cwd()))


def test_a_cache_that_cannot_be_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place, said in [
        ("$NOSUCH/sid", "SID_CACHE_DIR is '$NOSUCH/sid', which cannot be expanded; try: set it to the path of a folder"),
        ("~no-such-user/sid", "SID_CACHE_DIR is '~no-such-user/sid', which cannot be expanded"),
        (str(tmp_path / "file"), "file is a file, not a folder; try: choose another cache with SID_CACHE_DIR"),
    ]:
        monkeypatch.setenv("SID_CACHE_DIR", place)
        for command in (["eval"], ["distill", "--eval-every", "50", "-o", tmp_path / "run"]):
            assert sid(*command) == 4
            assert said in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("SID_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # a user that the system does not know
    with pytest.raises(EnvironmentProblem, match="no home folder"):
        cache_folder()


def test_a_switch_is_off_where_its_value_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for value, is_on in {"": False, "0": False, "False": False, "off": False, "1": True, "yes": True}.items():
        monkeypatch.setenv("SID_DEBUG", value)
        assert flag("SID_DEBUG") == is_on
        assert sid("sample") == 2
        assert ("Traceback" in capsys.readouterr().err) == is_on
