"""Writes checkpoints on a disk that is full from its n-th file operation on, for every n; to be run where the disk is small.

python -m tests.full_disk FOLDER
"""

import itertools
import shutil
import sys
from pathlib import Path

import torch

from sidcli.errors import EnvironmentProblem
from sidcli.training import checkpoint

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def fill(file: Path) -> None:
    """Leave no byte."""
    with file.open("wb", buffering=0) as filler:
        for size in (1 << 16, 1):
            try:
                while filler.write(bytes(size)):
                    pass
            except OSError:
                continue


def main(folder: Path) -> None:
    left = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if left and event in OPERATIONS and str(folder) in str(arguments[0]):
            left -= 1
            if not left:
                fill(folder / "filler")

    sys.addaudithook(count)
    for operation in itertools.count(1):
        root = folder / "checkpoints"
        for step in (1, 2):
            checkpoint.write(root, step, {"average": {"w": torch.full((5000,), float(step))}}, {}, {})
        left, refused = operation, False
        try:
            checkpoint.write(root, 3, {"average": {"w": torch.full((5000,), 3.0)}}, {}, {})
        except EnvironmentProblem as error:
            refused = "No space left" in error.message or "of disk space free" in error.message
            assert refused, error.message
        if left:
            print("operations", operation - 1)
            return
        found, problems = checkpoint.latest(root)
        assert found is not None and found.step == (2 if refused else 3) and not problems, operation
        assert checkpoint.read(found)["average"]["w"].tolist() == [float(found.step)] * 5000
        assert not list(root.glob(".tmp-*")), operation
        print("refused" if refused else "written")
        (folder / "filler").unlink()
        shutil.rmtree(root)
