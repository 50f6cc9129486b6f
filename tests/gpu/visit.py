"""Everything that a GPU can tell, in one command and at most nine minutes: is it right, how fast and how small, how good.

    make gpu-visit                                  # on a machine with a GPU, torch, transformers and accelerate
    make gpu-visit ARGS=--smoke                     # every part at a tiny size, on the CPU too
    python -m tests.gpu.visit --only right fast     # some parts

Each result is appended to OUTPUT/visit.jsonl as soon as it is there; a part that fails or runs out of time does not stop the others.
At the end a table goes to stdout and to OUTPUT/visit.md, and the students that were trained to OUTPUT/*.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.gpu import checks, speed
from tests.gpu.record import append, read

RIGHT, FAST = 90.0, 180.0
"""Seconds at most for the first two parts."""
EVALUATION = 150.0
"""Seconds kept for measuring the students."""

KEPT = 3
"""Number of students to keep, those with the lowest FID; they have 16 MB each."""
LARGE = {"batch_size": 256, "lr": 3e-4, "ema_images": 40_000.0, "kappa": 1.5, "prompts": "emoji-nouns"}
SMALL = {"batch_size": 16, "lr": 1e-4, "ema_images": 500.0, "kappa": 2.0, "steps": 600}
TRAININGS: dict[str, dict[str, Any]] = {
    "bare": LARGE,
    "bare-lr5": LARGE | {"lr": 5e-4},
    "bare-alpha12": LARGE | {"alpha": 1.2},
    "bare-k175": LARGE | {"kappa": 1.75},
    "full-600": SMALL,
    "lora16-600": SMALL | {"lr": 1e-3, "student_lora": 16, "fake_lora": 16},
    "lora64-600": SMALL | {"lr": 1e-3, "student_lora": 64, "fake_lora": 64},
}
"""Trainings of the third part, which share the device."""


class Visit:
    def __init__(self, output: Path, device: str, smoke: bool, minutes: float, graphs: bool = False):
        self.output, self.device, self.smoke, self.graphs = output, device, smoke, graphs
        self.file = output / "visit.jsonl"
        self.log = (output / "visit.log").open("w", encoding="utf-8")
        self.deadline = time.monotonic() + 60 * minutes
        self.size = "smoke" if smoke else "full"
        self.quiet = Path(tempfile.mkdtemp()) / "quiet"
        os.environ["SID_VISIT_QUIET"] = str(self.quiet)
        self.width = 8 if device.startswith("cuda") else 1  # side by side on a few cores they would only wait for each other

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tests.gpu.{module}", *map(str, arguments)]
        few = {} if module == "speed" else {"OMP_NUM_THREADS": "2" if self.width > 1 else "1"}
        return subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True, env=os.environ | few)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()

    def unfinished(self, part: str, names: Sequence[str]) -> list[str]:
        ended = {record["name"] for record in read(self.file) if record["part"] == part and record.get("event") == "done"}
        return [name for name in names if name not in ended]

    def fail(self, part: str, name: str, why: str) -> None:
        append(self.file, {"part": part, "name": name, "event": "done", "ok": False, "bound": "", "values": {"error": why}})

    def run(self, module: str, part: str, groups: list[list[str]], limit: float) -> None:
        """Run groups of checks side by side. The check during which a process dies has failed; the rest goes on in a new process."""
        until = min(time.monotonic() + limit, self.deadline)
        queue = [list(group) for group in groups if group]
        waiting: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}
        while (waiting or queue) and time.monotonic() < until:
            while queue and len(waiting) < self.width:
                group = queue.pop(0)
                waiting[tuple(group)] = self.start(module, self.file, self.device, self.size, *group)
            time.sleep(0.2)
            for group, process in list(waiting.items()):
                if process.poll() is None:
                    continue
                del waiting[group]
                rest = self.unfinished(part, group)
                if rest:
                    self.fail(part, rest[0], f"its process ended with {process.returncode}")
                if len(rest) > 1:
                    queue.insert(0, rest[1:])
        for process in waiting.values():
            self.stop(process)
        for group in (*waiting, *queue):
            for name in self.unfinished(part, group):
                append(self.file, late(part, name, f"not done within {limit:.0f} s"))

    def train(self, trainings: dict[str, dict[str, Any]], seconds: float) -> None:
        """Train side by side, measure each student when its training ends, and keep those with the lowest FID."""
        folder = Path(tempfile.mkdtemp())
        os.environ["SID_CACHE_DIR"] = tempfile.mkdtemp()
        num, more = (20, 20) if self.smoke else (2000, 10_000)
        scales = ("2", "3") if self.smoke else ("2", "2.5", "3", "3.5")
        measuring = [self.start("measure", self.file, self.device, "teacher", num, more, *scales)]
        graphs = self.graphs or any(record["name"] == "graphs" and record.get("ok") for record in read(self.file))
        training: dict[str, subprocess.Popen[bytes]] = {}
        for name, given in trainings.items():
            settings = {**given, "graphs": graphs and "student_lora" not in given}
            kappa, lr = settings.pop("kappa"), settings.pop("lr")
            objective = {f"kappa{index}": kappa for index in (1, 2, 3, 4)} | {"alpha": settings.pop("alpha", 1.0)}
            settings |= {"objective": objective, "lr_fake": lr, "lr_generator": lr}
            training[name] = self.start("train", self.file, self.device, folder, name, seconds, json.dumps(settings))
        until = min(time.monotonic() + seconds + 60, self.deadline - 30)
        while training and time.monotonic() < until:
            time.sleep(0.2)
            for name in [name for name, process in training.items() if process.poll() is not None]:
                del training[name]
                students = sorted(folder.glob(f"{name}-*"))
                if students:
                    measuring.append(self.start("measure", self.file, self.device, "students", num, *students))
        for process in training.values():
            self.stop(process)
        self.quiet.touch()
        self.keep(sorted(folder.glob("*-100"))[:KEPT])
        for process in measuring[::-1]:  # the teacher last
            try:
                if process.wait(max(1.0, self.left())):
                    self.fail("strong", "eval", f"its process ended with {process.returncode}")
            except subprocess.TimeoutExpired:
                self.stop(process)
                append(self.file, late("strong", "eval", "not done in time"))
        fids = {record["name"]: record["values"]["fid"] for record in read(self.file) if record["name"].startswith("eval ")}
        self.keep(sorted(folder.glob("*-100"), key=lambda path: fids.get(f"eval {path.name}", float("inf")))[:KEPT])

    def keep(self, students: Sequence[Path]) -> None:
        """Copy these students to the output, in place of those copied before."""
        for old in self.output.glob("*.safetensors"):
            old.unlink()
        for path in students:
            shutil.copy(path / "unet/diffusion_pytorch_model.safetensors", self.output / f"{path.name}.safetensors")


def late(part: str, name: str, why: str) -> dict[str, Any]:
    """The record of a check for which there was no time: neither passed nor failed."""
    return {"part": part, "name": name, "event": "done", "ok": None, "bound": "", "values": {"not_done": why}}


def line(record: dict[str, Any]) -> str:
    mark = {True: "ok", False: "FAILED", None: "-"}[record.get("ok")]
    values = {key: value for key, value in record["values"].items() if key not in ("longest", "trace")}
    shown = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    return f"| {record['part']} | {record['name']} | {mark} | {record.get('bound', '')} | {shown[:400]} | {record.get('seconds', '')} |"


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [record for record in records if record.get("event") in ("done", "trained")]
    return ["| part | check | | bound | values | s |", "| --- | --- | --- | --- | --- | ---: |", *map(line, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, every part")
    parser.add_argument("--only", nargs="+", choices=("right", "fast", "strong"), default=["right", "fast", "strong"])
    parser.add_argument("--checks", nargs="+", help="only these checks of the first two parts")
    parser.add_argument("--without", nargs="+", default=[], help="all but these checks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="limit of the whole visit; default: 9, and 60 with --smoke")
    parser.add_argument("--graphs", action="store_true", help="train with CUDA graphs, also if the check of them does not run")
    parser.add_argument("--trainings", type=json.loads, default=TRAININGS, help="JSON object: name -> settings")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-visit"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "visit.jsonl").unlink(missing_ok=True)
    visit = Visit(given.output, given.device, given.smoke, given.minutes or (60.0 if given.smoke else 9.0), given.graphs)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    append(visit.file, {"part": "machine", "name": hardware, "event": "done", "ok": None, "values": versions})

    def wanted(names: Sequence[str]) -> list[str]:
        return [name for name in names if (given.checks is None or name in given.checks) and name not in given.without]

    everything = list(speed.make_checks(speed.Lab(visit.file, "cpu", given.smoke)))
    if "right" in given.only:
        groups = [wanted(group) for group in checks.GROUPS]
        visit.run("checks", "right", [group for group in groups if group], 1800.0 if given.smoke else RIGHT)
    if "fast" in given.only:
        alone = wanted([name for name in everything if name not in ("planned", "sd15 compiled")])
        visit.run("speed", "fast", [group for group in (alone, wanted(["planned"])) if group], 1800.0 if given.smoke else FAST)
    beside = wanted(["sd15 compiled"]) if "fast" in given.only else []
    compiling = visit.start("speed", visit.file, given.device, visit.size, *beside) if beside else None
    if "strong" in given.only and given.smoke:
        name = next(iter(given.trainings))
        visit.train({name: given.trainings[name] | {"batch_size": 4}}, 20.0)
    elif "strong" in given.only:
        visit.train(given.trainings, visit.left() - EVALUATION)
    visit.quiet.touch()
    if compiling:
        try:
            compiling.wait(max(1.0, visit.left()))
        except subprocess.TimeoutExpired:
            visit.stop(compiling)
        for name in visit.unfinished("fast", beside):
            append(visit.file, late("fast", name, "not done in time"))
    lines = table(read(visit.file))
    (given.output / "visit.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)
    failed = [record for record in read(visit.file) if record.get("event") == "done" and record.get("ok") is False]
    print(f"{len(failed)} failed; {given.output}/visit.jsonl")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
