"""What commands write and print: where, over what, what is left when they are stopped, and nothing that drives a terminal."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console as Terminal

from sidcli import api
from sidcli.cli import console, main
from sidcli.cli.console import Console
from sidcli.errors import EnvironmentProblem, UsageError, out_of_memory
from sidcli.files import append_line, atomic_file, atomic_folder, locked
from sidcli.formats import export
from sidcli.formats.order import Order
from sidcli.formats.outputs import Places, check_export
from sidcli.formats.pictures import contact_sheet
from sidcli.models.loading import Model, load
from sidcli.models.sources import find
from tests import REPOSITORY
from tests.commands import Running, in_server
from tests.inprocess import sid
from tests.killing import killed_at

HOSTILE = "[/red][link=http://x]\x1b]0;t\x07\u202e\r\x9b31m\x7f\n"
EACH = """
import json, sys
from sidcli.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["sid", *arguments]
    try:
        main()
    except SystemExit as end:
        print(end.code or 0, flush=True)
"""
"""Several commands in one process of their own; prints their exit codes."""


def each(
    commands: list[list[str]], cwd: Path, *modules: Path, wrapper: tuple[str, ...] = (), **environment: str
) -> tuple[list[int], list[str]]:
    """Exit codes and error lines of several commands, with `modules` before the libraries."""
    settings = {"PYTHONPATH": ":".join(map(str, [*modules, REPOSITORY])), "OMP_NUM_THREADS": "1"} | environment
    command = [*wrapper, sys.executable, "-c", EACH, json.dumps(commands)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | settings, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    codes = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    return codes, [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def stub(folder: Path, *names: str) -> Path:
    """A folder of modules that end the process if anything imports them."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text("raise SystemExit(77)")
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own, beside which the cache lies."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def student(sd: Model) -> Model:
    return dataclasses.replace(sd, card={"kind": "student", "t_init": 625, "student_steps": 1, "renoise": "ddim"})


def exported(student: Model, folder: Path) -> None:
    export.run(student, "diffusers", folder, Order(), False, lambda count: None)


# Places


@pytest.mark.check(13, 28)
def test_every_output_option_refuses_what_cannot_be_before_torch_is_imported(tmp_path: Path) -> None:
    here, long = tmp_path / "here", "n" * 300
    (here / "folder.png").mkdir(parents=True)
    (here / "file").write_text("here already")
    (here / "there.png").write_text("here already")
    (here / "dangling").symlink_to(tmp_path / "outside")
    distill, sample, evaluate, write = ["distill", "-o"], ["sample", "a cat", "-o"], ["eval", "emoji"], ["export", "emoji", "-o"]
    cases = [
        ([*distill, "file"], "file is a file, not a folder"),
        ([*distill, "/dev/null"], "/dev/null is a device or a pipe, not a folder"),
        ([*distill, "file/run"], "file is a file, not a folder"),
        ([*distill, "dangling/run"], "is a link to a place that is not there"),
        ([*distill, long], "cannot hold files"),
        ([*sample, "file/cat.png"], "file is a file, not a folder"),
        ([*sample, "file"], "file is a file, not a folder"),
        ([*sample, "folder.png"], "folder.png is a folder"),
        ([*sample, "there.png"], "there.png exists already"),
        ([*sample, f"{long}.png"], "is not a valid file name"),
        ([*sample, "dangling/cat.png"], "is a link to a place that is not there"),
        ([*evaluate, "--report", "file/page.html"], "choose another --report"),
        ([*evaluate, "--report", "folder.png"], "give --report the name of a file"),
        ([*evaluate, "--report", "there.png"], "there.png exists already"),
        ([*evaluate, "--report", "dangling"], "dangling exists already"),
        ([*evaluate, "--picture", "file/rows.png"], "choose another --picture"),
        ([*evaluate, "--picture", "folder.png"], "give --picture the name of a file"),
        ([*evaluate, "--picture", "there.png"], "there.png exists already"),
        ([*evaluate, "--image-folder", "file"], "choose another --image-folder"),
        ([*evaluate, "--image-folder", f"file/{long}"], "choose another --image-folder"),
        ([*write, "file"], "file is a file, not a folder"),
        ([*write, "file/student"], "file is a file, not a folder"),
        ([*write, "folder.png"], "folder.png exists already"),
        ([*write, "folder.png", "--overwrite"], "is not an export"),
        ([*write, "dangling"], "is a link to a place that is not there"),
        ([*write, long], "cannot hold files"),
    ]
    before = tree(here)
    codes, said = each([arguments for arguments, _ in cases], here, stub(tmp_path / "stubs", "torch"))
    occupied = re.compile("is a folder|exists already|is not an export|give --")
    assert codes == [2 if occupied.search(wanted) else 4 for _, wanted in cases], said
    for (arguments, wanted), line in zip(cases, said, strict=True):
        assert wanted in line, (arguments, line)
    assert tree(here) == before and not (tmp_path / "outside").exists()


@pytest.mark.check(13)
@pytest.mark.parametrize("output", ["", "-"])
def test_a_folder_for_output_has_a_name(output: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, command in (
        ("--output", ["distill", "-o", output]),
        ("--output", ["distill", "--dry-run", "-o", output]),
        ("--output", ["export", "emoji", "-o", output]),
        ("--image-folder", ["eval", "emoji", "--image-folder", output]),
    ):
        assert sid(*command) == 2
        assert capsys.readouterr().err == f"error: {option} must be a folder, not {output!r}; try: {option} FOLDER\n"
    for call in (partial(api.distill, "emoji-teacher"), partial(api.export, "emoji")):
        with pytest.raises(UsageError, match="--output must be a folder, not"):
            call(output)
    assert tree(here) == {}


@pytest.mark.check(13)
def test_a_folder_that_cannot_be_written_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    mounted = "mount --bind closed closed && mount -o remount,bind,ro closed"
    (tmp_path / "closed" / "run").mkdir(parents=True)
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mounted], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a folder read-only")
    cases = [
        ["distill", "-o", "closed/run"],
        ["distill", "-o", "closed/new/run"],
        ["sample", "a cat", "-o", "closed/cat.png"],
        ["sample", "a cat", "-o", "closed/run"],
        ["sample", "a cat", "-o", "closed/run", "--overwrite"],
        ["eval", "emoji", "--report", "closed/page.html"],
        ["eval", "emoji", "--picture", "closed/rows.png"],
        ["eval", "emoji", "--image-folder", "closed/run"],
        ["export", "emoji", "-o", "closed/student"],
        ["export", "emoji", "-o", "closed/new/student"],
    ]
    wrapper = ("unshare", "-Urm", "sh", "-c", f'{mounted} && exec "$@"', "sh")
    codes, said = each(cases, tmp_path, stub(tmp_path / "stubs", "torch"), wrapper=wrapper)
    assert codes == [4] * len(cases) and all(re.search("no permission to read and write in .*closed", line) for line in said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "stubs"] and tree(tmp_path / "closed") == {"run": None}


@pytest.mark.check(28)
def test_what_is_there_stays_unless_overwrite_says_so_and_a_link_is_never_written_through(here: Path) -> None:
    outside = here.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("not ours")
    draws = ["sample", "a cat", "a dog"]
    evaluates = [
        "eval",
        "emoji",
        "--accuracy",
        "--num",
        "2",
        "--report",
        "page.html",
        "--picture",
        "rows.png",
        "--image-folder",
        "kept",
    ]
    assert sid(*draws, "-o", "out") == 0 and sid(*evaluates) == 0 and sid("export", "emoji", "-o", "student") == 0
    outputs = ["out/000001.png", "out/sheet.png", "page.html", "rows.png", "student"]
    before = tree(here)
    assert sid(*draws, "-o", "out") == 2 and sid(*evaluates) == 2 and sid("export", "emoji", "-o", "student") == 2
    assert tree(here) == before
    for name in outputs:
        shutil.move(here / name, outside / Path(name).name)
        (here / name).symlink_to(outside / Path(name).name)
    left = tree(outside)
    assert sid(*draws, "-o", "out") == 2 and sid(*evaluates) == 2 and sid("export", "emoji", "-o", "student") == 2
    assert tree(outside) == left and all((here / name).is_symlink() for name in outputs)
    assert sid(*draws, "-o", "out", "--overwrite") == 0 and sid(*evaluates, "--overwrite") == 0
    assert sid("export", "emoji", "-o", "student", "--overwrite") == 0
    assert tree(outside) == left and not any((here / name).is_symlink() for name in outputs)
    assert set(tree(here)) == set(before)


@pytest.mark.check(28)
def test_a_lock_and_a_log_that_are_links_are_refused_and_their_targets_untouched(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("not ours")
    (tmp_path / "run").mkdir()
    for name in (".lock", "metrics.jsonl"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "target")
    with pytest.raises(EnvironmentProblem, match="is a link"), locked(tmp_path / "run"):
        pass
    with pytest.raises(EnvironmentProblem, match="is a link"):
        append_line(tmp_path / "run" / "metrics.jsonl", "{}")
    assert (tmp_path / "target").read_text() == "not ours"
    for line in ("one", "two"):
        append_line(tmp_path / "run" / "own", line)
    assert (tmp_path / "run" / "own").read_text() == "one\ntwo\n"


@pytest.mark.check(28)
@pytest.mark.parametrize("name", ["config.toml", "student", "thesis.tex"])
def test_a_training_does_not_take_a_folder_of_something_else_for_its_own(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "project").mkdir()
    (here / "project" / name).write_text("mine")
    assert sid("distill", "-o", "project", "--steps", "2") == 2
    assert f"is not a run folder and not empty: it holds {name}" in capsys.readouterr().err
    assert tree(here) == {"project": None, f"project/{name}": b"mine"}


# Where results go


@pytest.mark.check(17)
def test_a_result_that_stdout_does_not_take_is_one_line_and_a_reader_that_has_left_none(tmp_path: Path) -> None:
    words, pipe = ["sample", "a cat", "-q", "--json", "-o"], tmp_path / "reader"
    full = Running(*words, "one.png", cwd=tmp_path, stdout=Path("/dev/full"))
    full.wait()
    os.mkfifo(pipe)
    left = Running(*words, "two.png", cwd=tmp_path, stdout=pipe)
    pipe.open().close()
    left.wait()
    assert (full.returncode, left.returncode) == (4, 0) and not left.stderr.read_text()
    (line,) = full.stderr.read_text().splitlines()
    error = json.loads(line)["error"]
    assert error["message"] == "stdout could not be written: No space left on device" and error["exit_code"] == 4
    assert "what went to files is complete" in error["hint"]
    assert (tmp_path / "one.png").is_file() and (tmp_path / "two.png").is_file()


@pytest.mark.check(17)
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["distill", "--list-settings"]])
def test_help_that_a_full_disk_does_not_take_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "sidcli", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
        )
    assert (
        done.returncode == 4
        and "no space left" in done.stderr.lower()
        and done.stderr.count("\n") == 1
        and "Traceback" not in done.stderr
    ), done.stderr


# Devices and memory


@pytest.mark.check(14)
def test_a_device_that_is_not_there_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    commands = [
        ["distill", "--teacher", "someone/sd", "-o", "run"],
        ["distill", "--teacher", "someone/sd", "--dry-run"],
        ["sample", "a cat", "--model", "someone/sd"],
        ["eval", "someone/sd"],
    ]
    planned = commands[1]  # for a GPU that is not here
    named = [[*command, "--device", device] for command in commands if command is not planned for device in ("cuda", "cuda:7")]
    odd = [
        [*command, "--device", device]
        for command in commands
        for device in ("gpu", "cuda:", "cuda:x", "mps", "", "CUDA", "cuda:-1")
    ]
    (tmp_path / "here").mkdir()
    hidden = stub(tmp_path / "stubs", "diffusers", "transformers", "huggingface_hub")
    codes, said = each(named, tmp_path / "here", hidden, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="0")
    assert codes == [4] * len(named) and all("use --device cpu" in line for line in said), said
    hidden = stub(tmp_path / "all", "torch", "diffusers")
    codes, said = each(odd, tmp_path / "here", hidden)
    assert codes == [2] * len(odd) and all("--device must be auto, cpu, cuda or cuda:INDEX, not" in line for line in said), said
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.check(14)
def test_auto_says_which_device_it_chose(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = "--device auto: cuda" if torch.cuda.is_available() else "--device auto: cpu"
    for command in (["sample", "a cat"], ["eval", "emoji", "--accuracy", "--num", "2"], ["distill", "--steps", "1", "--dry-run"]):
        assert sid(*command) == 0 and wanted in capsys.readouterr().err
    assert sid("sample", "a cat", "--device", "cpu", "--overwrite") == 0 and "auto" not in capsys.readouterr().err


@pytest.mark.check(11)
def test_memory_that_is_not_had_is_recognized_whoever_asked_for_it() -> None:
    def refused(ask: Callable[[], object]) -> str | None:
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            ask()
        return out_of_memory(caught.value)

    assert "tried to allocate" in str(refused(lambda: torch.empty(1 << 46)))
    assert "Unable to allocate" in str(refused(lambda: np.empty(1 << 46)))
    assert refused(lambda: bytearray(1 << 46)) == "no memory left"
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    assert out_of_memory(cuda) == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert out_of_memory(RuntimeError("shapes do not match")) is None


def short_of_memory(folder: Path) -> None:
    """Commands in a process that has little more memory than it uses."""

    def run(*arguments: str) -> None:
        sys.argv = ["sid", *arguments]
        try:
            main()
        except SystemExit as end:
            print(end.code or 0, flush=True)

    os.chdir(folder)
    run("sample", "a cat", "-o", "warm.png", "-q")
    run("eval", "emoji", "--accuracy", "--num", "2", "--quiet")
    run("export", "emoji", "-o", "warm", "-q")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), used + (40 << 20)))
    run("sample", "a cat", "--num", "512", "--batch-size", "512", "-o", "many")
    run("eval", "emoji", "--accuracy", "--num", "100", "--batch-size", "100")
    resource.setrlimit(resource.RLIMIT_AS, (used, used + (40 << 20)))
    run("export", "emoji", "-o", "student")


@pytest.mark.check(11)
def test_running_out_of_memory_is_one_line_that_says_what_was_asked_for_and_what_helps(here: Path) -> None:
    done = in_server(short_of_memory, here, SID_CACHE_DIR=str(here.parent / "cache"))
    codes = [line for line in done.stdout.splitlines() if line.isdecimal()]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert codes == ["0", "0", "0", "4", "4", "4"] and "Traceback" not in done.stderr, done.stderr
    assert all(line.startswith("error: out of memory: ") for line in errors) and len(errors) == 3, errors
    assert all("a smaller --batch-size" in line for line in errors[:2]), errors
    assert not list(here.rglob(".tmp-*")) and not (here / "student").exists()


# Drawing


@pytest.mark.check(19)
def test_the_same_seed_draws_the_same_bytes_and_another_batch_size_the_same_image(here: Path) -> None:
    prompts = ["a cat", "a dog on red", "three blue fish", "a bus"]
    (here / "rest.txt").write_text("\n".join(prompts[2:]))
    draw = ["sample", *prompts, "--num", "2", "--seed", "5", "-q"]
    assert sid(*draw, "-o", "one") == sid(*draw, "-o", "two") == 0
    assert tree(here / "one") == tree(here / "two")
    assert sid(*draw, "--batch-size", "1", "-o", "singly") == sid(*draw, "--batch-size", "3", "-o", "threes") == 0
    for index in range(8):
        with Image.open(here / "one" / f"{index:06d}.png") as first:
            assert json.loads(first.info["sid"])["prompt"] == prompts[index // 2]
            assert json.loads(first.info["sid"])["seed"] == 5 + index % 2
            for other in ("singly", "threes"):
                with Image.open(here / other / f"{index:06d}.png") as second:
                    assert second.info == first.info and export.apart(np.asarray(first), np.asarray(second)) <= 1
    # A list that was stopped goes on with what is left of it.
    assert sid("sample", "--prompts", "rest.txt", "--num", "2", "--seed", "5", "--batch-size", "1", "-o", "rest", "-q") == 0
    for index in range(4):
        assert (here / "rest" / f"{index:06d}.png").read_bytes() == (here / "singly" / f"{index + 4:06d}.png").read_bytes()


def test_bf16_draws_nearly_the_image_of_fp32_and_the_record_of_the_image_says_so(here: Path) -> None:
    assert (
        sid("sample", "a cat", "-o", "full.png", "-q") == sid("sample", "a cat", "--precision", "bf16", "-o", "half.png", "-q") == 0
    )
    with Image.open(here / "full.png") as full, Image.open(here / "half.png") as half:
        assert 1 <= export.apart(np.asarray(full), np.asarray(half)) <= 40
        assert np.abs(np.subtract(np.asarray(full, np.int16), np.asarray(half, np.int16))).mean() < 2
        assert [json.loads(one.info["sid"])["sampling"] for one in (full, half)] == ["1 step at t = 625", "1 step at t = 625, bf16"]


# Exports


@pytest.mark.check(20)
def test_an_export_holds_every_weight_bit_for_bit_and_draws_what_sample_draws(tmp_path: Path) -> None:
    assert sid("export", "emoji", "-o", tmp_path / "student", "-q") == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "student", torch_dtype=torch.float32)
    ours = load(find("emoji"))
    for theirs, net in ((pipe.unet, ours.denoiser), (pipe.vae, ours.vae), (pipe.text_encoder, ours.text_encoders[0])):
        weights = theirs.state_dict()
        assert weights.keys() == net.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a cat", num_inference_steps=1, guidance_scale=0, generator=torch.Generator().manual_seed(3)).images[0]
    assert sid("sample", "a cat", "--seed", "3", "-o", tmp_path / "cat.png", "-q") == 0
    with Image.open(tmp_path / "cat.png") as picture:
        assert export.apart(np.asarray(drawn), np.asarray(picture)) <= 1


UMASK = """
from pathlib import Path
from sidcli.files import atomic_folder
with atomic_folder(Path("student")) as folder:
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").touch(mode=0o600)
"""
"""A folder as exports write theirs, some of whose files libraries make unreadable for others."""


@pytest.mark.check(20)
def test_a_folder_follows_the_umask(tmp_path: Path) -> None:
    command = ["sh", "-c", 'umask 027; exec "$@"', "sh", sys.executable, "-c", UMASK]
    assert subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}).returncode == 0
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("student", "student/unet", "student/unet/weights")]
    assert modes == [0o750, 0o750, 0o640]


def fill(folder: Path, content: str) -> None:
    with atomic_folder(folder) as temporary:
        for name in ("a", "b", "sub/c"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(content)


def content(folder: Path) -> set[str]:
    """What stands in the three files of a whole folder."""
    assert set(tree(folder)) == {"a", "b", "sub", "sub/c"}
    return {str(value) for value in tree(folder).values() if value is not None}


@pytest.mark.check(20)
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_killed_before_any_operation_is_whole_and_the_next_writer_clears_what_was_left(
    there: bool, tmp_path: Path
) -> None:
    outcomes: list[str] = []
    for operation in range(1, 100):
        root = tmp_path / str(operation)
        if there:
            fill(root / "out", "old")
        if not killed_at(lambda: fill(root / "out", "new"), root, operation):  # noqa: B023
            break
        outcomes.append(content(root / "out").pop() if (root / "out").exists() else "nothing")
        fill(root / "out", "next")
        assert content(root / "out") == {"b'next'"} and os.listdir(root) == ["out"]
    first = "b'old'" if there else "nothing"
    assert len(outcomes) > 8 and set(outcomes) == {first, "b'new'"} and outcomes == sorted(outcomes, key=first.__ne__)


@pytest.mark.check(20)
def test_an_export_killed_while_it_writes_leaves_the_earlier_one_whole(student: Model, tmp_path: Path) -> None:
    exported(student, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    for operation in range(1, 1000, 9):
        root = tmp_path / str(operation)
        shutil.copytree(tmp_path / "whole", root / "out")
        (root / "out" / "old").touch()
        if not killed_at(lambda: exported(student, root / "out"), root, operation):  # noqa: B023
            break
        found = tree(root / "out")
        assert found in (whole, whole | {"old": b""})
        shutil.rmtree(root)
    assert operation > 60


@pytest.mark.check(20)
def test_a_folder_that_another_process_is_writing_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-0123abcd-out").mkdir()
    (tmp_path / ".tmp-1-0123abcd-other").mkdir()
    with atomic_folder(tmp_path / "out") as mine:
        assert sorted(os.listdir(tmp_path)) == sorted([".tmp-1-0123abcd-other", mine.name])
        child = os.fork()
        if child == 0:
            fill(tmp_path / "out", "other")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and mine.is_dir()
    assert sorted(os.listdir(tmp_path)) == [".tmp-1-0123abcd-other", "out"]


# Signals


def stopped(number: int, ready: Callable[[], bool], *arguments: object) -> int:
    """Run a command in this process and send it a signal as soon as something is there."""
    ended = threading.Event()

    def watch() -> None:
        while not ready() and not ended.is_set():
            time.sleep(0.002)
        if not ended.is_set():
            os.kill(os.getpid(), number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return sid(*arguments)
    finally:
        ended.set()
        watcher.join()


@pytest.mark.check(4)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_command_says_in_one_line_what_is_kept_and_leaves_nothing_half_written(
    number: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def last_line() -> str:
        said = capsys.readouterr()
        assert "Traceback" not in said.err and said.out == ""
        return said.err.splitlines()[-1]

    draws = ["sample", "a cat", "--num", "2000", "--batch-size", "2", "-o", "many"]
    assert stopped(number, (here / "many" / "000003.png").exists, *draws) == 128 + number
    assert last_line() == (
        "error: stopped; images that were drawn are kept; try: the same command with --overwrite, which draws them again, "
        "or the missing prompts with another --output"
    )
    drawn = sorted((here / "many").iterdir())
    assert 3 < len(drawn) < 2000 and all(Image.open(file).size == (64, 64) for file in drawn)
    evaluates = [
        "eval",
        "emoji",
        "--accuracy",
        "--num",
        "200",
        "--batch-size",
        "2",
        "--image-folder",
        "kept",
        "--report",
        "page.html",
    ]
    assert stopped(number, lambda: any(here.glob("kept/*/000003.png")), *evaluates) == 128 + number
    assert "images and features that are complete are kept" in last_line() and not (here / "page.html").exists()
    (kept,) = (here / "kept").iterdir()
    count = len(list(kept.glob("0*.png")))
    assert 3 < count < 200
    assert stopped(number, (kept / f"{count + 3:06d}.png").exists, *evaluates) == 128 + number, "goes on behind those"
    capsys.readouterr()
    assert stopped(number, lambda: any(here.glob(".tmp-*")), "export", "emoji", "-o", "student") == 128 + number
    assert "nothing half-written is left" in last_line()
    assert sorted(path.name for path in here.iterdir()) == ["kept", "many"] and not list(here.rglob(".tmp-*"))


# What is printed


def harmless(text: str) -> bool:
    """Whether a terminal shows this text as it is: no control but the ends of lines, nothing that turns the direction of writing."""
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in text)


@pytest.mark.check(30)
@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "a cat", f"--nope{HOSTILE}"],
        ["sample", "a cat", "--num", HOSTILE],
        ["sample", "a cat", "--device", HOSTILE],
        ["sample", "a cat", "--backend", HOSTILE],
        ["sample", "a cat", "--prediction-type", HOSTILE],
        ["sample", "a cat", "--model", HOSTILE],
        ["sample", "a cat", "--model", f"{HOSTILE}.ckpt"],
        ["sample", "a cat", "--prompts", HOSTILE],
        ["sample", "a cat", "--model-config", HOSTILE, "--model", "emoji.safetensors"],
        ["distill", HOSTILE],
        ["distill", "--prompts", HOSTILE],
        ["distill", "--teacher", HOSTILE],
        ["distill", "--resume", HOSTILE],
        ["distill", "--config", HOSTILE],
        ["distill", "--tracker", HOSTILE],
        ["distill", "--memory", HOSTILE],
        ["distill", "--guidance-strategy", HOSTILE],
        ["distill", "-o", f"file/{HOSTILE}"],
        ["eval", HOSTILE],
        ["eval", f"emoji,{HOSTILE}=3"],
        ["eval", "--fail-above", HOSTILE],
        ["eval", "--protocol", HOSTILE],
        ["eval", "--reference", HOSTILE],
        ["eval", "--inception", HOSTILE, "--protocol", "custom", "--reference", "."],
        ["export", HOSTILE, "-o", "x"],
        ["export", "emoji", "-o", f"file/{HOSTILE}"],
        ["export", "emoji", "-o", "x", "--format", HOSTILE],
        ["export", "emoji", "-o", "x", "--dtype", HOSTILE],
        ["export", "emoji", "-o", "x", "--variant", HOSTILE],
        ["export", "emoji", "-o", "x", "--push-to-hub", HOSTILE],
        ["export", f"{HOSTILE}.pkl", "-o", "x", "--teacher", "emoji"],
        ["export", "emoji", "-o", "x", f"--{HOSTILE}"],
        [HOSTILE],
        [f"--{HOSTILE}"],
    ],
    ids=lambda arguments: " ".join(arguments).encode("unicode_escape").decode()[:40],
)
def test_an_error_shows_what_it_was_given_without_driving_the_terminal(
    arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").touch()
    assert sid(*arguments) in (2, 3, 4)
    said = capsys.readouterr()
    assert harmless(said.out + said.err) and "error: " in said.err.splitlines()[-1], ascii(said.err)
    assert "MarkupError" not in said.err and "Traceback" not in said.err
    monkeypatch.setenv("SID_DEBUG", "1")
    assert sid(*arguments) in (2, 3, 4)
    assert harmless(capsys.readouterr().err)


@pytest.mark.check(30)
@pytest.mark.parametrize("setting", ["teacher", "prompts", "model_config", "guidance_strategy", "precision", HOSTILE])
def test_settings_of_a_file_are_shown_without_driving_the_terminal(
    setting: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.toml").write_text(tomli_w.dumps({"teacher": "emoji-teacher", setting: f"a\0{HOSTILE}"}))
    assert sid("distill", "--config", "own.toml", "-o", "run", "--dry-run") in (2, 3)
    said = capsys.readouterr()
    assert harmless(said.out + said.err) and said.err.splitlines()[-1].startswith("error: "), ascii(said.err)


@pytest.mark.check(30, 31)
def test_a_traceback_shows_neither_raw_control_characters_nor_values_of_variables(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "\x1b]0;t\x07\u202e.txt"
    (here / name).touch()
    monkeypatch.setenv("SID_DEBUG", "1")
    assert sid("sample", "a prompt of nobody else", "--model", name) == 3
    said = capsys.readouterr().err
    assert "Traceback" in said and "\\u001b]0;t\\u0007\\u202e.txt is neither" in said and harmless(said)
    assert "a prompt of nobody else" not in said and "locals" not in said


@pytest.mark.check(30)
def test_names_and_prompts_that_would_drive_a_terminal_arrive_whole_and_are_shown_escaped(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "[/red]\x1b]0;t\x07\u202e\r\x9b\n"
    parts = Path(model).parts
    Path(*parts[:-1]).mkdir()
    assert sid("export", "emoji", "-o", "student", "--no-verify", "-q") == 0
    Path(model).symlink_to(here / "student")
    capsys.readouterr()
    for extra in ([], ["--json"]):
        assert sid("sample", HOSTILE, "a cat", "--model", model, "-o", f"out{len(extra)}", *extra) == 0
        said = capsys.readouterr()
        assert harmless(said.out + said.err), ascii(said)
    assert json.loads(said.out)["images"][0]["prompt"] == HOSTILE and json.loads(said.out)["model"] == model
    with Image.open(here / "out0" / "000000.png") as picture:
        assert json.loads(picture.info["sid"])["prompt"] == HOSTILE and harmless(picture.info["sid"])
    compared = ["eval", model, "emoji", "--accuracy", "--num", "2", "--report", "page.html", "--picture", "rows.png", "--overwrite"]
    for extra in ([], ["--latex"], ["--json"]):
        assert sid(*compared, *extra) == 0
        said = capsys.readouterr()
        assert harmless(said.out + said.err), ascii(said)
    assert json.loads(said.out)["models"][1]["model"] == model
    assert harmless((here / "page.html").read_text(encoding="utf-8"))
    assert sid("export", model, "-o", f"x{HOSTILE.replace('/', '')}", "--json") == 0
    said = capsys.readouterr()
    assert harmless(said.out + said.err) and json.loads(said.out)["folder"] == f"x{HOSTILE.replace('/', '')}"


@pytest.mark.check(30)
def test_a_contact_sheet_writes_control_characters_out() -> None:
    picture = Image.new("RGB", (64, 64))
    raw, escaped = contact_sheet([picture], ["a\n\x1bb"]), contact_sheet([picture], ["a\\u000a\\u001bb"])
    assert raw.tobytes() == escaped.tobytes() != contact_sheet([picture], ["ab"]).tobytes()


@pytest.mark.check(30)
def test_a_table_and_a_bar_on_a_terminal_take_no_name_for_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "BAR_SECONDS", 0.0)
    voice = Console()
    voice.live, options = True, {"force_terminal": True, "width": 200, "markup": False, "highlight": False, "emoji": False}
    voice.err, voice.out = Terminal(file=sys.stderr, **options), Terminal(file=sys.stdout, **options)
    with voice.progress(HOSTILE, 2, "images") as advance:
        advance(1, HOSTILE)
    voice.table(HOSTILE, ["model", HOSTILE], [["a", HOSTILE]])
    said = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.out + said.err).replace("\r", "")
    assert harmless(plain) and plain.count("[link=http://x]") >= 5, ascii(plain)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_commands_that_create_the_same_output_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for name in ("image.png", "folder"):
        place = tmp_path / name
        write = atomic_file if place.suffix else atomic_folder
        with pytest.raises(UsageError, match=f"another program has created {place}"), write(place, replace=False) as late:
            with write(place, replace=False) as first:
                (first if place.suffix else first / "a").write_text("first")
            (late if place.suffix else late / "a").write_text("second")
        assert (place if place.suffix else place / "a").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "image.png"]


def test_nothing_is_drawn_into_a_run_folder_and_no_export_replaces_its_student(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    for file in (tmp_path / "run" / "run.json", student / "sid.json"):
        file.write_text("{}")
    with pytest.raises(UsageError, match="run is a run folder"):
        Places.of(tmp_path / "run", 2).check(overwrite=True)
    with pytest.raises(UsageError, match="student is the student of a run"):
        check_export(student, overwrite=True)
    Places.of(tmp_path / "run" / "images", 2).check(overwrite=True)
    Places.of(tmp_path / "run" / "one.png", 1).check(overwrite=True)
