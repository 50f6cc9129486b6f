"""What a command says where no terminal watches."""

import sys

import pytest
from PIL import Image
from rich.console import Console as Terminal

from sidcli import console


def test_a_log_gets_lines_with_the_amount_the_losses_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", -1.0)
    now = iter(range(0, 100_000, 60))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(now)))
    with console.Console().progress("distil", 100, "steps") as advance:
        listener = console.DistillProgress(console.Console(), advance)
        listener.started(40, 100)
        capsys.readouterr()
        listener.stepped({"step": 50, "images_per_second": 12.5, "fake_loss": 0.25, "memory_gb": 1.5})
    line = capsys.readouterr().err
    assert "distil 50/100 img/s 12.5 fake 0.25 GB 1.5" in line
    # Ten steps took at least two of this clock's minutes, and fifty are left.
    minutes = int(line.split("about ")[1].split(" min left")[0])
    assert 10 <= minutes <= 40


@pytest.mark.check(10)
def test_a_step_whose_numbers_are_not_finite_is_shown_without_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", -1.0)
    with console.Console().progress("distil", 100, "steps") as advance:
        listener = console.DistillProgress(console.Console(), advance)
        listener.stepped({"step": 1, "images_per_second": 2.0, "fake_loss": 0.25, "generator_loss": None, "ratio": None})
    assert "distil 1/100 img/s 2 fake 0.25 about" in capsys.readouterr().err


@pytest.mark.check(30)
def test_control_characters_of_a_prompt_are_made_visible() -> None:
    assert console.printable("cat\x1b]0;x\u202e") == "cat\\u001b]0;x\\u202e"


def test_a_preview_shows_two_pixels_a_character_on_a_terminal_and_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.new("RGB", (3, 2), (255, 0, 0))
    picture.putpixel((1, 1), (0, 0, 255))
    voice = console.Console()
    voice.preview(picture)
    assert capsys.readouterr().err == ""
    voice.live, voice.err = True, Terminal(file=sys.stderr, force_terminal=True, color_system="truecolor", no_color=False, width=40)
    voice.preview(picture)
    shown = capsys.readouterr().err
    assert shown.count("\u2580") == 3 and "38;2;255;0;0;48;2;0;0;255" in shown
