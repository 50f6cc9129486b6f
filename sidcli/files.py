"""Atomic file writes: a reader sees the old content or the new content, never a part of either.

Nothing is written through a link: a file that is renamed to the path of a link replaces the link, and appending to a link
raises an error.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from sidcli.errors import EnvironmentProblem, InputError, SidError, UsageError
from sidcli.printable import json_text

if TYPE_CHECKING:
    from torch import Tensor

Parsed = TypeVar("Parsed")

MAX_DESCRIPTION = 1 << 24
"""Maximum bytes of a JSON or TOML file. The largest JSON files of models, the lists of their shards, have a twentieth of it."""


def size_of(path: Path, most: int) -> int:
    """Return the size of a regular file in bytes. Pipes and devices, which may be endless, are recognized by type and not opened.

    Raises OSError for these, and for a file of more than `most` bytes.
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
    """Return the content of a regular file. Raises OSError as `size_of` does."""
    size_of(path, most)
    return path.read_bytes()


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """Return an unused path in the same folder. Files that a killed process left are recognizable by the prefix `.tmp-`.

    The name ends with the last 50 characters of the path's name, so that it does not exceed the maximum length of a file name.
    """
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name[-50:]}")


_UMASK = os.umask(0)
os.umask(_UMASK)


def _set_default_permissions(path: Path) -> None:
    """Give a file the default permissions of a new file; safetensors creates files that only the owner can read."""
    if path.is_file():
        path.chmod(0o666 & ~_UMASK)


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write. On success it is renamed to `path` and synced to disk; on an error it is removed.

    Raises EnvironmentProblem if writing fails, for example because the disk is full or the folder is read-only, and UsageError if
    `path` exists and `replace` is False.
    """
    temporary = temporary_beside(path)
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _set_default_permissions(temporary)
            fsync_path(temporary)
            if replace or not _link(temporary, path):
                os.replace(temporary, path)
            fsync_path(path.parent)
    finally:
        with suppress(OSError):  # a path that cannot be written cannot be removed either
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary folder to fill. On success it is renamed to `path`; an existing `path` is replaced only then.

    If the process is killed, `path` is the complete old folder or the complete new folder, because the two are exchanged
    atomically. If the file system cannot exchange folders (NFS; systems other than Linux), there is an instant at which `path` does
    not exist and both complete folders are beside it as `.tmp-*`. The next writer of `path` removes temporary folders that a killed
    writer left.

    Raises EnvironmentProblem if writing fails, for example because the disk is full or the folder is read-only, and UsageError if
    `path` exists and `replace` is False.
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
                    _set_default_permissions(file)
                    fsync_path(file)
                fsync_path(temporary)
                if not os.path.lexists(path):
                    os.rename(temporary, path)
                elif not replace:
                    raise _appeared(path)
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
    """Locks a folder for this process and yields whether that succeeded. The kernel releases the lock when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds the lock, or the file system cannot lock folders
        return False
    return True


def remove_abandoned(path: Path) -> None:
    """Remove the temporary folders that killed writers of `path` left beside it."""
    for leftover in path.parent.glob(".tmp-*"):
        same = re.fullmatch(r"\.tmp-\d+-[0-9a-f]{8}-(.*)", leftover.name, re.DOTALL)
        if same and same[1] == path.name[-50:] and not leftover.is_symlink() and leftover.is_dir():
            with suppress(OSError), _held(leftover) as is_abandoned:
                if is_abandoned:
                    remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder with its content, a link or a file. Entries that cannot be removed stay."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file its final name if nothing has that name. Returns False if the file system has no hard links.

    Raises UsageError if `path` exists.
    """
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _appeared(path) from error
    except OSError:
        if os.path.lexists(path):
            raise _appeared(path) from None
        return False
    return True


def _appeared(path: Path) -> UsageError:
    return UsageError(f"another program has created {path} since this command started", "choose another --output")


def _swap(one: Path, other: Path) -> bool:
    """Exchange two paths atomically. Returns False if the system does not support this."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def nearest(path: Path) -> Path:
    """Return the path, or its nearest parent folder that exists."""
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if os.path.exists(parent))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Context that raises EnvironmentProblem if writing fails, for example because the disk is full or the folder is read-only.

    Libraries in other languages raise errors of their own types if the disk is full.
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
    """Return a size as text, in GB of 10^9 bytes, or in MB if it is below 1 GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def check_space(place: Path, needed: int, what: str, hint: str = "make room, or choose another --output") -> None:
    """Raises EnvironmentProblem if fewer than `needed` bytes are free. `what` is for the message, such as `a checkpoint needs`."""
    free = shutil.disk_usage(nearest(place)).free
    if free < needed:
        raise EnvironmentProblem(f"{place} has {gigabytes(free)} of disk space free; {what} {gigabytes(needed)}", hint)


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Return the content of a JSON file as `write_json` writes it."""
    return (json_text(content, indent=2) + "\n").encode()


def append_line(path: Path, line: str) -> None:
    """Append a line to a file. Raises EnvironmentProblem if writing fails or the file is a link."""
    try:
        with _open_own(path, os.O_WRONLY | os.O_APPEND) as file:
            file.write(line + "\n")
    except OSError as error:
        raise _problem(path, error) from error


def appended(path: Path, parse: Callable[[str], Parsed]) -> list[Parsed]:
    """Return what `parse` makes of the lines that `append_line` has written, none if there is no file.

    Lines from the first one on for which it raises ValueError, KeyError or TypeError are removed: an interruption has cut one off.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: list[Parsed] = []
    for line in lines:
        try:
            found.append(parse(line))
        except (ValueError, KeyError, TypeError):
            break
    if len(found) < len(lines):
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines[: len(found)]), encoding="utf-8")
    return found


def _open_own(path: Path, flags: int) -> TextIO:
    """Open a file without following links, and create it if it does not exist. Raises EnvironmentProblem for a link."""
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise EnvironmentProblem(f"{path} is a link; sid does not write through links", "remove the link") from error
        raise
    return os.fdopen(descriptor, "a" if flags & os.O_APPEND else "r+", encoding="utf-8")


NOT_READ = "check its permissions, or take another copy of it"


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Context that raises InputError if a file or folder below `path` cannot be read, for example without permission."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read: {error.strerror or error}",
            "check its permissions, or take another copy of it",
        ) from error


def read_json(file: Path, hint: str = "write the model again, or take another copy of it") -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError if the file does not exist or contains no JSON object."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", hint) from error
    return json_object(content, str(file), hint)


def json_object(content: bytes | str, place: str, hint: str) -> dict[str, Any]:
    """Return the JSON object in a text. Raises InputError, naming the `place` of the text, if it is no JSON object."""
    try:
        value = json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is damaged: {error}", hint) from error
    if not isinstance(value, dict):
        raise InputError(f"{place} is damaged: not a JSON object", hint)
    return value


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, not atomically. Raises OSError if writing fails, instead of the error of safetensors."""
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
    """Raises EnvironmentProblem if `folder` cannot be created or written. Call it before any work."""
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
        kind = "a file" if existing.is_file() else "a device or a pipe"
        raise EnvironmentProblem(f"{existing} is {kind}, not a folder", instead)
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"no permission to read and write in {existing}", instead)


def check_new(files: Sequence[Path], option: str, overwrite: bool) -> None:
    """Raises EnvironmentProblem if files of one folder cannot be created, UsageError if a file is a folder, or exists and
    `overwrite` is False.

    A link counts as an existing file, whatever its target is; the link itself is replaced. Call it before any work.
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
    """Remove temporary files that killed writers left under a folder that this process has locked."""
    for leftover in list(folder.rglob(".tmp-*")):
        remove(leftover)


def check_unlocked(folder: Path) -> None:
    """Raises EnvironmentProblem if another process has locked a run folder. Call it before any work."""
    if (folder / ".lock").exists():
        with locked(folder):
            pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run folder for this process. The kernel releases the lock even after kill -9.

    Raises EnvironmentProblem with the id of the process that holds the lock, or if the folder cannot be written.
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
