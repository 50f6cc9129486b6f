"""Files and folders without permission, and folders in the place of files: one line with the path, and the right exit code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import in_a_child
from tests.inprocess import sid
from tests.namespaces import give_up_rights


def closed(path: Path, mode: int = 0) -> Path:
    path.chmod(mode)
    return path


def run_folder(folder: Path) -> Path:
    for name in ("checkpoints", "samples"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.mark.check(13)
def test_what_is_not_permitted_or_of_another_type_is_named_in_one_line(
    sd_folder: Path, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(20):
        Image.new("RGB", (8, 8)).save(images / f"{index}.png")
    unet = closed(Path(shutil.copytree(sd_folder, tmp_path / "unet")) / "unet")
    weights = closed(Path(shutil.copytree(sd_folder, tmp_path / "weights")) / "vae" / "diffusion_pytorch_model.safetensors")
    hidden = closed(Path(shutil.copytree(images, tmp_path / "hidden")))
    inception = closed(Path(shutil.copyfile(stand_ins["inception"], tmp_path / "inception.pt")))
    clip = closed(Path(shutil.copytree(stand_ins["clip"], tmp_path / "clip")))
    unread, unwritten = run_folder(tmp_path / "unread"), run_folder(tmp_path / "unwritten")
    closed(unread / "checkpoints"), closed(unwritten / "checkpoints", 0o555)
    records = run_folder(tmp_path / "records") / "metrics.jsonl"
    records.mkdir()
    measure = ["eval", "--protocol", "custom", "--reference", images]
    cases = [
        (
            ["sample", "a cat", "--model", unet.parent, "-o", tmp_path / "x.png"],
            3,
            f"{unet}/config.json cannot be read: Permission denied",
        ),
        (
            ["sample", "a cat", "--model", weights.parent.parent, "-o", tmp_path / "x.png"],
            3,
            f"{weights} cannot be read: Permission denied",
        ),
        ([*measure, hidden, "--fid"], 3, f"{hidden}/model_index.json cannot be read: Permission denied"),
        (
            [*measure, images, "--fid", "--inception", inception],
            2,
            f"Invalid value for '--inception': path '{inception}' is not readable",
        ),
        ([*measure, images, "--cmmd", "--cmmd-model", clip], 3, f"{clip} cannot be read as a folder: Permission denied"),
        (["distill", "-o", unread], 4, f"no permission to read and write in {unread}/checkpoints"),
        (["distill", "-o", unwritten], 4, f"no permission to read and write in {unwritten}/checkpoints"),
        (["distill", "-o", records.parent], 4, f"{records} is a folder; the run needs a file of this name"),
    ]

    def run_all() -> None:
        give_up_rights()
        sys.stdout.write(json.dumps([sid(*words) for words, _, _ in cases]))

    ended = in_a_child(run_all)
    unet.chmod(0o755)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(cases) and "Traceback" not in ended.stderr, ended.stderr
    for error, (_, _, said) in zip(errors, cases, strict=True):
        assert error.startswith(f"error: {said}"), error
    assert json.loads(ended.stdout.splitlines()[-1]) == [code for _, code, _ in cases]
