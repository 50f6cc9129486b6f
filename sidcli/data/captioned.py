"""Images with captions: a folder, or webdataset's .tar files. Captions are read at once, images one at a time by index.

- A folder has a table `metadata.jsonl` or `metadata.csv` with the columns file_name and text (the layout `imagefolder` of Hugging Face
  datasets), or a .txt beside each image.
- A .tar file has a member KEY.txt for each member KEY.jpg (or another image format). If it has several images of one key, the last is
  used. Several files are a folder of .tar files, or a text file with one path per line.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from sidcli.data.imagefiles import NOT_READ, READABLE, SUFFIXES, ImageFiles, about_not_read, by_suffix, open_images
from sidcli.data.prompts import MAX_LINE_BYTES, one_line
from sidcli.data.tables import COLUMNS, Table, numbered_lines, open_table
from sidcli.errors import InputError, UsageError
from sidcli.files import read_bytes, size_of
from sidcli.progress import counted

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_TABLE = 1 << 30
"""Maximum size of a table of captions in bytes."""
MAX_TAR = 1 << 50
HINT = "give a folder of images with metadata.jsonl or a .txt beside each image, webdataset's .tar files, or teacher"
TABLE_HINT = "give it the columns file_name and text"
CAPTION_HINT = (
    "give each image a caption: a row with file_name and text of metadata.jsonl in the folder itself, or a .txt of the same name"
)
Skipped = tuple[tuple[str, str], ...]
"""Pairs (name, reason) of images that are not used."""


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions. `indices` are the positions in `files` of the images that have one, in order, `captions` their captions.

    `skipped` are the images without a caption, and those of which a .tar file has another with the same key.
    """

    files: ImageFiles
    indices: tuple[int, ...]
    captions: tuple[str, ...]
    skipped: Skipped = ()

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.files.members[self.indices[index]]


def open_captioned(place: str) -> CaptionedImages:
    """Open a folder of images, a .tar file, a folder of .tar files, or a text file with paths of .tar files.

    Raises InputError if the place does not exist, contains no image with a caption, or has an invalid table or .tar file.
    """
    path = Path(place)
    try:
        if path.is_dir():
            tars = sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar")
            return _of_tars(place, tars) if tars else _of_folder(path)
        size_of(path, MAX_TAR)
        if path.suffix.lower() == ".tar":
            return _of_tars(place, [path])
        if path.suffix.lower() == ".txt":
            lines = (line.strip() for _, line in numbered_lines(path, MAX_LINE_BYTES, HINT))
            return _of_tars(place, [path.parent / line for line in lines if line])
    except OSError as error:
        raise InputError(f"cannot read the images {error.filename or place}: {error.strerror or error}", HINT) from error
    raise InputError(f"{place} is neither a folder nor a .tar file", HINT)


def _with_captions(
    files: ImageFiles, captions: Mapping[str, str], reasons: Mapping[str, str], others: Skipped = ()
) -> CaptionedImages:
    """Return the images that have a caption. `reasons` says why others have none, if there is more to say.

    `others` are images that are not in `files`, and why.
    """
    indices = tuple(index for index, member in enumerate(files.members) if captions.get(member))
    if not indices:
        raise InputError(f"{files.name} has {counted(len(files), 'image')}, none with a caption", CAPTION_HINT)
    skipped = tuple((member, reasons.get(member, "no caption")) for member in files.members if not captions.get(member))
    return CaptionedImages(files, indices, tuple(captions[files.members[index]] for index in indices), (*others, *skipped))


def _of_folder(folder: Path) -> CaptionedImages:
    files = open_images(folder)
    for name in METADATA:
        if (folder / name).exists():
            return _with_captions(files, _of_table(folder / name), {})
    captions, reasons = {}, {}
    for member in files.members:
        beside = (folder / member).with_suffix(".txt")
        if beside.exists():
            try:
                captions[member] = _caption(read_bytes(beside, MAX_LINE_BYTES), str(beside))
            except (InputError, OSError) as error:
                reasons[member] = f"no caption: {getattr(error, 'message', None) or error}"
    return _with_captions(files, captions, reasons)


def _caption(content: bytes, place: str) -> str:
    """Return a caption as one line. Raises InputError if it is not a text."""
    try:
        return one_line(content.decode("utf-8-sig"), place)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: byte {error.start} is not UTF-8", "save it as UTF-8 text") from error


def table_rows(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the image file and the caption of each row of a table. Rows with neither, as of blank lines, are skipped.

    A row without a caption yields "". Raises InputError with file and line if the table is invalid.
    """
    try:
        names = open_table(file, "file_name", MAX_TABLE)
    except UsageError:  # the table has other columns
        names = Table("", (), iter(()))
    if not names.columns:
        raise InputError(f"{file} has no column file_name", TABLE_HINT)
    column = next((name for name in ("text", *COLUMNS) if name in names.columns), None)
    if column is None:
        raise InputError(f"{file} has no column of captions, only {', '.join(names.columns)}", TABLE_HINT)
    for (place, name), (_, text) in zip(names.texts, open_table(file, column, MAX_TABLE).texts, strict=True):
        if name in (None, "") and text in (None, ""):
            continue
        if not isinstance(name, str) or not name:
            raise InputError(f"{place}: file_name is {name!r}, not {'a name' if name == '' else 'a text'}", TABLE_HINT)
        yield place, posixpath.normpath(name), "" if text is None else one_line(text, place)


def _of_table(file: Path) -> dict[str, str]:
    """Return the captions in a table by image file. Raises InputError with file and line if the table is invalid."""
    captions: dict[str, str] = {}
    for place, member, caption in table_rows(file):
        if member in captions:
            raise InputError(f"{place} has another caption for {member}", "give each image one caption")
        captions[member] = caption
    return captions


class _Part(NamedTuple):
    """The content of a member of a .tar file: start and number of bytes."""

    start: int
    size: int


@dataclass(frozen=True)
class _Shards:
    """Opens images in .tar files by name. A file is opened for each image, so that threads and processes share no position."""

    places: Mapping[str, tuple[Path, _Part]]

    def __call__(self, name: str, most: int) -> BinaryIO:
        path, part = self.places[name]
        return io.BytesIO(_content(path, part, most))


def _content(path: Path, part: _Part, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(part.start)
        return file.read(min(part.size, most))


def _of_tars(place: str, paths: list[Path]) -> CaptionedImages:
    if not paths:
        raise InputError(f"{place} lists no .tar file", HINT)
    found: dict[str, tuple[Path, _Part]] = {}
    captions, reasons, stamps = {}, {}, []
    others: list[tuple[str, str]] = []
    not_read: Counter[str] = Counter()
    for path in paths:
        held = _members(path)
        stamps.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
        others += [(f"{path.name}/{name}", "another image of the same key") for name in held.replaced]
        not_read += held.not_read
        for key, (suffix, part) in held.images.items():
            member = f"{path.name}/{key}{suffix}"
            if member in found:
                raise InputError(f"{place} lists two files named {path.name}", "give each .tar file its own name")
            found[member] = path, part
            if key in held.texts:
                try:
                    captions[member] = _caption(_content(path, held.texts[key], MAX_LINE_BYTES), member)
                except InputError as error:
                    reasons[member] = f"no caption: {error.message}"
    if not found:
        raise InputError(f"{place} holds no {READABLE} image" + (f", only {by_suffix(not_read)}" if not_read else ""), HINT)
    fingerprint = hashlib.sha256(json.dumps([stamps, list(found)]).encode()).hexdigest()
    files = ImageFiles(place, fingerprint, tuple(found), _Shards(found), tuple(about_not_read(place, not_read)))
    return _with_captions(files, captions, reasons, tuple(others))


@dataclass(frozen=True)
class _Members:
    """The members of a .tar file: images as {key: (suffix, part)} and texts as {key: part}.

    `replaced` are the names of images with a later one of the same key, `not_read` the numbers of unsupported images by suffix.
    """

    images: dict[str, tuple[str, _Part]] = field(default_factory=dict)
    texts: dict[str, _Part] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    not_read: Counter[str] = field(default_factory=Counter)


def _members(path: Path) -> _Members:
    """Return the images and texts of a .tar file. Of several with one key, the last is used, as when the file is unpacked.

    The key of a member is its path up to the first dot of its file name, as in webdataset. Raises InputError if the file is invalid.
    """
    found = _Members()
    for member in _regular(path):
        place = PurePosixPath(posixpath.normpath(member.name))
        if not place.name or place.name.startswith("."):
            continue
        stem, _, suffix = place.name.partition(".")
        key, suffix = str(place.with_name(stem)), f".{suffix.lower()}"
        part = _Part(member.offset_data, member.size)
        if suffix == ".txt":
            found.texts[key] = part
        elif suffix in SUFFIXES:
            if key in found.images:
                found.replaced.append(f"{key}{found.images[key][0]}")
            found.images[key] = suffix, part
        elif suffix in NOT_READ:
            found.not_read[suffix] += 1
    return found


def _regular(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files of an uncompressed .tar file. Only headers are read. Raises InputError if a header is invalid.

    Sparse files and links are passed over: their content is not one part of the file.
    """
    size, last = size_of(path, MAX_TAR), -1
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                if archive.offset <= last:  # a negative size; without this check the same header would be read for ever
                    raise InputError(f"{path} is damaged: a member has an invalid size", "make the file again")
                last = archive.offset
                archive.members = []  # type: ignore[attr-defined]
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                    yield member
        # tarfile ends silently at a header without a checksum.
        if any(_content(path, _Part(archive.offset, size), tarfile.BLOCKSIZE)):
            raise InputError(f"{path} is damaged: no valid header at byte {archive.offset}", "make the file again")
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is not an uncompressed .tar file or is damaged: {error}", "make it with tar -cf") from error
