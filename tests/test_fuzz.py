"""Readers of other people's files, given what hypothesis thinks of: a result or an error of ours, nothing else, and no great appetite.

`make soak` gives each of them 10,000 cases; a usual run a hundred times fewer.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidcli.data.captioned import open_captioned
from sidcli.data.imagefiles import open_images
from sidcli.data.prompts import read_list
from sidcli.errors import SidError
from sidcli.evaluation.protocols import read_statistics
from sidcli.evaluation.spec import ModelSpec, limits
from sidcli.models import single_file
from sidcli.models.loading import describe
from sidcli.models.official_pkl import network
from sidcli.models.sources import find
from sidcli.progress import Silence
from sidcli.settings import read_toml
from sidcli.training import checkpoint

CASES = int(os.environ.get("SID_FUZZ_CASES", "100"))
fuzzed = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
APPETITE = 300 << 20
"""Bytes that reading a few kilobytes may add to the most memory used so far."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def broken(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file with a few bytes changed, a piece cut out, doubled, or moved."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        place = draw(st.integers(0, len(content) - 1))
        kind = draw(st.sampled_from(["set", "cut", "double", "insert"]))
        length = draw(st.integers(1, 40))
        if kind == "set":
            content[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + length]
        elif kind == "double":
            content[place:place] = content[place : place + length]
        else:
            content[place:place] = draw(st.binary(max_size=length))
    return bytes(content)


def survives(read: Callable[[], object]) -> None:
    """Only errors of ours may come out, and memory stays."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
    except SidError as error:
        assert error.message
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < APPETITE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzzed
@given(
    st.binary(max_size=400)
    | st.text(max_size=200).map(str.encode)
    | broken(b'id,caption\n1,"a cat, ""old"""\n2,a dog\n')
    | broken(b'{"id": 1, "caption": "a cat"}\n{"id": 2, "caption": null}\n'),
    st.sampled_from(["list.txt", "list.csv", "list.tsv", "list.jsonl"]),
    st.sampled_from(["", "caption"]),
)
def test_prompt_lists(place: Path, content: bytes, name: str, column: str) -> None:
    (place / name).write_bytes(content)
    survives(lambda: read_list(place / name, column))


CAPTIONS = json.dumps(
    {
        "images": [{"id": 1}],
        "annotations": [{"image_id": 1, "id": 2, "caption": "a cat"}, {"image_id": 3, "id": 1, "caption": "\n"}],
    }
).encode()


@fuzzed
@given(
    broken(CAPTIONS) | JSON.map(lambda value: json.dumps({"annotations": value}).encode()) | JSON.map(json.dumps).map(str.encode)
)
def test_captions_of_coco(place: Path, content: bytes) -> None:
    (place / "captions.json").write_bytes(content)
    survives(lambda: read_list(place / "captions.json"))


@fuzzed
@given(broken(b'teacher = "emoji-teacher"\nsteps = 300\nkappa1 = 2.0\ncompile = "auto"\n') | st.binary(max_size=200))
def test_settings(place: Path, content: bytes) -> None:
    (place / "config.toml").write_bytes(content)
    survives(lambda: read_toml(place / "config.toml"))


@pytest.fixture(scope="module")
def saved(place: Path) -> tuple[Path, dict[str, bytes]]:
    folder = checkpoint.write(place / "checkpoints", 1, {"average": {"w": torch.ones(4)}}, {"lr": 1.0}, {"prompts": "digest"})
    return folder, {file.name: file.read_bytes() for file in folder.iterdir()}


@fuzzed
@given(data=st.data())
def test_checkpoints_and_their_manifests(saved: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    folder, whole = saved
    name = data.draw(st.sampled_from(sorted(whole)))
    content = data.draw(broken(whole[name]) | JSON.map(json.dumps).map(str.encode))
    (folder / name).write_bytes(content)
    try:
        survives(lambda: checkpoint.read(checkpoint.verify(folder)))
    finally:
        (folder / name).write_bytes(whole[name])


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


TENSORS = {"model.diffusion_model.input_blocks.0.0.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


@pytest.mark.check(24)
@fuzzed
@given(
    broken(header(TENSORS))
    | JSON.map(header)
    | JSON.map(lambda value: header({"__metadata__": {"sid.card": json.dumps(value)}, **TENSORS}))
)
def test_single_files(place: Path, content: bytes) -> None:
    (place / "model.safetensors").write_bytes(content)
    survives(lambda: single_file.read(place / "model.safetensors"))


PICKLE = pickle.dumps({"ema": [1, "two", {"three": 4.0}], "size": (1, 2)}, 4)


@fuzzed
@given(broken(PICKLE) | st.binary(max_size=200) | broken(pickle.dumps({"ema": {1, 2}}, 2)))
def test_released_pickles(content: bytes) -> None:
    survives(lambda: network(content))


@pytest.mark.check(23)
@fuzzed
@given(data=st.data())
def test_descriptions_of_models(place: Path, data: st.DataObject) -> None:
    source = find("emoji-teacher").path
    names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "sid.json",
    ]
    chosen = data.draw(st.sampled_from(names))
    folder = place / "model"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        whole = (source / name).read_bytes()
        (folder / name).write_bytes(data.draw(broken(whole) | JSON.map(json.dumps).map(str.encode)) if name == chosen else whole)
    survives(lambda: describe(find(str(folder), Silence())))


YAML = b'model:\n  params:\n    linear_start: 0.00085\n    parameterization: "v"\n    timesteps: 1000\n'


@pytest.mark.check(24)
@fuzzed
@given(
    broken(YAML) | st.text(max_size=200).map(str.encode) | JSON.map(lambda value: json.dumps({"model": {"params": value}}).encode())
)
def test_descriptions_beside_single_files(place: Path, content: bytes) -> None:
    (place / "beside.yaml").write_bytes(content)
    survives(lambda: single_file.prediction_in_yaml(place / "beside.safetensors", "sd1"))


@fuzzed
@given(st.binary(max_size=300))
def test_images_and_statistics(place: Path, content: bytes) -> None:
    (place / "images").mkdir(exist_ok=True)
    (place / "images" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    (place / "some.npz").write_bytes(b"PK\x03\x04" + content)
    (place / "some.zip").write_bytes(b"PK\x03\x04" + content)
    survives(lambda: open_images(place / "images").read(0))
    survives(lambda: open_images(place / "some.zip"))
    survives(lambda: read_statistics(place / "some.npz"))


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()[:3072]


@fuzzed
@given(
    broken(tar({"0.png": b"\x89PNG\r\n\x1a\n", "0.txt": b"a cat"}))
    | broken(tar({"é.jpg": b"\xff\xd8", "é.txt": b"a cat"}))
    | st.binary(max_size=600),
    broken(b'{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "text": null}\n'),
)
def test_images_with_captions(place: Path, content: bytes, table: bytes) -> None:
    (place / "shard.tar").write_bytes(content)
    folder = place / "captioned"
    folder.mkdir(exist_ok=True)
    (folder / "0.png").write_bytes(content)
    (folder / "metadata.jsonl").write_bytes(table)
    for name in ("shard.tar", "captioned"):
        survives(lambda name=name: open_captioned(str(place / name)).files.read(0))


@fuzzed
@given(st.text(max_size=40), st.text(max_size=20))
def test_words_of_the_command_line(name: str, bound: str) -> None:
    survives(lambda: ModelSpec.parse(name, None, None))
    survives(lambda: limits([bound, f"fid={bound}"], []))
