"""Pickles of modules, read as data: nothing that a file names is imported, called or altered.

A stack machine over the instructions that pickletools parses. It knows only those that networks are written with and calls only
BUILDERS; any other name becomes an inert Name, any object an Inert. It needs the standard library alone.

Why not a pickle.Unpickler whose find_class has a list: there REDUCE calls and BUILD alters whatever was let in, EXT1 to EXT4 ask
copyreg's cache before they ask find_class, and lengths are allocated before they are checked. Here the list of names is not the wall,
it tells a hostile file from an unknown one. Speed speaks for neither: the network of SD 1.5 takes 100,000 instructions, a fifth of
a second, and its weights stay where they are.
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
"""torch's name of a storage type -> its name in safetensors, bytes of an element."""

INERT = ("diffusers", "torch.nn", "transformers", "xformers", "peft")
"""Packages whose names are let in, as names."""
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
TOKENS = {("functools", "partial"), ("torch", "device"), ("torch.utils.checkpoint", "checkpoint")} | {
    ("torch", name) for name in DTYPES
}

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
"""How torch.save opened its files before they were zip archives; each storage inside a plain pickle is still such a file."""
INSTRUCTIONS, NESTED_INSTRUCTIONS = 2_000_000, 1000
"""Of a pickle and of one in a storage. Each costs the reader some hundred bytes at most, whatever the file says."""
LINE = 1000
"""Bytes of the longest line: protocols below 4 write names as text."""
AXES = 8

HINT = "only generators of SiD-LSG are read: a pickle of {'ema': UNet2DConditionModel}"

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
LITERALS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the file names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclass(eq=False)
class Inert:
    """What calling `of` would have made: its attributes are plain data, what it was called with is forgotten."""

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
    def width(self) -> int:
        """Bytes of an element."""
        return STORAGES[self.storage.kind][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.width


def shown(text: str) -> str:
    """A stranger's text, fit for one line of a terminal."""
    return ascii(text)[1:-1][:200]


def typename(value: Any) -> str:
    return str(value.of) if type(value) is Inert else type(value).__name__.lower()


class Window:
    """A file over memory: what is announced beyond its end is refused before anything is allocated.

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
        end = line.index(b"\n") + 1
        self.position += end
        return line[:end]


class Reader:
    """Reads the pickles of protocol 2 to 5 that follow each other in memory, one per `load`.

    `nested` is for the parts of a storage's own file: the only names there are those of storages.
    """

    def __init__(self, data: bytes | memoryview, nested: bool = False):
        self.window: Any = Window(memoryview(data))
        self.nested = nested

    def load(self) -> Any:
        """Plain containers, Inert and View. Raises InputError for everything that a network has no use for."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the open marks
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
        """One instruction. Raises InputError for those that networks are not written with."""
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
        """Raises InputError for a name that is on no list."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 has it
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
    """Only plain values may be hashed: a deep tuple's hash would overflow the interpreter's stack."""
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
    elif type(target) is not Inert:  # of a subclass of dict or list: what it holds is no weight
        raise ValueError(f"{instruction} on a {typename(target)}")


def set_state(target: Any, state: Any) -> None:
    """What BUILD does, to an Inert alone: containers, names and tensors have no state."""
    if type(target) is not Inert:
        raise ValueError(f"a state for a {typename(target)}")
    if type(state) is tuple and len(state) == 2:  # attributes and slots
        state = state[0]
    target.state = state if type(state) is dict else {}


# ---- The few things that are built


def call(function: Any, arguments: Any = None) -> Any:
    """What REDUCE makes, and without arguments NEWOBJ, which never builds."""
    if type(function) is not Name:
        raise ValueError(f"a {typename(function)} is called")
    build = BUILDERS.get((function.module, function.name))
    if build is None or arguments is None:
        return Inert(function)
    if type(arguments) is not tuple:
        raise ValueError("arguments that are no tuple")
    return build(*arguments)


def encoded(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes that are not written as latin1")
    return text.encode("latin-1")


def members(items: Any) -> set[Any]:
    """How protocols below 4 write sets."""
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
    """A storage from its own file inside the pickle: five pickles, the count of its elements, the elements.

    torch.storage._load_from_bytes would read it with an unpickler that is free to run anything.
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
    ("collections", "OrderedDict"): lambda: dict(),  # no arguments: dict itself would take any
    ("_codecs", "encode"): encoded,
    ("torch", "Size"): torch_size,
    ("torch.storage", "_load_from_bytes"): storage,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): parameter,
}
"""Everything that a file can call, under the name it calls it by: functions of this module."""
