"""The output paths of commands, which are chosen and checked before a heavy library is imported.

All commands follow one rule: an existing file or folder is replaced only with --overwrite, and then by renaming, never through a
link. An existing run folder is continued; no other folder is treated as a run folder.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.files import check_new, check_writable
from sidcli.formats.png import RECORD_BYTES, text_before_pixels

BACKENDS = ("auto", "torch", "onnx", "openvino")
"""Values of --backend of `sid sample`."""
RUN = (".lock", "run.json", "checkpoints")
"""Names that identify a run folder. At least one of them exists from the start of a run."""


def slug(text: str, otherwise: str) -> str:
    """Return a short file name of ASCII letters and digits made from `text`, or `otherwise` if nothing is left of it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or otherwise


def unnamed(prompts: Sequence[str], num: int, seed: int) -> Path:
    """Return an unused path in the current folder, named after the prompt and the seed.

    For example a-cat-0.png for one image, a-cat-0 for several images of one prompt, samples-0 for several prompts.
    """
    stem = f"{slug(prompts[0], 'image') if len(prompts) == 1 else 'samples'}-{seed}"
    suffix = ".png" if len(prompts) * num == 1 else ""
    names = (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}" for number in itertools.count(1))
    return next(Path(name) for name in names if not os.path.lexists(name))


def check_named(output: str | os.PathLike[str] | None, option: str = "--output") -> None:
    """Raises UsageError if the path of a folder is empty, or "-", which does not stand for stdout. None is allowed."""
    if output is not None and os.fspath(output) in ("", "-"):
        raise UsageError(f"{option} must be a folder, not {os.fspath(output)!r}", f"{option} FOLDER")


@dataclass(frozen=True)
class Places:
    """The files that `sid sample` writes: one for each image, and a contact sheet if the output is a folder."""

    files: list[Path]
    sheet: Path | None

    @classmethod
    def of(cls, output: str | os.PathLike[str], count: int) -> Places:
        """Return `output` itself for a single image if it ends in .png, otherwise files in the folder `output`.

        A path that ends with a slash is a folder. Raises UsageError if `output` is one file for several images, ends in a suffix other
        than .png, is empty, or is "-".
        """
        text, place = os.fspath(output), Path(output)
        if text in ("", "-"):
            raise UsageError(f"--output must be a .png file or a folder, not {text!r}", "-o cat.png, or leave --output out")
        if not text.endswith("/"):
            if count == 1 and place.suffix.lower() == ".png":
                return cls([place], None)
            if count == 1 and place.suffix and not place.is_dir():
                raise UsageError(f"--output must end in .png or name a folder, not {place}", f"-o {place.with_suffix('.png')}")
            if place.suffix and not place.is_dir():
                raise UsageError(f"{count} images do not fit in one file {place}", "give a folder with --output")
        return cls([place / f"{index:06d}.png" for index in range(count)], place / "sheet.png")

    @property
    def others(self) -> list[Path]:
        """Numbered images of an earlier call in the folder, which this call does not replace.

        A file counts only if its name is one that `of` chooses and it holds the record that `sid` writes into an image.
        """
        if self.sheet is None:
            return []
        named = {file.name for file in self.files}
        numbered = [file for file in self.sheet.parent.glob("*.png") if re.fullmatch("[0-9]{6}|[1-9][0-9]{6,}", file.stem)]
        return sorted(file for file in numbered if file.name not in named and _is_drawn(file))

    def check(self, overwrite: bool) -> None:
        """Raises EnvironmentProblem if the files cannot be written, and UsageError if a file exists and `overwrite` is False, or if
        the output folder is a run folder."""
        folder = self.files[0].parent
        if self.sheet and _is_run(folder):
            raise UsageError(f"{folder} is a run folder", "choose another --output for images")
        check_new([*self.files, *([self.sheet] if self.sheet else [])], "--output", overwrite)


def _is_drawn(file: Path) -> bool:
    """Return whether a file, not a link, is an image with the record that `sid` writes."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        with file.open("rb") as content:
            return text_before_pixels(content, "sid", RECORD_BYTES) is not None
    except OSError:
        return False


def check_picture(file: Path) -> None:
    """Raises UsageError if the path of a comparison picture does not end in .png."""
    if file.suffix.lower() != ".png":
        raise UsageError(f"--picture must end in .png, not {file}", f"--picture {file.with_suffix('.png')}")


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def check_export(folder: Path, overwrite: bool) -> None:
    """Raises EnvironmentProblem if an export cannot be written to `folder`, and UsageError if `folder` exists and is not replaced.

    Only an export can be replaced, and only if `overwrite` is True.
    """
    check_writable(folder.parent)
    check_writable(folder)
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise UsageError(f"{folder} exists already", "choose another --output, or pass --overwrite")
    is_run = any((folder / name).exists() for name in (*RUN, "config.toml"))
    if folder.name == "student" and _is_run(folder.parent):
        raise UsageError(f"{folder} is the student of a run, and --overwrite does not replace it", "choose another --output")
    if is_run or not (folder / "sid.json").is_file() or folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} is not an export, and --overwrite replaces nothing else", "choose another --output")


def check_run(folder: Path) -> None:
    """Raises EnvironmentProblem if a run folder cannot be written, and UsageError if `folder` is not empty and not a run folder."""
    check_writable(folder)
    if any(os.path.lexists(folder / name) for name in RUN):
        check_parts(folder)
        return
    others = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) if folder.is_dir() else []
    if others:
        raise UsageError(f"'{folder}' is not a run folder and not empty: it holds {others[0]}", "choose another --output")


def check_parts(folder: Path) -> None:
    """Raises EnvironmentProblem if a folder or a file that a continued run reads and writes is of another type or not permitted."""
    for name in ("checkpoints", "samples"):
        check_writable(folder / name)
    for file in (folder / name for name in ("config.toml", "run.json", "metrics.jsonl", "report.html")):
        if file.is_dir():
            raise EnvironmentProblem(
                f"{file} is a folder; the run needs a file of this name", "remove it, or choose another --output"
            )
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            raise EnvironmentProblem(f"no permission to read and write {file}", "choose another --output")
