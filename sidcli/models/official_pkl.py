"""Read the SiD-LSG authors' generators - pickle.dump({'ema': UNet2DConditionModel}) - without running any code in the file.

The two halves of this module run in two processes. The child process reads the pickle and writes a safetensors file with only the
standard library: it cannot reach torch or diffusers, starts at once and needs little memory. The parent process reads that file.

    mapped file -> Reader -> Inert -> walk -> View per name -> packed -> safetensors | -> tensors() -> matching()
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sidcli.errors import EnvironmentProblem, InputError
from sidcli.models.inert_pickle import HINT, MAGIC, Inert, Reader, View, shown, typename
from sidcli.printable import with_article

if TYPE_CHECKING:  # the child process does not import torch
    from torch import Tensor, nn

FLOATS = ("F64", "F32", "F16", "BF16")
DEPTH, MODULES = 32, 20_000
GROWTH = 4
"""Maximum ratio of tensor bytes to file bytes. Tied weights exceed 1 slightly, decompression bombs by far."""
ROOM = "make room, or set TMPDIR"


# ---- Child process: converts the tree of modules to a safetensors file


def main(source: str, target: str) -> int:
    """Convert `source` to the safetensors file `target`. Returns exit code 0, 3 if the file is refused, or 4 if this machine has
    too little space; for 3 and 4, stderr contains the message and the hint, one line each."""
    try:
        size = os.stat(source).st_size
        confine(size)
        write(target, network(mapped(source)), GROWTH * size + 2**20)
        return 0
    except (InputError, EnvironmentProblem) as error:
        problem: InputError | EnvironmentProblem = error
    except MemoryError:
        problem = InputError("reading it takes more memory than a network of its size does", HINT)
    except OSError as error:
        problem = EnvironmentProblem(f"cannot be copied: {error.strerror}", ROOM)
    print(problem.message, problem.hint, sep="\n", file=sys.stderr)
    return problem.exit_code


def confine(size: int) -> None:
    """Limit this process for a file of `size` bytes: memory, bytes of a written file, CPU seconds, no core dump, no children.

    The mapped file counts as memory, and protocol 2 needs each storage as text and as bytes: in total less than 4 times the file.
    """
    limits = {
        resource.RLIMIT_AS: 4 * size + 2**28,
        resource.RLIMIT_FSIZE: GROWTH * size + 2**24,
        resource.RLIMIT_CPU: 60 + size // 10**7,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):  # some systems define a limit but cannot set it
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)


def mapped(source: str) -> memoryview:
    try:
        with open(source, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", HINT) from error


def network(data: bytes | memoryview) -> dict[str, View]:
    """Return the tensors of the generator in a file's content, under the names of its state_dict()."""
    if bytes(data[:4]) == b"PK\x03\x04":
        raise InputError("a zip archive, as torch.save writes training states, not a released generator", HINT)
    content = Reader(data).load()
    if content == MAGIC:
        raise InputError("written by torch.save: a training state or a state dict, not a released generator", HINT)
    if type(content) is not dict:
        raise InputError(f"holds {with_article(typename(content))}, not a dict with the key 'ema'", HINT)
    if "ema" not in content:
        found = ", ".join(shown(key) if type(key) is str else typename(key) for key in itertools.islice(content, 10)) or "none"
        raise InputError(f"has no key 'ema'; its keys: {found}", HINT)
    root = content["ema"]
    if type(root) is not Inert or "_modules" not in root.state:
        raise InputError(f"its 'ema' is {with_article(typename(root))}, not a network", HINT)
    return dict(walk(root))


def walk(root: Inert) -> Iterator[tuple[str, View]]:
    """Yield (dotted name, tensor) of parameters and persistent buffers. Raises InputError for a tree that no module can have."""
    waiting = [("", root)]
    for _ in range(MODULES):
        if not waiting:
            return
        prefix, module = waiting.pop()
        temporary = module.state.get("_non_persistent_buffers_set")
        temporary = temporary if type(temporary) is set else set()
        for group in ("_parameters", "_buffers"):
            for name, value in members(module, group):
                if group == "_buffers" and name in temporary:
                    continue
                if type(value) is not View or value.dtype not in FLOATS:
                    what = value.dtype if type(value) is View else typename(value)
                    raise InputError(f"{prefix}{name} is {with_article(str(what))}, not a tensor of floats", HINT)
                yield prefix + name, value
        for name, value in reversed(members(module, "_modules")):
            if type(value) is not Inert:
                raise InputError(f"{prefix}{name} is {with_article(typename(value))}, not a module", HINT)
            if prefix.count(".") == DEPTH:
                raise InputError(f"more than {DEPTH} modules inside each other: no network has as many", HINT)
            waiting.append((f"{prefix}{name}.", value))
    raise InputError(f"more than {MODULES} modules: no network has as many", HINT)


def members(module: Inert, group: str) -> list[tuple[str, Any]]:
    found = module.state.get(group, {})
    if type(found) is not dict or not all(type(name) is str and re.fullmatch(r"\w{1,100}", name, re.ASCII) for name in found):
        raise InputError(f"the {group} of a {module.of} are no dict of names", HINT)
    return [(name, value) for name, value in found.items() if value is not None]


def packed(view: View) -> memoryview:
    """Return the elements of a view in order, as bytes. They are copied only if the storage has another order."""
    axes = [
        (size, stride, math.prod(view.size[axis + 1 :]))
        for axis, (size, stride) in enumerate(zip(view.size, view.stride, strict=True))
    ]
    if view.nbytes == 0 or all(size == 1 or stride == step for size, stride, step in axes):
        return view.storage.data[view.offset * view.width : view.offset * view.width + view.nbytes]
    words: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
    source = view.storage.data.cast(words[view.width])
    target = memoryview(bytearray(view.nbytes)).cast(words[view.width])
    *others, (size, stride, step) = sorted(axes)  # the longest axis is copied as one slice, in C
    for index in itertools.product(*(range(length) for length, _, _ in others)):
        start = view.offset + sum(i * axis[1] for i, axis in zip(index, others, strict=True))
        to = sum(i * axis[2] for i, axis in zip(index, others, strict=True))
        target[to : to + (size - 1) * step + 1 : step] = source[start : start + (size - 1) * stride + 1 : stride]
    return target.cast("B")


def write(path: str, views: dict[str, View], most: int) -> None:
    """Write a safetensors file, widest dtypes first for alignment. Raises InputError if the tensors exceed `most` bytes."""
    entries, total = {}, 0
    order = sorted(views.items(), key=lambda item: -item[1].width)
    for name, view in order:
        entries[name] = {"dtype": view.dtype, "shape": view.size, "data_offsets": (total, total + view.nbytes)}
        total += view.nbytes
    if total > most:
        raise InputError(f"its tensors unpack to {total} bytes, out of all proportion to the file", HINT)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, view in order:
            file.write(packed(view))


# ---- Parent process: reads the safetensors file


def tensors(path: Path, scratch: Path | None = None) -> dict[str, Tensor]:
    """Return the weights of a released generator, float32, under the names of its state_dict(). A child process reads the file.

    A copy as large as the file occupies `scratch` (the system's temporary folder if None) until the tensors are deleted. Raises
    InputError if the file is not a released generator, EnvironmentProblem if there is too little disk space.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from sidcli.files import gigabytes

    if not path.is_file():
        raise InputError(f"{path}: no such file", "pass a .pkl that the authors released")
    try:
        with tempfile.TemporaryDirectory(prefix="sid-", dir=scratch, ignore_cleanup_errors=True) as folder:
            free, needed = shutil.disk_usage(folder).free, path.stat().st_size
            if free < needed:
                raise EnvironmentProblem(
                    f"{folder} has {gigabytes(free)} of disk space free; reading {path} needs {gigabytes(needed)}", ROOM
                )
            target = Path(folder).absolute() / "ema.safetensors"
            run_child(path, target)
            # load_file maps the file: the data outlive its deletion, and float32 weights are not copied.
            return {name: value.float() for name, value in load_file(target).items()}
    except SafetensorError as error:
        raise InputError(f"{path}: its tensors cannot be read: {error}", HINT) from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {path}: {error}", ROOM) from error


def run_child(source: Path, target: Path) -> None:
    """Run the child process. Raises the error that it reports, or InputError if it crashes."""
    # -P and -S: import no code from the current folder, site-packages or sitecustomize.
    command = [sys.executable, "-P", "-S", "-B", "-m", __name__, str(source.absolute()), str(target)]
    nothing = subprocess.DEVNULL
    done = subprocess.run(
        command, env=environment(), cwd=target.parent, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, text=True, check=False
    )
    lines = done.stderr.splitlines()
    for problem in (InputError, EnvironmentProblem):
        if done.returncode == problem.exit_code and len(lines) == 2:
            raise problem(f"{source}: {lines[0]}", lines[1])
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise InputError(f"{source}: reading it was stopped by {name}: it takes more memory or time than a network", HINT)
    if done.returncode:
        raise InputError(f"{source}: reading it failed: {lines[-1] if lines else done.returncode}", HINT)


def environment() -> dict[str, str]:
    """Return the child's environment: the path of this package and the variables of a Python in a nonstandard location, but none of
    the user's tokens."""
    kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PYTHONHOME") if key in os.environ}
    return {"PYTHONPATH": str(Path(__file__).resolve().parents[2])} | kept


def matching(found: dict[str, Tensor], unet: nn.Module) -> None:
    """Raises InputError unless `found` has exactly the names and shapes of `unet`'s state_dict(), and only finite values."""
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    differences = {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [name for name in shapes if name not in wanted],
        "misshaped": [f"{name}: {shapes[name]}, not {shape}" for name, shape in wanted.items() if shapes.get(name, shape) != shape],
    }
    problems = [f"{len(names)} {what} ({'; '.join(names[:3])})" for what, names in differences.items() if names]
    if problems:
        raise InputError(
            f"these are not the weights of this UNet: {', '.join(problems)}", "choose the base model that they were trained from"
        )
    broken = [name for name, value in found.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{len(broken)} tensors are not finite, the first is {broken[0]}", "take another copy of the file")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
