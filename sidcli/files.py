"""Writing without loss: a reader sees the old content or the new one, never half of either.

Nothing is written through a link: what is renamed into place takes the place of the link, and a file that grows refuses to be one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sidcli.errors import EnvironmentProblem, InputError, SidError, UsageError
from sidcli.printable import json_text

if TYPE_CHECKING:
    from torch import Tensor


MAX_DESCRIPTION = 1 << 24
"""Bytes of a JSON or TOML file; the largest that models come with, lists of their shards, have a twentieth."""


def size_of(path: Path, most: int) -> int:
    """Bytes of a regular file. Pipes and devices, which may never end, are told by their kind and not opened.

    Raises OSError, also for a file of more than `most` bytes.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a NUL character in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
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
    """A name in the same folder that no other process uses; leftovers of killed runs are recognisable by `.tmp-`.

    It ends as the path does, with so much of it that a name as long as names may be has room.
    """
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name[-50:]}")


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
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _open_to_others(temporary)
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
    finally:
        with suppress(OSError):  # a path that cannot be written cannot be cleaned either
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it becomes `path`. An existing `path` is replaced only then.

    Killed at any moment, it leaves the whole old folder or the whole new one under the name: both are swapped at once. Only where
    the file system cannot swap (NFS; systems other than Linux) is there an instant at which neither has the name, and both are
    whole beside it as `.tmp-*`. What a killed writer left of the same folder is removed by the next one.

    Raises EnvironmentProblem where the disk or the folder refuses.
    """
    temporary = temporary_beside(path)
    try:
        with _writing(path):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path)
            temporary.mkdir()
            with _held(temporary):
                yield temporary
                for file in sorted(temporary.rglob("*")):
                    _open_to_others(file)
                    fsync_path(file)
                fsync_path(temporary)
                if not os.path.lexists(path):
                    os.rename(temporary, path)
                elif not _swap(temporary, path):
                    old = temporary_beside(path)
                    os.rename(path, old)
                    os.rename(temporary, path)
                    remove(old)
                fsync_path(path.parent)
    finally:
        remove(temporary)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Marks a folder as in use by this process, and yields whether it could; the kernel takes the mark away when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a living process has it, or this file system marks no folders
        return False
    return True


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of a folder left beside it."""
    for leftover in path.parent.glob(".tmp-*"):
        same = re.fullmatch(r"\.tmp-\d+-[0-9a-f]{8}-(.*)", leftover.name, re.DOTALL)
        if same and same[1] == path.name[-50:] and not leftover.is_symlink() and leftover.is_dir():
            with suppress(OSError), _held(leftover) as is_abandoned:
                if is_abandoned:
                    remove(leftover)


def remove(path: Path) -> None:
    """A folder with all that is in it, or a link or file by itself; whatever cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, at once; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def nearest(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if os.path.exists(parent))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises EnvironmentProblem where the disk or the folder refuses what a block writes.

    Libraries that write through other languages have errors of their own for a full disk.
    """
    try:
        yield
    except SidError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or "No space left on device" in str(error):
            raise _problem(path, error) from error
        raise


def _problem(path: Path, error: Exception) -> EnvironmentProblem:
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    free = shutil.disk_usage(nearest(path)).free
    return EnvironmentProblem(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
        "choose another place" if forbidden else f"{free / 1e9:.1f} GB are free there; choose another place or make room",
    )


def gigabytes(size: float) -> str:
    """A size for people, in GB of 10^9 bytes, or in MB below one."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def check_space(place: Path, needed: int, what: str) -> None:
    """Raises EnvironmentProblem where the disk has less room than `what`, such as `a checkpoint needs`, needs in bytes."""
    free = shutil.disk_usage(nearest(place)).free
    if free < needed:
        raise EnvironmentProblem(
            f"{place} has {gigabytes(free)} of disk space free; {what} {gigabytes(needed)}", "make room, or choose another --output"
        )


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """A JSON file as `write_json` spells it."""
    return (json_text(content, indent=2) + "\n").encode()


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that grows. Raises EnvironmentProblem where the disk refuses, or the file is a link to another place."""
    try:
        with _open_own(path, os.O_WRONLY | os.O_APPEND) as file:
            file.write(line + "\n")
    except OSError as error:
        raise _problem(path, error) from error


def _open_own(path: Path, flags: int) -> TextIO:
    """A file opened in place, made where there is none, but never through a link."""
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise EnvironmentProblem(f"{path} is a link; sid does not write through links", "remove the link") from error
        raise
    return os.fdopen(descriptor, "a" if flags & os.O_APPEND else "r+", encoding="utf-8")


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


def check_writable(folder: Path, option: str = "--output") -> None:
    """Raises EnvironmentProblem, before any work, where `folder` cannot be made or written."""
    instead = f"choose another {option}"
    try:
        folder.exists()
        existing = nearest(folder)
    except OSError as error:
        raise EnvironmentProblem(f"{str(folder)[:80]} cannot hold files: {error.strerror}", instead) from error
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            raise EnvironmentProblem(f"{place} is a link to a place that is not there", instead)
    if not existing.is_dir():
        raise EnvironmentProblem(f"{existing} is a file, not a folder", instead)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"no permission to write in {existing}", instead)


def check_new(files: Sequence[Path], option: str, overwrite: bool) -> None:
    """Raises EnvironmentProblem, before any work, where files of one folder cannot be made, and UsageError where they are folders or
    are there already and not to be replaced.

    A link counts as being there, wherever it leads; replaced, it is the link that goes.
    """
    check_writable(files[0].parent, option)
    for file in files:
        try:
            is_folder, exists = file.is_dir(), file.exists() or file.is_symlink()
        except OSError as error:
            raise EnvironmentProblem(
                f"{str(file)[:80]} is not a valid file name: {error.strerror}", f"choose another {option}"
            ) from error
        if is_folder:
            raise UsageError(f"{file} is a folder", f"give {option} the name of a file")
        if exists and not overwrite:
            raise UsageError(f"{file} exists already", f"choose another {option}, or pass --overwrite")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers left under a folder that this process holds."""
    for leftover in list(folder.rglob(".tmp-*")):
        remove(leftover)


def check_unlocked(folder: Path) -> None:
    """Raises EnvironmentProblem where another process holds a run folder, before any work."""
    if (folder / ".lock").exists():
        with locked(folder):
            pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process; the kernel releases the lock even after kill -9.

    Raises EnvironmentProblem, naming the process that holds it, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_own(folder / ".lock", os.O_RDWR)
    except OSError as error:
        raise _problem(folder / ".lock", error) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().strip() or "unknown"
            raise EnvironmentProblem(
                f"{folder} is in use by process {holder}", "wait for it, stop it, or choose another --output"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
