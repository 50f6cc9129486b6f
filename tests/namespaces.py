"""What Linux can take from a forked child: the network, or the rights of root. It can also get a small disk of its own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NEW_MOUNTS, NEW_USER, NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
LIBRARY = ctypes.CDLL(None, use_errno=True)


def skip_without(flags: str) -> None:
    """Skip the test if this system does not let `unshare FLAGS` work for everybody."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", flags, "true"], capture_output=True).returncode:
        pytest.skip("this system does not allow namespaces")


def leave_network() -> None:
    """Disconnect this process, which must have one thread, from every network."""
    _unshare(NEW_NETWORK)


def mount_small_disk(folder: Path, kilobytes: int) -> None:
    """Mount a disk of this size at `folder`, visible to this process, which must have one thread, and to its children alone."""
    _unshare(NEW_MOUNTS)
    _check(LIBRARY.mount(b"small", str(folder).encode(), b"tmpfs", 0, f"size={kilobytes}k".encode()))


def give_up_rights() -> None:
    """Give up every capability of root, so that the modes of files hold for this process too."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(LIBRARY.capset(header, none))


def _unshare(flags: int) -> None:
    user, group = os.getuid(), os.getgid()
    _check(LIBRARY.unshare(NEW_USER | flags))
    for name, content in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
        Path("/proc/self", name).write_text(content)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
