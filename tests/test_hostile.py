"""Files that want to harm: each does its work where it is trusted, and is given to everything that takes a file."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sidcli.api import SILENT, sample
from sidcli.data.imagefiles import open_images
from sidcli.data.prompts import read_list
from sidcli.errors import InputError
from sidcli.evaluation import protocols
from sidcli.evaluation.protocols import read_statistics
from sidcli.files import read_json
from sidcli.metrics.clip import Clip
from sidcli.metrics.features import DinoFeatures, InceptionFeatures
from sidcli.models import official_pkl, single_file
from sidcli.models.loading import load
from sidcli.models.sources import find
from sidcli.progress import Silence
from sidcli.settings import read_toml
from sidcli.training import checkpoint
from tests import commands, tiny
from tests.commands import Ended, in_a_child

CPU = torch.device("cpu")


@pytest.fixture
def sid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """The command line in a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return commands.sid


def refused(ended: Ended, *codes: int) -> None:
    """One error of ours, with its exit code, and nothing of Python's."""
    assert ended.returncode in (codes or (3,)), ended
    assert "Traceback" not in ended.stderr and ended.stderr.count("error:") == 1, ended


# ---- 21 Malicious pickles


class Call:
    """Pickled, it calls a function where it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def archived(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def payloads(canary: Path) -> dict[str, tuple[bytes, Callable[[io.BytesIO], object]]]:
    """Name -> a file that makes `canary` appear, and the reader that it was made for."""
    system = Call(os.system, f"touch {canary}")
    wish = f"open({str(canary)!r}, 'w').close()"
    nested = Call(torch.storage._load_from_bytes, saved(system, _use_new_zipfile_serialization=False))
    tensor = Call(torch._utils._rebuild_tensor_v2, nested, 0, (1,), (1,), False, OrderedDict())
    trusting: dict[str, Any] = {"weights_only": False}
    return {
        "text": (f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode(), pickle.load),
        "eval": (pickle.dumps(Call(eval, wish), 2), pickle.load),
        "exec": (pickle.dumps({"state_dict": Call(exec, wish)}, 4), pickle.load),
        "network": (pickle.dumps({"ema": system}, 5), pickle.load),
        "storage": (pickle.dumps({"ema": {"weight": tensor}}, 4), pickle.load),
        "torch": (saved({"state_dict": system}), lambda file: torch.load(file, **trusting)),
        "legacy": (saved(system, _use_new_zipfile_serialization=False), lambda file: torch.load(file, **trusting)),
        "arrays": (
            archived(mu=np.array([system], object), sigma=np.eye(1)),
            lambda file: np.load(file, allow_pickle=True)["mu"],
        ),
    }


PAYLOADS = tuple(payloads(Path("canary")))
SUFFIXES = (".pt", ".ckpt", ".bin", ".pkl", ".pth", ".npz", ".npy", ".safetensors", ".json", ".txt", ".png", ".zip", ".toml")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that must not appear."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def malicious(tmp_path: Path, canary: Path) -> Path:
    """A folder of files, PAYLOAD.SUFFIX."""
    (tmp_path / "evil").mkdir()
    for name, (content, _) in payloads(canary).items():
        for suffix in SUFFIXES:
            (tmp_path / "evil" / f"{name}{suffix}").write_bytes(content)
    return tmp_path / "evil"


@pytest.fixture(scope="session")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in a single file that describes itself, with CLIP's vocabulary, which single files do not contain."""
    model = load(find(str(tiny.write_sd(tmp_path_factory.mktemp("single") / "sd"))))
    networks = {"unet": model.denoiser, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    file = tmp_path_factory.mktemp("single") / "good.safetensors"
    single_file.write(file, networks, model.scheduler_config, {}, torch.float32)
    return file


@pytest.mark.check(21)
@pytest.mark.parametrize("name", PAYLOADS)
def test_the_malicious_files_of_these_tests_do_run_where_they_are_trusted(name: str, tmp_path: Path) -> None:
    content, read = payloads(tmp_path / "proof")[name]
    in_a_child(lambda: read(io.BytesIO(content)))
    assert (tmp_path / "proof").exists()


OPTIONS: dict[str, list[str]] = {
    "teacher": ["distill", "--teacher", "EVIL"],
    "teacher that is planned": ["distill", "--teacher", "EVIL", "--dry-run"],
    "description of a teacher": ["distill", "--teacher", "FILE", "--model-config", "EVIL"],
    "prompts to train on": ["distill", "--teacher", "FOLDER", "--prompts", "EVIL"],
    "settings": ["distill", "--config", "EVIL"],
    "checkpoint": ["distill", "--teacher", "FOLDER", "--resume", "EVIL"],
    "model to draw with": ["sample", "a cat", "--model", "EVIL"],
    "description of a model": ["sample", "a cat", "--model", "FILE", "--model-config", "EVIL"],
    "prompts to draw": ["sample", "--prompts", "EVIL"],
    "model to measure": ["eval", "EVIL", "--protocol", "custom"],
    "reference": ["eval", "FOLDER", "--reference", "EVIL"],
    "captions": ["eval", "FOLDER", "--prompts", "EVIL"],
    "Inception": ["eval", "IMAGES", "--reference", "IMAGES", "--fid", "--inception", "EVIL"],
    "CLIP": ["eval", "IMAGES", "--reference", "IMAGES", "--cmmd", "--cmmd-model", "EVIL"],
    "weights of CLIP": ["eval", "IMAGES", "--reference", "IMAGES", "--cmmd", "--cmmd-model", "tiny-clip:EVIL"],
    "DINOv2": ["eval", "IMAGES", "--reference", "IMAGES", "--dino", "--dino-model", "EVIL"],
    "model to export": ["export", "EVIL", "-o", "out", "--format", "lora", "--teacher", "FOLDER"],
    "teacher of a LoRA": ["export", "emoji", "-o", "out", "--format", "lora", "--teacher", "EVIL"],
    "teacher of a pickle": ["export", "EVIL", "-o", "out", "--format", "lora", "--teacher", "EVIL"],
    "description of an export": ["export", "FILE", "-o", "out", "--model-config", "EVIL"],
}
TEXTS = ("prompts to train on", "prompts to draw", "captions")
"""Options for which a pickle that is plain text is a plain text."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(20):
        Image.fromarray(np.full((16, 16, 3), 9 * index, np.uint8)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


@pytest.mark.check(21)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_malicious_file_given_to_any_option_is_refused_and_does_not_run(
    option: str,
    sid: Callable[..., Ended],
    malicious: Path,
    images: Path,
    good_file: Path,
    sd_folder: Path,
    stand_ins: dict[str, Path],
    canary: Path,
) -> None:
    names = [name for name in PAYLOADS if option not in TEXTS or name != "text"]
    turn = 3 * list(OPTIONS).index(option)
    for index in range(turn, turn + 3):  # which ones is another choice for each option; all of them follow below
        given = {"FILE": good_file, "FOLDER": sd_folder, "IMAGES": images}
        evil = str(malicious / f"{names[index % len(names)]}{SUFFIXES[index % len(SUFFIXES)]}")
        words = [str(given.get(word, word)).replace("EVIL", evil) for word in OPTIONS[option]]
        ended = sid(*words)
        refused(ended)
        assert not canary.exists(), words


READERS: dict[str, Callable[[Path], object]] = {
    "model": lambda file: load(find(str(file))),
    "single file": single_file.read,
    "description": lambda file: single_file.from_folder(file),
    "released generator": official_pkl.tensors,
    "prompts": read_list,
    "settings": read_toml,
    "JSON": read_json,
    "statistics": read_statistics,
    "images": open_images,
    "checkpoint": checkpoint.verify,
    "Inception": lambda file: InceptionFeatures(file, CPU).net,
    "CLIP": lambda file: Clip(f"tiny-clip:{file}", CPU, "").opened,
    "DINOv2": lambda file: DinoFeatures(str(file), CPU).net,
}


@pytest.mark.check(21)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_a_malicious_file_under_any_name(
    reader: str, malicious: Path, stand_ins: dict[str, Path], canary: Path
) -> None:
    read = 0
    for file in sorted(malicious.iterdir()):
        if reader == "released generator" and file.suffix != ".pkl":
            continue  # takes a process each
        try:
            READERS[reader](file)
        except InputError:
            pass
        else:
            read += 1
            assert reader == "prompts" and file.stem == "text", file
        assert not canary.exists(), file
    no_prompts = {".json", ".zip", ".toml"}
    assert read == (len(set(SUFFIXES) - no_prompts) if reader == "prompts" else 0)


@pytest.fixture
def copied(sd_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.mark.check(21, 23)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pt"])
def test_a_folder_whose_weights_are_pickles_is_refused(
    weights: str, suffix: str, copied: Path, malicious: Path, canary: Path
) -> None:
    (copied / f"{weights}.safetensors").unlink()
    for name in PAYLOADS:
        for place in (copied / f"{weights}{suffix}", (copied / weights).parent / "pytorch_model.bin"):
            shutil.copyfile(malicious / f"{name}.bin", place)
        with pytest.raises(InputError, match="safetensors"):
            load(find(str(copied)))


@pytest.mark.check(21)
def test_judges_in_folders_of_pickles_are_refused(
    stand_ins: dict[str, Path], malicious: Path, tmp_path: Path, canary: Path
) -> None:
    clip, dino = (Path(shutil.copytree(stand_ins[name], tmp_path / name)) for name in ("clip", "dino"))
    (clip / "open_clip_model.safetensors").unlink()
    (dino / "model.safetensors").unlink()
    for name in PAYLOADS:
        shutil.copyfile(malicious / f"{name}.bin", clip / "open_clip_pytorch_model.bin")
        shutil.copyfile(malicious / f"{name}.bin", dino / "pytorch_model.bin")
        with pytest.raises(InputError):
            _ = Clip(str(clip), CPU, "").opened
        with pytest.raises(InputError):
            _ = DinoFeatures(str(dino), CPU).net


class Restoring(torch.nn.Module):
    """A script that runs when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.shift, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.shift = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class Looking(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


class Inside(torch.nn.Module):
    def __init__(self, layers: torch.nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def rewritten(file: Path, source: Path, old: bytes, new: bytes) -> Path:
    """A TorchScript file with another program."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(file, "w") as changed:
        for name in whole.namelist():
            content = whole.read(name)
            changed.writestr(name, content.replace(old, new) if name.endswith(".py") else content)
    return file


@pytest.mark.check(21)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("call", ["torch.save", "ops.aten.save", 'getattr(torch, "save")'])
@pytest.mark.parametrize("moment", ["forward", "loading"])
def test_an_inception_whose_script_writes_files_is_refused(call: str, moment: str, tmp_path: Path, canary: Path) -> None:
    layers, line = (Restoring(), b"    self.shift = ") if moment == "loading" else (Looking(), b"    return torch.sin")
    source = tmp_path / "harmless.pt"
    torch.jit.script(Inside(layers)).save(str(source))
    spy = f'    _9 = {call}(1, "{tmp_path / "proof"}")\n'.encode() + line
    trusted = rewritten(tmp_path / "trusted.pt", source, line, spy)
    ended = in_a_child(lambda: torch.jit.load(str(trusted)).layers.forward(torch.zeros(1, 3, 299, 299)))
    assert (tmp_path / "proof").exists(), ended
    evil = rewritten(tmp_path / "evil.pt", source, line, spy.replace(b"proof", b"canary"))
    with pytest.raises(InputError, match=r"would run a program|does more than look at images: aten::save"):
        InceptionFeatures(evil, CPU)([np.zeros((8, 8, 3), np.uint8)])


# ---- 23 Hostile model folders


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.check(23)
@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("model_index.json", {"_class_name": ["evil", "Evil"]}),
        ("model_index.json", {"_class_name": "StableDiffusionEvil"}),
        ("model_index.json", {"_class_name": "../evil"}),
        ("model_index.json", {"unet": ["evil", "UNet2DConditionModel"]}),
        ("model_index.json", {"unet": ["../evil", "UNet2DConditionModel"]}),
        ("model_index.json", {"scheduler": ["evil", "Evil"]}),
        ("model_index.json", {"tokenizer": ["evil", "Evil"]}),
        ("model_index.json", {"safety_checker": ["evil", "Evil"]}),
        ("model_index.json", {"custom": ["evil", "Evil"]}),
        ("unet/config.json", {"_class_name": ["evil", "Evil"]}),
        ("unet/config.json", {"_class_name": "Evil"}),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("unet/config.json", {"quantization_config": {"quant_method": "evil"}}),
        ("vae/config.json", {"auto_map": {"AutoModel": "evil--evil.Evil"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
        ("tokenizer/tokenizer_config.json", {"vocab": "/etc/passwd"}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_object": "evil"}),
        ("scheduler/scheduler_config.json", {"auto_map": {"AutoScheduler": "evil.Evil"}}),
    ],
)
def test_a_folder_that_asks_for_code_of_its_own_is_refused_and_the_code_does_not_run(
    file: str, entries: dict[str, object], copied: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (".", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in ("evil.py", "pipeline.py", "__init__.py"):
            (copied / place / name).write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(copied))  # where python -m sidcli also looks
    monkeypatch.chdir(copied)
    change(copied / file, **entries)
    with pytest.raises(InputError):
        load(find(str(copied)))


@pytest.mark.check(23)
def test_code_beside_a_model_that_nobody_asks_for_is_only_a_file(copied: Path, canary: Path) -> None:
    for name in ("pipeline.py", "unet/diffusion_pytorch_model.py", "tokenizer/tokenizer.py", "setup.py", "sitecustomize.py"):
        (copied / name).write_text(f"open({str(canary)!r}, 'w')")
    load(find(str(copied)))


@pytest.mark.check(23)
def test_an_adapter_beside_a_network_is_refused(copied: Path) -> None:
    content = {"peft_type": "LORA", "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}
    (copied / "text_encoder" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="would change the weights beside it"):
        load(find(str(copied)))


READ = (
    "model_index.json",
    "README.md",
    "LICENSE",
    "unet",
    "tokenizer",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.check(23)
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_a_models_folder_is_not_followed(name: str, relative: bool, copied: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (copied / name).rename(outside) if (copied / name).exists() else outside.write_text("a secret")
    target = os.path.relpath(outside, (copied / name).parent) if relative else outside
    (copied / name).symlink_to(target)
    with pytest.raises(InputError, match="leads out of the model's folder") as caught:
        find(str(copied))
    assert "cp -rL" in caught.value.hint


@pytest.mark.check(23)
def test_links_out_of_folders_of_judges_descriptions_and_graphs_are_not_followed(
    stand_ins: dict[str, Path], good_file: Path, copied: Path, tmp_path: Path
) -> None:
    clip, dino = (Path(shutil.copytree(stand_ins[name], tmp_path / name)) for name in ("clip", "dino"))
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    (graphs / "generator.onnx").write_bytes(b"")
    readers: list[tuple[Path, Callable[[], object]]] = [
        (clip / "open_clip_config.json", lambda: Clip(str(clip), CPU, "")),
        (dino / "model.safetensors", lambda: DinoFeatures(str(dino), CPU).net),
        (copied / "vae" / "config.json", lambda: single_file.read(good_file, copied)),
        (graphs / "generator.onnx", lambda: find(str(graphs))),
    ]
    for file, read in readers:
        file.rename(tmp_path / "outside")
        file.symlink_to(tmp_path / "outside")
        with pytest.raises(InputError, match="leads out of the model's folder"):
            read()
        file.unlink()
        (tmp_path / "outside").rename(file)


@pytest.mark.check(23)
@pytest.mark.parametrize(
    "shard", ["../../outside.safetensors", "OUTSIDE", "../unet/../../outside.safetensors", "x\\..\\y", 3, None]
)
@pytest.mark.parametrize("weights", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_a_list_of_shards_that_leads_elsewhere_is_refused(shard: object, weights: str, copied: Path, tmp_path: Path) -> None:
    (copied / f"{weights}.safetensors").rename(tmp_path / "outside.safetensors")
    shard = str(tmp_path / "outside.safetensors") if shard == "OUTSIDE" else shard
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (copied / f"{weights}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"\.index\.json names .* which is not beside it"):
        load(find(str(copied)))


@pytest.mark.check(23)
def test_a_folder_of_the_hubs_cache_is_links_and_loads(copied: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in copied.rglob("*") if file.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(copied)
        file.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    load(find(str(snapshot)))
    (tmp_path / "short").symlink_to(snapshot)
    load(find(str(tmp_path / "short")))
    (snapshot / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="leads out"):
        find(str(snapshot))


@pytest.mark.check(23)
def test_links_that_stay_inside_a_folder_are_followed_and_loops_refused(copied: Path) -> None:
    (copied / "unet" / "config.json").rename(copied / "described.json")
    (copied / "unet" / "config.json").symlink_to("../described.json")
    load(find(str(copied)))
    (copied / "vae" / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop"):
        find(str(copied))


@pytest.mark.check(23)
def test_a_folder_may_be_called_like_a_file(copied: Path) -> None:
    load(find(str(copied.rename(copied.with_suffix(".safetensors")))))


# ---- 24 Hostile safetensors


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


Attack = Callable[[dict[str, Any], bytes, str], bytes]


def moved(begin: int, end: int) -> Attack:
    """The tensor's offsets, changed by so much."""

    def attack(header: dict[str, Any], data: bytes, name: str) -> bytes:
        start, stop = header[name]["data_offsets"]
        return joined(header | {name: header[name] | {"data_offsets": [start + begin, stop + end]}}, data)

    return attack


def described(**entries: Any) -> Attack:
    return lambda header, data, name: joined(header | {name: header[name] | entries}, data)


def filled(number: float) -> Attack:
    """One element of the tensor, in float32."""

    def attack(header: dict[str, Any], data: bytes, name: str) -> bytes:
        start, stop = header[name]["data_offsets"]
        assert header[name]["dtype"] == "F32" and stop - start >= 8
        return joined(header, data[: start + 4] + struct.pack("<f", number) + data[start + 8 :])

    return attack


def shaped(header: dict[str, Any], data: bytes, name: str) -> bytes:
    count = int(np.prod(header[name]["shape"]))
    return described(shape=[count // 2, 2] if len(header[name]["shape"]) == 1 else [count])(header, data, name)


def without(header: dict[str, Any], data: bytes, name: str) -> bytes:
    """The tensor goes by another name that nothing is called by."""
    return joined({f"{name}.other" if key == name else key: value for key, value in header.items()}, data)


def with_another(header: dict[str, Any], data: bytes, name: str) -> bytes:
    return joined(
        header | {f"{name}.other": {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}}, data + bytes(4)
    )


@cache
def crowded(count: int) -> bytes:
    """A file of so many tensors of one byte."""
    entries = ",".join(f'"{index:07d}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for index in range(count))
    return struct.pack("<Q", len(entries) + 2) + b"{" + entries.encode() + b"}"


LENGTHS: dict[str, Attack] = {
    "header of 2^63 bytes": lambda header, data, name: struct.pack("<Q", 2**63) + data[:1000],
    "header of 2^64 - 1 bytes": lambda header, data, name: struct.pack("<Q", 2**64 - 1) + data[:1000],
    "header longer than the file": lambda header, data, name: struct.pack("<Q", len(data) + 9) + data,
    "header of 100 MB": lambda header, data, name: struct.pack("<Q", 10**8) + json.dumps(header).encode().ljust(10**8) + data,
    "header of 17 MB of tensors": lambda header, data, name: crowded(300_000),
    "header as long as may be": lambda header, data, name: crowded(single_file.MAX_HEADER // 59)[:-1],
    "header that is a list": lambda header, data, name: struct.pack("<Q", 2) + b"[]",
    "header nested deep": lambda header, data, name: struct.pack("<Q", 100_000) + b"[" * 100_000,
    "nothing": lambda header, data, name: b"",
    "data that end early": lambda header, data, name: joined(header, data[:-1]),
    "data left over": lambda header, data, name: joined(header, data + b"x"),
}
OFFSETS: dict[str, Attack] = {
    "overlap": moved(-4, -4),
    "gap": moved(4, 4),
    "beyond the end": moved(2**40, 2**40),
    "negative": described(data_offsets=[-8, 0]),
    "backwards": described(data_offsets=[8, 0]),
    "huge": described(data_offsets=[2**64 - 8, 2**64 - 4]),
    "no such type": described(dtype="F33"),
    "shape that overflows": described(shape=[2**33, 2**33]),
    "negative shape": described(shape=[-1, -1]),
    "no number": described(shape=["x"]),
}
TENSORS: dict[str, tuple[Attack, str]] = {
    "integers": (described(dtype="I32"), "is I32|as I32"),
    "another shape": (shaped, "of shape"),
    "missing": (without, "lacks|missing|no place for"),
    "extra": (with_another, "no place for"),
    "NaN": (filled(float("nan")), "not finite"),
    "infinite": (filled(float("inf")), "not finite"),
}
NAMES = {
    "unet/diffusion_pytorch_model": "mid_block.resnets.0.norm1.weight",
    "vae/diffusion_pytorch_model": "decoder.conv_norm_out.bias",
    "text_encoder/model": "encoder.layers.1.layer_norm2.bias",
    "FILE": "model.diffusion_model.out.0.weight",
    "FILE of the VAE": "first_stage_model.decoder.norm_out.bias",
    "FILE of the text": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
}
"""Where an attack takes place -> the tensor attacked."""


def attacked(place: str, attack: Attack, good_file: Path, copied: Path) -> tuple[Path, Path]:
    """The file that was changed, and the model that it belongs to."""
    single = place.startswith("FILE")
    file = copied / ("attacked.safetensors" if single else f"{place}.safetensors")
    header, data = parts(good_file if single else file)
    file.write_bytes(attack(header, data, NAMES[place]))
    return file, file if single else copied


@pytest.mark.check(24)
@pytest.mark.parametrize("place", ["unet/diffusion_pytorch_model", "text_encoder/model", "FILE"])
def test_a_safetensors_file_that_lies_about_itself_is_refused_by_name_at_once_and_in_little_memory(
    place: str, good_file: Path, sd_folder: Path, tmp_path: Path
) -> None:
    def read_one(what: str, file: Path, model: Path) -> None:
        with pytest.raises(InputError) as caught:
            load(find(str(model)))
        # Beyond the end of the file and in a huge one, the next tensor in the order of the file is named.
        named = NAMES[place] if what not in ("beyond the end", "huge") else "for tensor `"
        assert str(file) in caught.value.message, caught.value.message
        assert what not in OFFSETS or named in caught.value.message, (what, caught.value.message)

    load(find(str(good_file if place == "FILE" else sd_folder)))  # no fork describes it again
    for what, attack in (LENGTHS | OFFSETS).items():
        copied = Path(shutil.copytree(sd_folder, tmp_path / what))
        ended = in_a_child(partial(read_one, what, *attacked(place, attack, good_file, copied)))
        assert ended.returncode == 0 and ended.grown < 200 and ended.read < 200, (what, ended)
        shutil.rmtree(copied)


@pytest.mark.check(24)
@pytest.mark.parametrize(
    ("place", "what"),
    [
        (place, what)
        for place in NAMES
        for what in TENSORS
        if what in ("missing", "extra") or (not place.startswith("FILE of") and (what != "infinite" or place.startswith("vae")))
    ],
)
def test_tensors_that_do_not_fit_or_are_not_finite_are_refused_by_name(
    place: str, what: str, good_file: Path, copied: Path
) -> None:
    attack, said = TENSORS[what]
    file, model = attacked(place, attack, good_file, copied)
    with pytest.raises(InputError, match=said) as caught:
        load(find(str(model)))
    message = caught.value.message
    named = NAMES[place] if not (place.startswith("FILE") and "finite" in message) else NAMES[place].rpartition(".")[2]
    assert named in message and (str(file.parent) in message or str(model) in message), message


@pytest.mark.check(24)
def test_the_text_encoder_of_an_older_library_and_the_rest_of_clip_beside_it_load(copied: Path) -> None:
    file = copied / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": value for name, value in load_file(file).items()}
    spare = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}
    spare |= {"text_projection.weight": torch.ones(32, 32), "vision_model.post_layernorm.weight": torch.ones(4)}
    save_file(tensors | spare, file, {"format": "pt"})
    old = load(find(str(copied))).text_encoders[0].state_dict()
    assert all(torch.equal(old[name.removeprefix("text_model.")], value) for name, value in tensors.items())


@pytest.mark.check(24)
def test_large_weights_are_finite_although_their_sum_is_not(copied: Path) -> None:
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {NAMES["unet/diffusion_pytorch_model"]: torch.full((32,), 3e38)}, file, {"format": "pt"})
    load(find(str(copied)))


@pytest.mark.check(10)
def test_an_image_with_values_that_are_not_finite_is_not_written(copied: Path, tmp_path: Path) -> None:
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(
        weights | {"decoder.conv_in.weight": torch.full_like(weights["decoder.conv_in.weight"], 3e38)}, file, {"format": "pt"}
    )
    with pytest.raises(InputError, match="the image of 'a cat' with seed 7 has values that are not finite") as refused:
        sample("a cat", copied, steps=1, seed=7, output=tmp_path / "x.png", listener=SILENT)
    assert refused.value.hint == f"a smaller --guidance, or another copy of {copied}, with weights in fp32"
    assert not (tmp_path / "x.png").exists()


@pytest.mark.check(24)
def test_a_checkpoint_with_hashes_of_its_own_and_tensors_of_another_run_is_refused(
    sid: Callable[..., Ended], sd_folder: Path
) -> None:
    command = ["distill", "--teacher", sd_folder, "--steps", "1", "--batch-size", "1", "--save-every", "1", "--device", "cpu"]
    # A comparison of precisions would run a backward pass in a fork.
    command += ["--sample-every", "9", "--precision", "fp32", "--quiet", "-o"]
    assert commands.from_server(*command, "run").returncode == 0
    saved_at = Path("run") / "checkpoints" / checkpoint.folder_name(1)
    found = checkpoint.verify(saved_at)
    state = checkpoint.read(found)
    name = next(iter(state["generator"]))
    del state["generator"][name]
    made = checkpoint.write(Path("made"), 1, state, found.config, found.inputs)
    os.mkfifo(made / "junk.safetensors")  # which the manifest does not name
    ended = sid(*command, "other", "--resume", made)
    refused(ended)
    assert "holds no state of this run" in ended.stderr and name in ended.stderr


# ---- 25 Bombs, devices and pipes

MOST = 300
"""Megabytes of memory that a refusal may take, and that it may read."""


def sparse(file: Path, size: int, start: bytes = b"") -> Path:
    """A file of zeros that takes no room on the disk."""
    file.write_bytes(start)
    os.truncate(file, size)
    return file


def lying_archive(file: Path, promised: int, held: bytes, **arrays: np.ndarray) -> Path:
    """An .npz whose directory promises `promised` bytes for a member of what `held` unpacks to."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)
        archive.writestr("mu.npy", held)
        archive.filelist[-1].file_size = promised
    return file


def array_header(count: int) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f8", "fortran_order": False, "shape": (count,)})
    return content.getvalue()


@pytest.mark.check(25)
@pytest.mark.parametrize(
    ("promised", "held", "said"),
    [
        (40 * 2**30, array_header(5 * 2**30), "[0-9]{11} bytes, unpacked"),  # 40 GB promised, and asked for
        (5000, array_header(600) + bytes(2**28), ""),  # 5 kB promised, 256 MB there
        (5000, array_header(5 * 2**30), ""),  # 5 kB there, room for 40 GB asked for
        (5000, array_header(2**60), ""),
    ],
)
def test_statistics_that_unpack_to_more_than_there_is_room_for_are_refused(
    promised: int, held: bytes, said: str, tmp_path: Path
) -> None:
    file = lying_archive(tmp_path / "bomb.npz", promised, held, sigma=np.eye(600))

    def read() -> None:
        with pytest.raises(InputError, match=f"holds no statistics: .*{said}"):
            read_statistics(file)

    ended = in_a_child(read)
    assert ended.returncode == 0 and ended.grown < MOST and ended.read < MOST, ended


BOMBS: dict[str, tuple[str, int, bytes, list[str]]] = {
    "prompts of 3 GB": ("list.txt", 3 << 30, b"a cat\n", ["sample", "--prompts", "EVIL"]),
    "prompts of 1 GB in a line": ("list.txt", 10**9, b"a cat\n", ["sample", "--prompts", "EVIL"]),
    "prompts of 1 GB in a line, to train on": ("list.txt", 10**9, b"a", ["distill", "--prompts", "EVIL", "--teacher", "FOLDER"]),
    "captions of 1 GB": ("list.json", 10**9, b'["a cat', ["eval", "FOLDER", "--prompts", "EVIL"]),
    "captions of 100 MB": ("list.json", 10**8, b'["a cat', ["eval", "FOLDER", "--prompts", "EVIL"]),
    "settings of 9 GB": ("config.toml", 9 << 30, b"steps = 1\n", ["distill", "--config", "EVIL"]),
    "a model of 99 GB": ("big.safetensors", 99 << 30, b"", ["sample", "a cat", "--model", "EVIL"]),
    "a generator of 99 GB": ("big.pkl", 99 << 30, b"\x80\x04", ["export", "EVIL", "-o", "out", "--teacher", "FOLDER"]),
    "a generator of 1 GB": ("big.pkl", 1 << 30, b"\x80\x04", ["export", "EVIL", "-o", "out", "--teacher", "FOLDER"]),
    "statistics of 9 GB": ("big.npz", 9 << 30, b"PK\x03\x04", ["eval", "FOLDER", "--reference", "EVIL"]),
    "a zip of 9 GB": ("big.zip", 9 << 30, b"PK\x03\x04", ["eval", "FOLDER", "--reference", "EVIL"]),
    "an image of 9 GB": ("in/0.png", 9 << 30, b"\x89PNG", ["eval", "IN", "--reference", "IN", "--fid"]),
    "a description of 9 GB": ("in/model_index.json", 9 << 30, b"{", ["sample", "a cat", "--model", "IN"]),
    "a card of 9 GB": ("in/sid.json", 9 << 30, b"{", ["sample", "a cat", "--model", "IN"]),
    "a manifest of 9 GB": (
        "in/manifest.json",
        9 << 30,
        b"{",
        ["distill", "--teacher", "FOLDER", "--resume", "IN", "--precision", "fp32", "-o", "run"],
    ),
}


@pytest.mark.check(25)
@pytest.mark.parametrize("what", BOMBS)
def test_a_file_that_is_too_large_is_refused_before_it_is_read(
    what: str, sid: Callable[..., Ended], sd_folder: Path, tmp_path: Path
) -> None:
    name, size, start, words = BOMBS[what]
    (tmp_path / "in").mkdir()
    file = sparse(tmp_path / name, size, start)
    given = {"FOLDER": sd_folder, "EVIL": file, "IN": tmp_path / "in"}
    ended = sid(*(given.get(word, word) for word in words))
    refused(ended, 3, 4)  # 4: there is no room for a copy of the tensors
    assert ended.grown < MOST and ended.read < MOST, ended


def png(width: int, height: int) -> bytes:
    """The header of an image, and no more."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(4) + b"IDAT"


@pytest.mark.check(25)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_of_sixty_thousand_pixels_square_is_refused_by_its_header(packed: bool, images: Path, tmp_path: Path) -> None:
    (images / "1.png").write_bytes(png(60_000, 60_000) + bytes(10**6))
    place = Path(shutil.make_archive(str(tmp_path / "set"), "zip", images)) if packed else images

    def read() -> None:
        files = open_images(place)
        files.read(0)
        with pytest.raises(InputError, match=r"1\.png has more than 100000000 pixels"):
            files.read(1)

    ended = in_a_child(read)
    assert ended.returncode == 0 and ended.grown < MOST, ended


@pytest.mark.check(25)
@pytest.mark.parametrize("option", OPTIONS)
def test_devices_and_pipes_are_refused_by_their_kind_and_nobody_waits_for_them(
    option: str,
    sid: Callable[..., Ended],
    images: Path,
    good_file: Path,
    sd_folder: Path,
    stand_ins: dict[str, Path],
    tmp_path: Path,
) -> None:
    suffix = {
        "settings": ".toml",
        "reference": ".npz",
        "captions": ".json",
        "teacher of a pickle": ".pkl",
        "model to measure": ".zip",
    }
    pipe = tmp_path / f"pipe{suffix.get(option, '.safetensors')}"
    os.mkfifo(pipe)
    for device in (pipe, "/dev/zero" if list(OPTIONS).index(option) % 2 else "/dev/stdin"):
        given = {"FILE": good_file, "FOLDER": sd_folder, "IMAGES": images}
        words = [str(given.get(word, word)).replace("EVIL", str(device)) for word in OPTIONS[option]]
        ended = sid(*words)
        refused(ended)
        assert ended.grown < MOST and ended.read < MOST, ended


@pytest.mark.check(25)
@pytest.mark.parametrize("name", ["model_index.json", *READ[3:]])
def test_a_pipe_in_a_models_folder_is_not_waited_for(name: str, copied: Path, tmp_path: Path) -> None:
    (copied / name).rename(tmp_path / "away")
    os.mkfifo(copied / name)

    def read() -> None:
        with pytest.raises(InputError):
            load(find(str(copied)))

    ended = in_a_child(read)
    assert ended.returncode == 0 and ended.read < MOST, ended


@pytest.mark.check(25)
def test_a_pipe_among_images_is_not_one_of_them(images: Path) -> None:
    os.mkfifo(images / "20.png")
    (images / "21.png").symlink_to("/dev/zero")
    assert sorted(open_images(images).members) == sorted(f"{index}.png" for index in range(20))


# ---- 26 Broken prompt lists


class Notes(list[str], Silence):
    """What a user is told."""

    def note(self, text: str) -> None:
        self.append(text)


def listed(folder: Path, content: bytes, name: str = "list.txt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.check(26)
@pytest.mark.parametrize(
    ("content", "lines", "blank"),
    [
        (b"a cat\ra dog\r", ("a cat", "a dog"), 0),
        (b"a cat\r\n\r\na dog", ("a cat", "a dog"), 1),
        (b"\n\n \t \na cat\n\n", ("a cat",), 4),
        (b"\xef\xbb\xbfa cat\n", ("a cat",), 0),
        (b"\xef\xbb\xbf\na cat", ("a cat",), 1),
        (b"a cat\na cat\na cat\n", ("a cat",) * 3, 0),
        (
            "a\u2028cat\na\x0bcat\na\x0ccat\na\x85cat\na\x1ccat".encode(),
            ("a\u2028cat", "a\x0bcat", "a\x0ccat", "a\x85cat", "a\x1ccat"),
            0,
        ),
        ("\u3000a d\u00f6g \U0001f431\u00a0".encode(), ("a d\u00f6g \U0001f431",), 0),
        ("\u00e9".encode() * 10_000, ("\u00e9" * 10_000,), 0),
        ("\U0001f431".encode() * 10_000 + b"\r\nb", ("\U0001f431" * 10_000, "b"), 0),
    ],
)
def test_a_line_ends_where_an_editor_says_and_nowhere_else(
    content: bytes, lines: tuple[str, ...], blank: int, tmp_path: Path
) -> None:
    found = read_list(listed(tmp_path, content))
    assert found.lines == lines and found.blank == blank and len(found) == len(lines)
    assert tuple(found[index] for index in range(len(found))) == lines and found.first(2) == list(lines[:2])
    assert {found.at(0, position) for position in range(len(lines))} == set(lines)


@pytest.mark.check(26)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a cat\na d\u00f6g\n".encode("latin-1"), ":2: byte 3 is not UTF-8"),
        ("a cat".encode("utf-16"), ":1: byte 0 is not UTF-8"),
        ("a cat".encode("utf-16-le"), ":1: a NUL character"),
        ("a cat".encode("utf-32-be"), ":1: a NUL character"),
        (b"a cat\r\n\r\nb\0\r\n", ":3: a NUL character"),
        (b"a cat\rb\xff\r", ":2: byte 1 is not UTF-8"),
        (b"a\xc3", ":1: byte 1 is not UTF-8"),
        (b"\xed\xa0\x80", ":1: byte 0 is not UTF-8"),
        (b"fine\n" + b"x" * 10_001, ":2: a prompt of 10001 characters"),
        (b"fine\n" + "\U0001f431".encode() * 10_001, ":2: more than 40000 bytes"),
        (b"fine\n" + b" " * 50_000, ":2: more than 40000 bytes"),
        (b"", " holds no prompt"),
        (b"\xef\xbb\xbf", " holds no prompt"),
        (b" \n\t\r\n\r", " holds no prompt"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_with_file_line_and_byte(content: bytes, said: str, tmp_path: Path) -> None:
    file = listed(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_list(file)
    assert caught.value.message.startswith(f"{file}{said}") and caught.value.hint


@pytest.mark.check(26)
def test_blank_lines_and_prompts_that_are_too_long_are_counted_once_in_every_command(
    sid: Callable[..., Ended], sd_folder: Path, tmp_path: Path
) -> None:
    long = b"a cat " * 200
    file = listed(tmp_path, b"\n" + long + b"\n \na dog\n\n" + long + b"\n")
    skipped, cut = f"{file}: 3 blank lines skipped", "2 prompts were longer than the text encoder reads"
    drawn = sid("sample", "--prompts", file, "--model", "emoji", "-o", "out", "--device", "cpu")
    assert drawn.returncode == 0 and drawn.stderr.count(skipped) == 1 and drawn.stderr.count(cut) == 1, drawn
    assert len(list(Path("out").glob("0*.png"))) == 3
    training = ["distill", "--teacher", sd_folder, "--prompts", file, "--steps", "1", "--batch-size", "3", "--device", "cpu"]
    trained = commands.from_server(*training, "-o", "run")
    assert trained.returncode == 0 and trained.stderr.count(skipped) == 1, trained
    assert trained.stderr.count("training prompts were longer than the text encoder reads") == 1, trained
    captions = listed(tmp_path, b'["a cat", " ", "a dog"]', "list.json")
    notes = Notes()
    assert protocols.listed(captions, notes).first(9) == ["a cat", "a dog"] and notes == [f"{captions}: 1 blank line skipped"]


@pytest.mark.check(26)
def test_a_million_lines_take_little_more_than_their_bytes(tmp_path: Path) -> None:
    line = b"a photograph of cat %07d on a red table by the window\n"
    file = listed(tmp_path, b"".join(line % index for index in range(1_000_000)))
    size = file.stat().st_size / 1e6

    def read() -> None:
        found = read_list(file)
        assert len(found) == 1_000_000 and found[123] == (line % 123).decode().strip()
        assert found.digest == read_list(file).digest

    ended = in_a_child(read)
    assert ended.returncode == 0 and ended.grown < 3.2 * size, (size, ended)  # two of them: a Python string takes twice its bytes
