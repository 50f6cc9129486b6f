"""Where a model is: embedded name | run folder | diffusers folder | single file | hub id -> Source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidcli.errors import InputError
from sidcli.files import read_json, sha256
from sidcli.hub import NETWORKS, Listener, Silence, fetch, needed

WEIGHTS = Path(__file__).parent / "emoji" / "weights"
EMBEDDED: dict[str, tuple[Path, Path | None]] = {
    "emoji-teacher": (WEIGHTS / "teacher", None),
    "emoji": (WEIGHTS / "student", WEIGHTS / "teacher"),
}
"""Folder of each embedded model, and the folder of the model that it shares its other parts with."""
PARTS = (*NETWORKS, "tokenizer", "tokenizer_2", "scheduler")
"""Folders of a pipeline that something is read from."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Source:
    """Where a model was found: `path`, a folder or a single file on this disk; `name` as asked for, `origin` and `revision` as
    actually used."""

    name: str
    path: Path
    origin: str
    revision: str = ""
    missing: tuple[tuple[str, int], ...] = ()
    """Files of a hub model, with their bytes, that are not on this disk; empty unless only descriptions were asked for."""
    base: Path | None = None
    """Folder of another pipeline, whose parts stand for those that `path` does not have."""

    def part(self, name: str) -> Path:
        """Folder of one part of a pipeline, such as `unet`."""
        own = self.path / name
        return self.base / name if self.base and not own.is_dir() else own

    @property
    def is_file(self) -> bool:
        return self.path.is_file()

    @property
    def folder(self) -> Path:
        """Where licence and card of the model are to be found. What lies beside a single file is its own only where we wrote it."""
        return self.path.parent if self.is_file and (self.path.parent / "sid.json").is_file() else self.path


def find(name: str, listener: Listener | None = None, descriptions_only: bool = False) -> Source:
    """Resolve a model name; of a hub model that is not in the cache, `descriptions_only` fetches no weights.

    Raises InputError where nothing is found, or what is found could run code or leads elsewhere, with the ways out.
    """
    if name in EMBEDDED:
        folder, base = EMBEDDED[name]
        return Source(name, folder, f"embedded:{name}", base=base)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".pkl":
        raise InputError(
            f"{name}: a pickle can run code and is not read as a model",
            "sid export FILE.pkl --teacher ID, if it is a released SiD-LSG generator",
        )
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{name}: pickled weights can run code and are not read", "convert the model to safetensors first")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{name} is neither a .safetensors file nor a folder", "pass a model in safetensors")
        if (path.parent / "sid.json").is_file():
            check_links(path.parent)
        return Source(name, path, str(path))
    if path.is_dir():
        if (path / "student.safetensors").is_file():
            check_links(path)
            return Source(name, path / "student.safetensors", str(path))
        for folder in (path, path / "student"):
            if any((folder / name).is_file() for name in ("model_index.json", "generator.onnx", "generator.xml")):
                check_links(folder)
                return Source(name, folder, str(folder))
        raise InputError(
            f"{name} holds neither model_index.json nor student/", "pass a diffusers folder, or a run folder that has finished"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not name.startswith((".", "/", "runs/")):
        fetched = fetch(name, listener or Silence(), descriptions_only)
        return Source(name, fetched.folder, f"hub:{fetched.repo}", fetched.revision, fetched.missing)
    raise InputError(
        f"no model {name!r}: not a folder, not a hub id, and not one of {', '.join(EMBEDDED)}", "check the spelling of the path"
    )


def check_links(folder: Path, parts: Collection[str] = PARTS) -> None:
    """Raises InputError where a link in a model's folder leads out of it, or what should be a file is a pipe or a device.

    The hub's cache keeps a snapshot as links to the blobs beside it; its folder reaches as far as the repository's. Of the folders
    in it those in `parts` are looked into; from others nothing is read.
    """
    top = folder.resolve()
    if top.parent.name == "snapshots" and (top.parent.parent / "blobs").is_dir():
        top = top.parent.parent
    try:
        entries = [entry for entry in folder.iterdir() if entry.name in parts or not entry.is_dir()]
        entries += [below for entry in entries if entry.name in parts for below in entry.rglob("*")]
        for entry in entries:
            target = entry.resolve()
            if not target.is_relative_to(top):
                raise InputError(
                    f"{entry} leads out of the model's folder, to {target}",
                    f"if you trust it: cp -rL {folder} COPY, and pass the copy",
                )
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise InputError(f"{entry} is neither a file nor a folder", "take another copy of the model")
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be read as a folder: {reason}", "take another copy of the model") from error


def fingerprint(source: Source) -> str:
    """Hex digest of what a model draws with: the content of the files that it is read from, wherever they lie."""
    if source.is_file:
        return sha256(source.path)
    files: dict[str, Path] = {}
    for folder in (source.base, source.path):  # what `path` has itself goes before what it shares
        files |= {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()} if folder else {}
    names = sorted(files)
    chosen = names if graph_format(source.path) else needed(names)
    content = [(name, sha256(files[name])) for name in sorted(chosen)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def read_card(source: Source) -> dict[str, Any]:
    """The content of sid.json beside a model of ours, {} for others. Raises InputError where it cannot be read."""
    file = source.path / "sid.json"
    return read_json(file) if file.is_file() else {}


def graph_format(folder: Path) -> str | None:
    """`onnx`, `openvino` or `torch-export` for a folder of exported graphs, None for any other."""
    check_links(folder, parts=())
    file = folder / "sid.json"
    return read_json(file).get("graph", {}).get("format") if file.is_file() else None
