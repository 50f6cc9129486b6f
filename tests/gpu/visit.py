"""Everything that a GPU can tell, in one command and at most nine minutes: is it right, how fast and how small, how good.

    make gpu-visit                                  # on a machine with a GPU, torch, transformers and accelerate
    make gpu-visit ARGS=--smoke                     # the same parts at a tiny size, on the CPU too
    python -m tests.gpu.visit --only right fast     # some parts
    python -m tests.gpu.visit --only teacher        # the emoji teacher is trained further and measured; needs a visit of its own
    python -m tests.gpu.visit --only leaderboard    # every objective with equal FLOPs; needs a visit of its own
    python -m tests.gpu.visit --only subjects       # Diffusion Self-Distillation, from sheets to one step; needs a visit of its own
    python -m tests.gpu.visit --only flow           # a teacher of flow matching and its students; needs a visit of its own

The part `teacher` writes the UNet to OUTPUT/teacher.safetensors, the part `subjects` the UNet and the text encoder of the teacher of
sheets to OUTPUT/sheets-*.safetensors, the part `flow` the transformer to OUTPUT/flow.safetensors. The parts `leaderboard`, `subjects` and
`flow` write rows to OUTPUT/leaderboard.jsonl, OUTPUT/subjects.jsonl and OUTPUT/flow.jsonl. Rows that are there from an earlier visit are
kept, and their cells are not repeated.

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

TEACHER = 330.0
"""Seconds of the training of the part `teacher`. Starting it and drawing its scenes take about 40 s more."""
GUIDANCE = 150.0
"""Seconds kept for measuring that teacher and the shipped one, side by side."""
SCALES = ("2", "2.5", "3", "1.5", "3.5")
"""Its guidance scales, the most important ones first."""
LEADERBOARD = ("--tflops", 100, "--batch-size", 64, "--lr", 2e-4, "--beside", 12)
"""At batch size 64, an update of sid takes about 50 ms of an H200's time, and 250 ms of a CPU core's to launch it: from six cells
upward the GPU is busy. 100 TFLOP are about 120 updates of sid. With twelve cells at a time, a cell takes 110 s on an H200 (start and
measurement 35 s), so that 45 cells end within seven minutes; 130 s on an H100."""
SHEETS = ("--batch", 256, "--lr", 1e-3)
SHEETS_SHARE = 0.4
"""Share of a visit in which the teacher of sheets is trained."""
SUBJECTS = ("--sheets", 4000, "--steps", 2000, "--student-steps", 1500, "--batch-size", 32, "--num", 1000, "--beside", 8)
FLOW = ("--batch", 512, "--scenes", 200_000)
FLOW_SHARE = 0.45
"""Share of a visit in which the teacher of flow matching is trained. Starting it and drawing its scenes take about 40 s more."""
FLOW_STUDENTS = ("--steps", 600, "--batch-size", 64, "--lr", 2e-4, "--num", 2000, "--beside", 8)
LAST_CELLS = 130.0
"""Seconds before the end of the visit at which the last cells of the leaderboard start."""

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
        command = [sys.executable, "-m", module, *map(str, arguments)]
        few = {} if module == "tests.gpu.speed" else {"OMP_NUM_THREADS": "2" if self.width > 1 else "1"}
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
                waiting[tuple(group)] = self.start(f"tests.gpu.{module}", self.file, self.device, self.size, *group)
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
        measuring = [self.start("tests.gpu.measure", self.file, self.device, "teacher", num, more, *scales)]
        graphs = self.graphs or any(record["name"] == "graphs" and record.get("ok") for record in read(self.file))
        training: dict[str, subprocess.Popen[bytes]] = {}
        for name, given in trainings.items():
            settings = {**given, "graphs": graphs and "student_lora" not in given}
            kappa, lr = settings.pop("kappa"), settings.pop("lr")
            objective = {f"kappa{index}": kappa for index in (1, 2, 3, 4)} | {"alpha": settings.pop("alpha", 1.0)}
            settings |= {"objective": objective, "lr_fake": lr, "lr_generator": lr}
            training[name] = self.start("tests.gpu.train", self.file, self.device, folder, name, seconds, json.dumps(settings))
        until = min(time.monotonic() + seconds + 60, self.deadline - 30)
        while training and time.monotonic() < until:
            time.sleep(0.2)
            for name in [name for name, process in training.items() if process.poll() is not None]:
                del training[name]
                students = sorted(folder.glob(f"{name}-*"))
                if students:
                    measuring.append(self.start("tests.gpu.measure", self.file, self.device, "students", num, *students))
        for process in training.values():
            self.stop(process)
        self.quiet.touch()
        self.keep(sorted(folder.glob("*-100"))[:KEPT])
        for process in measuring[::-1]:  # the teacher last
            self.finish(process, "strong", "eval", self.deadline)
        fids = {record["name"]: record["values"]["fid"] for record in read(self.file) if record["name"].startswith("eval ")}
        self.keep(sorted(folder.glob("*-100"), key=lambda path: fids.get(f"eval {path.name}", float("inf")))[:KEPT])

    def finish(self, process: subprocess.Popen[bytes], part: str, name: str, until: float) -> bool:
        """Wait for a process, at most until a monotonic time, and return whether it succeeded. If not, record why."""
        try:
            code = process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop(process)
            append(self.file, late(part, name, "not done in time"))
            return False
        if code:
            self.fail(part, name, f"its process ended with {code}")
        return code == 0

    def train_teacher(self, seconds: float) -> None:
        """Train the emoji teacher further for a given time, keep its UNet, and measure it beside the shipped teacher."""
        folder, started = Path(tempfile.mkdtemp()), time.monotonic()
        os.environ["SID_CACHE_DIR"] = tempfile.mkdtemp()
        sizes = ("--batch", 8, "--scenes", 64) if self.smoke else ()
        arguments = ("--output", folder, "--device", self.device, "--seconds", seconds, *sizes)
        training = self.start("sidcli.emoji.train", "teacher-more", *arguments)
        if not self.finish(training, "teacher", "training", self.deadline - 10):
            return
        shutil.copy(folder / "teacher-more/unet/diffusion_pytorch_model.safetensors", self.output / "teacher.safetensors")
        values = json.loads((folder / "teacher-more.log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        record = {"part": "teacher", "name": "training", "event": "trained", "ok": True, "bound": "", "values": values}
        append(self.file, record | {"seconds": round(time.monotonic() - started, 1)})
        num, scales = (20, ("2",)) if self.smoke else (2000, SCALES)
        measuring = {
            f"eval {Path(model).name}": self.start("tests.gpu.measure", self.file, self.device, "guidance", num, model, *scales)
            for model in (folder / "teacher-more", "emoji-teacher")
        }
        for name, process in measuring.items():
            self.finish(process, "teacher", name, self.deadline - 5)

    def fill_leaderboard(self) -> None:
        """Train and measure the cells of the leaderboard for which there is time."""
        os.environ["SID_CACHE_DIR"] = tempfile.mkdtemp()
        tiny = ("--tflops", 0.15, "--batch-size", 4, "--num", 20, "--seeds", 0, "--beside", 2, "--only", "regression")
        self.fill("leaderboard", "cells", LAST_CELLS, *(tiny if self.smoke else LEADERBOARD))

    def fill(self, part: str, name: str, last: float, *arguments: object) -> None:
        """Let the benchmark of a part write its rows to the output. No row starts in the `last` seconds of the visit."""
        file, started = self.output / f"{part}.jsonl", time.monotonic()
        place = ("--device", self.device, "--output", file, "--runs", tempfile.mkdtemp(), "--minutes", (self.left() - last) / 60)
        is_done = self.finish(self.start(f"tests.benchmarks.{part}", *place, *arguments), part, name, self.deadline - 5)
        record = {"part": part, "name": "rows", "event": "done", "ok": is_done or None, "bound": ""}
        append(self.file, record | {"values": {"rows": len(read(file))}, "seconds": round(time.monotonic() - started, 1)})

    def tune_subjects(self) -> None:
        """Train the teacher of sheets, keep it, and measure judges, tuned models and their one-step students."""
        folder = Path(tempfile.mkdtemp())
        os.environ["SID_CACHE_DIR"] = tempfile.mkdtemp()
        seconds = 8.0 if self.smoke else SHEETS_SHARE * self.left()
        arguments = ("--output", folder, "--device", self.device, "--seconds", seconds)
        training = self.start("sidcli.emoji.train", "sheets", *arguments, *(("--batch", 8) if self.smoke else SHEETS))
        if not self.finish(training, "subjects", "training", self.deadline - 10):
            return
        shutil.copy(folder / "sheets/unet/diffusion_pytorch_model.safetensors", self.output / "sheets-unet.safetensors")
        shutil.copy(folder / "sheets/text_encoder/model.safetensors", self.output / "sheets-text.safetensors")
        tiny = ("--sheets", 16, "--sheet-steps", 2, "--steps", 2, "--student-steps", 2, "--batch-size", 2, "--num", 4)
        self.fill("subjects", "rows", LAST_CELLS / 2, "--teacher", folder / "sheets", *(tiny if self.smoke else SUBJECTS))

    def train_flow(self) -> None:
        """Train the teacher of flow matching, keep its transformer, and measure it beside its students."""
        folder = Path(tempfile.mkdtemp())
        os.environ["SID_CACHE_DIR"] = tempfile.mkdtemp()
        seconds = 8.0 if self.smoke else FLOW_SHARE * self.left()
        arguments = ("--output", folder, "--device", self.device, "--seconds", seconds)
        training = self.start("sidcli.emoji.train", "flow", *arguments, *(("--batch", 8, "--scenes", 64) if self.smoke else FLOW))
        if not self.finish(training, "flow", "training", self.deadline - 10):
            return
        shutil.copy(folder / "flow/transformer/diffusion_pytorch_model.safetensors", self.output / "flow.safetensors")
        values = json.loads((folder / "flow.log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        append(self.file, {"part": "flow", "name": "training", "event": "trained", "ok": True, "bound": "", "values": values})
        tiny = ("--steps", 2, "--batch-size", 2, "--num", 20, "--draw-steps", 2, "--only", "sid, steps 4", "teacher, guidance 2")
        self.fill("flow", "rows", LAST_CELLS / 2, "--teacher", folder / "flow", *(tiny if self.smoke else FLOW_STUDENTS))

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
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parts = ("right", "fast", "strong", "teacher", "leaderboard", "subjects", "flow")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts[:3], help="default: right fast strong")
    parser.add_argument("--checks", nargs="+", help="only these checks of the first two parts")
    parser.add_argument("--without", nargs="+", default=[], help="all but these checks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="limit of the whole visit; default: 9, and 60 with --smoke")
    parser.add_argument("--graphs", action="store_true", help="train with CUDA graphs, also if the check of them does not run")
    parser.add_argument("--trainings", type=json.loads, default=TRAININGS, help="JSON object: name -> settings")
    parser.add_argument("--seconds", type=float, default=TEACHER, help="of the training of the part teacher, at most")
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
    compiling = visit.start("tests.gpu.speed", visit.file, given.device, visit.size, *beside) if beside else None
    if "strong" in given.only and given.smoke:
        name = next(iter(given.trainings))
        visit.train({name: given.trainings[name] | {"batch_size": 4}}, 20.0)
    elif "strong" in given.only:
        visit.train(given.trainings, visit.left() - EVALUATION)
    if "teacher" in given.only:
        visit.train_teacher(8.0 if given.smoke else min(given.seconds, visit.left() - GUIDANCE - 40))
    if "leaderboard" in given.only:
        visit.fill_leaderboard()
    if "subjects" in given.only:
        visit.tune_subjects()
    if "flow" in given.only:
        visit.train_flow()
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
