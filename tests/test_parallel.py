"""Several real processes on this machine (gloo on the CPU) compute what one process computes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.environment import Group
from sidcli.errors import SidError, UsageError
from sidcli.models.loading import Model
from sidcli.settings import DistillConfig
from sidcli.training import checkpoint, launch
from tests.commands import together

SETTINGS = ["--prompts", "general", "--steps", "2", "--batch-size", "8", "--lr", "1e-3", "--device", "cpu", "--precision", "fp32"]
# Where a gradient is all but zero, Adam's step has a rounding error's sign; a large epsilon makes steps follow gradients.
SMOOTH = "adam_eps = 0.1\n"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def command(teacher: Path, output: Path, *more: str) -> list[str]:
    smooth = output.with_suffix(".toml")
    smooth.write_text(SMOOTH)
    return [
        "-m",
        "sidcli",
        "distill",
        "--teacher",
        str(teacher),
        "--output",
        str(output),
        "--config",
        str(smooth),
        *SETTINGS,
        *more,
    ]


def distilled(arguments: list[str], output: Path) -> dict[str, torch.Tensor]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output / "student")  # one process speaks
    return state(output)


def distilled_by_forks(arguments: list[str], output: Path, count: int = 1) -> dict[str, torch.Tensor]:
    """The same in forks, without a launcher."""
    processes = together(count, *arguments[2:], cwd=output.parent)  # without `-m sidcli`
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    return state(output)


def state(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": value
        for file in (output / "checkpoints" / "step-00000002").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def alone(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("alone") / "run"
    return distilled_by_forks(command(sd_folder, output), output)


def assert_same(alone: dict[str, torch.Tensor], together: dict[str, torch.Tensor], teacher: Path) -> None:
    """Equal up to rounding: measured on the way each network has gone, and on the optimizers' state, which has the gradients' size."""
    assert together.keys() == alone.keys()
    (denoiser,) = (file for name in ("unet", "transformer") for file in (teacher / name).glob("*.safetensors"))
    start = load_file(denoiser)
    for file in {name.partition("/")[0] for name in alone}:
        names = sorted(name for name in alone if name.startswith(f"{file}/") and not name.endswith(".step"))
        one, other = (torch.cat([values[name].flatten().double() for name in names]) for values in (alone, together))
        begun = [start.get(name.partition("/")[2], torch.zeros_like(alone[name])).flatten().double() for name in names]
        way_gone = (one - torch.cat(begun)).norm()
        assert way_gone > 0 and (one - other).norm() < 1e-4 * way_gone, file


def test_two_processes_of_small_pieces_train_what_one_trains(
    sd_folder: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    together = distilled_by_forks(command(sd_folder, tmp_path / "run", "--micro-batch", "2"), tmp_path / "run", 2)
    assert_same(alone, together, sd_folder)


def test_two_processes_with_sharded_networks_train_what_one_trains(
    sd_folder: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    together = distilled_by_forks(command(sd_folder, tmp_path / "run", "--shard"), tmp_path / "run", 2)
    assert_same(alone, together, sd_folder)


GAN = ["--objective", "dmd2", "--fake-updates", "1", "--set", "gan=0.01", "--data", "teacher", "--data-num", "4"]


def test_two_processes_with_sharded_networks_and_small_pieces_train_the_discriminator_that_one_trains(
    sd_folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = distilled_by_forks(command(sd_folder, one, *GAN), one)
    assert any("discriminator." in name for name in alone)
    together = distilled_by_forks(command(sd_folder, two, *GAN, "--micro-batch", "2", "--shard"), two, 2)
    assert_same(alone, together, sd_folder)


# The gradient of a distance with a small constant is all but its sign.
SQUARES = ["--set", "huber=0", "--set", "target=0.5"]
ON_IMAGES = [
    ("dmd", [], ["--micro-batch", "2"]),  # as regression, and two outputs of one network
    ("lcm", SQUARES, ["--micro-batch", "2", "--shard"]),
    ("scflow", [*SQUARES, "--set", "joined_images=0"], ["--micro-batch", "2"]),  # all terms
]


@pytest.mark.parametrize(("name", "settings", "more"), ON_IMAGES)
def test_two_processes_train_on_the_images_on_which_one_trains(
    sd_folder: Path, tmp_path: Path, name: str, settings: list[str], more: list[str]
) -> None:
    method = ["--objective", name, *settings, "--data", "teacher", "--data-num", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = distilled_by_forks(command(sd_folder, one, *method), one)
    assert_same(alone, distilled_by_forks(command(sd_folder, two, *method, *more), two, 2), sd_folder)


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
# Its CPU mode starts one process unless MPI is there; the launcher for GPUs starts two anywhere, and --device cpu does the rest.
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29617"]


def test_accelerate_launch_sets_the_variables_from_which_a_process_knows_its_group() -> None:
    tell = "import sys; from sidcli.environment import group; sys.stdout.write(f'{group()}\\n')"
    launch = [*ACCELERATE, "--no_python", sys.executable, "-c", tell]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [str(Group(rank, 2, rank, 2)) for rank in range(2)]


@pytest.mark.soak  # the test above and those of forks show what each part of it does
def test_accelerate_launch_starts_the_same_run(sd_folder: Path, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    output = tmp_path / "run"
    assert_same(alone, distilled([*ACCELERATE, "-m", *command(sd_folder, output)[1:]], output), sd_folder)


@pytest.mark.check(4)
def test_a_signal_to_one_process_of_a_group_saves_and_stops_all(sd_folder: Path, tmp_path: Path) -> None:
    group = together(2, *command(sd_folder, tmp_path / "run", "--steps", "100000")[2:], cwd=tmp_path)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in group)
        time.sleep(0.05)
    os.kill(group[1].pid, signal.SIGUSR1)
    said = [process.communicate()[1] for process in group]
    assert [process.returncode for process in group] == [128 + signal.SIGUSR1] * 2, said
    assert "saved" in said[0] and "".join(said).count("error:") == 1
    assert checkpoint.numbered(tmp_path / "run" / "checkpoints")


@pytest.mark.check(4)
def test_a_launcher_forwards_a_signal_to_each_of_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"  # in the place of `python -m sidcli`
    program.write_text(
        '#!/bin/sh\ntrap "echo $RANK $WORLD_SIZE > $3/heard-$RANK; exit 138" USR1\n: > $3/ready-$RANK\nwhile :; do sleep 0.01; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    ended = threading.Event()

    def send() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2 and not ended.wait(0.01):
            pass
        while not ended.wait(0.1):  # again, because the first may arrive before the launcher listens
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        code = launch.launch(2, [str(tmp_path)])
    finally:
        ended.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert code == 138
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in range(2)] == ["0 2\n", "1 2\n"]


@pytest.mark.check(4)
@pytest.mark.soak  # the two tests above show what each part of it does
@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, "the launcher"), (signal.SIGUSR1, "one of the processes")])
def test_a_signal_saves_and_stops_every_process(sd_folder: Path, tmp_path: Path, number: signal.Signals, who: str) -> None:
    arguments = command(sd_folder, tmp_path / "run", "--processes", "2", "--steps", "100000")
    running = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert running.poll() is None
        time.sleep(0.2)
    team = psutil.Process(running.pid).children()
    assert len(team) == 2
    (running if who == "the launcher" else team[1]).send_signal(number)
    _, said = running.communicate()
    assert running.returncode == 128 + number, said
    assert not any(process.is_running() for process in team)
    assert "saved" in said and said.count("error:") == 1
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.check(2)
def test_when_a_process_of_a_group_is_killed_the_other_ends_and_the_checkpoints_are_whole(sd_folder: Path, tmp_path: Path) -> None:
    words = command(sd_folder, tmp_path / "run", "--steps", "100000", "--save-every", "1")[2:]
    leader, other = together(2, *words, cwd=tmp_path)
    while 2 not in checkpoint.numbered(tmp_path / "run" / "checkpoints"):
        assert leader.poll() is None and other.poll() is None
        time.sleep(0.05)
    os.kill(other.pid, signal.SIGKILL)
    _, said = leader.communicate()
    assert other.wait() == -signal.SIGKILL and leader.returncode == 1 and "Traceback" not in said, said
    assert [line for line in said.splitlines() if line.startswith("error: ")], said
    found, problems = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step >= 2 and not problems


@pytest.mark.check(2)
def test_a_launcher_says_which_signal_killed_one_of_its_processes_ends_the_others_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"  # in the place of `python -m sidcli`
    program.write_text(
        "#!/bin/sh\necho $$ > $3/.process-$RANK && mv $3/.process-$RANK $3/process-$RANK\nwhile :; do sleep 0.01; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.0)

    def kill_one() -> None:
        while len(list(tmp_path.glob("process-*"))) < 2:
            time.sleep(0.01)
        os.kill(int((tmp_path / "process-1").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(SidError, match="a process of this command was killed by SIGKILL") as told:
        launch.launch(2, [str(tmp_path)])
    killer.join()
    assert told.value.hint == "run the same command to continue"
    assert not any(psutil.pid_exists(int(file.read_text())) for file in tmp_path.glob("process-*"))


@pytest.mark.check(2)
@pytest.mark.soak  # two tests above show what each part of it does
@pytest.mark.parametrize("victim", ["the other", "the launcher", "the leader"])
def test_whichever_process_is_killed_the_others_end_too_and_the_checkpoints_are_whole(
    sd_folder: Path, tmp_path: Path, victim: str
) -> None:
    arguments = command(sd_folder, tmp_path / "run", "--processes", "2", "--steps", "100000", "--save-every", "1")
    running = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while 2 not in checkpoint.numbered(tmp_path / "run" / "checkpoints"):
        assert running.poll() is None
        time.sleep(0.05)
    team = psutil.Process(running.pid).children()
    order = sorted(team, key=lambda process: int(process.environ()["RANK"]))
    {"the launcher": running, "the leader": order[0], "the other": order[1]}[victim].kill()
    _, said = running.communicate()
    psutil.wait_procs(team)
    assert not any(process.is_running() for process in team)
    found, problems = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step >= 2 and not problems
    if victim != "the launcher":
        assert running.returncode in (1, 137) and "Traceback" not in said, said
        assert [line for line in said.splitlines() if line.startswith("error: ")][-1].endswith("run the same command to continue")


def test_a_closed_terminal_stops_a_command_unless_it_runs_under_nohup() -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        caught = launch.install_handlers(handler)
        assert signal.getsignal(signal.SIGHUP) is handler
        launch.restore_handlers(caught)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        caught = launch.install_handlers(handler)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is handler
        launch.restore_handlers(caught)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_batch_that_does_not_split_evenly_is_refused(sd: Model, config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="batch-size 4 does not split over 3 processes"):
        Engine(sd, config, open_prompts("general"), torch.device("cpu"))
