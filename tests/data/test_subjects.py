"""Reference images with prompts: the layout of DreamBench++, a table beside the images, and what is wrong with either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sidcli.data.imagesets import as_it_is
from sidcli.data.subjects import Subjects, open_subjects
from sidcli.errors import InputError

SHADES = {"object/00": 10, "live_subject/animal/00": 20, "live_subject/animal/01": 30}


def gray(shade: int) -> Image.Image:
    return Image.new("RGB", (20, 12), (shade, shade, shade))


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with the layout of DreamBench++: two prompts of each of three images."""
    for name, shade in SHADES.items():
        for part, suffix in (("images", ".jpg"), ("captions", ".txt")):
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            file = (tmp_path / part / name).with_suffix(suffix)
            if part == "images":
                gray(shade).save(file)
            else:
                file.write_text(f"Thing {shade}\na thing of {shade} at sea\n\n  a thing of {shade} on Mars \n")
    return tmp_path


def drawings(subjects: Subjects) -> list[tuple[str, str, int]]:
    """The prompt, the subject and the shade of the reference image of each drawing."""
    references = subjects.references(as_it_is, "")
    places = range(len(subjects))
    return [(subjects.prompts[place], references.subject(place), int(references.read(place).mean())) for place in places]


def test_each_line_after_the_first_of_a_text_is_a_prompt_of_the_image_at_the_same_path(bench: Path) -> None:
    expected = [
        (f"a thing of {shade} {where}", f"Thing {shade}", shade) for shade in (20, 30, 10) for where in ("at sea", "on Mars")
    ]
    assert drawings(open_subjects(bench)) == expected


def test_each_row_of_a_table_is_a_drawing_and_an_image_may_have_several(tmp_path: Path) -> None:
    for name, shade in (("a", 10), ("b", 20), ("unused", 30)):
        gray(shade).save(tmp_path / f"{name}.png")
    rows = [("b.png", "at sea"), ("a.png", "on Mars"), ("b.png", "on Mars")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
    subjects = open_subjects(tmp_path)
    assert drawings(subjects) == [("at sea", "", 20), ("on Mars", "", 10), ("on Mars", "", 20)] and len(subjects.files) == 2
    collection = subjects.references(as_it_is, "").collection(2)
    assert [int(image.mean()) for image in collection.images.read(range(collection.count))] == [20, 10]


def test_the_key_changes_with_an_image_and_with_a_prompt(bench: Path) -> None:
    first = open_subjects(bench).key
    assert open_subjects(bench).key == first
    text = bench / "captions" / "object" / "00.txt"
    text.write_text(text.read_text() + "another prompt\n")
    second = open_subjects(bench).key
    gray(99).save(bench / "images" / "object" / "00.jpg")
    assert len({first, second, open_subjects(bench).key}) == 3


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "captions/object/00.txt").unlink(), "captions has no text for 1 image: object/00.jpg"),
        (lambda folder: (folder / "images/object/00.jpg").unlink(), "images has no image for 1 text: object/00.txt"),
        (lambda folder: (folder / "captions/object/00.txt").write_text("Thing\n"), "captions without a prompt: object/00.txt"),
        (lambda folder: damage(folder / "images/object/00.jpg"), "images/object/00.jpg "),
        (lambda folder: (folder / "captions/object/00.txt").write_bytes(b"a\n\xff"), "00.txt:2: byte 0 is not UTF-8"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a"}'), "hold: x.png"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "text": ""}'), "a prompt: .*jsonl:1"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "x.png"}'), "no column of captions"),
        (lambda folder: (folder / "metadata.jsonl").write_text(""), "has no column file_name"),
        (lambda folder: (folder / "images").rename(folder / "pictures"), "holds no reference images with prompts"),
    ],
)
def test_an_error_names_the_files_that_are_missing_or_broken(bench: Path, change, said: str) -> None:  # type: ignore[no-untyped-def]
    change(bench)
    with pytest.raises(InputError, match=said):
        open_subjects(bench)


def test_one_error_names_all_broken_images_up_to_five(tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(b"not an image")
    rows = [json.dumps({"file_name": f"{index}.png", "text": "a"}) for index in range(7)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError) as caught:
        open_subjects(tmp_path)
    assert caught.value.message.startswith("7 reference images cannot be used: ") and caught.value.message.endswith(" and 2 more")
    assert all(f"{index}.png" in caught.value.message for index in range(5))
