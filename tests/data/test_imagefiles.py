import os
import struct
import tempfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidcli.data.imagefiles import MAX_BYTES, ImageFiles, open_images
from sidcli.errors import InputError

NOBODY = 65534


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def write(folder: Path, *names: str) -> Path:
    """Images that differ, number i under the i-th name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def zipped(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", method) as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return folder.with_suffix(".zip")


def patched(file: Path, signature: bytes, offset: int, value: bytes) -> Path:
    """Bytes overwritten, so many behind the first `signature`."""
    content = bytearray(file.read_bytes())
    start = content.index(signature) + offset
    content[start : start + len(value)] = value
    file.write_bytes(content)
    return file


def header_of_a_png(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(4) + b"IDAT"


def open_handles(place: Path) -> list[int]:
    """This process's descriptors of files in a folder."""
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    return [number for number in descriptors if os.path.realpath(f"/proc/self/fd/{number}").startswith(f"{place}/")]


def assert_numbers(files: ImageFiles, *numbers: int) -> None:
    assert len(files) == len(numbers)
    for index, number in enumerate(numbers):
        np.testing.assert_array_equal(files.read(index), np.asarray(picture(number)))


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who may read nothing of root's, for tests that run as root."""
    was = os.geteuid()
    os.seteuid(was or NOBODY)
    try:
        yield
    finally:
        os.seteuid(was)


def test_numbered_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write(tmp_path / "set", "10.png", "9.png", "000002.png", "0.png")
    for files in (open_images(tmp_path / "set"), open_images(zipped(tmp_path / "set"))):
        assert_numbers(files, 3, 2, 1, 0)


def test_other_images_come_by_folder_and_name(tmp_path: Path) -> None:
    write(tmp_path / "set", "b/a.png", "b.png", "B.png", "a/z.png", "a/7.png", "ä.png")
    for files in (open_images(tmp_path / "set"), open_images(zipped(tmp_path / "set"))):
        assert files.members == ("B.png", "b.png", "ä.png", "a/7.png", "a/z.png", "b/a.png")
        assert_numbers(files, 2, 1, 5, 4, 3, 0)


@pytest.mark.parametrize("inside", ["", "out/"])
def test_the_contact_sheet_beside_numbered_images_is_not_one_of_them(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "set", *(inside + name for name in ("sheet.png", "000000.png", "000001.png", "more/000002.png", "more/x.png")))
    for files in (open_images(tmp_path / "set"), open_images(zipped(tmp_path / "set"))):
        assert_numbers(files, 1, 2, 3)


def test_numbers_in_one_of_several_folders_leave_no_image_out(tmp_path: Path) -> None:
    assert len(open_images(write(tmp_path, "cats/0.png", "cats/tom.png", "dogs/rex.png"))) == 3


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("0001.png", "0000.png", "0000.jpg"), "holds two images of one number: 0000.jpg and 0000.png"),
        (("0.png", "000.png", "1.png"), "holds two images of one number: 0.png and 000.png"),
        (("in/cat.png", "in/cat.b.png", "in/cat.webp"), "holds two images of one name: in/cat.png and in/cat.webp"),
    ],
)
def test_two_images_of_one_number_or_name_are_refused_by_their_names(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    write(tmp_path / "set", *names)
    for place in (tmp_path / "set", zipped(tmp_path / "set")):
        with pytest.raises(InputError) as caught:
            open_images(place)
        assert caught.value.message == f"{place} {said}" and caught.value.hint == "remove one of them"


def test_hidden_files_and_what_is_no_image_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", ".b.png", ".cache/c.png", "d/.e/f.png", "__MACOSX/._a.png")
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "set" / "pipe.png")
    assert_numbers(open_images(tmp_path / "set"), 0)
    (tmp_path / "set" / "pipe.png").unlink()
    assert_numbers(open_images(zipped(tmp_path / "set")), 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".jpe", ".jfif", ".webp", ".bmp", ".gif"])
def test_each_format_reads_as_pillow_reads_it(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, f"a{suffix}")
    read = open_images(tmp_path).read(0)
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB")))


def test_a_format_we_do_not_read_is_refused_whatever_its_name_says(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(InputError, match=r"a\.png is not a PNG, JPEG, WebP, BMP or GIF image"):
        open_images(tmp_path).read(0)


def test_images_in_formats_we_do_not_read_are_counted_and_named(tmp_path: Path) -> None:
    write(tmp_path / "set", "a.png", "b.tif", "c/d.TIF", "e.ppm", ".f.tif")
    for files in (open_images(tmp_path / "set"), open_images(zipped(tmp_path / "set"))):
        assert_numbers(files, 0)
        assert files.notes == (f"{files.name}: ignoring images that are not PNG, JPEG, WebP, BMP or GIF: 1 .ppm, 2 .tif",)
    write(tmp_path / "other", "b.tif")
    with pytest.raises(InputError, match=r"other holds no image that can be read, only 1 \.tif"):
        open_images(tmp_path / "other")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, name: str) -> None:
    first = picture(0).convert("P").convert("RGB")  # whose colors survive a GIF
    first.save(tmp_path / name, save_all=True, append_images=[picture(1), picture(2)], lossless=True)
    np.testing.assert_array_equal(open_images(tmp_path).read(0), np.asarray(first))


def with_chunks(file: Path, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG with more chunks behind its header."""
    content = file.read_bytes()
    more = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    file.write_bytes(content[:33] + more + content[33:])
    return file


LARGE = zlib.compress(bytes(2 << 20), 1)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"workflow\0\0" + LARGE),
        (b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
        (b"iCCP", b"profile\0\0" + LARGE),
        (b"tEXt", b"workflow\0" + b"x" * (65 << 20)),
        (b"eXIf", bytes(1000)),
        (b"iCCP", b"profile\0\7"),
        (b"acTL", b""),
    ],
    ids=lambda chunk: f"{chunk[0].decode()} {len(chunk[1])}",
)
def test_what_a_png_holds_beside_its_pixels_is_neither_read_nor_a_reason_to_refuse_it(
    tmp_path: Path, chunk: tuple[bytes, bytes]
) -> None:
    file = with_chunks(write(tmp_path, "a.png") / "a.png", chunk)
    with pytest.raises((ValueError, SyntaxError, OSError)) if len(chunk[1]) != 1000 else nullcontext(), Image.open(file) as image:
        image.load()
    files = open_images(tmp_path)
    tracemalloc.start()
    assert_numbers(files, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_png_in_many_pieces_reads_as_one(tmp_path: Path) -> None:
    content = (write(tmp_path, "a.png") / "a.png").read_bytes()
    start = content.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", content[start - 8 : start - 4])
    pieces = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for byte in content[start : start + length]
        for kind, body in ((b"IDAT", bytes([byte])), (b"teXt", b"between"))
    )
    (tmp_path / "a.png").write_bytes(content[: start - 8] + pieces + content[start + length + 4 :])
    assert_numbers(open_images(tmp_path), 0)


def test_the_prompt_of_a_png_is_read_without_its_pixels(tmp_path: Path) -> None:
    write(tmp_path / "set", "0.png", "1.png", "2.png", "3.png", "4.jpg")
    made = '{"prompt": "a caf\u00e9", "seed": 3}'.encode()
    for name, body in {
        "0.png": b"sid\0\0\0\0\0" + made,
        "1.png": b"sid\0\0\0\0\0{not json",
        "2.png": b"other\0\0\0\0\0" + made,
        "3.png": b"sid\0\0\0\0\0" + b"[" * 60_000,
    }.items():
        with_chunks(tmp_path / "set" / name, (b"zTXt", b"a" * 3000), (b"iTXt", body))
    for files in (open_images(tmp_path / "set"), open_images(zipped(tmp_path / "set"))):
        assert [files.record(index, "prompt") for index in range(5)] == ["a caf\u00e9", None, None, None, None]
    (tmp_path / "set" / "0.png").unlink()
    assert open_images(tmp_path / "set").record(0, "prompt") is None


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("LA", "a.png"), ("CMYK", "a.jpg")])
def test_other_kinds_of_pixels_become_rgb(tmp_path: Path, mode: str, name: str) -> None:
    picture(0).convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as kept:
        assert kept.mode == mode
        np.testing.assert_array_equal(open_images(tmp_path).read(0), np.asarray(kept.convert("RGB")))


def test_alpha_is_dropped_without_a_warning(tmp_path: Path) -> None:
    colors = picture(0)
    colors.putalpha(128)
    colors.save(tmp_path / "a.png")
    colors.convert("P").save(tmp_path / "b.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = open_images(tmp_path)
        np.testing.assert_array_equal(files.read(0), np.asarray(picture(0)))
        assert files.read(1).shape == (6, 8, 3)


def test_sixteen_bits_of_gray_become_eight(tmp_path: Path) -> None:
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(gray * 257).save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_images(tmp_path).read(0), np.stack([gray] * 3, axis=2))


def test_exif_orientation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(open_images(tmp_path).read(0), np.asarray(picture(0)))


def test_the_fingerprint_of_a_folder_changes_with_its_images_and_with_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b/c.png")
    seen = [open_images(tmp_path).fingerprint]
    (tmp_path / "notes.txt").write_text("not an image")
    assert open_images(tmp_path).fingerprint == seen[0]

    write(tmp_path, "a.png", "b/d.png")
    seen.append(open_images(tmp_path).fingerprint)
    (tmp_path / "b/d.png").rename(tmp_path / "d.png")
    seen.append(open_images(tmp_path).fingerprint)
    os.utime(tmp_path / "d.png", ns=(0, 0))
    seen.append(open_images(tmp_path).fingerprint)
    (tmp_path / "d.png").write_bytes((tmp_path / "d.png").read_bytes() + b"x")
    os.utime(tmp_path / "d.png", ns=(0, 0))
    seen.append(open_images(tmp_path).fingerprint)
    (tmp_path / "d.png").unlink()
    seen.append(open_images(tmp_path).fingerprint)
    assert len(set(seen)) == 6


def test_the_fingerprint_of_a_zip_is_that_of_its_content(tmp_path: Path) -> None:
    def fingerprint(name: str, content: bytes, date: tuple[int, int, int, int, int, int]) -> str:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo(name, date), content)
        return open_images(tmp_path / "a.zip").fingerprint

    old, new = (2000, 1, 1, 0, 0, 0), (2001, 1, 1, 0, 0, 0)
    assert fingerprint("a.png", b"one", old) == fingerprint("a.png", b"one", new)
    assert len({fingerprint(name, content, old) for name in ("a.png", "b.png") for content in (b"one", b"two")}) == 4


def test_what_is_not_there_not_a_set_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    for name, said in {
        "nothing": "cannot read the images .*nothing: No such file",
        "a.txt": r"a\.txt is neither a folder nor a \.zip",
        "empty": "empty holds no image",
        "empty.zip": r"empty\.zip holds no image",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            open_images(tmp_path / name)
        assert "PNG, JPEG, WebP, BMP or GIF" in caught.value.hint


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"a\.png: No such file"):
        open_images(tmp_path)


def test_permission_denied_says_where() -> None:
    with tempfile.TemporaryDirectory() as place:  # tmp_path lies in a folder that is closed to others
        folder = write(Path(place), "a.png", "closed/b.png")
        folder.chmod(0o755)
        (folder / "closed").chmod(0)
        with without_rights(), pytest.raises(InputError, match="/closed: Permission denied"):
            open_images(folder)
        (folder / "closed").chmod(0o755)
        (folder / "a.png").chmod(0)
        files = open_images(folder)
        with without_rights(), pytest.raises(InputError, match=r"/a\.png cannot be read: .*Permission denied"):
            files.read(0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
@pytest.mark.parametrize("kept", [0, 20, 100])
def test_a_cut_image_is_refused_by_name_and_the_others_are_read(tmp_path: Path, name: str, kept: int) -> None:
    write(tmp_path / "set", "b.png", name)
    file = tmp_path / "set" / name
    file.write_bytes(file.read_bytes()[:kept])
    for files in (open_images(tmp_path / "set"), open_images(zipped(tmp_path / "set"))):
        with pytest.raises(InputError, match=f"/{name} (is not|cannot)") as caught:
            files.read(0)
        assert "replace" in caught.value.hint
        np.testing.assert_array_equal(files.read(1), np.asarray(picture(0)))


@pytest.mark.check(25)
@pytest.mark.parametrize("size", [(10_001, 10_000), (100_000, 100_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(header_of_a_png(*size))
    with pytest.raises(InputError, match=r"a\.png has more than 100000000 pixels"):
        open_images(tmp_path).read(0)


def test_a_zip_member_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    archive = patched(zipped(write(tmp_path / "set", "a.png")), b"PK\1\2", 24, struct.pack("<I", MAX_BYTES + 1))
    with pytest.raises(InputError, match=r"a\.png has 536870913 bytes"):
        open_images(archive)


def test_a_zip_member_that_expands_beyond_its_promise_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(bytes(64 << 20))
    files = open_images(patched(zipped(tmp_path / "set", zipfile.ZIP_DEFLATED), b"PK\1\2", 24, struct.pack("<I", 1000)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.png cannot be read: Bad CRC"):
        files.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = patched(zipped(write(tmp_path / "set", "a.png")), b"PK\1\2", 8, b"\1")
    with pytest.raises(InputError, match=r"a\.png is encrypted"):
        open_images(archive)


def test_a_zip_packed_by_a_rare_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png is compressed by method 12"):
        open_images(zipped(write(tmp_path / "set", "a.png"), zipfile.ZIP_BZIP2))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all" * 10])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zip is not a zip or is damaged"):
        open_images(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("method", "signature", "offset", "value", "said"),
    [
        (zipfile.ZIP_STORED, b"IDAT", 10, b"\0\1\2\3", "Bad CRC-32"),
        (
            zipfile.ZIP_STORED,
            b"PK\1\2",
            20,
            struct.pack("<II", 10**6, 10**6),
            "(EOFError|Overlapped entries)",
        ),  # newer Pythons look first
        (zipfile.ZIP_STORED, b"PK\1\2", 8, b"\x20", "compressed patched data"),
        (zipfile.ZIP_DEFLATED, b"PK\3\4", 35, b"\xff\xff\xff", "Error -3 while decompressing"),
    ],
)
def test_damage_of_a_zip_names_the_member(
    tmp_path: Path, method: int, signature: bytes, offset: int, value: bytes, said: str
) -> None:
    files = open_images(patched(zipped(write(tmp_path / "set", "a.png"), method), signature, offset, value))
    with pytest.raises(InputError, match=rf"set\.zip/a\.png cannot be read: {said}"):
        files.read(0)


@pytest.mark.parametrize(
    ("signature", "offset", "value", "said"),
    [(b"IHDR", -4, b"\0\0\0\5", "Truncated IHDR"), (b"IDAT", -4, b"\0\0\0\5", "broken PNG file")],
)
def test_damage_of_a_png_names_the_file(tmp_path: Path, signature: bytes, offset: int, value: bytes, said: str) -> None:
    patched(write(tmp_path, "a.png") / "a.png", signature, offset, value)
    with pytest.raises(InputError, match=rf"a\.png cannot be read: {said}"):
        open_images(tmp_path).read(0)


def test_a_member_named_outside_of_the_zip_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "../../outside.png")
    assert_numbers(open_images(tmp_path / "in.zip"), 0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "in.zip"]
    assert not (tmp_path.parent.parent / "outside.png").exists()


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    assert_numbers(open_images(tmp_path), 0)
    write(tmp_path, "a.png")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "9" * 5000 + ".png")
    assert_numbers(open_images(tmp_path / "in.zip"), 0)


def test_reading_keeps_no_memory_and_no_handle_but_one_of_the_zip(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Image.new("RGB", (500, 500)).save(tmp_path / "set" / "a.bmp")
    for files, handles in ((open_images(tmp_path / "set"), 0), (open_images(zipped(tmp_path / "set")), 1)):
        files.read(0)  # which may load a codec, once
        tracemalloc.start()
        for _ in range(20):
            files.read(0)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept < 500 * 500 * 3
        assert len(open_handles(tmp_path)) == handles


def test_a_zip_is_opened_once_for_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Counted(zipfile.ZipFile):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            time.sleep(0.05)  # in which every other thread asks for it too
            super().__init__(path)

    files = open_images(zipped(write(tmp_path / "set", *(f"{number}.png" for number in range(50)))))
    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(files.read, list(range(50)) * 4))
    assert len(opened) == 1
    for index, image in enumerate(read):
        np.testing.assert_array_equal(image, np.asarray(picture(index % 50)))


def test_a_forked_process_does_not_move_its_parents_place_in_a_zip(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("0.bmp", "1.bmp"):  # larger than what a file object reads at once
        Image.new("RGB", (500, 500)).save(tmp_path / "set" / name)
    files = open_images(zipped(tmp_path / "set"))
    files.read(0)
    (handle,) = open_handles(tmp_path)
    place = os.lseek(handle, 0, os.SEEK_CUR)
    child = os.fork()
    if not child:
        os._exit(files.read(1).max())
    assert os.waitpid(child, 0)[1] == 0
    assert os.lseek(handle, 0, os.SEEK_CUR) == place
