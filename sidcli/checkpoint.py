"""Checkpoints of a run: `step-00000200/` with safetensors files and a manifest of their sizes and sha256.

Promise: when `write` returns, the new checkpoint loads; whenever it does not return, the previous one still does. A folder without a
complete manifest is no checkpoint. Only folders named step-NNNNNNNN are ever read or removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sidcli.errors import EnvironmentProblem, InputError
from sidcli.files import atomic_folder, read_bytes, save_tensors, sha256, write_json

FORMAT = 2
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    config: dict[str, Any]
    prompts_digest: str
    files: tuple[str, ...]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def write(
    root: Path, step: int, files: dict[str, dict[str, Tensor]], config: dict[str, Any], prompts_digest: str, keep: int = KEEP
) -> Path:
    """Write checkpoint `step` under `root`, then drop all but the newest `keep`. Raises EnvironmentProblem where the disk refuses."""
    target = root / folder_name(step)
    needed = sum(value.numel() * value.element_size() for tensors in files.values() for value in tensors.values())
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise EnvironmentProblem(
            f"{root} has {free} bytes free; a checkpoint needs {needed}", "make room, or choose another --output"
        )
    with atomic_folder(target) as folder:
        entries = {}
        for name, tensors in files.items():
            file = folder / f"{name}.safetensors"
            save_tensors(tensors, file)
            entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        manifest = {"format": FORMAT, "step": step, "config": config, "prompts": prompts_digest, "files": entries}
        write_json(folder / "manifest.json", manifest | {"sha256": _digest(manifest)})
    for old in sorted(numbered(root), reverse=True)[keep:]:
        shutil.rmtree(root / folder_name(old))
    return target


def numbered(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{8})", folder.name) for folder in root.iterdir() if folder.is_dir())
    return [int(match[1]) for match in found if match]


def verify(folder: Path) -> Checkpoint:
    """Check every size and hash. Raises InputError that names the file at fault."""
    try:
        manifest = json.loads(read_bytes(folder / "manifest.json"))
        claimed, version = manifest.pop("sha256", None), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder} is not a complete checkpoint: manifest.json is missing or broken") from error
    if version != FORMAT:
        raise InputError(f"{folder} has checkpoint format {version}; this version of sid reads format {FORMAT}", "use that version")
    if claimed != _digest(manifest):
        raise InputError(f"{folder / 'manifest.json'} is damaged", "continue from an older checkpoint with --resume")
    for name, entry in manifest["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise InputError(f"{file} is damaged or missing", "continue from an older checkpoint with --resume")
    return Checkpoint(folder, manifest["step"], manifest["config"], manifest["prompts"], tuple(manifest["files"]))


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, by which a flipped bit in the manifest itself is seen."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones."""
    problems: list[str] = []
    for step in sorted(numbered(root), reverse=True):
        try:
            return verify(root / folder_name(step)), problems
        except InputError as error:
            problems.append(error.message)
    return None, problems


def read(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Of the files that its manifest names, which `verify` has seen; others that lie there are not opened."""
    return {Path(name).stem: load_file(checkpoint.folder / Path(name).name) for name in sorted(checkpoint.files)}
