"""Images with captions: folders and .tar files, as people have them."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidcli.data.captioned import CaptionedImages, open_captioned
from sidcli.errors import InputError


def picture(number: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def folder_of(place: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / name)
    return place


def shard(file: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def pairs(found: CaptionedImages) -> dict[str, str]:
    return {found.name(index): found.captions[index] for index in range(len(found))}


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_a_folder_come_from_its_table(tmp_path: Path, table: str) -> None:
    folder_of(tmp_path, "b.png", "a.png", "train/c.png", "none.png")
    rows = [("train/c.png", "a  tall\ncat"), ("./a.png", 'a "red" dog, old'), ("b.png", "a house"), ("gone.png", "nothing")]
    if table.endswith("jsonl"):
        text = "".join(json.dumps({"file_name": name, "id": 3, "text": said}) + "\n" for name, said in rows)
    else:
        text = "id,text,file_name\n" + "".join(f'1,"{said.replace(chr(34), 2 * chr(34))}",{name}\n' for name, said in rows)
    (tmp_path / table).write_text(text)
    found = open_captioned(str(tmp_path))
    assert pairs(found) == {"a.png": 'a "red" dog, old', "b.png": "a house", "train/c.png": "a tall cat"}
    assert found.skipped == (("none.png", "no caption"),)
    np.testing.assert_array_equal(found.files.read(found.indices[0]), np.asarray(picture(1)))


@pytest.mark.parametrize(
    ("table", "header", "row", "empty"),
    [
        ("metadata.jsonl", "", '{"file_name": "%s", "text": "%s"}\n', '{"file_name": null, "text": ""}\n'),
        ("metadata.csv", "file_name,text\n", "%s,%s\n", ",\n"),
    ],
)
def test_blank_rows_of_a_table_are_skipped_and_captions_without_a_name_are_refused(
    tmp_path: Path, table: str, header: str, row: str, empty: str
) -> None:
    folder_of(tmp_path, "a.png", "b.png")
    content = header + row % ("a.png", "a cat") + "\n \n" + empty + row % ("b.png", "a dog") + "\n\n"
    (tmp_path / table).write_text(content)
    assert pairs(open_captioned(str(tmp_path))) == {"a.png": "a cat", "b.png": "a dog"}
    (tmp_path / table).write_text(content + row % ("", "a house"))
    with pytest.raises(InputError, match=f"{table}:{content.count(chr(10)) + 1}: file_name is '', not a name"):
        open_captioned(str(tmp_path))


def test_captions_of_a_folder_come_from_the_texts_beside_its_images(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png", "c.png", "d.png", "more/e.png")
    (tmp_path / "a.txt").write_bytes("\ufeffa café\r\n".encode())
    (tmp_path / "more" / "e.txt").write_text("a\ndog")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text(" \n")
    found = open_captioned(str(tmp_path))
    assert pairs(found) == {"a.png": "a café", "more/e.png": "a dog"}
    reasons = dict(found.skipped)
    assert reasons.keys() == {"b.png", "c.png", "d.png"} and reasons["b.png"].endswith("b.txt: byte 0 is not UTF-8")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_members_of_shards_are_paired_by_their_keys(tmp_path: Path, form: int) -> None:
    first = {"000.txt": b"a cat", "000.png": encoded(0), "000.json": b"{}", "001.PNG": encoded(1), "001.txt": b"a dog"}
    second = {
        "./in/000.png": encoded(2),
        "in/000.txt": b"a house",
        "x.depth.png": encoded(3),
        "._000.png": b"",
        "002.png": encoded(4),
    }
    shard(tmp_path / "s" / "0.tar", first, form)
    shard(tmp_path / "s" / "1.tar", second, form)
    (tmp_path / "list.txt").write_text("s/1.tar\n\ns/0.tar\n")
    wanted = {"0.tar/000.png": "a cat", "0.tar/001.png": "a dog", "1.tar/in/000.png": "a house"}
    for place in ("s", "list.txt"):
        found = open_captioned(str(tmp_path / place))
        assert pairs(found) == wanted and found.skipped == (("1.tar/002.png", "no caption"),)
        for index in range(3):
            number = sorted(wanted).index(found.name(index))
            np.testing.assert_array_equal(found.files.read(found.indices[index]), np.asarray(picture(number)))
    assert pairs(open_captioned(str(tmp_path / "s" / "0.tar"))).keys() == {"0.tar/000.png", "0.tar/001.png"}


def test_a_link_or_a_sparse_file_in_a_shard_is_no_image(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", {"0.png": encoded(0), "0.txt": b"a cat", "1.txt": b"a dog", "2.txt": b"a house"})
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        sparse = tarfile.TarInfo("2.png")
        sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
        archive.addfile(sparse)
    assert pairs(open_captioned(str(file))).keys() == {"a.tar/0.png"}


def test_a_second_image_of_a_key_and_an_unsupported_format_in_a_shard_are_counted_and_named(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", {"k.png": encoded(0), "k.jpg": encoded(1), "k.txt": b"a cat", "x.png": encoded(2)})
    shard(
        tmp_path / "more.tar",
        {"x.txt": b"a dog", "x.png": encoded(3), "y.tiff": b"II", "z.AVIF": b"", "w.tiff": b"", "w.txt": b"a"},
    )
    with tarfile.open(file, "a") as archive, tarfile.open(tmp_path / "more.tar") as more:
        for member in more.getmembers():
            archive.addfile(member, more.extractfile(member))
    (tmp_path / "more.tar").unlink()
    found = open_captioned(str(file))
    assert pairs(found) == {"a.tar/k.jpg": "a cat", "a.tar/x.png": "a dog"}
    assert found.skipped == tuple((name, "another image of the same key") for name in ("a.tar/k.png", "a.tar/x.png"))
    for index, number in enumerate((1, 3)):
        np.testing.assert_array_equal(found.files.read(found.indices[index]), np.asarray(picture(number)))
    assert found.files.notes == (f"{file}: ignoring images that are not PNG, JPEG, WebP, BMP or GIF: 1 .avif, 2 .tiff",)
    with pytest.raises(InputError, match=r"b\.tar holds no PNG, .* image, only 1 \.tiff"):
        open_captioned(str(shard(tmp_path / "b.tar", {"0.tiff": b"II", "0.txt": b"a cat"})))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", {"0.png": encoded(0), "0.txt": b"a cat", "1.png": encoded(1)}).read_bytes()
    negative = bytearray(whole)
    negative[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xfa\x00"  # 0.txt has -1536 bytes: the next member would be 0.png again
    broken = {
        "cut.tar": whole[:1500],
        "header.tar": whole[:1024] + b"x" * 512 + whole[1536:],
        "negative.tar": bytes(negative),
        "gzip.tar": b"\x1f\x8b\x08" + bytes(600),
        "empty.tar": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as refused:
            open_captioned(str(tmp_path / name))
        assert name in refused.value.message and "damaged" in refused.value.message, name


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    for place in (tmp_path, tmp_path / "a.tar"):
        with pytest.raises(InputError, match=r"a\.tar: not a regular file"):
            open_captioned(str(place))


@pytest.mark.parametrize(
    ("files", "place", "said"),
    [
        ({}, "gone", "cannot read the images .*gone: No such file"),
        ({"a.zip": b"PK"}, "a.zip", "neither a folder nor a .tar file"),
        ({"a.png": encoded(0)}, "", "has 1 image, none with a caption"),
        ({"a.png": encoded(0), "metadata.csv": b"name,text\n"}, "", "metadata.csv has no column file_name"),
        ({"a.png": encoded(0), "metadata.csv": b""}, "", "metadata.csv has no column file_name"),
        ({"a.png": encoded(0), "metadata.csv": b"file_name,width\na.png,3\n"}, "", "no column of captions, only file_name, width"),
        (
            {"a.png": encoded(0), "metadata.csv": b"file_name,text\na.png,x\n./a.png,y\n"},
            "",
            "metadata.csv:3 has another caption for a.png",
        ),
        (
            {"a.png": encoded(0), "metadata.jsonl": b'{"file_name": 3, "text": "x"}\n'},
            "",
            "metadata.jsonl:1: file_name is 3, not a",
        ),
        ({"list.txt": b"\n"}, "list.txt", "list.txt lists no .tar file"),
        ({"list.txt": b"gone.tar\n"}, "list.txt", "cannot read the images .*gone.tar"),
        ({"notes.txt": b"", "a.tar": b"\0" * 10240}, "a.tar", "a.tar holds no PNG"),
    ],
)
def test_a_place_without_images_and_captions_is_an_error_that_names_it(
    tmp_path: Path, files: dict[str, bytes], place: str, said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as refused:
        open_captioned(str(tmp_path / place) if place else str(tmp_path))
    assert refused.value.hint
