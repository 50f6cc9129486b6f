import json
from pathlib import Path

import pytest

from sidcli.errors import InputError
from sidcli.prompts import Grammar, open_prompts, read_list
from tests.coco import write_coco


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


@pytest.mark.check(26)
def test_a_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  \r\na d\xc3\xb6g\r\n")
    assert read_list(file).lines == ("a cat", "a dög")


@pytest.mark.check(26)
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


@pytest.mark.check(25)
def test_a_missing_list_and_a_device_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError):
            read_list(path)


def captions_file(folder: Path, *annotations: tuple[int, int, object]) -> Path:
    """COCO's layout with (image_id, id, caption) each."""
    keys = ("image_id", "id", "caption")
    content = {"images": [], "annotations": [dict(zip(keys, annotation, strict=True)) for annotation in annotations]}
    (folder / "captions.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "captions.json"


def test_of_cocos_captions_each_image_keeps_the_one_with_the_lowest_id_in_the_order_of_images(tmp_path: Path) -> None:
    file = captions_file(tmp_path, (9, 3, "nine, later"), (10, 1, "ten"), (9, 2, "nine"), (2, 70, "two"), (2, 71, "two, later"))
    assert read_list(file).lines == ("two", "nine", "ten")


def test_white_space_in_a_caption_becomes_single_spaces(tmp_path: Path) -> None:
    assert read_list(captions_file(tmp_path, (1, 1, "\u00a0a  cat\n on\ta\r\nmat. \n"))).lines == ("a cat on a mat.",)


def test_a_blank_caption_gives_way_to_the_next_of_its_image(tmp_path: Path) -> None:
    file = captions_file(tmp_path, (1, 1, " \n"), (1, 2, ""), (1, 3, "a cat"), (1, 4, "late"), (2, 5, " "), (3, 6, "a dog"))
    assert read_list(file).lines == ("a cat", "a dog")


def test_a_file_in_cocos_own_layout_gives_one_clean_caption_for_each_image(tmp_path: Path) -> None:
    file = write_coco(tmp_path, 20) / "annotations" / "captions_val2014.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    said = {}
    for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"], reverse=True):
        said[annotation["image_id"]] = " ".join(annotation["caption"].split())
    assert read_list(file).lines == tuple(said[image["id"]] for image in sorted(content["images"], key=lambda image: image["id"]))


def test_a_json_list_of_strings_is_the_same_list_as_a_text_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "list.JSON").write_text('["a cat", "", "a\\nd\u00f6g"]', encoding="utf-8-sig")
    (tmp_path / "list.txt").write_text("a cat\n\na d\u00f6g\n", encoding="utf-8")
    from_json, from_text = read_list(tmp_path / "list.JSON"), read_list(tmp_path / "list.txt")
    assert from_json.lines == ("a cat", "a d\u00f6g")
    assert from_json.digest == from_text.digest


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ((1, 7, "a\0b"), "captions.json: annotation 7: a NUL"),
        ((1, 7, "x" * 10_001), "captions.json: annotation 7: a prompt of 10001"),
        ((1, 7, "a \ud800 cat"), "captions.json: annotation 7: character 2 is half"),
        ((1, 7, None), "captions.json: annotation 7 has no text"),
        ((1, "7", "a cat"), "captions.json: annotation number 2 has no image_id and id"),
        ((True, 7, "a cat"), "captions.json: annotation number 2 has no image_id and id"),
    ],
)
def test_a_broken_caption_is_refused_with_its_annotation(tmp_path: Path, annotation: tuple[int, int, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_list(captions_file(tmp_path, (5, 5, "fine"), annotation))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('"a cat"', "has no list of annotations"),
        ('{"annotations": {}}', "has no list of annotations"),
        ('{"annotations": [3]}', "annotation number 1 has no image_id"),
        ('{"annotations": []}', "holds no prompt"),
        ("[]", "holds no prompt"),
        ('["fine", 3]', "item 2 has no text"),
        ('["fine", "a\\u0000b"]', "item 2: a NUL"),
    ],
)
def test_json_that_is_no_list_of_prompts_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "list.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"list\.json:? {said}"):
        read_list(tmp_path / "list.json")
