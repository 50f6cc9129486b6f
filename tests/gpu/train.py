"""How good does the emoji student become? One training for a given time, its student written at parts of that time.

    python -m tests.gpu.train FILE DEVICE FOLDER NAME SECONDS SETTINGS

SETTINGS is a JSON object of settings of `sid distill`. Students are written to FOLDER/NAME-PERCENT; `sid eval` measures them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.formats.diffusers_folder import write_student
from sidcli.models.loading import load, quiet_libraries
from sidcli.models.sources import find
from sidcli.objectives.sid import SidSettings
from sidcli.settings import PRESETS, DistillConfig
from sidcli.training.run_folder import student_card
from tests.gpu.graphs import attach
from tests.gpu.record import append
from tests.gpu.speed import PRECISION

PARTS = (50, 100)
"""Percent of the time at which a student is written."""


def train(file: Path, device: str, folder: Path, name: str, seconds: float, given: dict[str, Any]) -> None:
    started = time.monotonic()
    given = dict(given)
    graphs, last, source = given.pop("graphs", False), given.pop("steps", 0), given.pop("prompts", "emoji")
    size = int(given.get("batch_size", 256))
    base = PRESETS["emoji"] | {"batch_size": size, "micro_batch": size, "precision": PRECISION, "compile": "off"}
    objective = SidSettings(**given.pop("objective", {}))
    config = DistillConfig(teacher="emoji-teacher", prompts=source, objective=objective, **(base | given))
    prompts = open_prompts(source)
    engine = Engine(load(find("emoji-teacher")), config, prompts, torch.device(device))
    if graphs:
        attach(engine)
    parts, logged = list(PARTS), time.monotonic()
    begun = time.monotonic()
    while parts:
        measured = engine.train_step()
        if time.monotonic() - logged > max(2.0, seconds / 60) or engine.step == 1:
            logged = time.monotonic()
            numbers = {key: round(value, 5) if math.isfinite(value) else None for key, value in measured.numbers().items()}
            pace = engine.step * size / (logged - begun)
            append(
                file,
                {"part": "curve", "name": name, "step": engine.step, "seconds": round(logged - started, 1), "pace": round(pace, 1)}
                | numbers,
            )
        share = engine.step / last if last else (time.monotonic() - started) / seconds
        if share >= parts[0] / 100:
            done = dataclasses.replace(config, steps=engine.step)
            engine.config = done
            write_student(folder / f"{name}-{parts[0]}", engine.student(), student_card(engine, prompts), "fp16")
            record = {"part": "strong", "name": f"{name}-{parts[0]}", "event": "trained", "ok": True, "bound": ""}
            values = {
                "steps": engine.step,
                "images": engine.images,
                "seconds": round(time.monotonic() - begun, 1),
                "graphs": graphs,
                "prompts": source,
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if torch.cuda.is_available() else None,
                "objective": dataclasses.asdict(objective),
                **given,
            }
            append(file, record | {"values": values, "seconds": round(time.monotonic() - started, 1)})
            parts.pop(0)


def main() -> None:
    quiet_libraries()
    file, device, folder, name, seconds, given = sys.argv[1:]
    train(Path(file), device, Path(folder), name, float(seconds), json.loads(given))


if __name__ == "__main__":
    main()
