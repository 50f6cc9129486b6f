"""Where a model is: embedded name | run folder | diffusers folder | single file | hub id -> Source."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidcli.errors import InputError
from sidcli.files import read_json, sha256
from sidcli.models.hub import PARTS, PICKLES, fetch, needed
from sidcli.progress import Listener, Silence

WEIGHTS = Path(__file__).parent.parent / "emoji" / "weights"
EMBEDDED: dict[str, tuple[Path, Path | None]] = {
    "emoji-teacher": (WEIGHTS / "teacher", None),
    "emoji": (WEIGHTS / "student", WEIGHTS / "teacher"),
}
"""Folder of each embedded model, and the folder of the model that it shares its other parts with."""
FILES = (
    *PICKLES,
    ".safetensors",
    ".gguf",
    ".onnx",
    ".xml",
    ".pt2",
    ".json",
    ".yaml",
    ".toml",
    ".txt",
    ".zip",
    ".npz",
    ".png",
    ".jpg",
)
"""Endings of files: a name that ends so and is not there is a misspelled path, not an id of the hub."""
HUB_ID = r"\w[\w.-]*/[\w.-]+(@(?P<revision>[\w./-]+))?"


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
        """Where license and card of the model are to be found. What lies beside a single file is its own only where we wrote it."""
        return self.path.parent if self.is_file and (self.path.parent / "sid.json").is_file() else self.path


def find(name: str, listener: Listener | None = None, descriptions_only: bool = False) -> Source:
    """Resolve a model name; of a hub model that is not in the cache, `descriptions_only` fetches no weights.

    Raises InputError where nothing is found, or what is found could run code or leads elsewhere, with the ways out.
    """
    if name in EMBEDDED:
        folder, base = EMBEDDED[name]
        return Source(name, folder, f"embedded:{name}", base=base)
    path = Path(os.path.expanduser(name))
    if not name or not os.path.exists(path):
        if is_hub_id(name):
            fetched = fetch(name, listener or Silence(), descriptions_only)
            return Source(name, fetched.folder, f"hub:{fetched.repo}", fetched.revision, fetched.missing)
        raise not_found(name, path)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix == ".pkl":
        raise InputError(
            f"{name}: a pickle can run code and is not read as a model",
            "sid export FILE.pkl --teacher ID, if it is a released SiD-LSG generator",
        )
    if suffix in PICKLES:
        raise InputError(f"{name}: pickled weights can run code and are not read", "convert the model to safetensors first")
    if path.is_file():
        if suffix != ".safetensors":
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
    raise InputError(f"{name} is neither a file nor a folder", "pass a model in safetensors")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path on this disk is OWNER/NAME[@REVISION] of the hub, rather than a misspelled path.

    Without a revision it is a path if it ends as files do, or if OWNER is a folder here.
    """
    found = re.fullmatch(HUB_ID, name, re.ASCII)
    is_path = name.lower().endswith(FILES) or name.startswith("runs/") or os.path.isdir(name.partition("/")[0])
    return found is not None and (found["revision"] is not None or not is_path)


def not_found(name: str, path: Path) -> InputError:
    """The error for a path that is not there, with the nearest name beside it."""
    if os.path.islink(path):
        return InputError(f"{name} is a link to {os.readlink(path)}, which is not there", "check the link")
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir() if entry.exists())
    except (OSError, ValueError):
        beside = []
    close = difflib.get_close_matches(path.name, beside if "/" in name else [*EMBEDDED, *beside], 1)
    if close:
        hint = f"did you mean {path.parent / close[0]}?"
    elif re.fullmatch(HUB_ID, name, re.ASCII) and not name.lower().endswith(FILES) and not name.startswith("runs/"):
        hint = f"check the path; a model of that name on the hub is {name}@main"
    else:
        hint = f"pass a path, OWNER/NAME of the hub, or one of {', '.join(EMBEDDED)}"
    return InputError(f"no model {name!r}: there is no such file or folder", hint)


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
        yaml = source.path.with_suffix(".yaml")  # may say what the model predicts
        return (
            hashlib.sha256(f"{sha256(source.path)} {sha256(yaml)}".encode()).hexdigest() if yaml.is_file() else sha256(source.path)
        )
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
