"""What safety costs: the share of a training that waits for checkpoints, and the time from a signal to the end of the process.

    python tests/benchmarks/reliability.py            # about seven minutes on two CPU cores
    python tests/benchmarks/reliability.py --gigabytes 17.2 --device cuda

Prints a table and writes tests/benchmarks/results/reliability.json. `--gigabytes` sizes the checkpoint that is written as a trial;
17.2 is that of Stable Diffusion 1.5 with its optimizers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sidcli.training import checkpoint
from sidcli.training.intervals import Intervals

RESULTS = Path(__file__).parent / "results"
PHASES = ("loading", "first picture", "step", "saving", "teacher's images for --eval-every", "step, two processes")


def command(output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sidcli", "distill", "--output", str(output), *options]


def share(steps: int) -> dict[str, Any]:
    """A run with every default but its length."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        done = subprocess.run([*command(output, "--steps", str(steps)), "--json"], stdout=subprocess.PIPE, text=True, check=True)
        saved = checkpoint.verify(output / "checkpoints" / checkpoint.folder_name(steps)).folder
        size = sum(file.stat().st_size for file in saved.iterdir())
    made = json.loads(done.stdout)
    return {"steps": steps, "checkpoint_mb": round(size / 1e6, 1), "seconds": made["seconds"], "waited": made["saving_seconds"]}


def trial(gigabytes: float, device: str) -> dict[str, Any]:
    """One checkpoint of that size from a device: the copy, for which training waits, and the write, for which it does not."""
    count = round(gigabytes * 1e9 / 4 / 5)
    names = ("generator", "average", "fake_score", "optimizer_generator", "optimizer_fake_score")
    live = {name: {"w": torch.rand(count, device=device)} for name in names}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        begun = time.monotonic()
        copies = {name: {"w": tensors["w"].to("cpu", copy=True)} for name, tensors in live.items()}
        copied = time.monotonic()
        del live
        written = checkpoint.write(Path(folder), 1, copies, {}, {})
        wrote = time.monotonic()
        checkpoint.verify(written)
        verified = time.monotonic()
    return {
        "gigabytes": gigabytes,
        "device": device,
        "copy": round(copied - begun, 2),
        "write": round(wrote - copied, 2),
        "verify": round(verified - wrote, 2),
        "share_at_default": round((copied - begun) / Intervals(1, 1).save_seconds, 5),
        "share_if_training_waited": round((wrote - begun) / Intervals(1, 1).save_seconds, 5),
    }


def leaving(phase: str, number: int) -> dict[str, Any]:
    """Seconds from a signal in this phase to the end of all processes, with the emoji teacher at its defaults."""
    options = {"saving": ["--save-every", "1"], PHASES[4]: ["--eval-every", "50"], PHASES[5]: ["--processes", "2"]}.get(phase, [])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        environment = os.environ | {"SID_CACHE_DIR": str(Path(folder) / "cache")}
        running = subprocess.Popen(
            command(output, *options), stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        assert running.stderr is not None
        reached: dict[str, Callable[[], bool]] = {
            "loading": lambda: "loading" in running.stderr.readline(),  # type: ignore[union-attr]
            "first picture": lambda: (output / "samples" / "prompts.json").exists(),
            "saving": lambda: any((output / "checkpoints").glob(".tmp-*")),
            PHASES[4]: lambda: any((Path(folder) / "cache").rglob("*.png")),
        }
        there = reached.get(phase, lambda: (output / "metrics.jsonl").exists())
        while not there():
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.01)
        begun = time.monotonic()
        running.send_signal(number)
        _, said = running.communicate()
        seconds = time.monotonic() - begun
        return {"phase": phase, "signal": signal.Signals(number).name, "exit": running.returncode, "seconds": round(seconds, 2)} | {
            "steps_saved": checkpoint.numbered(output / "checkpoints"),
            "said": said.strip().splitlines()[-1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of the run with defaults")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the trial checkpoint")
    parser.add_argument("--device", default="cpu", help="where its tensors are")
    options = parser.parse_args()
    ran = share(options.steps)
    tried = trial(options.gigabytes, options.device)
    left = [leaving(phase, number) for phase in PHASES for number in (signal.SIGTERM, signal.SIGUSR1)]
    print(f"\n{ran['steps']} steps of emoji-teacher at the defaults, a checkpoint has {ran['checkpoint_mb']} MB:")
    print(f"  {ran['waited']:.2f} of {ran['seconds']:.0f} s waited for checkpoints, {100 * ran['waited'] / ran['seconds']:.2f} %")
    print(
        f"a checkpoint of {tried['gigabytes']} GB on {tried['device']}: copied in {tried['copy']} s, written in {tried['write']} s,"
    )
    print(f"  verified in {tried['verify']} s; once in eight minutes {100 * tried['share_at_default']:.2f} % of the time, and")
    print(f"  {100 * tried['share_if_training_waited']:.2f} % if the training waited for the disk")
    for row in left:
        print(f"{row['signal']:8} {row['phase']:34} exit {row['exit']}  {row['seconds']:6.2f} s  {row['said']}")
    record = {"machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reliability.json").write_text(json.dumps(record | {"run": ran, "trial": tried, "leaving": left}, indent=2) + "\n")


if __name__ == "__main__":
    main()
