"""Files that want to harm: each does its work where it is trusted, and is given to everything that takes a file."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from sidcli import checkpoint, cli, console, distill, evaluate, export, scores
from sidcli.config import read_toml
from sidcli.errors import InputError
from sidcli.files import read_json
from sidcli.formats import official_pkl, single_file
from sidcli.imagefiles import open_images
from sidcli.metrics.clip import Clip
from sidcli.metrics.features import DinoFeatures, InceptionFeatures
from sidcli.prompts import read_list
from sidcli.protocols import read_statistics
from sidcli.sources import Source, find
from sidcli.teachers import load
from tests import tiny_families
from tests.stand_ins import write_clip, write_dino, write_inception

LOADED = (console, distill, evaluate, export, scores)
"""What the commands import only when they run; here before, so that what grows in a test is not the libraries."""
CPU = torch.device("cpu")
SECONDS = 30


@dataclass(frozen=True)
class Ended:
    """A command that was run: exit code (negative: a signal), what it said, megabytes that it grew, seconds."""

    code: int
    out: str
    said: str
    grown: float
    seconds: float


def in_a_child(work: Callable[[], object], place: Path) -> Ended:
    """Run `work` in a fork of this process, which has all libraries in memory; it is killed after SECONDS."""
    before, begun = psutil.Process().memory_info().rss, time.monotonic()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        for number, name in ((1, "out"), (2, "said")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        code: object = 0
        try:
            work()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)
    _, status, used = os.wait4(child, 0)
    said = [(place / name).read_text(errors="replace") for name in ("out", "said")]
    return Ended(
        os.waitstatus_to_exitcode(status), *said, (used.ru_maxrss * 1024 - before) / 1e6, time.monotonic() - begun
    )


@pytest.fixture
def sid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """The command line, in a child, in a folder of its own."""
    (tmp_path / "said").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: object) -> Ended:
        def command() -> None:
            sys.argv = ["sid", *map(str, words)]
            cli.main()

        return in_a_child(command, tmp_path / "said")

    return run


def refused(ended: Ended, *codes: int) -> None:
    """One error of ours, with its exit code, and nothing of Python's."""
    assert ended.code in (codes or (3,)), ended
    assert "Traceback" not in ended.said and ended.said.count("error:") == 1, ended


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
def good_file(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in a single file that describes itself."""
    model = load(find(str(sd_folder)))
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    file = tmp_path_factory.mktemp("single") / "good.safetensors"
    single_file.write(file, networks, model.scheduler_config, {}, torch.float32)
    return file


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judges")
    return {
        "inception": write_inception(folder / "net.pt"),
        "clip": write_clip(folder / "clip"),
        "dino": write_dino(folder / "dino"),
    }


@pytest.mark.check(21)
@pytest.mark.parametrize("name", PAYLOADS)
def test_the_malicious_files_of_these_tests_do_run_where_they_are_trusted(name: str, tmp_path: Path) -> None:
    content, read = payloads(tmp_path / "proof")[name]
    in_a_child(lambda: read(io.BytesIO(content)), tmp_path)
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
    "model to export": ["export", "EVIL", "-o", "out", "--teacher", "FOLDER"],
    "teacher of a LoRA": ["export", "emoji", "-o", "out", "--format", "lora", "--teacher", "EVIL"],
    "teacher of a pickle": ["export", "EVIL", "-o", "out", "--teacher", "EVIL"],
    "description of an export": ["export", "FILE", "-o", "out", "--model-config", "EVIL"],
}
TEXTS = ("prompts to train on", "prompts to draw", "captions")
"""Options for which a pickle that is plain text is a plain text."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.fromarray(np.full((16, 16, 3), 90 * index, np.uint8)).save(tmp_path / "images" / f"{index}.png")
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
    for index in range(turn, turn + 4):  # which ones is another choice for each option; all of them follow below
        given = {"FILE": good_file, "FOLDER": sd_folder, "IMAGES": images}
        evil = str(malicious / f"{names[index % len(names)]}{SUFFIXES[index % len(SUFFIXES)]}")
        words = [str(given.get(word, word)).replace("EVIL", evil) for word in OPTIONS[option]]
        ended = sid(*words)
        print(ended.said)
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
            assert reader == "prompts" and file.stem == "text" and file.suffix != ".json", file
        assert not canary.exists(), file
    assert read == (len(SUFFIXES) - 1 if reader == "prompts" else 0)
