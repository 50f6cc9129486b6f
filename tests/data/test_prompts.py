import dataclasses
import json
from pathlib import Path

import pytest

from sidcli import evaluate
from sidcli.data.prompts import BUILT_IN, Grammar, open_prompts, read_list, shipped_folder
from sidcli.emoji import world
from sidcli.errors import InputError, UsageError
from sidcli.evaluation import protocols
from sidcli.progress import Silence
from sidcli.settings import DistillConfig, differences
from tests.coco import write_coco
from tests.inprocess import sid


def test_the_general_grammar_yields_over_a_million_prompts_and_rarely_repeats() -> None:
    grammar = open_prompts("general")
    assert isinstance(grammar, Grammar) and grammar.count > 1_000_000
    drawn = [grammar.at(0, position) for position in range(2000)]
    assert len(set(drawn)) > 1900
    assert not any("{" in text for text in drawn)


def test_half_of_the_prompts_of_emoji_nouns_are_a_noun_alone_and_the_others_those_of_emoji() -> None:
    mixed, captions = open_prompts("emoji-nouns"), open_prompts("emoji")
    drawn = [(mixed.at(0, position), captions.at(0, position)) for position in range(2000)]
    others = [prompt for prompt, caption in drawn if prompt != caption]
    assert 900 < len(others) < 1100
    assert set(others) == {world.bare_caption(index) for index in range(len(world.NOUN_LIST))}


def test_the_list_of_nouns_holds_every_noun_of_the_emoji_world_alone() -> None:
    nouns = read_list(shipped_folder() / "nouns.txt").lines
    assert list(nouns) == [world.bare_caption(index) for index in range(len(world.NOUN_LIST))]


@pytest.mark.parametrize("source", BUILT_IN)
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
        ('"a cat"', "is neither a list nor COCO's captions"),
        ('{"annotations": {}}', "is neither a list nor COCO's captions"),
        ('{"annotations": [3]}', "annotation number 1 has no image_id"),
        ('{"annotations": []}', "holds no prompt"),
        ("[]", "holds no prompt"),
        ('["fine", 3.5]', "item 2: the caption is a number, 3.5, not a text"),
        ('["fine", "a\\u0000b"]', "item 2: a NUL"),
    ],
)
def test_json_that_is_no_list_of_prompts_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "list.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"list\.json:? {said}"):
        read_list(tmp_path / "list.json")


def table(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.check(26)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("excel.csv", '\ufeffid;Caption\r\n1;"a cat; ""old"""\r\n2;"a dog\r\non a mat"\r\n'),
        ("pandas.csv", ',file_name,text\n0,0.png,"a cat; ""old"""\n1,1.png,"a dog\non a mat"\n'),
        ("PARTI.TSV", 'Prompt\tCategory\n"a cat; ""old"""\tAnimals\na dog  on a mat \tAnimals\n'),
        ("old-mac.csv", 'case_number,prompt,seed\r1,"a cat; ""old""",7\r2,a dog on a mat,8\r'),
        ("flickr.csv", 'image| number| comment\n1.jpg| 0| "a cat; ""old"""\n1.jpg| 1| a dog on a mat\n'),
        ("one.csv", '\nprompts\n"a cat; ""old"""\n\na dog on a mat'),
        ("rows.jsonl", '{"tag": "x", "prompt": "a cat; \\"old\\""}\r\n\r\n{"prompt": "a dog\\non a mat", "tag": 3}\r\n'),
        ("strings.ndjson", '"a cat; \\"old\\""\n"a dog\\ton a mat"'),
        ("objects.json", '[{"id": 1, "TEXT": "a cat; \\"old\\""}, {"TEXT": "a dog on a mat", "id": 2}]'),
    ],
)
def test_the_captions_of_a_table_are_those_of_a_text_of_them(tmp_path: Path, name: str, content: str) -> None:
    plain = read_list(table(tmp_path, "list.txt", 'a cat; "old"\na dog on a mat\n'))
    found = read_list(table(tmp_path, name, content))
    assert found.lines == plain.lines and found.digest == plain.digest


def test_the_first_usual_name_is_read_and_the_note_says_so(tmp_path: Path) -> None:
    file = table(tmp_path, "both.csv", "url,text,Caption\nx,wrong,a cat\ny,wrong,\n")
    found = read_list(file)
    assert found.lines == ("a cat",)
    assert found.note == f"{file}: using column 'Caption' (others: url, text); 1 blank line skipped"
    assert read_list(table(tmp_path, "single.csv", "caption\na cat\n")).note == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "\na cat\n\n  \na dog\n"),
        ("t.csv", "id,caption\n1,a cat\n\n   \n2,\n3,a dog\n"),
        ("t.csv", "caption\na cat\n\n   \n  \na dog\n"),
        ("t.jsonl", '\n{"caption": "a cat"}\n\n{"caption": null}\n{"caption": "a dog"}\n'),
        ("t.jsonl", '\n"a cat"\n  \n""\n"a dog"\n'),
        ("t.json", '["", "a cat", " ", null, "a dog"]'),
    ],
)
def test_blank_lines_and_captions_of_every_kind_of_list_are_skipped_and_counted(tmp_path: Path, name: str, content: str) -> None:
    found = read_list(table(tmp_path, name, content))
    assert found.lines == ("a cat", "a dog") and found.note.endswith("3 blank lines skipped"), found.note


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("names.csv", "alt,caption\na cat,wrong\na dog,wrong\n", "ALT"),
        ("names.tsv", "ALT\talt\twidth\nwrong\ta cat\t3\nwrong\ta dog\t4\n", "alt"),
        ("names.jsonl", '{"alt": "a cat", "text": "wrong"}\n{"alt": "a dog"}\n', "alt"),
        ("names.json", '[{"alt": "a cat", "text": "wrong"}, {"alt": "a dog"}]', "Alt"),
        ("plain.txt", "url;alt, as written\nx;a cat\ny;a dog\n", "alt, as written"),
    ],
)
def test_a_column_is_found_by_its_own_name_before_any_case(tmp_path: Path, name: str, content: str, column: str) -> None:
    assert read_list(table(tmp_path, name, content), column).lines == ("a cat", "a dog")


@pytest.mark.check(26)
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "url,alt\nx,a cat\n", "t.csv has no caption column; its columns are 'url', 'alt'"),
        ("t.csv", "a cat\na dog\n", "its columns are 'a cat'"),
        ("t.csv", "Caption,id,caption\nx,1,y\n", "t.csv has 2 columns named 'Caption': 'Caption', 'id', 'caption'"),
        ("t.jsonl", '{"url": 1, "alt": 2}\n', "its columns are 'url', 'alt'"),
        ("t.csv", "caption,text\n,a cat\n,a dog\n", "t.csv holds no prompt; using column 'caption' (others: text)"),
        ("t.csv", "\n", "t.csv holds no prompt"),
        ("t.csv", "id,caption\n", "t.csv holds no prompt"),
        ("t.csv", 'id,caption\n1,"a\nb"\n2,a cat, old\n', "t.csv:4: the row has 3 fields, the header 2"),
        ("t.csv", "id,caption\n1\n", "t.csv:2: the row has 1 field, the header 2"),
        ("t.csv", 'id,caption\n1,a\n2,"a cat\n3,b\n', "t.csv:3: unexpected end of data"),
        ("t.csv", 'id,caption\n1,"a" cat\n', "t.csv:2: ',' expected after '\"'"),
        ("t.csv", b"id,caption\n1,a c\xe4t\n", "t.csv:2: byte 5 is not UTF-8"),
        ("t.csv", 'id,caption\n1,"a\n\nb"\n2,"a\0\n"\n', "t.csv:5: a NUL"),
        ("t.csv", "id,caption\n1," + "x" * 10_001 + "\n", "t.csv:2: a prompt of 10001"),
        ("t.csv", "id,caption\n" + "x" * (1 << 20) + ",x\n", "t.csv:2: more than 1048576 bytes"),
        ("t.jsonl", '{"caption": "a"}\n\n{"caption": "b"\n', "t.jsonl:3 is not JSON"),
        ("t.jsonl", '{"caption": "a"}\n{"text": "b"}\n', "t.jsonl:2 has no 'caption'"),
        ("t.jsonl", '{"caption": "a"}\n"b"\n', "t.jsonl:2 has no 'caption'"),
        ("t.jsonl", '{"caption": "a"}\n{"caption": ["b", "c"]}\n', 't.jsonl:2: the caption is a list, ["b", "c"], not a text'),
        ("t.jsonl", '{"caption": 5}\n', "t.jsonl:1: the caption is a number, 5, not a text"),
        ("t.jsonl", '{"caption": true}\n', "t.jsonl:1: the caption is a truth value, true, not a text"),
        ("t.jsonl", '{"caption": {"en": "a"}}\n', 't.jsonl:1: the caption is an object, {"en": "a"}, not a text'),
        ("t.jsonl", '{"caption": "a \\ud800 cat"}\n', "t.jsonl:1: character 2 is half"),
        ("t.jsonl", "[" * 100_000 + "\n", "t.jsonl:1 is not JSON"),
        ("t.json", '[{"caption": "a"}, {"caption": 3}]', "t.json: item 2: the caption is a number, 3, not a text"),
        ("t.json", '{"caption": "a"}\n{"caption": "b"}\n', "t.json is not JSON: Extra data"),
        ("t.parquet", b"PAR1", "t.parquet: cannot read prompts from .parquet files"),
        ("t.XLSX", b"PK", "t.XLSX: cannot read prompts from .XLSX files"),
        ("t.txt", "image,caption\n1.jpg,a cat\n2.jpg,a dog\n", "t.txt looks like a table with the columns 'image', 'caption'"),
        ("t.txt", "id\ttext\n\n1\ta cat\n", "t.txt looks like a table with the columns 'id', 'text'"),
        ("t.txt", '{"caption": "a cat"}\n{"caption": "a dog"}\n', "t.txt looks like JSON"),
        ("t", '[\n "a cat"\n]\n', "t looks like JSON"),
    ],
)
def test_a_table_that_is_none_or_has_no_captions_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_list(table(tmp_path, name, content))
    assert said in caught.value.message and caught.value.hint


def test_a_text_of_tags_stays_a_text(tmp_path: Path) -> None:
    tags = ("a cat, text, red", "photo, a dog", "{a|b}", "[a cat]", "title")
    assert read_list(table(tmp_path, "list.txt", "\n".join(tags))).lines == tags


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "id,caption\n1,a cat\n", "has the columns 'id', 'caption'"),
        ("t.jsonl", '{"id": 1, "caption": "a cat"}\n', "has the columns 'id', 'caption'"),
        ("t.jsonl", '"a cat"\n', "t.jsonl:1 is not an object"),
        ("t.json", '["a cat"]', "t.json: item 1 is not an object"),
        ("t.json", '{"annotations": []}', "COCO's layout"),
        ("t.txt", "a cat\na dog\n", "is a text with one prompt per line and has no such column"),
        ("t.txt", "a cat, old\na dog, red\n", "is a text with one prompt per line and has no such column"),
        ("t.txt", "alt\na cat\n", "is a text with one prompt per line and has no such column"),
    ],
)
def test_a_column_that_is_not_there_is_a_mistake_in_the_command(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(UsageError, match="--column alt") as caught:
        read_list(table(tmp_path, name, content), "alt")
    assert said in caught.value.message


def test_built_in_prompts_have_no_columns() -> None:
    for source in BUILT_IN:
        with pytest.raises(UsageError, match="have no columns"):
            open_prompts(source, "caption")
    with pytest.raises(UsageError, match="have no columns"):
        protocols.listed(Path("general"), Silence(), "caption")
    with pytest.raises(UsageError, match="--column alt names a column of --prompts, which is not given"):
        evaluate("emoji", column="alt", listener=Silence())


def test_a_continued_run_compares_prompts_by_content_and_not_by_column() -> None:
    given, inputs = DistillConfig(prompts="a.csv", column="alt"), {"prompts": "digest", "teacher": "digest"}
    older = {name: value for name, value in dataclasses.asdict(given).items() if name != "column"}
    assert differences(older, given, by_content=inputs) == []
    assert differences(older | {"column": "text", "prompts": "b.txt"}, given, by_content=inputs) == []
    assert differences(older | {"column": "text"}, given) == ["column: text -> alt"]


def test_a_run_on_a_table_goes_on_with_a_text_of_the_same_captions_and_with_no_others(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path, "a.csv", "id,caption,alt\n1,a cat,x\n2,a dog,y\n")
    table(tmp_path, "a.txt", "a cat\na dog\n")
    training = ["distill", "--teacher", sd_folder, "--batch-size", "2", "--device", "cpu", "--output", "run"]
    assert sid(*training, "--prompts", "a.csv", "--steps", "1") == 0
    assert "a.csv: using column 'caption' (others: id, alt)" in capsys.readouterr().err
    assert sid(*training, "--prompts", "a.csv", "--column", "alt", "--steps", "2") == 3
    assert "prompts: " in capsys.readouterr().err.splitlines()[-1]
    table(tmp_path, "own.toml", 'prompts = "a.csv"\ncolumn = "alt"\n')  # whose column is that of its own prompts
    assert sid(*training, "--config", "own.toml", "--prompts", "a.txt", "--steps", "2") == 0
    assert "continuing from step 1" in capsys.readouterr().err


def test_sample_and_eval_read_the_column_that_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = table(tmp_path, "a.tsv", "alt\ttext\na cat\tx\n\ty\n")
    assert sid("sample", "--prompts", file, "--column", "alt", "-o", "drawn", "--json") == 0
    ended = capsys.readouterr()
    assert [image["prompt"] for image in json.loads(ended.out)["images"]] == ["a cat"]
    assert f"{file}: using column 'alt' (others: text); 1 blank line skipped" in ended.err
    assert protocols.listed(file, Silence(), "alt").first(9) == ["a cat"]
    for command in (["sample", "a cat"], ["eval"]):
        assert sid(*command, "--column", "alt") == 2
        assert "--column alt names a column of --prompts" in capsys.readouterr().err
    assert sid("eval", "emoji", "--prompts", file, "--column", "url", "--clip", "--protocol", "custom") == 2
    assert "has the columns 'alt', 'text'" in capsys.readouterr().err


def test_a_built_in_source_is_no_list_of_prompts_unless_a_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in BUILT_IN:
        assert sid("sample", "--prompts", name) == 2
        assert capsys.readouterr().err == (
            f"error: --prompts {name} names built-in prompts for training, which have no end; try: --prompts FILE\n"
        )
    for name, hint in (("emoji", ""), ("emoji-nouns", ", whose metric `bare noun` measures nouns alone")):
        assert sid("eval", "emoji", "--prompts", name) == 2
        said = f"error: --prompts {name}: the captions of the emoji world are those of its protocol; try: --protocol emoji{hint}\n"
        assert capsys.readouterr().err.endswith(said)
        Path(name).write_text("a cat\n")
        assert protocols.listed(Path(name), Silence()).first(9) == ["a cat"] == list(read_list(Path(name)).lines)
