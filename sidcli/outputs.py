"""Where a command's results go, found and refused before anything heavy is imported.

One rule for all commands: what is there already is replaced only where --overwrite says so, and then by renaming, never through a
link. A run folder is continued; nothing else is taken for one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sidcli.errors import EnvironmentProblem, UsageError
from sidcli.files import check_new, check_writable

RUN = (".lock", "run.json", "checkpoints")
"""What tells a run folder from others, beginning with its very first moment."""


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
            raise UsageError(f"--output {output} is no .png", "a name that ends in .png, or a folder")
        if output.suffix and not output.is_dir():
            raise UsageError(f"{count} images do not fit in one file {output}", "give a folder with --output")
        return cls([output / f"{index:06d}.png" for index in range(count)], output / "sheet.png")

    def check(self, overwrite: bool) -> None:
        """Raises EnvironmentProblem where they cannot be, or are there and not to be replaced."""
        check_new([*self.files, *([self.sheet] if self.sheet else [])], "--output", overwrite)


def check_export(folder: Path, overwrite: bool) -> None:
    """Raises EnvironmentProblem where an export cannot be; only an earlier export is ever replaced."""
    check_writable(folder.parent)
    check_writable(folder)
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise EnvironmentProblem(f"{folder} exists already", "choose another --output, or pass --overwrite")
    is_run = any((folder / name).exists() for name in RUN) or (folder / "config.toml").exists()
    if is_run or not (folder / "sid.json").is_file() or folder.resolve() == Path.cwd():
        raise EnvironmentProblem(f"{folder} is not an export, and --overwrite replaces nothing else", "choose another --output")


def check_run(folder: Path) -> None:
    """Raises EnvironmentProblem where a run folder cannot be, or what is there is another folder with something in it."""
    check_writable(folder)
    if any(os.path.lexists(folder / name) for name in RUN):
        return
    others = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) if folder.is_dir() else []
    if others:
        raise EnvironmentProblem(f"{folder} is no run folder, and holds {others[0]}", "choose another --output")
