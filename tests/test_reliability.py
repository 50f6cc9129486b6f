"""What is promised about crashes, disks and broken files, by physics: real signals, real full disks, real flipped bits."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from sidcli import checkpoint

WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def files(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"w": torch.full((50,), value)} for name in ("generator", "fake_score", "average")}


def write(root: Path, step: int) -> Path:
    return checkpoint.write(root, step, files(step), {"lr": 1.0}, "digest")


def killed_at(root: Path, step: int, operation: int) -> bool:
    """Write a checkpoint in a child that is killed before its n-th operation on files below `root`; False if it had fewer."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in WRITING and str(root) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(root, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (status != 0) and (status == 0 or os.WTERMSIG(status) == signal.SIGKILL)
    return status != 0


def test_check_3_a_writer_killed_before_any_of_its_file_operations_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for operation in range(1, 100):
        root = tmp_path / str(operation)
        for step in (1, 2):
            write(root, step)
        if not killed_at(root, 3, operation):
            break
        found, problems = checkpoint.latest(root)
        assert found is not None and found.step in (2, 3) and not problems
        assert checkpoint.read(found)["average"]["w"].tolist() == [float(found.step)] * 50
        outcomes.append(found.step)
        write(root, 4)
        assert checkpoint.verify(root / "step-00000004").step == 4
    assert outcomes == sorted(outcomes) and set(outcomes) == {2, 3}, "old up to the rename, new from there on"
    assert len(outcomes) >= 8


def test_check_7_every_flipped_bit_is_seen_before_a_weight_is_used(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder, rng = write(tmp_path, 2), np.random.default_rng(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(12):
            place, bit = int(rng.integers(len(whole))), int(rng.integers(8))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found, problems = checkpoint.latest(tmp_path)
            assert found is not None and found.step == 1 and len(problems) == 1, f"byte {place}, bit {bit} of {file.name}"
        file.write_bytes(whole)
    assert checkpoint.verify(folder).step == 2
