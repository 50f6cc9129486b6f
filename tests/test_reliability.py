"""What is promised about crashes, disks and broken files, by physics: real signals, real full disks, real flipped bits."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.models.loading import Model
from sidcli.settings import DistillConfig
from sidcli.training import checkpoint
from tests import REPOSITORY, full_disk
from tests.commands import Ended, Running, in_a_child, process, sid
from tests.killing import killed_at
from tests.namespaces import mount_small_disk, skip_without

STEPS = 6


def files(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"w": torch.full((50,), value)} for name in ("generator", "fake_score", "average")}


def write(root: Path, step: int) -> Path:
    return checkpoint.write(root, step, files(step), {"lr": 1.0}, {"prompts": "digest"})


@pytest.mark.check(3, 8)
def test_a_writer_killed_before_any_of_its_file_operations_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for operation in range(1, 100):
        root = tmp_path / str(operation)
        for step in (1, 2):
            write(root, step)
        if not killed_at(partial(write, root, 3), root, operation):
            break
        found, problems = checkpoint.latest(root)
        assert found is not None and found.step in (2, 3) and not problems
        assert checkpoint.read(found)["average"]["w"].tolist() == [float(found.step)] * 50
        outcomes.append(found.step)
        write(root, 4)
        assert checkpoint.verify(root / "step-00000004").step == 4
    assert outcomes == sorted(outcomes) and set(outcomes) == {2, 3}, "old up to the rename, new from there on"
    assert len(outcomes) >= 8


def training(teacher: Path) -> list[str]:
    options = {"--teacher": teacher, "--steps": STEPS, "--batch-size": 4, "--lr": 1e-3, "--precision": "fp32", "--device": "cpu"}
    options |= {"--save-every": 1, "--sample-every": 3, "--output": "run"}
    return ["distill", *(str(part) for pair in options.items() for part in pair)]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / checkpoint.folder_name(STEPS)
    return {f"{file.stem}/{name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def uninterrupted(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody disturbed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    done = Running(*training(sd_folder), cwd=folder)
    _, said = done.communicate()
    assert done.returncode == 0, said
    return folder / "run", time.monotonic() - begun


@pytest.mark.check(7)
@pytest.mark.parametrize("flips", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_every_flipped_bit_is_seen_before_a_weight_is_used(flips: int, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    shutil.copytree(uninterrupted[0] / "checkpoints", tmp_path, dirs_exist_ok=True)
    folder, rng = tmp_path / checkpoint.folder_name(STEPS), np.random.default_rng(flips)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(flips if file.suffix == ".safetensors" else 12 * flips):  # a manifest has its sense in every byte
            place, bit = int(rng.integers(len(whole))), int(rng.integers(8))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found, problems = checkpoint.latest(tmp_path)
            assert found is not None and found.step == STEPS - 1, f"byte {place}, bit {bit} of {file.name}"
            assert len(problems) == 1 and folder.name in problems[0]
        file.write_bytes(whole)
    assert checkpoint.verify(folder).step == STEPS


@pytest.mark.check(2)
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[] if seed == 0 else pytest.mark.soak) for seed in range(20)])
def test_a_run_killed_at_any_moment_and_started_again_ends_as_one_that_was_not(
    seed: int, uninterrupted: tuple[Path, float], sd_folder: Path, tmp_path: Path
) -> None:
    whole, seconds = uninterrupted
    rng = random.Random(seed)
    for _ in range(2):
        command = Running(*training(sd_folder), cwd=tmp_path)
        until = time.monotonic() + rng.uniform(0.4, 1.0) * seconds
        while command.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if command.returncode is None:
            os.killpg(command.pid, signal.SIGKILL)  # on a busy machine it can end by itself before
        command.communicate()
    last = Running(*training(sd_folder), cwd=tmp_path)
    _, said = last.communicate()
    assert last.returncode == 0, said
    one, two = final_state(whole), final_state(tmp_path / "run")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 6]
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    student = "student/unet/diffusion_pytorch_model.safetensors"
    assert (whole / student).read_bytes() == (tmp_path / "run" / student).read_bytes()


def in_small_disk(folder: Path, kilobytes: int, work: Callable[[], object]) -> Ended:
    """Do some work in a fork whose current folder is on a disk of its own that holds so much."""
    skip_without("-Urm")
    folder.mkdir()

    def inside() -> None:
        mount_small_disk(folder, kilobytes)
        os.chdir(folder)
        work()

    return in_a_child(inside)


@pytest.fixture(scope="module")
def kilobytes(uninterrupted: tuple[Path, float]) -> float:
    """Size of a checkpoint."""
    folder = uninterrupted[0] / "checkpoints" / checkpoint.folder_name(STEPS)
    return sum(file.stat().st_size for file in folder.iterdir()) / 1024


@pytest.mark.check(5)
def test_a_disk_too_small_for_the_checkpoints_is_told_before_the_first_step(
    kilobytes: float, sd_folder: Path, tmp_path: Path
) -> None:
    def work() -> None:
        done = sid(*training(sd_folder))
        print(done.returncode, *(path for path in Path().rglob("*")))
        print(done.stderr, file=sys.stderr)

    done = in_small_disk(tmp_path / "disk", round(2.5 * kilobytes), work)
    assert done.stdout.startswith("4"), done.stderr
    assert "of disk space free; the run needs" in done.stderr and "--output" in done.stderr
    assert "checkpoints" not in done.stdout and "samples" not in done.stdout


@pytest.mark.check(5)
def test_a_disk_that_fills_up_during_a_run_ends_it_with_its_last_checkpoint_whole(
    kilobytes: float, sd_folder: Path, tmp_path: Path
) -> None:
    skip_without("-Urm")
    (tmp_path / "disk").mkdir()
    running = Running(*training(sd_folder), "--steps", "400", cwd=tmp_path / "disk", disk=round(6 * kilobytes))
    seen_from_here = Path(f"/proc/{running.pid}/root{tmp_path}/disk")
    step_reached(running, seen_from_here / "run", 2)
    mounted = os.open(seen_from_here, os.O_DIRECTORY)  # keeps the disk after the process
    with suppress(OSError), (seen_from_here / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    _, said = running.communicate()
    shutil.copytree(f"/proc/self/fd/{mounted}/run", tmp_path / "kept")
    os.close(mounted)
    assert running.returncode == 4, said
    assert "run" in said and ("of disk space free; a checkpoint needs" in said or "No space left" in said)
    found, problems = checkpoint.latest(tmp_path / "kept" / "checkpoints")
    assert found is not None and not problems
    again = Running(*training(sd_folder)[:-2], "--steps", str(found.step + 1), "--output", "kept", cwd=tmp_path)
    _, said = again.communicate()
    assert again.returncode == 0 and f"continuing from step {found.step}" in said, said


@pytest.mark.check(5, 20)
def test_an_export_that_the_disk_has_no_room_for_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    def work() -> None:
        for name in ("diffusers", "torch-export"):
            done = sid("export", "emoji", "--format", name, "-o", name)
            print(done.returncode)
            print(done.stderr, file=sys.stderr)
        print(*os.listdir())

    done = in_small_disk(tmp_path / "disk", 10_000, work)
    assert done.stdout.split() == ["4", "4"], done.stderr
    assert done.stderr.count("of disk space free; the export needs") == 2


@pytest.mark.check(3, 5)
def test_a_disk_that_is_full_from_any_file_operation_of_the_writer_on_keeps_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    done = in_small_disk(tmp_path / "disk", 1000, lambda: full_disk.main(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    *outcomes, last = done.stdout.splitlines()
    assert outcomes == sorted(outcomes) and set(outcomes) == {"refused", "written"}, "refused up to the rename, written from there"
    assert last == f"operations {len(outcomes)}" and len(outcomes) >= 6


@pytest.mark.check(4)
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "loading"),
        (signal.SIGINT, "step 1"),
        (signal.SIGUSR1, "step 3"),
        pytest.param(signal.SIGTERM, "step 2", marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, "loading", marks=pytest.mark.soak),
    ],
)
def test_a_signal_at_any_moment_ends_a_training_saved_with_its_own_code_and_no_process_left(
    number: int, moment: str, sd_folder: Path, tmp_path: Path
) -> None:
    command = Running(*training(sd_folder)[:-2], "--steps", "400", "--output", "run", cwd=tmp_path)
    if moment == "loading":
        while "loading" not in command.stderr.read_text():
            assert command.poll() is None
            time.sleep(0.01)
    else:
        step_reached(command, tmp_path / "run", int(moment.split()[1]))
    os.kill(command.pid, number)
    _, said = command.communicate()
    assert command.returncode == 128 + number, said
    with pytest.raises(ProcessLookupError):
        os.killpg(command.pid, 0)
    if moment != "loading":
        found, problems = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert found is not None and found.step >= 1 and not problems


def step_reached(command: Running, run: Path, step: int) -> None:
    """Wait until a running command has saved a step."""
    while max(checkpoint.numbered(run / "checkpoints"), default=0) < step:
        assert command.poll() is None
        time.sleep(0.01)


def work(command: Running, seconds: float) -> None:
    """Wait until a running command has used a processor for `seconds` more, or has ended."""
    process = psutil.Process(command.pid)
    until = sum(process.cpu_times()[:2]) + seconds
    while command.poll() is None and sum(process.cpu_times()[:2]) < until:
        time.sleep(0.05)


@pytest.mark.check(4)
def test_a_second_signal_ends_a_training_in_the_middle_of_a_step_and_gives_the_terminal_back(
    sd_folder: Path, tmp_path: Path
) -> None:
    terminal, behind = pty.openpty()
    long = [*training(sd_folder), "--batch-size", "4000", "--micro-batch", "1"]
    command = Running(*long, cwd=tmp_path, stderr=Path(os.ttyname(behind)), TERM="xterm")
    said = b""
    while b"0/6" not in said:
        said += os.read(terminal, 4096)
    while not (tmp_path / "run" / "report.html").exists():
        time.sleep(0.05)
    work(command, seconds=1)  # the page is the last thing before the first step, whose 4000 micro-batches take minutes
    os.kill(command.pid, signal.SIGTERM)
    work(command, seconds=0.5)
    assert command.poll() is None, "the first waits for the end of the step"
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143
    os.close(behind)
    with suppress(OSError):  # the other end is closed
        while more := os.read(terminal, 4096):
            said += more
    os.close(terminal)
    assert b"\x1b[?25l" in said and said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l"), "the cursor is hidden, then shown"
    assert b"Traceback" not in said and not checkpoint.numbered(tmp_path / "run" / "checkpoints")


@pytest.mark.check(12)
def test_a_second_run_in_a_folder_is_refused_before_anything_is_loaded_and_a_killed_one_leaves_no_lock(
    sd_folder: Path, tmp_path: Path
) -> None:
    first = Running(*training(sd_folder), "--steps", "400", cwd=tmp_path)
    step_reached(first, tmp_path / "run", 1)
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "torch.py").write_text("raise SystemExit(77)")
    second = process(*training(sd_folder), cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'trap'}:{REPOSITORY}")
    assert second.returncode == 4 and f"in use by process {first.pid}" in second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    last = max(checkpoint.numbered(tmp_path / "run" / "checkpoints"))
    third = Running(*training(sd_folder), "--steps", str(last + 1), cwd=tmp_path)
    _, said = third.communicate()
    assert third.returncode == 0, said


@pytest.mark.check(17)
def test_a_closed_pipe_and_a_log_on_a_full_disk_cost_no_checkpoint(sd_folder: Path, tmp_path: Path) -> None:
    pipe, full = tmp_path / "reader", Path("/dev/full")
    os.mkfifo(pipe)
    for folder, stream in (("pipe", pipe), ("full", full)):
        words = [*training(sd_folder)[:-2], "--steps", "3", "--output", folder]
        running = Running(*words, cwd=tmp_path, stdout=stream, stderr=stream)
        if stream == pipe:
            with pipe.open() as reader:
                assert reader.readline()
        running.wait()
        found, problems = checkpoint.latest(tmp_path / folder / "checkpoints")
        assert found is not None and found.step == 3 and not problems, folder


@pytest.mark.check(18)
@pytest.mark.parametrize("steps", [24, pytest.param(150, marks=pytest.mark.soak)])
def test_a_long_run_keeps_its_memory_and_its_open_files(steps: int, sd: Model, config: DistillConfig) -> None:
    engine = Engine(sd, config, open_prompts("general"), torch.device("cpu"))
    process = psutil.Process()
    for _ in range(steps // 3):
        engine.train_step()
    memory, files_open = process.memory_info().rss, process.num_fds()
    for _ in range(steps):
        engine.train_step()
    assert process.memory_info().rss < 1.05 * memory and process.num_fds() == files_open


@pytest.mark.check(27)
def test_prompts_that_look_like_paths_name_no_file(tmp_path: Path) -> None:
    prompts = ["../../x", "/etc/passwd", "C:\\x", "a/b", "cat " * 1250, "\U0001f431", ".", "CON", "a\tb"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "inside").mkdir()
    done = Running("sample", "--prompts", "../prompts.txt", "-o", "out", "--json", cwd=tmp_path / "inside")
    said, _ = done.communicate()
    assert done.returncode == 0
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert names == {"prompts.txt", "inside/out/sheet.png", *(f"inside/out/{index:06d}.png" for index in range(len(prompts)))}
    assert [image["prompt"] for image in json.loads(said)["images"]] == [prompt.strip() for prompt in prompts]


@pytest.mark.check(29)
@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "a", "--num", "0"],
        ["sample", "a", "--num", "-1"],
        ["sample", "a", "--num", "1000000000000000000"],
        ["sample", "a", "--steps", "0"],
        ["sample", "a", "--seed", "18446744073709551616"],
        ["distill", "--steps", "0"],
        ["distill", "--lr", "nan"],
        ["distill", "--lr", "-1"],
        ["eval", "--num", "1"],
        ["eval", "--batch-size", "0"],
    ],
)
def test_numbers_that_make_no_sense_are_usage_errors_before_anything_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(77)")
    done = process(*arguments, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.check(32)
def test_libraries_with_known_holes_are_too_old(tmp_path: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr]
    safe = {
        "torch": (2, 10),
        "diffusers": (0, 38),
        "safetensors": (0, 8),
        "pillow": (12, 3),
        "huggingface_hub": (2, 0),
        "jinja2": (3, 1, 6),
    }
    for name, floor in safe.items():
        assert tuple(int(part) for part in floors[name].split(".")) >= floor, name


@pytest.mark.check(15)
def test_everything_that_ships_works_where_there_is_no_network_at_all(tmp_path: Path) -> None:
    skip_without("-Urn")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
    environment.pop("HF_HUB_OFFLINE")

    command = ["unshare", "-Urn", sys.executable, "-m", "sidcli", "sample", "a cat", "-o", "cat.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "cat.png").is_file(), done.stderr
