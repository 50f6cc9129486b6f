"""Where a command's results go, found and refused before anything heavy is imported.

One rule for all commands: what is there already is replaced only where --overwrite says so, and then by renaming, never through a
link. A run folder is continued; nothing else is taken for one.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidcli.errors import UsageError
from sidcli.files import check_new, check_writable

BACKENDS = ("auto", "torch", "onnx", "openvino")
"""What `sid sample` draws with."""
RUN = (".lock", "run.json", "checkpoints")
"""What tells a run folder from others, beginning with its very first moment."""


def slug(text: str, otherwise: str) -> str:
    """A short file name of ASCII letters and digits made from any text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or otherwise


def unnamed(prompts: Sequence[str], num: int, seed: int) -> Path:
    """A new file or folder in this folder, named after the prompt and the seed: a-cat-0.png, or samples-0 for several prompts."""
    stem = f"{slug(prompts[0], 'image') if len(prompts) == 1 else 'samples'}-{seed}"
    suffix = ".png" if len(prompts) * num == 1 else ""
    names = (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}" for number in itertools.count(1))
    return next(Path(name) for name in names if not os.path.lexists(name))


@dataclass(frozen=True)
class Places:
    """The files of `sid sample`: one for each image, and for several a contact sheet."""

    files: list[Path]
    sheet: Path | None

    @classmethod
    def of(cls, output: Path, count: int) -> Places:
        """A single image goes to `output` if that is a .png, others into it. Raises UsageError for several in one file."""
        if count == 1 and output.suffix.lower() == ".png":
            return cls([output], None)
        if count == 1 and output.suffix and not output.is_dir():
            raise UsageError(f"--output must end in .png or name a folder, not {output}", f"-o {output.with_suffix('.png')}")
        if output.suffix and not output.is_dir():
            raise UsageError(f"{count} images do not fit in one file {output}", "give a folder with --output")
        return cls([output / f"{index:06d}.png" for index in range(count)], output / "sheet.png")

    def check(self, overwrite: bool) -> None:
        """Raises EnvironmentProblem where they cannot be, UsageError where they are there and not to be replaced."""
        check_new([*self.files, *([self.sheet] if self.sheet else [])], "--output", overwrite)


def check_export(folder: Path, overwrite: bool) -> None:
    """Raises EnvironmentProblem where an export cannot be, UsageError where something else is; only an export is ever replaced."""
    check_writable(folder.parent)
    check_writable(folder)
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise UsageError(f"{folder} exists already", "choose another --output, or pass --overwrite")
    is_run = any((folder / name).exists() for name in RUN) or (folder / "config.toml").exists()
    if is_run or not (folder / "sid.json").is_file() or folder.resolve() == Path.cwd():
        raise UsageError(f"{folder} is not an export, and --overwrite replaces nothing else", "choose another --output")


def check_run(folder: Path) -> None:
    """Raises EnvironmentProblem where a run folder cannot be, UsageError where another folder with something in it is there."""
    check_writable(folder)
    if any(os.path.lexists(folder / name) for name in RUN):
        return
    others = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) if folder.is_dir() else []
    if others:
        raise UsageError(f"'{folder}' is not a run folder and not empty: it holds {others[0]}", "choose another --output")
