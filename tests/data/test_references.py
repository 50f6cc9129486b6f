"""Reference images: files and images of all kinds, what is said about them, and their records."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from sidcli.data import imagefiles
from sidcli.data.references import Reference
from sidcli.errors import InputError
from sidcli.progress import Silence
from sidcli.randomness import numpy_generator

RED = (200, 30, 30)


class Heard(Silence):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def fitted(reference: Reference, size: tuple[int, int] = (64, 64)) -> tuple[np.ndarray, list[str]]:
    heard = Heard()
    return reference.fitted(size, heard), heard.notes


def saved(image: Image.Image, file: Path, **options: object) -> Path:
    image.save(file, **options)
    return file


def test_a_plain_image_is_used_as_it_is_and_recorded_with_the_hash_of_its_file(tmp_path: Path) -> None:
    pixels = numpy_generator(0, "reference", 0).integers(0, 256, (64, 64, 3), np.uint8)
    file = saved(Image.fromarray(pixels), tmp_path / "a subject.png")
    reference = Reference.read(file)
    assert (fitted(reference)[0] == pixels).all() and not fitted(reference)[1]
    assert reference.record == {"file": "a subject.png", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    memory = Reference.of(Image.fromarray(pixels))
    assert (memory.pixels == pixels).all()
    assert memory.record == {"file": None, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "I;16"])
def test_other_modes_become_rgb_and_this_is_said(tmp_path: Path, mode: str) -> None:
    gray = Image.new("L", (64, 64), 128)
    image = Image.fromarray(np.full((64, 64), 128 * 257, np.uint16)) if mode == "I;16" else gray.convert("RGB").convert(mode)
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    file = saved(image, tmp_path / f"subject.{suffix}")
    with Image.open(file) as opened:
        stored = opened.mode  # a JPEG in YCbCr opens as RGB
    pixels, notes = fitted(Reference.read(file))
    assert pixels.shape == (64, 64, 3)
    if mode not in ("1", "P"):  # whose colors are rounded
        assert np.abs(pixels.astype(int) - 128).max() <= 2
    assert notes == ([] if stored == "RGB" else [f"{file} was converted from {stored} to RGB"])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*RED, 255), (16, 16, 48, 48))
    file = saved(image.convert(mode) if mode != "P" else image.quantize(4), tmp_path / "subject.png")
    pixels, notes = fitted(Reference.read(file))
    assert (pixels[0, 0] == 255).all() and pixels[32, 32].max() < 210
    assert notes == [f"{file} has transparent parts, which were filled with white"]
    opaque = saved(Image.new("RGBA", (64, 64), (*RED, 255)), file)
    assert fitted(Reference.read(opaque))[1] == [f"{file} was converted from RGBA to RGB"]


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (80, 64), RED), Image.Exif()
    exif[Base.Orientation] = 6
    reference = Reference.read(saved(image, tmp_path / "photo.jpg", exif=exif))
    assert reference.pixels.shape == (80, 64, 3)
    assert fitted(reference)[1] == [
        f"{tmp_path / 'photo.jpg'} was turned as its EXIF orientation says",
        f"{tmp_path / 'photo.jpg'} has 64 x 80 pixels; its center is used",
    ]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_of_an_animation_the_first_frame_is_used_and_this_is_said(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (64, 64), color) for color in (RED, (30, 30, 200))]
    file = saved(frames[0], tmp_path / f"subject.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    pixels, notes = fitted(Reference.read(file))
    assert pixels[32, 32, 0] > 150 and notes[0] == f"{file} is an animation; its first frame is used"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.png", "cannot read the image {}: No such file or directory"),
        ("folder.png", "{} is not a file"),
        ("notes.txt", "{} is not a PNG, JPEG, WebP, BMP or GIF image"),
        ("empty.png", "{} is not a PNG, JPEG, WebP, BMP or GIF image"),
        ("cut.png", "{} cannot be read: "),
        ("huge.png", "{} has more than 1000 pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr(imagefiles, "MAX_PIXELS", 1000)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("a teapot")
    (tmp_path / "empty.png").touch()
    noise = Image.fromarray(numpy_generator(0, "reference", 0).integers(0, 256, (30, 30, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes(saved(noise, tmp_path / "whole.png").read_bytes()[:400])
    Image.new("RGB", (40, 40)).save(tmp_path / "huge.png")
    with pytest.raises(InputError) as caught:
        Reference.read(tmp_path / name)
    assert caught.value.message.startswith(said.format(tmp_path / name))
    assert caught.value.hint == "give a PNG, JPEG, WebP, BMP or GIF image"


def test_an_image_that_would_be_enlarged_more_than_twice_is_refused(tmp_path: Path) -> None:
    file = saved(Image.new("RGB", (8, 8)), tmp_path / "small.png")
    with pytest.raises(InputError) as caught:
        fitted(Reference.read(file))
    assert caught.value.message == f"{file} has 8 x 8 pixels, too small for 64 x 64"
    assert caught.value.hint == "give an image of at least 32 x 32 pixels"
    assert fitted(Reference.read(saved(Image.new("RGB", (32, 32)), file)))[0].shape == (64, 64, 3)


def test_an_image_in_memory_is_not_changed() -> None:
    image = Image.new("P", (64, 64))
    image.info["transparency"] = 7
    assert fitted(Reference.of(image))[1] == ["the reference image was converted from P to RGB"]
    assert image.info == {"transparency": 7}


def test_a_closed_image_in_memory_is_refused_in_one_line(tmp_path: Path) -> None:
    image = Image.open(saved(Image.new("RGB", (64, 64)), tmp_path / "subject.png"))
    image.close()
    with pytest.raises(InputError, match="the reference image cannot be read"):
        Reference.of(image)
