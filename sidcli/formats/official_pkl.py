"""The authors' generators, pickles of whole modules, as tensors - and nothing that is in the file ever runs.

Two halves that never share a process. The child reads: a stack machine over the instructions that pickletools parses, which knows only
those that networks are written with and calls only BUILDERS; every other name in the file becomes an inert Name, every object an Inert.
It runs on the standard library alone, so that neither torch nor diffusers is there to be reached, it starts at once, and it can be
held to little memory. It writes one safetensors file, which the parent reads.

Why not a pickle.Unpickler whose find_class has a list: there REDUCE calls and BUILD alters whatever was let in, EXT1 to EXT4 ask
copyreg's cache before they ask find_class, and lengths are allocated before they are checked. Here nothing calls what a file names,
so the list is there to tell a hostile file from an unknown one, not to keep it in. Speed is no reason either: the network of SD 1.5
takes 100,000 instructions and its bytes stay in the mapped file.

    {'ema': UNet2DConditionModel}  ->  Reader  ->  Inert  ->  walk  ->  View per name  ->  safetensors  ->  tensors()
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import pickletools
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidcli.errors import EnvironmentProblem, InputError

if TYPE_CHECKING:  # the child must start without torch
    from torch import Tensor, nn

STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
"""torch's name of a storage type -> its name in safetensors, bytes of an element."""
FLOATS = ("F64", "F32", "F16", "BF16")
WORDS = {8: "Q", 4: "I", 2: "H", 1: "B"}

INERT = ("diffusers", "torch.nn", "transformers", "xformers", "peft")
"""Packages whose names are let in, as names: nothing of them is imported."""
TOKENS = {("functools", "partial"), ("torch", "device"), ("torch.utils.checkpoint", "checkpoint")} | {
    ("torch", name) for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
}

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
"""How torch.save opened its files before they were zip archives; each storage inside a plain pickle is still such a file."""
INSTRUCTIONS = 2_000_000
"""Of a pickle; each costs the reader at most some hundred bytes, whatever the file says."""
LINE = 1000
"""Bytes of the longest line, of the names that protocols below 4 write as text."""
DEPTH, MODULES, AXES = 32, 20_000, 8
GROWTH = 4
"""Tensors may unpack to this many times the file: tied weights repeat, bombs repeat more."""

OTHER_FILE = "only the generators of SiD-LSG are read: a pickle of {'ema': UNet2DConditionModel}"
CONVERT = "convert the weights to safetensors where you trust the file"


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the file names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(eq=False)
class Inert:
    """What the file would have made by calling `of`: its attributes as plain data, what it was called with forgotten."""

    of: Name
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    """`count` elements of a type of STORAGES; `data` are their bytes."""

    kind: str
    key: str
    count: int
    data: memoryview = field(default_factory=lambda: memoryview(b""))


@dataclass(frozen=True, eq=False)
class View:
    """A tensor: offset, size and stride count elements, and every element lies inside the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return STORAGES[self.storage.kind][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * STORAGES[self.storage.kind][1]


def shown(text: str) -> str:
    """A stranger's text on one line of a terminal."""
    return ascii(text)[1:-1][:200]


# ---- Reading a pickle


class Window:
    """A file over memory: what it announces beyond its end is refused before anything is allocated.

    Short reads are bytes, long ones views: the storages of a mapped file are never copied.
    """

    def __init__(self, data: memoryview):
        self.data = data
        self.position = 0

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes | memoryview:
        start, left = self.position, len(self.data) - self.position
        if not 0 <= size <= left:
            raise ValueError(f"{size} more bytes are announced, {left} follow")
        self.position += size
        found = self.data[start : self.position]
        return found if size > LINE else bytes(found)

    def readline(self) -> bytes:
        line = bytes(self.data[self.position : self.position + LINE])
        if b"\n" not in line:
            raise ValueError("a line without an end")
        self.position += line.index(b"\n") + 1
        return line[: line.index(b"\n") + 1]


class Reader:
    """Reads pickles of protocol 2 to 5 from memory, one per `load`, without calling anything they name.

    `nested` reads the parts of a storage's own file instead, where the only names are those of storages.
    """

    def __init__(self, data: bytes | memoryview, nested: bool = False):
        self.window: Any = Window(memoryview(data))
        self.nested = nested
        self.limit = 1000 if nested else INSTRUCTIONS

    def load(self) -> Any:
        """The next pickle as plain containers, Inert and View. Raises InputError for anything that a network has no use for."""
        try:
            return self._run()
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, struct.error) as error:
            raise InputError(f"not a pickle, or damaged at byte {self.window.position}: {shown(str(error))}", OTHER_FILE) from error
        except RecursionError as error:
            raise InputError("its content is nested too deep for a network", OTHER_FILE) from error

    def _run(self) -> Any:
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks under each open mark
        memo: dict[int, Any] = {}

        def marked() -> list[Any]:
            nonlocal stack
            items, stack = stack, below.pop()
            return items

        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.window)):
            if count == self.limit:
                raise InputError(f"more than {count} instructions: no network needs as many", OTHER_FILE)
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    (result,) = stack
                    return result

                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                    stack.append(argument)
                case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                    stack.append(argument)

                case "MARK":
                    below.append(stack)
                    stack = []
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(reversed(items)))
                case "TUPLE":
                    items = marked()
                    stack.append(tuple(items))
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    add_items(stack[-2], [stack.pop()])
                case "APPENDS":
                    add_items(below[-1][-1], marked())
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    add_pairs(stack[-1], [key, value])
                case "SETITEMS":
                    add_pairs(below[-1][-1], marked())
                case "EMPTY_SET":
                    stack.append(set())
                case "ADDITEMS":
                    add_members(below[-1][-1], marked())
                case "FROZENSET":
                    items = marked()
                    stack.append(frozenset(keys(items)))

                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])

                case "GLOBAL":
                    module, _, name = argument.partition(" ")
                    stack.append(self._name(module, name))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._name(module, name))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(call(function, arguments))
                case "NEWOBJ":
                    _, function = stack.pop(), stack.pop()
                    stack.append(made(function))
                case "NEWOBJ_EX":
                    _, _, function = stack.pop(), stack.pop(), stack.pop()
                    stack.append(made(function))
                case "BUILD":
                    state = stack.pop()
                    set_state(stack[-1], state)
                case "BINPERSID" if self.nested:
                    stack.append(announced(stack.pop()))

                case other:
                    raise InputError(f"the pickle instruction {other} is refused: no network is written with it", OTHER_FILE)
        raise AssertionError("genops ends with STOP or raises")

    def _name(self, module: Any, name: Any) -> Name:
        """Raises InputError for a name that is on no list."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 has it
        found = Name(module, name)
        plain = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module, re.ASCII) and re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)
        if plain and module == "torch" and name in STORAGES:
            return found
        if plain and not self.nested:
            if module.split(".")[0] in ("torch_utils", "dnnlib"):
                raise InputError(f"a pickle of EDM or StyleGAN carries Python source that runs on loading ({found})", OTHER_FILE)
            if (module, name) in BUILDERS or (module, name) in TOKENS or any(f"{module}.".startswith(f"{p}.") for p in INERT):
                return found
        raise InputError(f"it names {found}, which is refused: weights have no use for it", CONVERT)


def keys(items: list[Any]) -> list[Any]:
    """Only plain values may be hashed: a deep tuple's hash would overflow the interpreter's stack."""
    for item in items:
        if type(item) not in (str, int, float, bool, bytes, type(None)):
            raise ValueError(f"a {type(item).__name__} as a key")
    return items


def add_items(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Inert:  # what a subclass of list holds is no weight
        raise ValueError(f"items for a {type(target).__name__}")


def add_members(target: Any, items: list[Any]) -> None:
    if type(target) is not set:
        raise ValueError(f"members for a {type(target).__name__}")
    target.update(keys(items))


def add_pairs(target: Any, items: list[Any]) -> None:
    if type(target) is dict:
        target.update(zip(keys(items[::2]), items[1::2], strict=True))
    elif type(target) is not Inert:
        raise ValueError(f"entries for a {type(target).__name__}")


def set_state(target: Any, state: Any) -> None:
    """What BUILD does, to objects of ours alone: containers, names and tensors have no state."""
    if type(target) is not Inert:
        raise ValueError(f"a state for a {type(target).__name__}")
    if type(state) is tuple and len(state) == 2:  # attributes and slots
        state = state[0]
    target.state = state if type(state) is dict else {}


def made(function: Any) -> Inert:
    if type(function) is not Name:
        raise ValueError(f"a {type(function).__name__} is called")
    return Inert(function)


# ---- The few things that are built


def call(function: Any, arguments: Any) -> Any:
    found = made(function)
    if type(arguments) is not tuple:
        raise ValueError("arguments that are no tuple")
    build = BUILDERS.get((function.module, function.name))
    return build(*arguments) if build else found


def encoded(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes that are not written as latin1")
    return text.encode("latin-1")


def plain_set(items: Any = ()) -> set[Any]:
    if type(items) is not list and items != ():
        raise ValueError("a set of no list")
    return set(keys(list(items)))


def torch_size(items: Any) -> tuple[Any, ...]:
    if type(items) is not tuple:
        raise ValueError("a torch.Size of no tuple")
    return items


def announced(pid: Any) -> Storage:
    match pid:
        case ("storage", Name(module="torch", name=kind), str(key), str(), int(count), None) if kind in STORAGES and count >= 0:
            return Storage(kind, key, count)
    raise ValueError("a persistent id that is no storage")


def storage(blob: Any) -> Storage:
    """A storage from its own file inside the pickle: five pickles, the count of its elements, the elements.

    torch.storage._load_from_bytes would read it with a pickle reader that is free to run anything.
    """
    if type(blob) not in (bytes, memoryview):
        raise ValueError("a storage of no bytes")
    reader = Reader(blob, nested=True)
    magic, version, system, found, names = (reader.load() for _ in range(5))
    if magic != MAGIC or version != VERSION or system["little_endian"] is not True:
        raise ValueError("a storage in an unknown format")
    if type(found) is not Storage or names != [found.key]:
        raise ValueError("a storage that holds something else")
    (count,) = struct.unpack("<q", reader.window.read(8))
    found.data = reader.window.data[reader.window.position :]
    if count != found.count or len(found.data) != count * STORAGES[found.kind][1]:
        raise ValueError("a storage whose length is not as announced")
    return found


def tensor(held: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, metadata: Any = None) -> View:
    """Raises InputError for a view that leaves its storage or repeats its elements."""
    if type(held) is not Storage or type(size) is not tuple or type(stride) is not tuple or metadata:
        raise ValueError("a tensor of an unknown form")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, size or stride is no count")
    if len(size) != len(stride) or len(size) > AXES:
        raise ValueError(f"a tensor of {len(size)} sizes and {len(stride)} strides")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= held.count or math.prod(size) > held.count):
        raise InputError(f"a tensor of size {shown(str(size))} reaches outside its storage of {held.count} elements", OTHER_FILE)
    if any(length > 1 and step == 0 for length, step in zip(size, stride, strict=True)):
        raise InputError("a tensor that repeats its elements is refused: no weight does", OTHER_FILE)
    return View(held, offset, size, stride)


def parameter(data: Any, gradient: Any, hooks: Any, state: Any = None) -> View:
    if type(data) is not View:
        raise ValueError("a parameter of no tensor")
    return data


BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "bytes"): lambda: b"",
    ("builtins", "set"): plain_set,
    ("builtins", "frozenset"): plain_set,
    ("collections", "OrderedDict"): lambda: {},
    ("_codecs", "encode"): encoded,
    ("torch", "Size"): torch_size,
    ("torch.storage", "_load_from_bytes"): storage,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): parameter,
}
"""Everything that a file can call, under the name it calls it by: functions of this module."""


# ---- From the tree of modules to a safetensors file


def network(data: bytes | memoryview) -> dict[str, View]:
    """The tensors of the generator in a file's content, under the names state_dict() has for them."""
    if bytes(data[:4]) == b"PK\x03\x04":
        raise InputError("a zip archive, as torch.save writes training states, and no released generator", OTHER_FILE)
    content = Reader(data).load()
    if content == MAGIC:
        raise InputError("written by torch.save: a training state or a state dict, and no released generator", OTHER_FILE)
    if type(content) is not dict:
        raise InputError(f"holds a {kind(content)}, not a dict with the key 'ema'", OTHER_FILE)
    if "ema" not in content:
        found = ", ".join(shown(str(key)) for key in itertools.islice(content, 10)) or "none"
        raise InputError(f"has no key 'ema'; its keys: {found}", OTHER_FILE)
    if type(content["ema"]) is not Inert or "_modules" not in content["ema"].state:
        raise InputError(f"its 'ema' is a {kind(content['ema'])}, not a network", OTHER_FILE)
    return dict(walk(content["ema"]))


def kind(value: Any) -> str:
    return str(value.of) if type(value) is Inert else type(value).__name__.lower()


def walk(root: Inert) -> Iterator[tuple[str, View]]:
    """(dotted name, tensor) of parameters and persistent buffers. Raises InputError for a tree that no module could have."""
    waiting = [("", root)]
    for _ in range(MODULES):
        if not waiting:
            return
        prefix, module = waiting.pop()
        temporary = module.state.get("_non_persistent_buffers_set")
        buffers = [(name, value) for name, value in members(module, "_buffers") if type(temporary) is not set or name not in temporary]
        for name, value in members(module, "_parameters") + buffers:
            if value is None:
                continue
            if type(value) is not View or value.dtype not in FLOATS:
                what = value.dtype if type(value) is View else kind(value)
                raise InputError(f"{prefix}{name} is a {what}, not a tensor of floats", OTHER_FILE)
            yield prefix + name, value
        for name, value in reversed(members(module, "_modules")):
            if value is None:
                continue
            if type(value) is not Inert or prefix.count(".") >= DEPTH:
                raise InputError(f"{prefix}{name} is a {kind(value)}, not a module, or nested too deep", OTHER_FILE)
            waiting.append((f"{prefix}{name}.", value))
    raise InputError(f"more than {MODULES} modules: no network has as many", OTHER_FILE)


def members(module: Inert, group: str) -> list[tuple[str, Any]]:
    found = module.state.get(group, {})
    if type(found) is not dict or not all(type(name) is str and re.fullmatch(r"\w{1,100}", name, re.ASCII) for name in found):
        raise InputError(f"the {group} of a {module.of} are no dict of names", OTHER_FILE)
    return list(found.items())


def packed(view: View) -> memoryview:
    """The elements of a view in order, as bytes; copied only where the storage has them in another order."""
    width = STORAGES[view.storage.kind][1]
    dense = [math.prod(view.size[axis + 1 :]) for axis in range(len(view.size))]
    shape = list(zip(view.size, view.stride, dense, strict=True))
    if all(length == 1 or stride == step for length, stride, step in shape) or not view.nbytes:
        return view.storage.data[view.offset * width : view.offset * width + view.nbytes]
    source = view.storage.data.cast(WORDS[width])
    target = memoryview(bytearray(view.nbytes)).cast(WORDS[width])
    # The longest axis is copied as one slice, which memoryview does in C.
    shape.sort()
    length, stride, step = shape.pop()
    for index in itertools.product(*(range(other) for other, _, _ in shape)):
        begin = view.offset + sum(i * axis[1] for i, axis in zip(index, shape, strict=True))
        end = sum(i * axis[2] for i, axis in zip(index, shape, strict=True))
        target[end : end + (length - 1) * step + 1 : step] = source[begin : begin + (length - 1) * stride + 1 : stride]
    return target.cast("B")


def write(path: str, views: dict[str, View], most: int) -> None:
    """A safetensors file of at most `most` bytes of tensors, the widest elements first as alignment wants it."""
    entries, total = {}, 0
    order = sorted(views, key=lambda name: -STORAGES[views[name].storage.kind][1])
    for name in order:
        view = views[name]
        entries[name] = {"dtype": view.dtype, "shape": view.size, "data_offsets": (total, total + view.nbytes)}
        total += view.nbytes
    if total > most:
        raise InputError(f"its tensors unpack to {total} bytes, out of all proportion to the file", OTHER_FILE)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            file.write(packed(views[name]))


# ---- The child


def confine(size: int) -> None:
    """Limits of this process for a file of `size` bytes: memory, bytes of a file, seconds, no core dump, no children.

    Protocol 2 holds each storage as text and as bytes, and the map counts as memory: below 4 times the file.
    """
    limits = {
        resource.RLIMIT_AS: 4 * size + 2**28,
        resource.RLIMIT_FSIZE: GROWTH * size + 2**24,
        resource.RLIMIT_CPU: 60 + size // 10**7,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        with suppress(ValueError, OSError):  # systems that know a limit but do not let it be set
            resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)


def main(source: str, target: str) -> int:
    """Exit code 3 where the file is refused, 4 where this machine has no room; then stderr is the message and the hint, a line each."""
    try:
        size = os.stat(source).st_size
        confine(size)
        write(target, network(mapped(source)), GROWTH * size + 2**20)
        return 0
    except (InputError, EnvironmentProblem) as error:
        message, hint, code = error.message, error.hint, error.exit_code
    except MemoryError:
        message, hint, code = "wants more memory than a network of its size does", OTHER_FILE, InputError.exit_code
    except OSError as error:
        message, hint, code = f"cannot be copied: {error.strerror or error}", "make room, or set TMPDIR", EnvironmentProblem.exit_code
    print(message, hint, sep="\n", file=sys.stderr)
    return code


def mapped(source: str) -> memoryview:
    try:
        with open(source, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", OTHER_FILE) from error


# ---- The parent


def tensors(path: Path, scratch: Path | None = None) -> dict[str, Tensor]:
    """The weights of a released generator, float32, under the names of state_dict(). A child does the reading.

    `scratch` is where a copy as large as the file stands meanwhile, the system's temporary folder if None.
    Raises InputError for a file that is no such generator, EnvironmentProblem where there is no room.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file", "pass the .pkl that the authors released")
    try:
        with tempfile.TemporaryDirectory(prefix="sid-", dir=scratch, ignore_cleanup_errors=True) as folder:
            free, needed = shutil.disk_usage(folder).free, path.stat().st_size
            if free < needed:
                raise EnvironmentProblem(f"{folder} has {free} bytes free; reading {path} needs {needed}", "make room, or set TMPDIR")
            target = Path(folder) / "ema.safetensors"
            run_child(path, target)
            # load_file maps, so the content outlives the file: a float32 network is never copied.
            return {name: value.float() for name, value in load_file(target).items()}
    except SafetensorError as error:
        raise InputError(f"{path}: its tensors cannot be read: {error}", OTHER_FILE) from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {path}: {error}", "make room, or set TMPDIR") from error


def run_child(source: Path, target: Path) -> None:
    """Raises what the child said, or InputError where it died."""
    # -P and -S: no code from the current folder, and none of any package but this one.
    command = [sys.executable, "-P", "-S", "-B", "-m", __name__, str(source.absolute()), str(target)]
    done = subprocess.run(
        command,
        env=environment(),
        cwd=target.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    for kind_of_error in (InputError, EnvironmentProblem):
        if done.returncode == kind_of_error.exit_code and len(lines) == 2:
            raise kind_of_error(f"{source}: {lines[0]}", lines[1])
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise InputError(f"{source}: reading it was stopped by {name}: it takes more memory or time than a network", OTHER_FILE)
    if done.returncode:
        raise InputError(f"{source}: reading it failed: {lines[-1] if lines else done.returncode}", OTHER_FILE)


def environment() -> dict[str, str]:
    """The child's: where this package is and what a Python of an unusual place needs to start, and none of the user's tokens."""
    package = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": package} | {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PYTHONHOME") if key in os.environ}


def matching(found: dict[str, Tensor], unet: nn.Module) -> None:
    """Raises InputError unless `found` has exactly the names and shapes of `unet`'s state_dict(), and only finite values."""
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    other = [f"{name} {shapes[name]}, not {shape}" for name, shape in expected.items() if shapes.get(name, shape) != shape]
    groups = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected],
        "of another shape": other,
    }
    problems = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in groups.items() if names]
    if problems:
        raise InputError(
            f"not the weights of this base model's UNet: {'; '.join(problems)}", "choose the base model that the file was trained from"
        )
    broken = [name for name, value in found.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{len(broken)} tensors hold values that are not finite, first {broken[0]}", "take another copy of the file")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
