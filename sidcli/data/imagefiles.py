"""Image files in a folder or a zip, read one at a time by index. Nothing is unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import stat
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sidcli.errors import InputError
from sidcli.formats.png import RECORD_BYTES, pixels_only, text_before_pixels
from sidcli.progress import counted

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"}
READABLE = "PNG, JPEG, WebP, BMP or GIF"
NOT_READ = {
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".j2k",
    ".ppm",
    ".pgm",
    ".tga",
    ".ico",
    ".psd",
    ".svg",
    ".exr",
}
"""Suffixes of image formats that are not supported. Files with these suffixes are counted and reported."""
MAX_PIXELS = 100_000_000
MAX_BYTES = 512 << 20
# Exceptions that Pillow and zipfile raise for damaged files, found by corrupting valid files at random.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error)
HINT = f"give a folder or a .zip of {READABLE} images"


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in a fixed order. `name` is for messages; `fingerprint` (hex) changes if an image is added, removed or changed."""

    name: str
    fingerprint: str
    members: tuple[str, ...]
    opened: Callable[[str, int], BinaryIO]
    """Opens a member, given its name and the number of bytes needed from its start. The stream may contain more bytes."""
    notes: tuple[str, ...] = ()
    """Messages for the user: which files are not among the images, and why."""

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 [H, W, 3], RGB; for an animation, the first frame.

        Alpha is dropped, EXIF orientation and color profiles are ignored, as in clean-fid. Raises InputError, which names the file,
        if the image is damaged, unreadable or larger than MAX_PIXELS.
        """
        return self.read_with_mode(index)[0]

    def read_with_mode(self, index: int) -> tuple[np.ndarray, str]:
        """Return image `index` as `read` does, and the mode in which Pillow reads the file, for example CMYK or RGBA."""
        name, hint = f"{self.name}/{self.members[index]}", "replace this image or remove it"
        with decoding(name, hint), self.opened(self.members[index], MAX_BYTES) as file:
            image = opened_image(file)
            return rgb(image), image.mode

    def record(self, index: int, name: str) -> str | None:
        """Return the `prompt` or the `model` that `sid` wrote into a PNG file, or None if the image has no such record."""
        try:
            with self.opened(self.members[index], RECORD_BYTES) as file:
                made = json.loads(text_before_pixels(file, "sid", RECORD_BYTES) or "null")
        except (*DAMAGE, RecursionError):
            return None
        value = made.get(name) if isinstance(made, dict) else None
        return value if isinstance(value, str) else None


@contextmanager
def open_image(file: Path) -> Iterator[Image.Image]:
    """Context with the image in a file. Raises InputError, also inside of the context, if the file is missing or cannot be read."""
    hint = f"give a {READABLE} image"
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{file} is not a file", hint)
        if status.st_size > MAX_BYTES:
            raise InputError(f"{file} has {status.st_size} bytes; images may have {MAX_BYTES}", hint)
        with file.open("rb") as content, decoding(str(file), hint):
            yield opened_image(content)
    except OSError as error:
        raise InputError(f"cannot read the image {file}: {error.strerror or error}", hint) from error


def opened_image(file: BinaryIO) -> Image.Image:
    """Return an image whose pixels are not read yet. Raises an exception of DAMAGE, or DecompressionBombError if it is too large."""
    image = Image.open(pixels_only(file), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


@contextmanager
def decoding(name: str, hint: str) -> Iterator[None]:
    """Context that raises InputError, which names an image, for what Pillow raises if it is damaged, unreadable or too large."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has more than {MAX_PIXELS} pixels", hint) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a {READABLE} image", hint) from error
    except DAMAGE as error:
        raise InputError(f"{name} cannot be read: {str(error) or type(error).__name__}", hint) from error


def rgb(image: Image.Image) -> np.ndarray:
    """Return an image as uint8 [H, W, 3]. Alpha is dropped."""
    if image.mode == "I;16":  # 16-bit gray: Pillow would clip its values at 255
        gray = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    image.info.pop("transparency", None)  # prevents Pillow's warning about palettes with transparency
    return np.array(image.convert("RGB"))


def open_images(path: Path) -> ImageFiles:
    """Return the images of a folder, searched recursively without links to folders, or of a .zip. Hidden files are skipped.

    The order is by folder, then by name; numbered images (000000.png) come first, by number. If the folder that contains all images
    has numbered images, only numbered images are used. This excludes the contact sheet sheet.png that `sid sample` writes into the
    same folder.

    Raises InputError if `path` is neither a folder nor a .zip, contains no image, two images of one number or name, or a too large
    or encrypted image.
    """
    opened: Callable[[str, int], BinaryIO]
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            found, opened = _in_folder(path), lambda name, most: (path / name).open("rb")
        elif stat.S_ISREG(mode) and path.suffix.lower() == ".zip":
            found, opened = _in_zip(path), _ZipMembers(path)
        else:
            raise InputError(f"{path} is neither a folder nor a .zip", HINT)
    except OSError as error:
        raise InputError(f"cannot read the images {error.filename or path}: {error.strerror or error}", HINT) from error
    images = [entry for entry in found if entry.suffix in SUFFIXES]
    entries = _numbered(sorted(images, key=_order))
    suffixes = Counter(entry.suffix for entry in found if entry.suffix not in SUFFIXES)
    if not entries:
        not_read = by_suffix(suffixes)
        raise InputError(f"{path} holds no image" + (f" that can be read, only {not_read}" if not_read else ""), HINT)
    _check_distinct(path, entries)
    notes = about_not_read(str(path), suffixes)
    if rest := len(images) - len(entries):
        notes.append(f"{path}: using {counted(len(entries), 'numbered image')}; ignoring {counted(rest, 'other image')}")
    for entry in entries:
        if entry.size > MAX_BYTES:
            raise InputError(f"{path}/{entry.name} has {entry.size} bytes; images may have {MAX_BYTES}", "remove it")
    fingerprint = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return ImageFiles(str(path), fingerprint, tuple(entry.name for entry in entries), opened, tuple(notes))


def by_suffix(suffixes: Mapping[str, int]) -> str:
    """Return numbers of files as text: 2 .avif, 1 .tiff."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def about_not_read(place: str, suffixes: Mapping[str, int]) -> list[str]:
    """Return a message on the images of unsupported formats in a place, by suffix; none if there are none."""
    return [f"{place}: ignoring images that are not {READABLE}: {by_suffix(suffixes)}"] if suffixes else []


class _Entry(NamedTuple):
    """A file: its name relative to the folder or zip, its size in bytes, and a stamp that changes with its content."""

    name: str
    size: int
    stamp: int

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.name)

    @property
    def stem(self) -> str:
        return posixpath.splitext(posixpath.basename(self.name))[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()

    @property
    def is_numbered(self) -> bool:
        return self.stem.isascii() and self.stem.isdecimal()


def _order(entry: _Entry) -> tuple[str, bool, int, str, str]:
    """Return the sort key. Numbers are compared by length and digits, because a name may have more digits than int() accepts."""
    number = entry.stem.lstrip("0") if entry.is_numbered else ""
    return entry.folder, not entry.is_numbered, len(number), number, entry.name


def _numbered(entries: list[_Entry]) -> list[_Entry]:
    """Return only the numbered entries if the folder of all entries (in a zip, often not its root) has any, else all."""
    numbered = [entry for entry in entries if entry.is_numbered]
    top = min({entry.folder for entry in numbered}, key=len, default=None)
    folders = {entry.folder for entry in entries}
    return numbered if top is not None and all(PurePosixPath(folder).is_relative_to(top) for folder in folders) else entries


def _check_distinct(path: Path, entries: Sequence[_Entry]) -> None:
    """Raises InputError if two images in a folder differ only in their suffix or in leading zeros of their number.

    The second of them would shift the captions of all later images.
    """
    seen: dict[tuple[str, str], _Entry] = {}
    for entry in entries:
        stem = entry.stem.lstrip("0") if entry.is_numbered else entry.stem
        other = seen.setdefault((entry.folder, stem), entry)
        if other is not entry:
            what = "number" if entry.is_numbered else "name"
            raise InputError(f"{path} holds two images of one {what}: {other.name} and {entry.name}", "remove one of them")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES | NOT_READ and not any(part.startswith(".") and part != ".." for part in path.parts)


def _in_folder(folder: Path) -> list[_Entry]:
    """Return the image files in a folder. Raises OSError if a subfolder or the status of a file cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    entries = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        for file in filter(_is_image, files):
            status = os.stat(os.path.join(place, file))
            if stat.S_ISREG(status.st_mode):
                entries.append(_Entry((inside / file).as_posix(), status.st_size, status.st_mtime_ns))
    return entries


def _in_zip(path: Path) -> list[_Entry]:
    """Return the image files in a zip. Raises OSError if it cannot be opened, InputError if it or a member is invalid."""
    entries = []
    with _zip(path) as archive:
        # If two members have the same name, the last is used, as when unzipping.
        for name, info in {info.filename: info for info in archive.infolist()}.items():
            if info.is_dir() or not _is_image(name):
                continue
            entry = _Entry(name, info.file_size, info.CRC)
            if entry.suffix in NOT_READ:
                entries.append(entry)
                continue
            if info.flag_bits & 1:
                raise InputError(f"{path}/{name} is encrypted", "zip the images without a password")
            # For other compression methods, zipfile does not limit the size of the output.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path}/{name} is compressed by method {info.compress_type}", "zip the images with deflate")
            entries.append(entry)
    return entries


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a zip or is damaged: {error}", HINT) from error


class _ZipMembers:
    """Opens members of a zip by name. The zip is opened at the first read, once for all threads of a process.

    A forked process opens the zip again, because otherwise it would share the file position with its parent.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.process, self.lock = path, 0, threading.Lock()

    def __call__(self, name: str, most: int) -> BinaryIO:
        with self.lock:
            if self.process != os.getpid():
                self.archive, self.process = _zip(self.path), os.getpid()
        with self.archive.open(name) as member:
            # Read at most the declared size: read() without a limit expands a member with a false size to up to 2 GB.
            return io.BytesIO(member.read(min(most, self.archive.getinfo(name).file_size)))
