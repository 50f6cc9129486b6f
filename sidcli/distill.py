"""`sid distill`: the loop around the engine - step, report, sample, save, stop - and the run folder it leaves behind.

runs/NAME/  config.toml  run.json  metrics.jsonl  samples/  checkpoints/  student/
"""

from __future__ import annotations

import dataclasses
import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import tomli_w
import torch

from sidcli import __version__, checkpoint
from sidcli.config import DistillConfig, differences
from sidcli.engine import Engine
from sidcli.errors import InputError, Interrupted, SidError, UsageError
from sidcli.files import atomic_file, check_writable, locked, write_json
from sidcli.formats.diffusers_folder import write_student
from sidcli.pictures import grid, save_png
from sidcli.prompts import Prompts
from sidcli.sampler import Sampler, pick_device
from sidcli.teachers import Model

GRID_IMAGES = 8


class Listener(Protocol):
    """Who wants to hear about a run: the terminal, or nobody."""

    def started(self, step: int, steps: int) -> None: ...
    def stepped(self, record: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Rhythm:
    """How often things happen, in steps; changes nothing that is computed."""

    save: int
    sample: int
    log: int = 10


@dataclass(frozen=True)
class Result:
    run: Path
    student: Path
    step: int
    images: int
    seconds: float
    last: dict[str, Any]


class StopFlag:
    """Remembers SIGINT and SIGTERM until the loop asks; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(
    teacher: Model,
    config: DistillConfig,
    prompts: Prompts,
    output: Path,
    device_name: str,
    rhythm: Rhythm,
    resume: Path | None,
    listener: Listener,
) -> Result:
    """Distil `teacher` into output/student, or continue the run that is there.

    Raises UsageError for a continued run whose settings changed, Interrupted after saving on a signal, EnvironmentProblem for a
    folder in use, SidError where the loss stops being finite.
    """
    check_writable(output)
    if teacher.is_student:
        raise InputError(f"{teacher.source.name} is a one-step student already", "pass the teacher it came from")
    if config.t_init >= teacher.schedule.steps or config.t_max > teacher.schedule.steps:
        raise UsageError(f"the teacher's schedule has {teacher.schedule.steps} timesteps; --t-init and --t-max must fit in it")
    with StopFlag().installed() as stop, locked(output):
        engine = Engine(teacher, config, prompts, pick_device(device_name))
        restore(engine, output, resume, listener)
        write_record(output, teacher, config, engine, prompts)
        with (output / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            listener.started(engine.step, config.steps)
            seconds, record = loop(engine, output, rhythm, stop, metrics, listener)
        student = output / "student"
        write_student(student, engine.student(), student_card(engine, prompts))
    return Result(output, student, engine.step, 2 * engine.step * config.batch_size, seconds, record)


def loop(
    engine: Engine, output: Path, rhythm: Rhythm, stop: StopFlag, metrics: Any, listener: Listener
) -> tuple[float, dict[str, Any]]:
    """Steps until config.steps or a signal. Returns the seconds of this session and the last record."""
    started, first = time.monotonic(), engine.step
    painter = Painter(engine, output / "samples")
    record: dict[str, Any] = {}
    while engine.step < engine.config.steps:
        if engine.step % rhythm.sample == 0:
            painter.paint()
        result = engine.advance()
        if engine.step % rhythm.log == 0 or engine.step in (1, engine.config.steps):
            seconds = time.monotonic() - started
            record = {"step": engine.step, **{name: round(value, 6) for name, value in result.numbers().items()}}
            check_finite(record, output)
            record["images_per_second"] = round((engine.step - first) * engine.config.batch_size / seconds, 3)
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
        listener.stepped({**record, "step": engine.step})
        finished = engine.step == engine.config.steps
        if stop.signal_number or finished or engine.step % rhythm.save == 0:
            save(engine, output)
        if stop.signal_number and not finished:
            raise Interrupted(
                stop.signal_number,
                f"stopped at step {engine.step} of {engine.config.steps}, saved",
                "run the same command to continue",
            )
    painter.paint()
    return time.monotonic() - started, record


def check_finite(record: dict[str, Any], output: Path) -> None:
    """Raises SidError when a measured value is not a number: the state is lost, the last checkpoint is not."""
    for name, value in record.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise SidError(
                f"{name} is {value} at step {record['step']}: the training diverged; checkpoints before it are in {output}/checkpoints",
                "lower --lr-fake and --lr-generator, or raise --batch-size, in a new --output",
            )


def save(engine: Engine, output: Path) -> None:
    checkpoint.write(
        output / "checkpoints", engine.step, engine.tensors(), dataclasses.asdict(engine.config), engine.prompts.digest
    )


def restore(engine: Engine, output: Path, resume: Path | None, listener: Listener) -> None:
    """Load the given checkpoint, or the run's newest valid one, if its settings agree; then drop metrics lines after it."""
    if resume:
        found = checkpoint.verify(resume)
    else:
        latest, problems = checkpoint.latest(output / "checkpoints")
        for problem in problems:
            listener.note(f"skipped: {problem}")
        if latest is None:
            return
        found = latest
    changed = differences(found.config, engine.config)
    if found.prompts_digest != engine.prompts.digest:
        changed.append("prompts: the list has another content")
    if changed:
        raise UsageError(
            f"{found.folder} was made with other settings: {'; '.join(changed)}", "choose another --output for a new run"
        )
    engine.load(found.step, checkpoint.read(found))
    listener.note(f"continuing from step {found.step}")
    file = output / "metrics.jsonl"
    if file.exists():
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= found.step]
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def write_record(output: Path, teacher: Model, config: DistillConfig, engine: Engine, prompts: Prompts) -> None:
    """config.toml, from which `--config` repeats the run, and run.json, which says where it ran and on what."""
    with atomic_file(output / "config.toml") as temporary:
        temporary.write_text(tomli_w.dumps(dataclasses.asdict(config)), encoding="utf-8")
    libraries = ("torch", "diffusers", "transformers")
    write_json(
        output / "run.json",
        {
            "sid": __version__,
            "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
            "teacher": provenance(teacher),
            "prompts": {"name": prompts.name, "digest": prompts.digest},
            "device": str(engine.device),
            "hardware": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
        },
    )


def provenance(teacher: Model) -> dict[str, str]:
    return {"name": teacher.source.name, "origin": teacher.source.origin, "revision": teacher.source.revision}


def student_card(engine: Engine, prompts: Prompts) -> dict[str, Any]:
    """sid.json of the student: how it draws and how it came to be."""
    config = engine.config
    card = {
        "kind": "student",
        "method": "SiD-LSG (arXiv 2406.01561)",
        "t_init": config.t_init,
        "teacher": provenance(engine.sampler.model),
        "steps_trained": engine.step,
        "images": 2 * engine.step * config.batch_size,
        "prompts": prompts.name,
        "config": dataclasses.asdict(config),
        "sid": __version__,
    }
    world = engine.sampler.model.card.get("world")
    return card | ({"world": world} if world else {})


class Painter:
    """The same prompts and noise at every visit, so that pictures of different steps can be laid side by side."""

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder
        self.texts = [engine.prompts.at(engine.config.seed, -1 - index) for index in range(GRID_IMAGES)]

    def paint(self) -> None:
        file = self.folder / f"{self.engine.step:08d}.png"
        sampler = Sampler(self.engine.student(), self.engine.device)
        noise = sampler.noise(range(GRID_IMAGES))
        latents = sampler.latents(self.texts, noise, 1, 0.0, self.engine.config.t_init)
        save_png(grid([sampler.decode(latents)]), file)
