"""Reference images with prompts, on which models that take a reference image are measured: `sid eval --protocol subjects`.

Two layouts of a folder are read:

- that of DreamBench++ (arXiv 2406.16855): `images/**/NAME.jpg`, and at the same path `captions/**/NAME.txt`, whose first line names the
  subject and whose further lines are prompts. Its data set has 150 images, `images/live_subject/animal/00.jpg`,
  `images/live_subject/human/00.jpg`, `images/object/00.jpg`, `images/style/00.jpg` and so on, and nine prompts of each: four
  photorealistic, three of other styles, two imaginative. Sources: `dreambench_plus/dreambench_plus_dataset.py` and `benchmarking.py`
  of https://github.com/yuangpeng/dreambench_plus;
- a table `metadata.jsonl` or `metadata.csv` beside the images with the columns file_name and text, as in `data.captioned`. Here an
  image may have several rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from sidcli.data.captioned import METADATA, table_rows
from sidcli.data.imagefiles import ImageFiles, open_images
from sidcli.data.imagesets import Collection, FileSet, ImageSet, Prepare, as_it_is, digest
from sidcli.data.prompts import MAX_LINE_BYTES, one_line
from sidcli.data.tables import numbered_lines
from sidcli.errors import InputError
from sidcli.metrics.features import in_threads
from sidcli.progress import counted

IMAGES, CAPTIONS = "images", "captions"
HINT = f"give DreamBench++'s folder with {IMAGES}/ and {CAPTIONS}/, or images with a metadata.jsonl of file_name and text"
NAMED = 5
"""Maximum number of files that an error names."""


@dataclass(frozen=True)
class References:
    """The reference images of a list of captions: caption i has image `of(i)` of a set, whose subject is `subject(i)`, "" if unknown.

    `prepare` is applied before features are computed; `prepared` describes it.
    """

    images: ImageSet
    of: Callable[[int], int]
    subject: Callable[[int], str]
    prepare: Prepare = as_it_is
    prepared: str = ""

    def read(self, caption: int) -> np.ndarray:
        """Return the reference image of a caption, uint8 [H, W, 3]."""
        place = self.of(caption)
        return self.images.read(range(place, place + 1))[0]

    def places(self, count: int) -> list[int]:
        """Return the positions of the images of the first `count` captions in the set."""
        return [self.of(caption) for caption in range(count)]

    def collection(self, count: int) -> Collection:
        """Return the images up to the last one that the first `count` captions need."""
        return Collection(self.images, 1 + max(self.places(count)), prepare=self.prepare, prepared=self.prepared)


@dataclass(frozen=True)
class Subjects:
    """Images and prompts of them: drawing i has the prompt `prompts[i]` and the reference image `places[i]` of `files`.

    `names` are those of the subjects of the images, "" if unknown.
    """

    files: ImageFiles
    names: tuple[str, ...]
    places: tuple[int, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def key(self) -> str:
        return digest("subjects", self.files.fingerprint, self.names, self.places, self.prompts)

    def references(self, prepare: Prepare, prepared: str) -> References:
        def subject(caption: int) -> str:
            return self.names[self.places[caption]]

        return References(FileSet(self.files), self.places.__getitem__, subject, prepare, prepared)


def open_subjects(folder: Path) -> Subjects:
    """Read the images and prompts of a folder. All images are decoded once, because a drawing of all prompts may take hours.

    Raises InputError, which names the files, if the folder has neither layout, an image or a text has no counterpart or no prompt, or
    images cannot be read.
    """
    table = next((folder / name for name in METADATA if (folder / name).exists()), None)
    try:
        if table:
            subjects = _of_table(folder, table)
        elif (folder / IMAGES).is_dir() and (folder / CAPTIONS).is_dir():
            subjects = _of_texts(folder)
        else:
            what = "holds no reference images with prompts" if folder.is_dir() else "is not a folder"
            raise InputError(f"{folder} {what}", HINT)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror or error}", HINT) from error

    def trouble(index: int) -> str:
        try:
            subjects.files.read(index)
        except InputError as error:
            return error.message
        return ""

    if troubles := [one for one in in_threads(trouble, range(len(subjects.files))) if one]:
        raise InputError(
            f"{counted(len(troubles), 'reference image')} cannot be used: {_listed(troubles)}", "replace or remove such images"
        )
    return subjects


def _of_table(folder: Path, table: Path) -> Subjects:
    rows = list(table_rows(table))
    if not rows:
        raise InputError(f"{table} has no rows", HINT)
    if empty := [place for place, _, prompt in rows if not prompt]:
        raise InputError(f"{counted(len(empty), 'row')} without a prompt: {_listed(empty)}", "give each row a text")
    files = open_images(folder)
    members = list(dict.fromkeys(member for _, member, _ in rows))
    if missing := sorted(set(members) - set(files.members)):
        raise InputError(f"{table} names {counted(len(missing), 'image')} that {folder} does not hold: {_listed(missing)}", HINT)
    places = {member: place for place, member in enumerate(members)}
    return Subjects(
        _selected(files, members),
        ("",) * len(members),
        tuple(places[member] for _, member, _ in rows),
        tuple(prompt for _, _, prompt in rows),
    )


def _of_texts(folder: Path) -> Subjects:
    files, texts = open_images(folder / IMAGES), folder / CAPTIONS
    wanted = {member: Path(member).with_suffix(".txt") for member in files.members}
    found = {file.relative_to(texts) for file in texts.rglob("*.txt") if not file.name.startswith(".")}
    if lonely := [member for member, text in wanted.items() if text not in found]:
        raise InputError(f"{texts} has no text for {counted(len(lonely), 'image')}: {_listed(lonely)}", HINT)
    if lonely := sorted(map(str, found - set(wanted.values()))):
        raise InputError(f"{folder / IMAGES} has no image for {counted(len(lonely), 'text')}: {_listed(lonely)}", HINT)
    contents = [_lines(texts / text) for text in wanted.values()]
    if empty := [str(text) for text, lines in zip(wanted.values(), contents, strict=True) if len(lines) < 2]:
        raise InputError(
            f"{counted(len(empty), 'text')} of {texts} without a prompt: {_listed(empty)}",
            "write the name of the subject in the first line and one prompt in each further line",
        )
    pairs = [(place, prompt) for place, (_, *prompts) in enumerate(contents) for prompt in prompts]
    names = tuple(name for name, *_ in contents)
    return Subjects(files, names, tuple(place for place, _ in pairs), tuple(prompt for _, prompt in pairs))


def _lines(file: Path) -> list[str]:
    """Return the lines of a text that are not blank."""
    return [line for number, text in numbered_lines(file, MAX_LINE_BYTES, HINT) if (line := one_line(text, f"{file}:{number}"))]


def _selected(files: ImageFiles, members: Sequence[str]) -> ImageFiles:
    """Return these images alone, in this order."""
    fingerprint = hashlib.sha256(json.dumps([files.fingerprint, members]).encode()).hexdigest()
    return replace(files, members=tuple(members), fingerprint=fingerprint)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
