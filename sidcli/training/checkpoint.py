"""Checkpoints of a run: `step-00000200/` with safetensors files and a manifest of their sizes and sha256.

Promise: when `write` returns, the new checkpoint loads; whenever it does not return, the previous one still does. A folder without a
complete manifest is no checkpoint. Only folders named step-NNNNNNNN are ever read, and only those that rotation drops are removed.
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
from sidcli.training.intervals import KEEP

FORMAT = 4
READABLE = (3, FORMAT)
"""Format 3 had the settings of SiD beside the others and another name for one file."""
RENAMED = {"optimizer_fake": "optimizer_fake_score"}
Files = dict[str, dict[str, Tensor]]
"""Tensors by name, by file without its suffix."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    config: dict[str, Any]
    inputs: dict[str, str]
    """Digests of what the run was given, by name: its prompts, its teacher."""
    files: tuple[str, ...]
    """Names of those that its manifest has digests of."""


class UnknownFormat(InputError):
    """Written by another version of sid: nothing is wrong with it."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def bytes_of(files: Files) -> int:
    """Bytes of the tensors."""
    return sum(value.nbytes for tensors in files.values() for value in tensors.values())


def check_room(root: Path, size: int, keep: int = KEEP, more: int = 0) -> None:
    """Raises EnvironmentProblem where the disk lacks room for the checkpoints that are still to come, and for `more` bytes.

    `keep` of them stay while another one of `size` bytes is written.
    """
    missing = max(1, keep + 1 - len(numbered(root)))
    needed, free = missing * size + more, shutil.disk_usage(nearest(root)).free
    if free >= needed:
        return
    fewer = f"--keep-checkpoints 1 needs {gigabytes(2 * size + more)}, or " if keep > 1 and free >= 2 * size + more else ""
    raise EnvironmentProblem(
        f"{root.parent} has {gigabytes(free)} of disk space free; the run needs {gigabytes(needed)} "
        f"({missing} {'checkpoint' if missing == 1 else 'checkpoints'} of {gigabytes(size)}{' and the student' if more else ''})",
        f"{fewer}make room, or choose another --output",
    )


def write(root: Path, step: int, files: Files, config: dict[str, Any], inputs: dict[str, str], keep: int = KEEP) -> Path:
    """Write checkpoint `step` under `root`, then drop all but the newest `keep`. Raises EnvironmentProblem where the disk refuses."""
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
    for old in sorted(numbered(root), reverse=True)[keep:]:
        shutil.rmtree(root / folder_name(old))
    return target


def numbered(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{8,})", folder.name) for folder in root.iterdir() if folder.is_dir())
    return [int(match[1]) for match in found if match]


def verify(folder: Path) -> Checkpoint:
    """Check every size and hash. Raises InputError that names the file at fault."""
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
    if not as_written:  # a flipped bit can leave the sense as it was: 1e-05 and 1E-05
        raise damaged
    for name, entry in manifest["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise InputError(f"{file} is damaged or missing", "continue from an older checkpoint with --resume")
    return Checkpoint(folder, manifest["step"], manifest["config"], manifest["inputs"], tuple(manifest["files"]))


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, by which a flipped bit in the manifest itself is seen."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones. Raises UnknownFormat for one of another version."""
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
    """Of the files that its manifest names, which `verify` has seen; others that lie there are not opened."""
    files = {name: checkpoint.folder / Path(name).name for name in sorted(checkpoint.files)}
    return {RENAMED.get(Path(name).stem, Path(name).stem): load_file(file) for name, file in files.items()}


def set_aside(root: Path, step: int) -> list[Path]:
    """Rename checkpoints newer than `step`, so that a run that continues from `step`
    neither counts them as its newest nor writes over them. Returns their new names; they are never removed by us."""
    renamed = []
    for newer in sorted(number for number in numbered(root) if number > step):
        folder = root / folder_name(newer)
        places = (folder.with_name(f"set-aside-{folder.name}" + (f"-{n}" if n else "")) for n in range(1000))
        renamed.append(folder.rename(next(place for place in places if not place.exists())))
    return renamed


class Writer:
    """Writes checkpoints in a thread, one at a time, while the training goes on in the block of a `with`.

    The state of a step is safe when `finish` or the next `write` returns, and at the end of the block, which waits even where an error
    ends it. Only what ends the process, SystemExit and KeyboardInterrupt, does not wait.
    """

    def __init__(self, root: Path, config: dict[str, Any], inputs: dict[str, str], keep: int = KEEP):
        self.root, self.config, self.inputs, self.keep = root, config, inputs, keep
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        """Time for which the training has waited."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception):
            with suppress(EnvironmentProblem):  # what ended the block is what is to be told
                self.finish()

    def write(self, step: int, files: Files) -> None:
        """Begin to write tensors that nobody will change. Raises what the write before has met, EnvironmentProblem above all."""
        self.finish()

        def work() -> None:
            try:
                write(self.root, step, files, self.config, self.inputs, self.keep)
            except BaseException as error:
                self.error = error

        # A daemon: who asks a second time to stop does not wait for a disk.
        self.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Wait for the write that is under way. Raises what it has met."""
        with self.waiting():
            if self.thread is not None:
                self.thread.join()
                self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of a block as waited."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun
