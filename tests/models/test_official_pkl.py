from __future__ import annotations

import copyreg
import functools
import io
import json
import operator
import os
import pickle
import random
import runpy
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.testing._private.utils import runstring
from torch import nn
from torch.jit.unsupported_tensor_ops import execWrapper

from sidcli.errors import EnvironmentProblem, InputError
from sidcli.models import official_pkl
from sidcli.models.inert_pickle import Inert, Name, Reader
from sidcli.models.official_pkl import matching, network, packed, tensors
from tests.tiny import DOWN, UP


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=DOWN,
        up_block_types=UP,
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(
        value.dtype == torch.float32 and value.shape == expected[name].shape and torch.equal(value, expected[name].float())
        for name, value in found.items()
    )


# ---- What is read


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_unet_comes_back_bit_for_bit_from_every_protocol(unet: UNet2DConditionModel, tmp_path: Path, protocol: int) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = tensors(dump(tmp_path / "g.pkl", {"ema": unet}, protocol), scratch)
    assert same(found, unet.state_dict())
    matching(found, unet)
    assert not list(scratch.iterdir())


def test_the_folder_for_the_copy_may_be_given_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(tensors(dump(Path("g.pkl"), {"ema": nn.Linear(2, 2)}), Path())) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(3)).to(dtype).requires_grad_(False)
    assert same(tensors(dump(tmp_path / "g.pkl", {"ema": net})), net.state_dict())


def odd() -> nn.Module:
    """Tensors in every order a storage can have them, shared, missing, empty, and buffers that state_dict() has or has not."""
    net, base = nn.Module(), torch.arange(120.0)
    net.transposed = nn.Parameter(base[:20].view(4, 5).t())
    net.last = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    net.inside = nn.Parameter(base[30:90].view(3, 4, 5)[1:, ::2, 1:4], requires_grad=False)
    net.scalar = nn.Parameter(torch.tensor(3.0))
    net.empty = nn.Parameter(torch.empty(0, 3))
    net.thin = nn.Parameter(base.as_strided((1, 4, 1), (7, 2, 0), 5))
    net.fp16 = nn.Parameter(torch.randn(5, 3).half().t())
    net.register_parameter("none", None)
    net.register_buffer("kept", torch.randn(3))
    net.register_buffer("dropped", torch.arange(3), persistent=False)
    net.register_buffer("nothing", None)
    net.first, net.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    net.second.weight = net.first.weight
    net.again, net.gone = net.first, None
    return net


@pytest.mark.parametrize("protocol", [2, 4])
def test_views_shared_weights_and_buffers_come_back_as_state_dict_has_them(tmp_path: Path, protocol: int) -> None:
    net = odd()
    expected = net.state_dict()
    assert len(expected) == 13 and "dropped" not in expected
    assert same(tensors(dump(tmp_path / "g.pkl", {"ema": net}, protocol)), expected)


def test_each_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    official_pkl.write(str(tmp_path / "w"), network(pickle.dumps({"ema": odd()})), 2**20)
    content = (tmp_path / "w").read_bytes()
    length = int.from_bytes(content[:8], "little")
    widths = {"F32": 4, "F16": 2}
    entries = json.loads(content[8 : 8 + length]).values()
    assert {entry["dtype"] for entry in entries} == set(widths) and length % 8 == 0
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in entries)


def test_classes_that_no_longer_exist_are_no_obstacle(unet: UNet2DConditionModel) -> None:
    content = pickle.dumps({"ema": unet}, 2).replace(b"diffusers.models.unets.unet_2d_condition", b"diffusers.gone")
    with pytest.raises(ImportError):
        pickle.loads(content)
    assert list(network(content)) == list(unet.state_dict())


# ---- What is refused


class Attack:
    """Pickles as a call of `function`; the name of a folder that the call makes is in its arguments."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments

    def __call__(self) -> None:
        """Only so that an attack can be called by another."""


def saved(content: Any, archive: bool = True) -> bytes:
    """As torch.save writes it, to a zip archive or in the old format."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def nested(content: Any) -> Attack:
    """A storage's own file, with something else in it."""
    return Attack(torch.storage._load_from_bytes, saved(content, archive=False))


def within(place: Callable[[nn.Module, Attack], None]) -> Callable[[str], bytes]:
    """An attack at a place of an otherwise honest file."""

    def content(canary: str) -> bytes:
        net = nn.Sequential(nn.Linear(2, 2))
        place(net, Attack(os.mkdir, canary))
        return pickle.dumps({"ema": net})

    return content


def calling(make: Callable[[str], Any], protocol: int = 4) -> Callable[[str], bytes]:
    return lambda canary: pickle.dumps({"ema": make(canary)}, protocol)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def code(canary: str) -> str:
    return f"__import__('os').mkdir({canary!r})"


def with_state(canary: str) -> OrderedDict[str, Any]:
    found: Any = OrderedDict()
    found.evil = Attack(os.mkdir, canary)
    return found


LIVE: dict[str, Callable[[str], bytes]] = {
    "at the top": lambda canary: pickle.dumps(Attack(os.mkdir, canary)),
    "as a value": calling(lambda canary: Attack(os.mkdir, canary)),
    "as a key": lambda canary: pickle.dumps({Attack(os.mkdir, canary): 1}),
    "by protocol 2": calling(lambda canary: Attack(os.mkdir, canary), 2),
    "by protocol 5": calling(lambda canary: Attack(os.mkdir, canary), 5),
    "in a parameter's place": within(lambda net, attack: net[0]._parameters.update(evil=attack)),
    "in a module's place": within(lambda net, attack: net._modules.update(evil=attack)),
    "in a module's state": within(lambda net, attack: net[0].__dict__.update(evil=attack)),
    "among the hooks": within(lambda net, attack: net._forward_hooks.update({0: attack})),
    "among temporary buffers": within(lambda net, attack: net.__dict__.update(_non_persistent_buffers_set=attack)),
    "in the state of an OrderedDict": calling(with_state),
    "in a list": calling(lambda canary: [1, Attack(os.mkdir, canary)]),
    "in a set": calling(lambda canary: {Attack(os.mkdir, canary)}),
    "in a storage's file": calling(lambda canary: nested(Attack(os.mkdir, canary))),
    "in a storage's file twice": calling(lambda canary: nested(nested(Attack(os.mkdir, canary)))),
    "in the storage of a tensor": calling(
        lambda canary: Attack(torch._utils._rebuild_parameter, nested(Attack(os.mkdir, canary)), False, OrderedDict())
    ),
    "torch.load": calling(
        lambda canary: Attack(functools.partial(torch.load, weights_only=False), io.BytesIO(saved(Attack(os.mkdir, canary))))
    ),
    "pickle.loads": calling(lambda canary: Attack(pickle.loads, pickle.dumps(Attack(os.mkdir, canary)))),
    "os.system": calling(lambda canary: Attack(os.system, f"mkdir {canary}")),
    "subprocess.run": calling(lambda canary: Attack(subprocess.run, ["mkdir", canary])),
    "eval": calling(lambda canary: Attack(eval, code(canary))),
    "exec": calling(lambda canary: Attack(exec, code(canary)), 2),
    "getattr": calling(lambda canary: Attack(Attack(getattr, Attack(__import__, "os"), "mkdir"), canary)),
    "functools.partial": calling(lambda canary: Attack(functools.partial(os.mkdir, canary))),
    "operator.methodcaller": calling(lambda canary: Attack(operator.methodcaller("mkdir", canary), Attack(__import__, "os"))),
    "map": calling(lambda canary: Attack(list, Attack(map, os.mkdir, [canary]))),
    "runpy": calling(lambda canary: Attack(runpy._run_code, code(canary), {})),
    "numpy": calling(lambda canary: Attack(runstring, code(canary), {})),
    "torch.jit": calling(lambda canary: Attack(execWrapper, code(canary), {}, {})),
    "INST": lambda canary: b"(" + text(canary) + b"iposix\nmkdir\n.",
    "OBJ": lambda canary: b"(cposix\nmkdir\n" + text(canary) + b"o.",
    "EXT1": lambda canary: b"\x80\x02\x82\x7f" + text(canary) + b"\x85R.",
    "EXT2": lambda canary: b"\x80\x02\x83\x7f\x7f" + text(canary) + b"\x85R.",
    "EXT4": lambda canary: b"\x80\x02\x84\x7f\x7f\x7f\x00" + text(canary) + b"\x85R.",
    "a dotted name": lambda canary: (
        b"\x80\x04" + text("torch.nn") + text("modules.module.torch.os.mkdir") + b"\x93" + text(canary) + b"\x85R."
    ),
    "BUILD of __setstate__": lambda canary: (
        b"\x80\x04ctorch.nn.modules.module\nModule\n)\x81}" + (text("__setstate__") + b"cposix\nmkdir\nsb") + (text(canary) + b"b.")
    ),
}
"""Attacks that work on pickle.loads."""


@pytest.fixture
def extensions() -> Iterator[None]:
    """mkdir in the registry of extensions, and in the cache that pickle asks without asking find_class."""
    codes = {0x7F: "mkdir", 0x7F7F: "mkdir", 0x7F7F7F: "mkdir"}
    for number, name in codes.items():
        copyreg._inverted_registry[number] = ("posix", name)
        copyreg._extension_cache[number] = os.mkdir
    yield
    for number in codes:
        del copyreg._inverted_registry[number]
        del copyreg._extension_cache[number]


@pytest.mark.parametrize("attack", LIVE)
def test_an_attack_that_works_on_pickle_is_refused_and_nothing_of_it_runs(attack: str, tmp_path: Path, extensions: None) -> None:
    canary = tmp_path / "canary"
    content = LIVE[attack](str(canary))
    with pytest.raises(InputError, match="refused"):
        network(content)
    assert not canary.exists()
    with suppress(Exception):  # after the damage
        pickle.loads(content)
    assert canary.exists(), "no attack at all"


@pytest.mark.parametrize("attack", LIVE)
def test_nothing_runs_even_where_every_name_is_let_in(
    attack: str, tmp_path: Path, extensions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of names is not the wall."""
    monkeypatch.setattr(Reader, "_name", lambda self, module, name: Name(module, name))
    canary = tmp_path / "canary"
    with suppress(InputError):
        network(LIVE[attack](str(canary)))
    assert not canary.exists()


NAMES = [
    "posix.system",
    "builtins.eval",
    "numpy.core.multiarray._reconstruct",
    "torch._C._nn.gelu",
    "torch.load",
    "builtins.object",
]
NAMES += ["diffusersx.Model", "torch.nnx.Module", "torch.serialization.load", "copyreg._reconstructor", "_codecs.decode"]


@pytest.mark.parametrize("name", NAMES)
def test_the_refused_name_is_said(name: str) -> None:
    module, _, last = name.rpartition(".")
    with pytest.raises(InputError, match=f"{name}, which is refused".replace(".", r"\.")):
        Reader(b"\x80\x04" + text(module) + text(last) + b"\x93.").load()


@pytest.mark.parametrize(("module", "name"), [("torch.nn", "Module.__init__.__globals__"), ("torch.nn.", "a"), ("diffusers", "")])
def test_a_name_is_one_word_in_a_module(module: str, name: str) -> None:
    with pytest.raises(InputError, match="is refused"):
        Reader(b"\x80\x04" + text(module) + text(name) + b"\x93.").load()


def test_a_name_cannot_write_to_the_terminal() -> None:
    with pytest.raises(InputError) as caught:
        Reader(b"\x80\x04" + text("os\n\x1b[2J") + text("system") + b"\x93.").load()
    assert caught.value.message.isprintable()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
HUGE = struct.pack("<Q", 2**62)
DEAD = {
    "OBJ of nothing": (b"(o.", "instruction OBJ"),
    "PERSID": (b"Pposix.system\n.", "instruction PERSID"),
    "BINPERSID": (b"\x80\x04(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x00NtQ.", "BINPERSID"),
    "an out-of-band buffer": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "a call of an object": (b"\x80\x04cdiffusers\nA\n)\x81)R.", "a diffusers.A is called"),
    "a call of a text": (b"\x80\x04" + text("posix.system") + b")R.", "a str is called"),
    "a call without a tuple": (b"\x80\x04ctorch\nSize\n]R.", "arguments that are no tuple"),
    "NEWOBJ of a text": (b"\x80\x04" + text("posix.system") + b")\x81.", "a str is called"),
    "NEWOBJ_EX of a tuple": (b"\x80\x04))}\x92.", "a tuple is called"),
    "a name that is a list": (b"\x80\x04]" + text("system") + b"\x93.", "a name that is no text"),
    "BUILD on an OrderedDict": (b"\x80\x04ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb.", "a state for a dict"),
    "BUILD on a class": (b"\x80\x04cdiffusers\nA\nN}" + text("__init__") + b"Ns\x86b.", "a state for a name"),
    "BUILD on a function": (b"\x80\x04ctorch._utils\n_rebuild_parameter\n}" + text("__code__") + b"Nsb.", "a state for a name"),
    "BUILD on a text": (b"\x80\x04" + text("a") + b"}b.", "a state for a str"),
    "items for a dict": (b"\x80\x04}(NNe.", "APPENDS on a dict"),
    "entries for a list": (b"\x80\x04](NNu.", "SETITEMS on a list"),
    "members for a dict": (b"\x80\x04}(" + text("ab") + b"\x90.", "ADDITEMS on a dict"),
    "half an entry": (b"\x80\x04}(Nu.", "shorter"),
    "an OrderedDict of an object": (b"\x80\x04ccollections\nOrderedDict\ncdiffusers\nA\n)\x81\x85R.", "0 positional arguments"),
    "a set of a text": (b"\x80\x04cbuiltins\nset\n" + text("ab") + b"\x85R.", "a set of no list"),
    "another codec": (b"\x80\x04c_codecs\nencode\n" + text("ab") + text("zip") + b"\x86R.", "not written as latin1"),
    "a tensor over bytes": (b"\x80\x04" + TENSOR + b"(C\x01aK\x00K\x01\x85K\x01\x85\x89}tR.", "a tensor of an unknown form"),
    "a parameter of a text": (
        b"\x80\x04ctorch._utils\n_rebuild_parameter\n" + text("a") + b"\x89}\x87R.",
        "a parameter of no tensor",
    ),
    "a frame without an end": (b"\x80\x04\x95" + HUGE, "1 more bytes are announced, 0 follow"),
    "bytes beyond all memory": (b"\x80\x04\x8e" + HUGE + b"a.", "bytes are announced, 2 follow"),
    "a text beyond all memory": (b"\x80\x04\x8d" + HUGE + b"a.", "bytes are announced, 2 follow"),
    "a byte array beyond all memory": (b"\x80\x05\x96" + HUGE + b"a.", "bytes are announced, 2 follow"),
    "a number beyond all memory": (b"\x80\x04\x8b\xff\xff\xff\x7fa.", "bytes are announced, 2 follow"),
    "a number of negative length": (b"\x80\x04\x8b\xff\xff\xff\xffa.", "count < 0"),
    "a number of a million digits": (b"L" + b"9" * 10**6 + b"L\n.", "not found"),
    "a memo entry that is not there": (b"\x80\x04j\xff\xff\xff\xff.", "4294967295"),
    "an open mark": (b"\x80\x04(N.", "end with one object"),
    "no mark": (b"\x80\x04Nt.", "pop from empty list"),
    "an empty stack": (b"\x80\x04.", "end with one object"),
    "two results": (b"\x80\x04NN.", "end with one object"),
    "a deep key": (b"\x80\x04})" + b"\x85" * 100_000 + b"Ns.", "a tuple as a key"),
    "a deep member of a set": (b"\x80\x04\x8f()" + b"\x85" * 100_000 + b"\x90.", "a tuple as a key"),
    "a deep member of a frozenset": (b"\x80\x04()" + b"\x85" * 100_000 + b"\x91.", "a tuple as a key"),
    "a web page": (b"<!DOCTYPE html>", "not a pickle"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a pickle"),
    "random bytes": (random.Random(0).randbytes(1000), "not a pickle"),
    "nothing": (b"", "not a pickle"),
}


@pytest.mark.parametrize(("content", "reason"), DEAD.values(), ids=DEAD.keys())
def test_what_no_network_has_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Reader(content).load()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_cut_anywhere_is_refused(protocol: int) -> None:
    content = pickle.dumps({"ema": nn.Linear(2, 2)}, protocol)
    assert len(network(content)) == 2
    for end in range(len(content)):
        with pytest.raises(InputError):
            network(content[:end])


def test_a_file_with_flipped_bytes_is_read_or_refused_and_nothing_else() -> None:
    honest, draw = pickle.dumps({"ema": odd()}), random.Random(0)
    for _ in range(300):
        content = bytearray(honest)
        for _ in range(draw.choice([1, 1, 4])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            for view in network(bytes(content)).values():
                assert len(packed(view)) == view.nbytes
        except InputError:
            pass


def test_what_is_called_in_an_allowed_package_stays_a_name() -> None:
    partial = functools.partial(nn.functional.silu, inplace=True)
    content = [partial, torch.device("cpu"), torch.float16, torch.Size([2, 3]), nn.ReLU(), frozenset({1}), nn.functional.silu]
    found = Reader(pickle.dumps(content)).load()
    assert [type(item) for item in found] == [Inert, Inert, Name, tuple, Inert, frozenset, Name]
    assert str(found[0].of) == "functools.partial" and not found[0].state and found[3] == (2, 3)
    assert found[4].state["inplace"] is False


# ---- Tensors and trees that lie


def typed(tensor: torch.Tensor) -> torch.TypedStorage:
    """What a tensor is pickled with, without the warning that it is old."""
    return torch.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


def rebuilt(offset: Any, size: Any, stride: Any, count: int = 6) -> bytes:
    return pickle.dumps(
        Attack(torch._utils._rebuild_tensor_v2, typed(torch.arange(float(count))), offset, size, stride, False, OrderedDict())
    )


BIG = 2**40
FORMS = {
    "reaches outside its storage": [
        *[(0, (7,), (1,)), (1, (6,), (1,)), (6, (1,), (1,)), (0, (2, 3), (4, 1)), (0, (2,), (BIG,)), (BIG, (1,), (1,))],
        *[(0, (7,), (0,)), (0, (BIG, BIG), (0, 0)), (0, (6, 2), (1, 1))],
    ],
    "repeats": [(0, (2,), (0,)), (0, (2, 1, 3), (0, 0, 1))],
    "is no count": [
        (0, (0, 2**62), (1, 1)),
        (0, (10**5000,), (1,)),
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0.0, (1,), (1,)),
        (True, (1,), (1,)),
        (0, ("1",), (1,)),
    ],
    "unknown form": [(0, [1], [1]), (0, 1, 1)],
    "zip": [(0, (2, 2), (1,)), (0, (), (1,))],
    "9 axes": [(0, (1,) * 9, (1,) * 9)],
}


@pytest.mark.parametrize(("reason", "number"), [(reason, n) for reason, forms in FORMS.items() for n in range(len(forms))])
def test_a_tensor_that_leaves_its_storage_or_repeats_it_is_refused(reason: str, number: int) -> None:
    with pytest.raises(InputError, match=reason):
        Reader(rebuilt(*FORMS[reason][number])).load()


def test_a_tensor_that_ends_with_its_storage_is_read() -> None:
    view = Reader(rebuilt(1, (2, 2), (2, 2))).load()
    assert struct.unpack("<4f", packed(view)) == (1.0, 3.0, 3.0, 5.0)
    assert struct.unpack("<2f", packed(Reader(rebuilt(0, (2,), (5,))).load())) == (0.0, 5.0)


def test_a_tensor_with_conjugate_or_negative_bits_is_refused() -> None:
    with pytest.raises(InputError):
        Reader(pickle.dumps(torch.view_as_complex(torch.randn(2, 2)).conj().imag)).load()


BLOB = saved(typed(torch.arange(6.0)), archive=False)
KEY = BLOB.rindex(b"]q\x00X") + 8
BLOBS = {
    "nothing": (b"", "not a pickle"),
    "cut": (BLOB[:-1], "length"),
    "longer": (BLOB + b"\0", "length"),
    "another count": (BLOB[:-32] + struct.pack("<q", 5) + BLOB[-24:], "length"),
    "a negative count": (BLOB[:-32] + struct.pack("<q", -1) + BLOB[-24:], "length"),
    "more elements than bytes": (BLOB.replace(b"cpuq\x03K\x06", b"cpuq\x03K\x07"), "length"),
    "another type": (BLOB.replace(b"FloatStorage", b"LongStorage"), "length"),
    "an unknown type": (BLOB.replace(b"FloatStorage", b"EvilStorage"), "torch.EvilStorage, which is refused"),
    "another key": (BLOB[:KEY] + b"x" + BLOB[KEY + 1 :], "holds something else"),
    "two storages": (saved([typed(torch.zeros(2)), typed(torch.ones(2))], archive=False), "holds something else"),
    "big endian": (BLOB.replace(b"endianq\x02\x88", b"endianq\x02\x89"), "unknown format"),
    "another magic": (BLOB.replace(b"l\xfc\x9cF", b"m\xfc\x9cF"), "unknown format"),
    "another version": (BLOB.replace(b"M\xe9\x03.", b"M\xe8\x03."), "unknown format"),
    "a tensor": (saved(torch.zeros(2), archive=False), "_rebuild_tensor_v2, which is refused"),
    "a name of a network": (saved(nn.ReLU, archive=False), "ReLU, which is refused"),
    "a zip archive": (saved(torch.zeros(2)), "not a pickle"),
    "a bomb": (b"\x80\x02" + b"N" * 2000, "more than 1000 instructions"),
}


@pytest.mark.parametrize(("blob", "reason"), BLOBS.values(), ids=BLOBS.keys())
def test_a_storage_that_is_not_what_it_says_is_refused_with_the_reason(blob: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Reader(pickle.dumps(Attack(torch.storage._load_from_bytes, blob))).load()


def chain(modules: int) -> nn.Module:
    """Each module holds the next one twice: 2 to the power of `modules` names for one tensor."""
    net: nn.Module = nn.Linear(1, 1, bias=False)
    for _ in range(modules):
        outer = nn.Module()
        outer.a, outer.b = net, net
        net = outer
    return net


def circle() -> nn.Module:
    net = nn.Linear(1, 1)
    net.inner = nn.Module()
    net.inner._modules["outer"] = net
    return net


def holding(**groups: Any) -> nn.Module:
    net = nn.Module()
    net.__dict__.update(groups)
    return net


TREES = {
    "a bomb of names": (lambda: chain(30), "modules"),
    "a circle": (circle, "inside each other"),
    "integers": (lambda: holding(_buffers={"steps": torch.tensor(1)}), "steps is an I64"),
    "a text for a weight": (lambda: holding(_parameters={"w": "text"}), "w is a str"),
    "a text for a module": (lambda: holding(_modules={"m": "text"}), "m is a str"),
    "a path for a name": (lambda: holding(_parameters={"../w": torch.zeros(1)}), "no dict of names"),
    "a dotted name": (lambda: holding(_modules={"a.b": nn.ReLU()}), "no dict of names"),
    "a number for a name": (lambda: holding(_parameters={1: torch.zeros(1)}), "no dict of names"),
    "a list of weights": (lambda: holding(_parameters=[torch.zeros(1)]), "no dict of names"),
    "no module": (lambda: torch.zeros(1), "not a network"),
    "a state dict": (lambda: nn.Linear(1, 1).state_dict(), "state for a dict"),
    "an object without modules": (lambda: torch.device("cpu"), "not a network"),
}


@pytest.mark.parametrize(("tree", "reason"), TREES.values(), ids=TREES.keys())
def test_a_tree_that_no_module_has_is_refused(tree: Callable[[], Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        network(pickle.dumps({"ema": tree()}))


def edm() -> bytes:
    source = b"import os"
    return (
        b"\x80\x04}"
        + text("ema")
        + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}C"
        + bytes([9])
        + source
        + b"s\x85Rs."
    )


FILES = {
    "a zip archive, as torch.save": lambda: saved({"step": 1}),
    "written by torch.save": lambda: saved({"step": 1}, archive=False),
    "EDM or StyleGAN, which carries Python source": edm,
    "no key 'ema'; its keys: G, psi": lambda: pickle.dumps({"G": 1, "psi": 2}),
    "its keys: none": lambda: pickle.dumps({}),
    "its keys: int, x": lambda: pickle.dumps({10**5000: 1, "x": 2}),
    "holds a list": lambda: pickle.dumps([1]),
    "holds a torch.nn.modules.linear.Linear": lambda: pickle.dumps(nn.Linear(1, 1)),
    "instruction INST": lambda: b"(iposix\nmkdir\n.",
}


@pytest.mark.parametrize("reason", FILES)
def test_other_files_are_refused_with_the_reason(reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        network(FILES[reason]())


# ---- Through the child


@pytest.mark.parametrize("attack", ["in a parameter's place", "in the storage of a tensor", "EXT1", "BUILD of __setstate__"])
def test_an_attack_on_the_child_is_refused_in_one_line_with_exit_code_3(tmp_path: Path, attack: str) -> None:
    path, scratch, canary = tmp_path / "g.pkl", tmp_path / "scratch", tmp_path / "canary"
    scratch.mkdir()
    path.write_bytes(LIVE[attack](str(canary)))
    with pytest.raises(InputError, match="refused") as caught:
        tensors(path, scratch)
    assert caught.value.exit_code == 3 and caught.value.message.startswith(f"{path}: ") and caught.value.hint
    assert "\n" not in caught.value.message and not canary.exists() and not list(scratch.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x80", random.Random(1).randbytes(5000)], ids=["empty", "cut", "random"])
def test_a_file_that_is_no_pickle_is_refused_by_the_child(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError):
        tensors(path)


def test_a_file_that_unpacks_to_far_more_than_itself_is_refused(tmp_path: Path) -> None:
    net = nn.Module()
    net.register_parameter("w0", nn.Parameter(torch.zeros(2**20)))
    for index in range(1, 8):
        net.register_parameter(f"w{index}", net.w0)
    with pytest.raises(InputError, match="out of all proportion"):
        tensors(dump(tmp_path / "g.pkl", {"ema": net}))


def test_a_file_that_wants_more_memory_than_its_size_explains_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.pkl"
    path.write_bytes(b"\x80\x04" + b"\x8f" * 1_900_000)  # 1.9 MB, 0.4 GB of empty sets
    with pytest.raises(InputError, match="more memory"):
        tensors(path)


def test_more_instructions_than_a_network_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidcli.models.inert_pickle.INSTRUCTIONS", 1000)
    with pytest.raises(InputError, match="more than 1000 instructions"):
        Reader(b"\x80\x04" + b"N" * 2000 + b".").load()


@pytest.mark.parametrize(
    ("deed", "sign"),
    [
        ("bytearray(2**29)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**25))", "File too large"),
        ("print(resource.getrlimit(resource.RLIMIT_CORE)[1], resource.getrlimit(resource.RLIMIT_CPU)[1])", "0 60"),
    ],
)
def test_the_child_cannot_leave_its_limits(tmp_path: Path, deed: str, sign: str) -> None:
    program = f"import resource; from sidcli.models.official_pkl import confine; confine(0); {deed}"
    command = [sys.executable, "-P", "-S", "-c", program]
    done = subprocess.run(command, env=official_pkl.environment(), cwd=tmp_path, capture_output=True, text=True)
    assert sign in done.stdout + done.stderr


def test_the_child_sees_no_token_and_no_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the current folder that shadows the standard library would run in a child that looks there."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickletools.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('the wrong module')")
    assert len(tensors(dump(tmp_path / "g.pkl", {"ema": nn.Linear(2, 2)}))) == 2
    assert "secret" not in official_pkl.environment().values()


def test_neither_torch_nor_diffusers_is_there_in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$1" "$2" "$3" -c "import torch"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match="No module named 'torch'"):
        tensors(dump(tmp_path / "g.pkl", {"ema": nn.Linear(2, 2)}))


@pytest.mark.parametrize(
    ("script", "reason"), [("kill -9 $$", "SIGKILL"), ("kill -24 $$", "SIGXCPU"), ("echo no; exit 1", "failed: 1")]
)
def test_a_child_that_dies_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match=reason):
        tensors(dump(tmp_path / "g.pkl", {"ema": nn.Linear(2, 2)}))


def test_a_child_that_writes_nonsense_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_pkl, "run_child", lambda source, target: target.write_bytes(b"nonsense"))
    with pytest.raises(InputError, match="cannot be read"):
        tensors(dump(tmp_path / "g.pkl", {"ema": nn.Linear(2, 2)}))


def test_what_is_missing_on_this_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dump(tmp_path / "g.pkl", {"ema": nn.Linear(2, 2)})
    for missing in (tmp_path / "no.pkl", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            tensors(missing)
    with pytest.raises(EnvironmentProblem):
        tensors(path, tmp_path / "nowhere")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(EnvironmentProblem, match="of disk space free"):
        tensors(path)


def test_a_full_disk_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(official_pkl, "confine", lambda size: None)
    monkeypatch.setattr(official_pkl, "write", full)
    assert official_pkl.main(str(dump(tmp_path / "g.pkl", {"ema": nn.Linear(2, 2)})), "") == 4
    message, hint = capsys.readouterr().err.splitlines()
    assert "No space left" in message and "room" in hint


# ---- Against the base model


def test_tensors_of_another_network_are_refused_by_name(unet: UNet2DConditionModel) -> None:
    found = dict(unet.state_dict())
    matching(found, unet)
    first = next(iter(found))
    with pytest.raises(InputError, match=f"1 missing .{first}"):
        matching({name: value for name, value in found.items() if name != first}, unet)
    with pytest.raises(InputError, match=r"1 unexpected .more"):
        matching(found | {"more": torch.zeros(1)}, unet)
    with pytest.raises(InputError, match=rf"1 misshaped .{first}: \(1,\), not \(8, 4, 3, 3\)"):
        matching(found | {first: torch.zeros(1)}, unet)
    with pytest.raises(InputError, match=r"missing .* unexpected"):
        matching({f"x.{name}": value for name, value in found.items()}, unet)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(unet: UNet2DConditionModel, value: float) -> None:
    name, weight = next(iter(unet.state_dict().items()))
    broken = weight.clone()
    broken[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=f"not finite, the first is {name}"):
        matching(dict(unet.state_dict()) | {name: broken}, unet)
