"""Writing without loss: a reader sees the old content or the new one, never half of either."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidcli.errors import EnvironmentProblem, InputError

if TYPE_CHECKING:
    from torch import Tensor


MAX_DESCRIPTION = 1 << 24
"""Bytes of a JSON or TOML file; the largest that models come with, lists of their shards, have a twentieth."""


def size_of(path: Path, most: int) -> int:
    """Bytes of a regular file. Pipes and devices, which may never end, are told by their kind and not opened.

    Raises OSError, also for a file of more than `most` bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, {most} at most are read", str(path))
    return status.st_size


def read_bytes(path: Path, most: int = MAX_DESCRIPTION) -> bytes:
    """The content of a regular file. Raises OSError for what `size_of` refuses."""
    size_of(path, most)
    return path.read_bytes()


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process uses; leftovers of killed runs are recognisable by `.tmp-`."""
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


_UMASK = os.umask(0)
os.umask(_UMASK)


def _open_to_others(path: Path) -> None:
    """The permissions that a new file has here; safetensors keeps its files to their owner."""
    if path.is_file():
        path.chmod(0o666 & ~_UMASK)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; on success it becomes `path` durably, on any error nothing of it is left.

    Raises EnvironmentProblem where the disk or the folder refuses.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _open_to_others(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise _problem(path, error) from error
    finally:
        with suppress(OSError):  # a path that cannot be written cannot be cleaned either
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it becomes `path`. An existing `path` is replaced only then."""
    temporary = temporary_beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _open_to_others(file)
            fsync_path(file)
        fsync_path(temporary)
        if path.exists():
            old = temporary_beside(path)
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise _problem(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def nearest(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if os.path.exists(parent))


def _problem(path: Path, error: OSError) -> EnvironmentProblem:
    free = shutil.disk_usage(nearest(path)).free
    return EnvironmentProblem(
        f"cannot write {path}: {error.strerror or error}",
        f"{free / 1e9:.1f} GB are free there; choose another place or make room",
    )


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path, hint: str = "write the model again, or take another copy of it") -> dict[str, Any]:
    """A JSON object from a file. Raises InputError where it is not there or not one."""
    try:
        content = json.loads(read_bytes(file).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}", hint) from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: not a JSON object", hint)
    return content


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, in place. Raises OSError where the disk refuses, which safetensors reports as an error of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Raises EnvironmentProblem, before any work, where `folder` cannot be made or written."""
    try:
        folder.exists()
        existing = nearest(folder)
    except OSError as error:
        raise EnvironmentProblem(
            f"{str(folder)[:80]} is no place for files: {error.strerror}", "choose another --output"
        ) from error
    if not existing.is_dir():
        raise EnvironmentProblem(f"{existing} is a file, not a folder", "choose another --output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"no permission to write in {existing}", "choose another --output")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers left under a folder that this process holds."""
    for leftover in list(folder.rglob(".tmp-*")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process; the kernel releases the lock even after kill -9.

    Raises EnvironmentProblem, naming the process that holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise EnvironmentProblem(
                f"{folder} is in use by process {holder}", "wait for it, stop it, or choose another --output"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def cache_folder() -> Path:
    """$SID_CACHE_DIR, else $XDG_CACHE_HOME/sid, else ~/.cache/sid."""
    if "SID_CACHE_DIR" in os.environ:
        return Path(os.environ["SID_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sid"
