"""What a command says, on a terminal and in a log."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console as Terminal

from sidcli.cli import console
from sidcli.errors import InputError
from sidcli.models.drawing import Plan
from sidcli.progress import counted, duration
from tests.inprocess import sid


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the console reads from its clock; its log gets every line."""
    now = [0.0]
    monkeypatch.setattr(console, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_short_lines_with_the_amount_the_time_left_and_the_losses(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.DistillProgress(console.Console()) as listener:
        listener.started(40, 100)
        for step in (50, 60):
            clock[0] += 180
            listener.stepped({"step": step, "images_per_second": 12.5, "fake_loss": 0.25, "memory_gb": 1.5})
    begun, first, second = capsys.readouterr().err.splitlines()
    assert begun == "distill: 40/100 steps"
    # The first step warms up: nothing is measured before it is done.
    assert first == "distill: 50/100 steps, 12.5 img/s, fake 0.25, 1.5 GB"
    assert second == "distill: 60/100 steps, 12 min left, 12.5 img/s, fake 0.25, 1.5 GB"


@pytest.mark.check(10)
@pytest.mark.usefixtures("clock")
def test_a_step_whose_numbers_are_not_finite_is_shown_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    with console.DistillProgress(console.Console()) as listener:
        listener.started(0, 100)
        listener.stepped({"step": 1, "images_per_second": 2.0, "fake_loss": 0.25, "generator_loss": None, "ratio": None})
    assert capsys.readouterr().err.splitlines()[-1] == "distill: 1/100 steps, 2 img/s, fake 0.25"


def test_parts_of_an_image_are_shown_as_steps_and_add_up_to_whole_images(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Console().progress("generate", 3, "images") as advance:
        for step in range(1, 51):
            clock[0] += 2
            advance(3 / 51, f"step {step}/50")
        advance(3 / 51)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generate: 0/3 images, step 1/50" and lines[-1] == "generate: 3/3 images"
    assert lines[17] == "generate: 1/3 images, 66 s left, step 18/50"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (30, ["120/300 steps"]),
        (60, ["120/300 steps", "12 min left", "24.5 img/s"]),
        (80, ["120/300 steps", "12 min left", "24.5 img/s", "fake 74.1", "gen 31.2"]),
        (120, ["120/300 steps", "12 min left", "24.5 img/s", "fake 74.1", "gen 31.2", "ratio 0.123", "1.51 GB"]),
    ],
)
def test_a_bar_takes_one_line_with_as_many_details_as_the_terminal_has_room_for(
    monkeypatch: pytest.MonkeyPatch, width: int, shown: list[str]
) -> None:
    monkeypatch.setattr(console, "BAR_SECONDS", 0.0)
    terminal = Terminal(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    bars = console.Bars(console.Line(terminal), console=terminal)
    inner = console.Advance(console.Console(), "teacher samples", 8, "images", bars)
    outer = console.Advance(console.Console(), "distill", 300, "steps", bars)
    outer(120, "24.5 img/s, fake 74.1, gen 31.2, ratio 0.123, 1.51 GB")
    inner(3 * 8 / 51, "step 3/50")
    monkeypatch.setattr(outer, "details", lambda: [*shown[:1], "12 min left", *outer.text.split(", ")])
    with terminal.capture() as captured:
        terminal.print(bars.make_tasks_table(bars.tasks))
    first, second = captured.get().splitlines()
    assert second.rstrip().endswith(f"  {', '.join(shown)}") and second.startswith("distill \u2501")
    assert "0/8 images" in first and all(len(line) <= width for line in (first, second))


def test_bars_in_each_other_leave_nothing_behind_and_short_work_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    voice = console.Console()
    for seconds in (0.0, 1000.0):
        monkeypatch.setattr(console, "BAR_SECONDS", seconds)
        voice.live, written = True, io.StringIO()
        voice.err = console.PipeSafeTerminal(file=written, force_terminal=True, width=80, color_system=None)
        with voice.progress("distill", 3, "steps") as outer:
            outer(1)
            with pytest.raises(KeyError), voice.progress("samples", 2, "images") as inner:
                inner(1)
                raise KeyError
            assert voice.bars is not None and len(voice.bars.tasks) == 1
        assert voice.bars is None and ("1/3 steps" in written.getvalue()) == (seconds == 0)


def test_times_have_two_digits_or_so_in_a_unit_that_fits() -> None:
    written = {0.4: "0 s", 12: "12 s", 89: "89 s", 100: "2 min", 5000: "83 min", 9000: "2.5 h", 200_000: "2.3 days"}
    assert {seconds: duration(seconds) for seconds in written} == written


def test_an_error_is_a_line_for_people_and_an_object_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    error = InputError("no file cat\x1b.txt", "check the path")
    console.Console().error(error)
    console.Console(as_json=True).error(error)
    line, text = capsys.readouterr().err.splitlines()
    assert line == "error: no file cat\\u001b.txt; try: check the path"
    said = {"type": "InputError", "message": "no file cat\x1b.txt", "hint": "check the path", "exit_code": 3}
    assert json.loads(text) == {"error": said} and "\x1b" not in text


@pytest.mark.check(30)
def test_control_characters_of_a_prompt_are_made_visible() -> None:
    assert console.printable("cat\x1b]0;x\u202e") == "cat\\u001b]0;x\\u202e"


def test_a_vertical_bar_in_a_name_does_not_split_a_cell_of_a_markdown_table(capsys: pytest.CaptureFixture[str]) -> None:
    console.Console().table("scores", ["model", "n"], [["a|b", "1"]])
    assert capsys.readouterr().out.splitlines()[2:] == [r"| model | n |", r"| ----- | - |", r"| a\|b  | 1 |"]


def test_counts_agree_with_their_nouns() -> None:
    assert [counted(number, "process") for number in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
    assert counted(1, "blank line") == "1 blank line" and counted(3, "image") == "3 images"
    assert Plan(1, 7.5).describe() == "1 step, guidance 7.5" and Plan(2, 3.0).describe() == "2 steps, guidance 3"


def test_a_preview_shows_two_pixels_a_character_on_a_terminal_and_is_a_note_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.new("RGB", (3, 2), (255, 0, 0))
    picture.putpixel((1, 1), (0, 0, 255))
    voice = console.Console()
    voice.preview(picture)
    assert capsys.readouterr().err == "no preview: stderr is not a terminal that shows block characters\n"
    voice.live, voice.err = True, Terminal(file=sys.stderr, force_terminal=True, color_system="truecolor", no_color=False, width=40)
    voice.preview(picture)
    shown = capsys.readouterr().err
    assert shown.count("\u2580") == 3 and "38;2;255;0;0;48;2;0;0;255" in shown


def test_a_message_is_printed_once_however_often_what_it_is_about_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sid("sample", "a cat", "a dog", "-o", "images") == 0
    capsys.readouterr()
    assert sid("eval", "images", "images", "emoji", "--accuracy", "--num", "2") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert sum("ignoring 1 other image" in line for line in lines) == 1 == sum("made from another prompt" in line for line in lines)
    assert len(set(lines)) == len(lines)
