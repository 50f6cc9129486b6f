"""How good are models of the emoji world? Rows of `sid eval`, appended to the results of the visit.

    python -m tests.gpu.measure FILE DEVICE students NUM MODEL [MODEL ...]
    python -m tests.gpu.measure FILE DEVICE teacher NUM MORE SCALE [SCALE ...]
    python -m tests.gpu.measure FILE DEVICE guidance NUM MODEL SCALE [SCALE ...]

The second command measures the teacher at each guidance scale with NUM images, then the best scale and the shipped student with MORE
images and three seeds. The third one measures a teacher at each guidance scale.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.record import append

SEEDS = (0, 1, 2)


def evaluate(file: Path, device: str, models: Sequence[str], num: int, seed: int = 0, part: str = "strong") -> dict[str, Any]:
    """Append the rows of `sid eval` to `file` and return their metrics by model and sampling settings."""
    command = [sys.executable, "-m", "sidcli", "eval", *models, "--num", str(num), "--seed", str(seed), "--device", device]
    command += ["--fid", "--clip", "--accuracy", "--batch-size", "500", "--json"]
    record = {"part": part, "event": "done", "ok": None, "bound": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)["models"]
    found = {}
    for row in rows:
        values = {name: round(measured["value"], 4) for name, measured in row["metrics"].items()}
        found[f"{row['model']}, {row['sampling']}"] = values
        facts = {"sampling": row["sampling"], "n": row["n"], "seed": seed, "seconds_per_image": row["seconds_per_image"]}
        append(file, record | {"name": f"eval {Path(row['model']).name}", "values": values | facts})
    return found


def main() -> None:
    file, device, what, num, *rest = sys.argv[1:]
    if what == "students":
        evaluate(Path(file), device, rest, int(num))
        return
    if what == "guidance":
        model, *scales = rest
        for scale in scales:  # one after another: the rows of those that ended are kept if the visit ends
            evaluate(Path(file), device, [f"{model},guidance={scale}"], int(num), part="teacher")
        return
    more, *scales = rest
    models = [f"emoji-teacher,guidance={scale}" for scale in scales]
    found = evaluate(Path(file), device, ["emoji", *models], int(num))
    best = min((name for name in found if name.startswith("emoji-teacher")), key=lambda name: found[name]["fid"])
    scale = best.rpartition("guidance ")[2]
    for seed in SEEDS:
        evaluate(Path(file), device, ["emoji", f"emoji-teacher,guidance={scale}"], int(more), seed)


if __name__ == "__main__":
    main()
