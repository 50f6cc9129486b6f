from pathlib import Path

import pytest

from sidcli.errors import InputError
from sidcli.prompts import Grammar, open_prompts, read_list


def test_the_general_grammar_yields_over_a_million_prompts_and_rarely_repeats() -> None:
    grammar = open_prompts("general")
    assert isinstance(grammar, Grammar) and grammar.count > 1_000_000
    drawn = [grammar.at(0, position) for position in range(2000)]
    assert len(set(drawn)) > 1900
    assert not any("{" in text for text in drawn)


@pytest.mark.parametrize("source", ["general", "emoji"])
def test_a_prompt_is_a_function_of_seed_and_position(source: str) -> None:
    prompts = open_prompts(source)
    assert prompts.at(0, 5) == prompts.at(0, 5)
    assert [prompts.at(0, i) for i in range(20)] != [prompts.at(1, i) for i in range(20)]


def test_a_list_is_read_through_once_before_it_repeats_and_then_in_another_order(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(30)), encoding="utf-8")
    prompts = read_list(file)
    first, second = ([prompts.at(0, 30 * epoch + i) for i in range(30)] for epoch in (0, 1))
    assert set(first) == set(second) == set(prompts.lines)
    assert first != second


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  \r\na d\xc3\xb6g\r\n")
    assert read_list(file).lines == ("a cat", "a dög")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"fine\nbad \xff byte\n", ":2: byte 4"),
        (b"a\0b\n", ":1: a NUL"),
        (b"x" * 10_001, ":1: a prompt of 10001"),
        ("a cat".encode("utf-16"), ":1: byte 0"),
    ],
)
def test_a_broken_list_is_refused_with_its_place(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_list(file)


def test_a_missing_list_and_a_device_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError):
            read_list(path)
