"""Distil on the emoji world, stop at several places to measure, and draw the curves. Every row is two commands that anyone can run.

    python tests/benchmarks/distillation.py student --steps 100 200 400 800 --options="--guidance 2"

A run continues from stage to stage, so the last stage is the student that one uninterrupted command would have made. Results go to
tests/benchmarks/results/NAME.jsonl (a row as soon as it is measured) and NAME.png; a stage that has its row is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PANELS = (("fid", "emoji-FID"), ("noun_accuracy", "noun accuracy"), ("color_accuracy", "color accuracy"), ("clip", "CLIP score"))


def sid(*arguments: str) -> dict[str, Any]:
    """One `sid` command with --json; its progress goes to the terminal."""
    done = subprocess.run([sys.executable, "-m", "sidcli", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `sid eval` with its metrics as plain numbers, under the names of this benchmark's files."""
    names = {"fid": "fid", "clip": "clip", "noun_accuracy": "noun", "color_accuracy": "color"}
    values = {name: row["metrics"][metric]["value"] for name, metric in names.items()}
    return {name: row[name] for name in ("model", "sampling", "n", "seconds_per_image")} | values


def stage(run: Path, steps: int, options: list[str], num: int) -> dict[str, Any]:
    """Distil up to `steps`, measure the student, and return the row."""
    started = time.monotonic()
    distilled = sid("distill", "--output", str(run), "--steps", str(steps), *options)
    seconds = time.monotonic() - started
    measured = numbers(sid("eval", str(run), "--num", str(num))["models"][-1])
    return {
        "options": " ".join(options),
        "steps": steps,
        "images": distilled["images"],
        "seconds_of_stage": round(seconds),
    } | measured


def draw(rows: list[dict[str, Any]], reference: list[dict[str, Any]], file: Path) -> None:
    """Four panels over the training images per network; horizontal lines are the scenes themselves and the teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        for options in dict.fromkeys(row["options"] for row in rows):
            line = [row for row in rows if row["options"] == options]
            axis.plot([row["images"] for row in line], [row[key] for row in line], marker="o", label=options or "defaults")
        for row, style in zip(reference, ("--", ":"), strict=False):
            axis.axhline(row[key], color="grey", linestyle=style, label=f"{row['model']}, {row['sampling']}")
        axis.set(title=title, xlabel="training images per network")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result files and of the run folders")
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument("--options", action="append", help="options of `sid distill`; repeat for several curves")
    parser.add_argument("--num", type=int, default=1000, help="images a measurement")
    parser.add_argument("--teacher-num", type=int, default=0, help="images of the teacher for its line in the picture; 0: no line")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{given.name}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    for number, text in enumerate(given.options or [""]):
        options = shlex.split(text)
        for steps in given.steps:
            if any(row.get("steps") == steps and row["options"] == text for row in rows):
                continue
            rows.append(stage(given.runs / f"{given.name}-{number}", steps, options, given.num))
            with file.open("a", encoding="utf-8") as results:
                results.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    if given.teacher_num and not any(row["options"] == "reference" for row in rows):
        floor, teacher = sid("eval", "emoji-teacher", "--num", str(given.teacher_num))["models"]
        for row in (floor, teacher):
            rows.append({"options": "reference"} | numbers(row))
            with file.open("a", encoding="utf-8") as results:
                results.write(json.dumps(rows[-1]) + "\n")
    if len(given.steps) == 1:  # a table says it better
        return
    draw(
        [row for row in rows if row["options"] != "reference"],
        [row for row in rows if row["options"] == "reference"],
        file.with_suffix(".png"),
    )
    print(file.with_suffix(".png"))


if __name__ == "__main__":
    main()
