"""Resolve a model name: embedded name | run folder | diffusers folder | single file | hub id -> Source."""

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
from sidcli.files import NOT_READ, readable, sha256
from sidcli.models import card
from sidcli.models.hub import PARTS, PICKLES, fetch, required_files
from sidcli.progress import Listener, Silence

WEIGHTS = Path(__file__).parent.parent / "emoji" / "weights"
EMBEDDED: dict[str, tuple[Path, Path | None]] = {
    "emoji-teacher": (WEIGHTS / "teacher", None),
    "emoji": (WEIGHTS / "student", WEIGHTS / "teacher"),
}
"""Embedded model -> (its folder, folder of the model that provides the components it lacks, or None)."""
TRAINED = {
    "emoji-flow": "train it with `python -m sidcli.emoji.train flow --output build/emoji`, and pass build/emoji/flow",
}
"""Model of the emoji world that does not ship -> how to get it."""
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
"""File suffixes. If a name with one of these suffixes does not exist, it is a misspelled path, not a hub id."""
HUB_ID = r"\w[\w.-]*/[\w.-]+(@(?P<revision>[\w./-]+))?"


@dataclass(frozen=True)
class Source:
    """The location of a model: `path` is a local folder or single file, `name` the requested name, `origin` and `revision` the ones
    actually used."""

    name: str
    path: Path
    origin: str
    revision: str = ""
    missing: tuple[tuple[str, int], ...] = ()
    """(Name, bytes) of a hub model's files that are not on this disk; empty unless `descriptions_only` was requested."""
    base: Path | None = None
    """Folder of another pipeline, which provides the components that `path` does not have."""

    def part(self, name: str) -> Path:
        """Return the folder of a pipeline's component, for example `unet`."""
        own = self.path / name
        return self.base / name if self.base and not own.is_dir() else own

    @property
    def is_embedded(self) -> bool:
        return self.origin.startswith("embedded:")

    @property
    def is_file(self) -> bool:
        return self.path.is_file()

    @property
    def folder(self) -> Path:
        """Location of the model's license and card. The folder of a single file is used only if sid wrote the file."""
        return self.path.parent if self.is_file and (self.path.parent / "sid.json").is_file() else self.path


def find(name: str, listener: Listener | None = None, descriptions_only: bool = False) -> Source:
    """Resolve a model name. With `descriptions_only`, the weights of a hub model that is not in the cache are not downloaded.

    Raises InputError, with a hint, if no model is found, if the model could run code, or if a link leads out of its folder.
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
    with readable(path):
        return _local(name, path)


def _local(name: str, path: Path) -> Source:
    """Return the source of a path that exists. Raises InputError if it is no model."""
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
    """Return whether a name that is not a local path is a hub id OWNER/NAME[@REVISION] and not a misspelled path.

    A name without a revision is a path if it has a suffix in FILES, starts with runs/, or if OWNER is a local folder.
    """
    found = re.fullmatch(HUB_ID, name, re.ASCII)
    is_path = name.lower().endswith(FILES) or name.startswith("runs/") or os.path.isdir(name.partition("/")[0])
    return found is not None and (found["revision"] is not None or not is_path)


def not_found(name: str, path: Path) -> InputError:
    """Return the error for a path that does not exist, with the most similar name in its folder."""
    if name in TRAINED:
        return InputError(f"{name} does not ship with sid", TRAINED[name])
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
    elif path.is_absolute():
        hint = "check the path"
    else:
        hint = f"pass a path, OWNER/NAME of the hub, or one of {', '.join(EMBEDDED)}"
    return InputError(f"no model {name!r}: there is no such file or folder", hint)


def check_links(folder: Path, parts: Collection[str] = PARTS) -> None:
    """Raises InputError if a link in a model's folder leads out of it, or if an entry is a pipe or a device.

    A snapshot in the hub's cache consists of links to blobs in the folder of its repository, so these links are allowed. Of the
    subfolders only `parts` are checked; the others are never read.
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
    except (OSError, RuntimeError) as error:  # RuntimeError: a link loop
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be read as a folder: {reason}", NOT_READ) from error


def fingerprint(source: Source) -> str:
    """Return a hex digest of the content of all files that a model is read from, independent of their location."""
    if source.is_file:
        yaml = source.path.with_suffix(".yaml")  # can define the prediction type
        return (
            hashlib.sha256(f"{sha256(source.path)} {sha256(yaml)}".encode()).hexdigest() if yaml.is_file() else sha256(source.path)
        )
    files: dict[str, Path] = {}
    for folder in (source.base, source.path):  # files in `path` take precedence over those in `base`
        files |= {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()} if folder else {}
    names = sorted(files)
    chosen = names if graph_format(source.path) else required_files(names)
    content = [(name, sha256(files[name])) for name in sorted(chosen)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def read_card(source: Source) -> dict[str, Any]:
    """Return the content of sid.json in a model's folder, or {} if there is none. Raises InputError for an invalid card."""
    file = source.path / "sid.json"
    return card.read_file(file) if file.is_file() else {}


def graph_format(folder: Path) -> str | None:
    """Return `onnx`, `openvino` or `torch-export` for a folder of exported graphs, or None for other folders."""
    check_links(folder, parts=())
    file = folder / "sid.json"
    return card.read_file(file).get("graph", {}).get("format") if file.is_file() else None
