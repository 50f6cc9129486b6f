"""Notes on prompts that models of the emoji world do not understand."""

import json
from pathlib import Path

import pytest

from sidcli.data.prompts import shipped_folder
from sidcli.emoji import vocabulary, world
from sidcli.emoji.nouns import NOUNS
from tests.inprocess import sid


def test_no_caption_of_the_emoji_world_is_remarked_on() -> None:
    captions = [world.caption(world.scene(9, index), 9, index, split).text for split in ("train", "eval") for index in range(500)]
    listed = (shipped_folder() / "emoji.txt").read_text(encoding="utf-8").splitlines()
    nouns = [text for noun in NOUNS for text in (noun.upper(), f"The {world.plural(noun)}!", f"a {noun}\u2019s picture")]
    for text in [*captions, *listed, *nouns]:
        assert vocabulary.remark([text], "emoji") == ""


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a submarine", "emoji does not know 'submarine'; `sid sample --list-prompts` prints the 152 nouns and 10 colors it knows"),
        ("a bicicle or bycicle", "'bicicle' (bicycle?), 'or', 'bycicle' (bicycle?);"),
        ("Grey ELEFANT's hat", "'grey' (gray?), 'elefant' (elephant?);"),
        ("\u043a\u043e\u0448\u043a\u0430", "'\u043a\u043e\u0448\u043a\u0430';"),
        ("\u732b on red", "'\u732b';"),
        ("\U0001f431 and \u2764\ufe0f", "'and', '\U0001f431' (cat?), '\u2764' (heart?);"),
        ("b c d e f g h", "'b', 'c', 'd', 'e', 'f' and 2 more;"),
        ("a red background", "'a red background' names nothing to draw;"),
        ("?!", "'?!' names nothing to draw;"),
    ],
)
def test_what_no_caption_says_is_named_with_close_words(prompt: str, said: str) -> None:
    assert said in vocabulary.remark(["a cat", prompt, prompt], "emoji")


def test_sample_remarks_on_words_of_an_emoji_model_and_lists_those_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sd_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sid("sample", "a submarine", "-o", "one.png") == 0
    assert "note: emoji does not know 'submarine'" in capsys.readouterr().err
    assert sid("sample", "a submarine", "-o", "other.png", "--model", sd_folder, "--steps", "1") == 0
    assert "does not know" not in capsys.readouterr().err
    assert sid("sample", "--list-prompts") == 0
    printed = capsys.readouterr().out
    assert "152 nouns:" in printed and "10 background colors:\n  red, green" in printed
    assert sid("sample", "--list-prompts", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["nouns"] == list(NOUNS) and vocabulary.remark(known["examples"], "emoji") == ""
    assert " ".join(printed.split()).count(", ".join(known["nouns"])) == 1
