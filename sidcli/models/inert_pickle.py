"""Read pickles of modules as data, without importing, calling or modifying anything that a file names.

The reader is a stack machine for the instructions that pickletools parses. It supports only the instructions that pickled networks
contain and calls only the functions in BUILDERS; any other accepted name becomes an inert Name, any object an Inert. It needs only
the standard library.

A pickle.Unpickler with an allow list in find_class is less safe: REDUCE calls and BUILD modifies any allowed object, EXT1 to EXT4
use copyreg's cache before find_class, and lengths are allocated before they are checked. Here safety does not depend on the list of
names, which only distinguishes hostile files from unknown ones. Both readers are fast enough: the network of SD 1.5 takes 100,000
instructions and 0.2 seconds, and its weights are not copied.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sidcli.errors import InputError

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
"""Storage type of torch -> (dtype in safetensors, bytes per element)."""

INERT = ("diffusers", "torch.nn", "transformers", "xformers", "peft")
"""Packages whose names are accepted. They become `Name` objects."""
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
TOKENS = {("functools", "partial"), ("torch", "device"), ("torch.utils.checkpoint", "checkpoint")} | {
    ("torch", name) for name in DTYPES
}

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
"""Magic number and version of torch.save files before zip archives. Each storage inside a plain pickle has this format."""
INSTRUCTIONS, NESTED_INSTRUCTIONS = 2_000_000, 1000
"""Maximum instructions of a pickle, and of a pickle inside a storage. Each uses at most some hundred bytes, whatever the file."""
LINE = 1000
"""Maximum bytes of a line: protocols below 4 write names as text."""
AXES = 8

HINT = "only generators of SiD-LSG are read: a pickle of {'ema': UNet2DConditionModel}"

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
LITERALS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the file names. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(eq=False)
class Inert:
    """A placeholder for the result of calling `of`. Its attributes are plain data; the arguments of the call are discarded."""

    of: Name
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    """A storage of `count` elements whose type is in STORAGES; `data` are their bytes."""

    kind: str
    key: str
    count: int
    data: memoryview = field(default_factory=lambda: memoryview(b""))


@dataclass(frozen=True, eq=False)
class View:
    """A tensor. Offset, size and stride are in elements, and every element lies inside the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return STORAGES[self.storage.kind][0]

    @property
    def width(self) -> int:
        """Bytes per element."""
        return STORAGES[self.storage.kind][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.width


def shown(text: str) -> str:
    """Return untrusted text as ASCII on one line, truncated to 200 characters."""
    return ascii(text)[1:-1][:200]


def typename(value: Any) -> str:
    return str(value.of) if type(value) is Inert else type(value).__name__.lower()


class Window:
    """A file-like object over memory. A read beyond its end raises ValueError before memory is allocated.

    Short reads return bytes, long reads return views, so that the storages of a mapped file are not copied.
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
        end = line.index(b"\n") + 1
        self.position += end
        return line[:end]


class Reader:
    """A reader of consecutive pickles of protocol 2 to 5 in memory. Each call of `load` reads one pickle.

    `nested` is for the pickles inside a storage's own file, which can name only storages.
    """

    def __init__(self, data: bytes | memoryview, nested: bool = False):
        self.window: Any = Window(memoryview(data))
        self.nested = nested

    def load(self) -> Any:
        """Return an object of plain containers, Inert and View. Raises InputError for content that no network needs."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks saved at open MARK instructions
        self.memo: dict[int, Any] = {}
        most = NESTED_INSTRUCTIONS if self.nested else INSTRUCTIONS
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.window)):
                if count == most:
                    raise InputError(f"more than {most} instructions: no network needs as many", HINT)
                self._take(opcode.name, argument)
            if len(self.stack) != 1 or self.below:
                raise ValueError("it does not end with one object")
            return self.stack[0]
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, struct.error) as error:
            raise InputError(f"not a pickle, or damaged at byte {self.window.position}: {shown(str(error))}", HINT) from error
        except RecursionError as error:
            raise InputError("its content is nested too deep for a network", HINT) from error

    def _take(self, instruction: str, argument: Any) -> None:
        """Execute one instruction. Raises InputError for an instruction that pickled networks do not contain."""
        push, pop = self.stack.append, self.stack.pop
        match instruction:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case literal if literal in LITERALS:
                push(argument)
            case constant if constant in CONSTANTS:
                push(CONSTANTS[constant])
            case container if container in CONTAINERS:
                push(CONTAINERS[container]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(instruction[-1]))]
                push(tuple(reversed(items)))

            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE" | "FROZENSET" | "APPENDS" | "SETITEMS" | "ADDITEMS":
                items, self.stack = self.stack, self.below.pop()
                if instruction == "TUPLE":
                    self.stack.append(tuple(items))
                elif instruction == "FROZENSET":
                    self.stack.append(frozenset(keys(items)))
                else:
                    extend(self.stack[-1], instruction, items)
            case "APPEND":
                item = pop()
                extend(self.stack[-1], "APPENDS", [item])
            case "SETITEM":
                value, key = pop(), pop()
                extend(self.stack[-1], "SETITEMS", [key, value])

            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])

            case "GLOBAL":
                module, _, name = argument.partition(" ")
                push(self._name(module, name))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(self._name(module, name))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(call(function, arguments))
            case "NEWOBJ" | "NEWOBJ_EX":
                parts = [pop() for _ in range(2 if instruction == "NEWOBJ" else 3)]
                push(call(parts[-1]))
            case "BUILD":
                state = pop()
                set_state(self.stack[-1], state)
            case "BINPERSID" if self.nested:
                push(announced(pop()))
            case _:
                raise InputError(f"the pickle instruction {instruction} is refused: no network is written with it", HINT)

    def _name(self, module: Any, name: Any) -> Name:
        """Return an accepted name as a Name. Raises InputError if no list of accepted names contains it."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        module = "builtins" if module == "__builtin__" else module  # the Python 2 name, which protocol 2 writes
        found = Name(module, name)
        plain = re.fullmatch(r"\w+(\.\w+)*", module, re.ASCII) and re.fullmatch(r"\w+", name, re.ASCII)
        if plain and module == "torch" and name in STORAGES:
            return found
        if module.split(".")[0] in ("torch_utils", "dnnlib"):
            raise InputError(f"a pickle of EDM or StyleGAN, which carries Python source that runs on loading ({found})", HINT)
        listed = (module, name) in BUILDERS or (module, name) in TOKENS or f"{module}.".startswith(tuple(f"{p}." for p in INERT))
        if plain and listed and not self.nested:
            return found
        raise InputError(f"it names {found}, which is refused: weights have no use for it", HINT)


def keys(items: list[Any]) -> list[Any]:
    """Return `items`. Raises ValueError unless all are plain: hashing a deeply nested tuple would overflow the stack."""
    for item in items:
        if type(item) not in (str, int, float, bool, bytes, type(None)):
            raise ValueError(f"a {typename(item)} as a key")
    return items


def extend(target: Any, instruction: str, items: list[Any]) -> None:
    if instruction == "APPENDS" and type(target) is list:
        target.extend(items)
    elif instruction == "ADDITEMS" and type(target) is set:
        target.update(keys(items))
    elif instruction == "SETITEMS" and type(target) is dict:
        target.update(zip(keys(items[::2]), items[1::2], strict=True))
    elif type(target) is not Inert:  # an Inert of a subclass of dict or list; its items are not weights
        raise ValueError(f"{instruction} on a {typename(target)}")


def set_state(target: Any, state: Any) -> None:
    """Execute BUILD on an Inert. Raises ValueError for any other target: containers, names and tensors have no state."""
    if type(target) is not Inert:
        raise ValueError(f"a state for a {typename(target)}")
    if type(state) is tuple and len(state) == 2:  # (attributes, slots)
        state = state[0]
    target.state = state if type(state) is dict else {}


# ---- Builders of the supported objects


def call(function: Any, arguments: Any = None) -> Any:
    """Return the result of REDUCE, or of NEWOBJ if `arguments` is None. NEWOBJ always gives an Inert."""
    if type(function) is not Name:
        raise ValueError(f"a {typename(function)} is called")
    build = BUILDERS.get((function.module, function.name))
    if build is None or arguments is None:
        return Inert(function)
    if type(arguments) is not tuple:
        raise ValueError("arguments that are no tuple")
    return build(*arguments)


def encoded(text: Any, encoding: Any) -> bytes:
    """Return the bytes that protocol 2 writes as latin1 text."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes that are not written as latin1")
    return text.encode("latin-1")


def members(items: Any) -> set[Any]:
    """Return the set that protocols below 4 write as a list."""
    if type(items) is not list:
        raise ValueError("a set of no list")
    return set(keys(items))


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
    """Read a storage from its own file inside the pickle: five pickles, the number of elements, the elements.

    torch.storage._load_from_bytes would use an unpickler that can run any code.
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
    """Return a tensor as a View. Raises InputError if it reaches outside its storage or repeats its elements."""
    if type(held) is not Storage or type(size) is not tuple or type(stride) is not tuple or metadata:
        raise ValueError("a tensor of an unknown form")
    if any(type(number) is not int or not 0 <= number < 2**62 for number in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, size or stride is no count")
    axes = list(zip(size, stride, strict=True))
    if len(axes) > AXES:
        raise ValueError(f"a tensor of {len(axes)} axes")
    last = offset + sum((length - 1) * step for length, step in axes)
    if math.prod(size) and (last >= held.count or math.prod(size) > held.count):
        raise InputError(f"a tensor of size {shown(str(size))} reaches outside its storage of {held.count} elements", HINT)
    if any(length > 1 and step == 0 for length, step in axes):
        raise InputError("a tensor that repeats its elements is refused: no weight does", HINT)
    return View(held, offset, size, stride)


def parameter(data: Any, gradient: Any, hooks: Any, state: Any = None) -> View:
    if type(data) is not View:
        raise ValueError("a parameter of no tensor")
    return data


BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "bytes"): lambda: b"",
    ("builtins", "set"): members,
    ("builtins", "frozenset"): members,
    ("collections", "OrderedDict"): lambda: dict(),  # accepts no arguments; dict itself would accept any
    ("_codecs", "encode"): encoded,
    ("torch", "Size"): torch_size,
    ("torch.storage", "_load_from_bytes"): storage,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): parameter,
}
"""(Module, name) in the file -> function of this module that is called instead. A file can call nothing else."""
