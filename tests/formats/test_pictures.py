"""A contact sheet shows every picture in its shape and every label to its end, in the letters that it is written in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from sidcli.formats.pictures import FONT, LABEL_LINES, columns_for, contact_sheet, wrapped

LETTERS = ImageFont.truetype(FONT, 11)


def drawn(letter: str) -> bytes:
    return bytes(LETTERS.getmask(letter))


@pytest.mark.parametrize(
    "text", ["Überraschung: żółć, ťuť, naïve café", "γάτα σε πράσινο φόντο", "їжак на жовтому тлі, кошка", "“a” – b…"]
)
def test_latin_greek_and_cyrillic_have_their_letters(text: str) -> None:
    box = drawn("\u732b")
    assert not [letter for letter in text if letter != " " and drawn(letter) == box]


@pytest.mark.parametrize("letter", ["\u732b", "\U0001f431", "\u0639"])
def test_a_letter_that_the_font_lacks_is_seen_to_be_missing(letter: str) -> None:
    assert any(drawn(letter))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a cat on a green background (seed 0)", ["a cat on a green", "background (seed 0)"]),
        ("cat " * 8, None),
        ("Donaudampfschifffahrtsgesellschaft", None),
        ("", []),
    ],
)
def test_a_label_is_broken_into_lines_that_fit_and_lose_nothing(text: str, lines: list[str] | None) -> None:
    found = wrapped(text, LETTERS, 128)
    assert lines is None or found == lines
    assert "".join(found).replace(" ", "") == text.replace(" ", "")
    assert all(LETTERS.getlength(line) <= 128 for line in found)


@pytest.mark.parametrize("text", ["cat " * 3000, "x" * 10_000])
def test_a_label_without_an_end_gets_an_ellipsis(text: str) -> None:
    found = wrapped(text, LETTERS, 128)
    assert len(found) == LABEL_LINES and found[-1].endswith("…") and LETTERS.getlength(found[-1]) <= 128


def test_the_last_row_has_few_gaps() -> None:
    chosen = {1: 1, 2: 2, 3: 3, 5: 3, 7: 4, 10: 5, 17: 6, 64: 8, 100: 10}
    assert {count: columns_for(count) for count in chosen} == chosen
    assert all(-count % columns_for(count) <= 0.4 * columns_for(count) for count in range(1, 101))


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 64), (128, 128)), ((96, 64), (96, 64)), ((512, 256), (256, 128)), ((100, 400), (64, 256))]
)
def test_pictures_keep_their_shape(size: tuple[int, int], shown: tuple[int, int]) -> None:
    sheet = np.asarray(contact_sheet([Image.new("RGB", size, (255, 0, 0))], [""]))
    red = (sheet == (255, 0, 0)).all(-1)
    assert (red.any(0).sum(), red.any(1).sum(), red.sum()) == (*shown, shown[0] * shown[1])


def test_the_whole_label_is_on_the_sheet() -> None:
    label = "a very long description " * 10
    picture = Image.new("RGB", (64, 64), "white")
    sheet = np.asarray(contact_sheet([picture] * 2, [label, "short"]))
    rows = (sheet[:, :134] < 128).any((1, 2))
    lines = int((np.diff(rows.astype(int)) == 1).sum())
    assert lines >= len(wrapped(label, LETTERS, 128)) > 5 and not rows[-1]
