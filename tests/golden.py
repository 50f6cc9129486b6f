"""Ten training steps of the emoji world under six settings, as numbers: what a change of the code that is meant to change no result
must reproduce.

    python -m tests.golden record      # writes tests/golden.json again, on another machine or after a change that is meant

`make test` compares two steps, `make soak` all ten. On the machine of the record every number is equal bit for bit. Elsewhere another
order of additions changes the last bits, and Adam amplifies them from step to step: there the first step is compared, within a tolerance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sidcli.data.prompts import open_prompts
from sidcli.engine import Engine
from sidcli.files import read_json
from sidcli.models.loading import load
from sidcli.models.overrides import Overrides
from sidcli.models.sources import WEIGHTS, find
from sidcli.objectives.sid import SidSettings
from sidcli.optimizer import Adam, local
from sidcli.settings import PRESETS, DistillConfig, strategy

RECORD = Path(__file__).with_suffix(".json")
STEPS, FEW = 10, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "lsg": {},
    "zero-cfg": {"strategy": "zero-cfg"},
    "v prediction": {"prediction_type": "v_prediction"},
    "four steps": {"student_steps": 4},
    "lora fake score": {"fake_lora": 4},
    "split backward": {"split_backward": True, "gradient_checkpointing": True, "micro_batch": 2},
}


def machine() -> dict[str, str]:
    """What decides the last bits of a result: libraries choose their code by the processor's features and the sizes of its caches."""
    found = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    entries = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")
    flags = hashlib.sha256(entries.get("flags", "").encode()).hexdigest()[:16]
    return found | {name: entries.get(name, "") for name in names} | {"flags": flags}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of values and their order; names do not count, so that a state may be renamed."""
    found = hashlib.sha256()
    for value in tensors.values():
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def teacher(folder: Path, prediction: str) -> Path:
    """The emoji teacher; its description says that it predicts `prediction`, whatever its weights were trained for."""
    shutil.copytree(WEIGHTS / "teacher", folder)
    described = folder / "scheduler" / "scheduler_config.json"
    described.write_text(json.dumps(read_json(described) | {"prediction_type": prediction}))
    return folder


def run(name: str, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Losses and other measurements [step], gradient norms [update] and hashes of the state after FEW and STEPS steps."""
    given = dict(SETTINGS[name])
    objective = SidSettings(**strategy(given.pop("strategy", "lsg"), None))
    prediction = given.pop("prediction_type", "epsilon")
    settings = PRESETS["emoji"] | {"batch_size": 4, "micro_batch": 4, "precision": "fp32", "steps": STEPS} | given
    config = DistillConfig(teacher="emoji-teacher", prompts="emoji", objective=objective, **settings)
    model = load(find(str(teacher(folder / "teacher", prediction))), Overrides())
    engine = Engine(model, config, open_prompts("emoji"), torch.device("cpu"))
    norms: list[float] = []
    step = Adam.step

    def measured(optimizer: Adam) -> None:
        values = [local(value.grad) for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        norms.append(float(torch.stack([value.double().square().sum() for value in values]).sum().sqrt()))
        step(optimizer)

    numbers, states = [], {}
    with mock.patch.object(Adam, "step", measured):
        for done in range(1, steps + 1):
            numbers.append(engine.train_step().numbers())
            if done in (FEW, STEPS):
                states[done] = {file: digest(tensors) for file, tensors in engine.tensors().items()}
    return {
        "measured": {key: [row[key] for row in numbers] for key in numbers[0]},
        "gradient_norms": norms,
        "states": states,
        "config": dataclasses.asdict(config),
    }


def record() -> None:
    torch.set_num_threads(1)
    runs = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = {key: value for key, value in run(name, Path(folder)).items() if key != "config"}
            print(name, runs[name]["states"])
    RECORD.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["record"]:
        sys.exit("usage: python -m tests.golden record")
    record()
