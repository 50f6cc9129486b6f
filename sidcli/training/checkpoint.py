"""Checkpoints of a run: `step-00000200/` with safetensors files and a manifest of their sizes and sha256.

Guarantee: if `write` returns, the new checkpoint can be loaded; if `write` does not return, the previous checkpoint can still be
loaded. A folder without a complete manifest is not a checkpoint. Only folders named step-NNNNNNNN are read, and only those beyond
the number of checkpoints to keep are removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sidcli.errors import EnvironmentProblem, InputError
from sidcli.files import (
    atomic_folder,
    check_space,
    gigabytes,
    json_bytes,
    nearest,
    read_bytes,
    save_tensors,
    sha256,
    write_json,
)
from sidcli.progress import counted
from sidcli.training.intervals import KEEP

FORMAT = 4
READABLE = (3, FORMAT)
"""Formats that can be read. Format 3 has SiD's settings on the top level of the config and another name for one file (RENAMED)."""
RENAMED = {"optimizer_fake": "optimizer_fake_score"}
Files = dict[str, dict[str, Tensor]]
"""{file name without suffix: {tensor name: tensor}}."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    config: dict[str, Any]
    inputs: dict[str, str]
    """Digests of the run's inputs, by name: prompts and teacher."""
    files: tuple[str, ...]
    """Names of the files whose sizes and digests are in the manifest."""


class UnknownFormat(InputError):
    """Raised for a checkpoint or run folder in the format of another version of sid. It is not damaged."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def bytes_of(files: Files) -> int:
    """Return the size of the tensors in bytes."""
    return sum(value.nbytes for tensors in files.values() for value in tensors.values())


def check_room(root: Path, size: int, keep: int = KEEP, more: int = 0) -> None:
    """Raises EnvironmentProblem if the disk lacks space for the checkpoints that are still to be written, and for `more` bytes.

    `size` is the size of a checkpoint in bytes. `keep` checkpoints stay on disk while another is written.
    """
    missing = max(1, keep + 1 - len(numbered(root)))
    needed, free = missing * size + more, shutil.disk_usage(nearest(root)).free
    if free >= needed:
        return
    fewer = f"--keep-checkpoints 1 needs {gigabytes(2 * size + more)}, or " if keep > 1 and free >= 2 * size + more else ""
    raise EnvironmentProblem(
        f"{root.parent} has {gigabytes(free)} of disk space free; the run needs {gigabytes(needed)} "
        f"({counted(missing, 'checkpoint')} of {gigabytes(size)}{' and the student' if more else ''})",
        f"{fewer}make room, or choose another --output",
    )


def write(
    root: Path, step: int, files: Files, config: dict[str, Any], inputs: dict[str, str], keep: int = KEEP, best: int | None = None
) -> Path:
    """Write checkpoint `step` under `root`, then remove all but the newest `keep` and that of step `best`. Returns its folder.

    Raises EnvironmentProblem if writing fails, for example because the disk is full.
    """
    target = root / folder_name(step)
    check_space(root, bytes_of(files), "a checkpoint needs")
    with atomic_folder(target) as folder:
        entries = {}
        for name, tensors in files.items():
            file = folder / f"{name}.safetensors"
            save_tensors(tensors, file)
            entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        manifest = {"format": FORMAT, "step": step, "config": config, "inputs": inputs, "files": entries}
        write_json(folder / "manifest.json", manifest | {"sha256": _digest(manifest)})
    for old in sorted(set(numbered(root)) - {best}, reverse=True)[keep:]:
        shutil.rmtree(root / folder_name(old))
    return target


def numbered(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{8,})", folder.name) for folder in root.iterdir() if folder.is_dir())
    return [int(match[1]) for match in found if match]


def verify(folder: Path) -> Checkpoint:
    """Check every size and hash, and return the checkpoint. Raises InputError that names the damaged file."""
    try:
        content = read_bytes(folder / "manifest.json")
        manifest = json.loads(content)
        as_written = content == json_bytes(manifest)
        claimed, version = manifest.pop("sha256", None), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder} is not a complete checkpoint: manifest.json is missing or broken") from error
    damaged = InputError(f"{folder / 'manifest.json'} is damaged", "continue from an older checkpoint with --resume")
    if claimed != _digest(manifest) and (claimed is not None or version in READABLE):
        raise damaged
    if version not in READABLE:
        raise UnknownFormat(
            f"{folder} has checkpoint format {version}; this version of sid reads formats {' and '.join(map(str, READABLE))}",
            "continue with the version that run.json names, or choose another --output for a new run",
        )
    if not as_written:  # a flipped bit can leave the parsed value unchanged: 1e-05 and 1E-05
        raise damaged
    for name, entry in manifest["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise InputError(f"{file} is damaged or missing", "continue from an older checkpoint with --resume")
    return Checkpoint(folder, manifest["step"], manifest["config"], manifest["inputs"], tuple(manifest["files"]))


def _digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, which detects a flipped bit in the manifest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that passes `verify`, and the errors of newer ones.

    Raises UnknownFormat for a checkpoint of another version of sid.
    """
    problems: list[str] = []
    for step in sorted(numbered(root), reverse=True):
        try:
            found = verify(root / folder_name(step))
            if found.step == step:
                return found, problems
            problems.append(f"{found.folder} holds step {found.step}, whatever its name says")
        except UnknownFormat:
            raise
        except InputError as error:
            problems.append(error.message)
    return None, problems


def read(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the files in the manifest, which `verify` has checked. Other files in the folder are not opened."""
    files = {name: checkpoint.folder / Path(name).name for name in sorted(checkpoint.files)}
    return {RENAMED.get(Path(name).stem, Path(name).stem): load_file(file) for name, file in files.items()}


def set_aside(root: Path, step: int) -> list[Path]:
    """Rename checkpoints newer than `step`, so that a run that continues from `step` neither counts nor overwrites them.

    Returns their new paths. sid never removes them.
    """
    renamed = []
    for newer in sorted(number for number in numbered(root) if number > step):
        folder = root / folder_name(newer)
        places = (folder.with_name(f"set-aside-{folder.name}" + (f"-{n}" if n else "")) for n in range(1000))
        renamed.append(folder.rename(next(place for place in places if not place.exists())))
    return renamed


class Writer:
    """Context manager that writes checkpoints in a thread, one at a time, while the training continues.

    A checkpoint is complete when `finish` or the next `write` returns, or when the context ends. The context waits for it even if
    an Exception ends the context, but not after SystemExit or KeyboardInterrupt, which end the process.
    """

    def __init__(self, root: Path, config: dict[str, Any], inputs: dict[str, str], keep: int = KEEP):
        self.root, self.config, self.inputs, self.keep = root, config, inputs, keep
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        """Seconds for which the training has waited."""
        self.best: int | None = None
        """Step of a checkpoint that is kept beside the newest ones."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception):
            with suppress(EnvironmentProblem):  # the exception that ended the context is raised instead
                self.finish()

    def write(self, step: int, files: Files) -> None:
        """Start to write tensors, which must not change afterwards. Raises the error of the previous write, if any."""
        self.finish()
        best = self.best

        def work() -> None:
            try:
                write(self.root, step, files, self.config, self.inputs, self.keep, best)
            except BaseException as error:
                self.error = error

        # A daemon thread, because a second signal must end the process without waiting for the disk.
        self.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Wait for the current write. Raises its error."""
        with self.waiting():
            if self.thread is not None:
                self.thread.join()
                self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context whose duration is added to `seconds`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun
