"""Images that others made, as an indexed set read one at a time from a folder or a zip. Nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sidcli.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_PIXELS = 100_000_000
MAX_BYTES = 512 << 20
# What Pillow and zipfile raise on damaged files, found by breaking valid ones at random.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error)
HINT = "give a folder or a .zip of PNG, JPEG, WebP or BMP images"


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in a fixed order. `name` for people; `fingerprint`, hex, changes when one of them is added, removed or changed."""

    name: str
    fingerprint: str
    members: tuple[str, ...]
    opened: Callable[[str], BinaryIO]
    left_out: str = ""
    """A sentence for people where the rule of numbers left images out."""

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, 3], RGB. Alpha is dropped and EXIF orientation left alone, as clean-fid does.

        Raises InputError, naming the file, where it is damaged, unreadable or larger than MAX_PIXELS.
        """
        name, hint = f"{self.name}/{self.members[index]}", "replace this image or remove it"
        try:
            with self.opened(self.members[index]) as file:
                image = Image.open(file, formats=FORMATS)
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return _rgb(image)
        except Image.DecompressionBombError as error:
            raise InputError(f"{name} has more than {MAX_PIXELS} pixels", hint) from error
        except UnidentifiedImageError as error:
            raise InputError(f"{name} is no PNG, JPEG, WebP or BMP image", hint) from error
        except DAMAGE as error:
            raise InputError(f"{name} cannot be read: {str(error) or type(error).__name__}", hint) from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I;16":  # 16-bit grey, which Pillow would clip at 255
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    image.info.pop("transparency", None)  # of a palette, which Pillow warns that it drops
    return np.array(image.convert("RGB"))


def open_images(path: Path) -> ImageFiles:
    """The images in a folder, searched recursively without following links to folders, or in a .zip. Hidden ones are skipped.

    Order: by folder, then by name; names that are numbers (000000.png) come first, by number. Where the folder that holds all of
    them has images with numbers for names, only such count: the contact sheet sheet.png that `sid sample` leaves beside them is
    not one of the images.

    Raises InputError where there is no such place, no image in it, or one that will not be read.
    """
    opened: Callable[[str], BinaryIO]
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            entries, opened = _in_folder(path), lambda name: (path / name).open("rb")
        elif stat.S_ISREG(mode) and path.suffix.lower() == ".zip":
            entries, opened = _in_zip(path), _ZipMembers(path)
        else:
            raise InputError(f"{path} is neither a folder nor a .zip", HINT)
    except OSError as error:
        raise InputError(f"cannot read the images {error.filename or path}: {error.strerror or error}", HINT) from error
    everything = len(entries)
    entries = _numbered(sorted(entries, key=_order))
    left_out = f"{path}: only the {len(entries)} images with numbers for names count, not the {everything - len(entries)} others"
    if not entries:
        raise InputError(f"{path} holds no image", HINT)
    for entry in entries:
        if entry.size > MAX_BYTES:
            raise InputError(f"{path}/{entry.name} has {entry.size} bytes; images may have {MAX_BYTES}", "remove it")
    fingerprint = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    names = tuple(entry.name for entry in entries)
    return ImageFiles(str(path), fingerprint, names, opened, left_out if len(entries) < everything else "")


class _Entry(NamedTuple):
    """A file by its name relative to the set, its size in bytes, and a stamp that changes with its content."""

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
    def is_numbered(self) -> bool:
        return self.stem.isascii() and self.stem.isdecimal()


def _order(entry: _Entry) -> tuple[str, bool, int, str, str]:
    """Numbers are compared by length and digits, because a name in a zip may have more digits than int() takes."""
    number = entry.stem.lstrip("0") if entry.is_numbered else ""
    return entry.folder, not entry.is_numbered, len(number), number, entry.name


def _numbered(entries: list[_Entry]) -> list[_Entry]:
    """Only the numbered ones, if some of these stand in the folder that holds all entries (in a zip, often not its root)."""
    numbered = [entry for entry in entries if entry.is_numbered]
    top = min({entry.folder for entry in numbered}, key=len, default=None)
    folders = {entry.folder for entry in entries}
    return numbered if top is not None and all(PurePosixPath(folder).is_relative_to(top) for folder in folders) else entries


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") and part != ".." for part in path.parts)


def _in_folder(folder: Path) -> list[_Entry]:
    """Raises OSError where a folder in it or a file's status cannot be read."""

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
    """Raises OSError where the file cannot be opened, InputError where it is no zip or a member could not be read."""
    entries = []
    with _zip(path) as archive:
        # By name, because of two members with one name the last counts, as it would when unzipped.
        for name, info in {info.filename: info for info in archive.infolist()}.items():
            if info.is_dir() or not _is_image(name):
                continue
            if info.flag_bits & 1:
                raise InputError(f"{path}/{name} is encrypted", "zip the images without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile does not bound what others expand to
                raise InputError(f"{path}/{name} is compressed by method {info.compress_type}", "zip the images with deflate")
            entries.append(_Entry(name, info.file_size, info.CRC))
    return entries


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a zip or is damaged: {error}", HINT) from error


class _ZipMembers:
    """Members by name. The zip is opened at the first read, once for all threads of a process.

    A forked process opens it again, because it would share the position in the file with its parent.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.process, self.lock = path, 0, threading.Lock()

    def __call__(self, name: str) -> BinaryIO:
        with self.lock:
            if self.process != os.getpid():
                self.archive, self.process = _zip(self.path), os.getpid()
        with self.archive.open(name) as member:
            # Never more than the promised size: a bare read() expands a member that lies about it by up to 2 GB.
            return io.BytesIO(member.read(self.archive.getinfo(name).file_size))
