"""How long a command takes in a new process, beside the imports of diffusers' UNet and transformers' CLIP alone.

    python -m tests.benchmarks.cold_start          (needs the extras onnx and openvino)

The processes of a round follow each other, so that other work on the machine slows all rows. A first round, which is not counted,
compiles modules and fills the disk cache. Writes tests/benchmarks/results/cold_start.json and prints the table of
docs/memory-and-speed.md: medians of wall time and of CPU time (user and system).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sidcli.devices import processor
from sidcli.files import write_json

RESULT = Path(__file__).parent / "results" / "cold_start.json"
IMPORTS = "from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
GRAPHS = ("onnx", "openvino")
SETTINGS = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""The environment of the processes. Installed modules are compiled, so those of a clone are compiled, too."""


def commands(folder: Path) -> dict[str, list[str]]:
    """Export graphs to `folder`, and return the title of each row of the table and its arguments of Python."""
    sid, draw = ["-m", "sidcli"], ["sample", "a cat", "--output", str(folder / "cat.png"), "--overwrite"]
    for form in GRAPHS:
        measured([*sid, "export", "emoji", "--format", form, "-o", str(folder / form)])
    return {
        "imports alone": ["-c", IMPORTS],
        "sid sample": [*sid, *draw],
        **{f"sid sample --model {form.upper()}-FOLDER": [*sid, *draw, "--model", str(folder / form)] for form in GRAPHS},
        "sid --help": [*sid, "--help"],
    }


def measured(arguments: list[str]) -> tuple[float, float]:
    """Run Python and return its wall time and CPU time in seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *arguments], check=True, env=SETTINGS, **quiet)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as temporary:
        runs = commands(Path(temporary))
        rounds = [{title: measured(arguments) for title, arguments in runs.items()} for _ in range(1 + repeats)][1:]
    rows = [{"what": title, "wall_s": 0.0, "cpu_s": 0.0} for title in runs]
    for row in rows:
        for name, index in (("wall_s", 0), ("cpu_s", 1)):
            row[name] = round(median(times[str(row["what"])][index] for times in rounds), 2)
    print(
        f"{processor()}, medians of {repeats}\n\n| process | wall time | CPU time | of the imports' |\n| --- | ---: | ---: | ---: |"
    )
    for row in rows:
        row["ratio"] = round(float(row["cpu_s"]) / float(rows[0]["cpu_s"]), 2)
        print(f"| `{row['what']}` | {row['wall_s']:.2f} s | {row['cpu_s']:.2f} s | {row['ratio']:.2f} |")
    write_json(RESULT, {"processor": processor(), "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    main()
