"""Train each objective on the emoji teacher with equal FLOPs and several seeds, measure every student, and write one table and one picture.

    python -m tests.benchmarks.leaderboard --tflops 60 --seeds 0 1 2
    python -m tests.benchmarks.leaderboard --device cuda --beside 12 --batch-size 64 --lr 2e-4 --tflops 100 --minutes 6.5

A cell is one objective with one seed: `sid distill`, as many steps as the FLOPs allow according to `sid distill --dry-run`, and `sid eval`.
Where the teacher draws images before a training, these take half of the FLOPs. Each cell is a line of results/leaderboard.jsonl as soon as
it is measured, and is not measured again; an interrupted run continues. Objectives that train on images use scenes of the emoji world,
which the script writes, and stand in a block of their own.

Each cell has a process of its own, which imports the libraries once. `--beside` cells share a GPU, which one small network leaves idle most
of the time. Cells start in the order of the seeds, so that an early end leaves whole tables. A cell that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from PIL import Image

from sidcli.cli import main as run_command
from sidcli.emoji import world
from tests.benchmarks.beside import RESULTS, Task, rows_with, run_beside

TEACHER, TEACHER_STEPS = "emoji-teacher", 20
"""The teacher, and its steps in the measurement of FID to the teacher."""
SCENES, SCENE_SEED = 2_000, 17
"""Scenes to train on, and their seed, which no other set uses."""
MEASURED = ("--fid", "--clip", "--accuracy", "--composition", "--prdc")
METRICS = ("fid", "fid_teacher", "clip", "noun", "color", "bare_noun", "composition", "coverage")


@dataclass(frozen=True)
class Entry:
    """A row of the table: an objective with its options. `images`: what it trains on besides prompts."""

    name: str
    options: tuple[str, ...]
    images: Literal["none", "teacher's", "scenes"] = "none"


ENTRIES = (
    Entry("sid", ("--objective", "sid")),
    Entry("sid, long guidance", ("--objective", "sid", "--guidance-strategy", "long")),
    Entry("sid, two LoRAs of rank 64", ("--objective", "sid", "--student-lora", "64", "--fake-lora", "64", "--lr", "3e-4")),
    Entry("dmd2, one fake-score update", ("--objective", "dmd2", "--fake-updates", "1")),
    Entry("dmd2, five fake-score updates", ("--objective", "dmd2", "--fake-updates", "5")),
    Entry("vsd", ("--objective", "vsd")),
    Entry("boot", ("--objective", "boot")),
    Entry(
        "dmd2, two LoRAs of rank 64",
        ("--objective", "dmd2", "--fake-updates", "1", "--student-lora", "64", "--fake-lora", "64", "--lr", "3e-4"),
    ),
    Entry("dmd", ("--objective", "dmd"), "teacher's"),
    Entry("regression", ("--objective", "regression"), "teacher's"),
    Entry("lcm, four steps", ("--objective", "lcm"), "teacher's"),
    Entry("lcm, one step", ("--objective", "lcm", "--student-steps", "1"), "teacher's"),
    Entry("tlcm, four steps", ("--objective", "tlcm"), "teacher's"),
    Entry("scflow", ("--objective", "scflow"), "scenes"),
    Entry("act", ("--objective", "act"), "scenes"),
    Entry("sida", ("--objective", "sida"), "scenes"),
    Entry("dmd2 with GAN, one fake-score update", ("--objective", "dmd2", "--fake-updates", "1", "--set", "gan=0.001"), "scenes"),
)


def sid(*arguments: object) -> dict[str, Any]:
    """Run one `sid` command with --json in this process, and return its result. Its progress goes to stderr.

    Raises RuntimeError if it fails.
    """
    sys.argv = ["sid", *map(str, arguments), "--json"]
    with redirect_stdout(io.StringIO()) as printed:
        try:
            run_command()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"exit code {ended.code} of {' '.join(sys.argv)}") from ended
    return json.loads(printed.getvalue())


def write_scenes(folder: Path) -> Path:
    """Write the scenes and their captions as an image folder, if it is not there yet."""
    if not (folder / "metadata.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(SCENES):
            scene = world.scene(SCENE_SEED, index)
            Image.fromarray(world.render(scene)).save(folder / f"{index:06d}.png")
            text = world.caption(scene, SCENE_SEED, index, "train").text
            lines.append(json.dumps({"file_name": f"{index:06d}.png", "text": text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def plan_of(options: Sequence[str], batch: int, steps: int) -> dict[str, Any]:
    """Return the plan of a run."""
    return sid("distill", "--teacher", TEACHER, *options, "--batch-size", batch, "--steps", steps, "--dry-run")


def with_images(entry: Entry, given: argparse.Namespace) -> list[str]:
    """Return the options of an entry with those of its images."""
    if entry.images == "none":
        return list(entry.options)
    if entry.images == "scenes":
        return [*entry.options, "--data", str(write_scenes(given.runs / "scenes"))]
    drawn = [*entry.options, "--data", "teacher", "--data-num"]
    of_one = plan_of([*drawn, "100"], given.batch_size, 1)["drawing_flops"] / 100
    return [*drawn, str(round(given.tflops * 1e12 / 2 / of_one))]


def steps_of(options: Sequence[str], batch: int, flops: float) -> tuple[int, dict[str, Any]]:
    """Return the steps that `flops` allow, and the plan of a run."""
    plan = plan_of(options, batch, 1_000_000)
    return max(1, round((flops - plan["drawing_flops"]) / (plan["flops_per_image"] * batch))), plan


def budget(given: argparse.Namespace) -> dict[str, float]:
    """Return the settings that rows of one table share."""
    return {"budget": given.tflops, "batch_size": given.batch_size, "n": given.num}


def folder_of(entry: Entry, seed: int, given: argparse.Namespace) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in entry.name)
    return given.runs / f"{name}-{given.tflops:g}-{given.batch_size}-{seed}"


def with_rate(entry: Entry, rate: float | None) -> Entry:
    """Return the entry with a learning rate, if one is given and the entry has none of its own."""
    if rate is None or "--lr" in entry.options:
        return entry
    return replace(entry, options=(*entry.options, "--lr", f"{rate:g}"))


def measure(given: argparse.Namespace, *runs: Path) -> dict[str, Any]:
    """Measure the students of these runs beside the teacher, whose images are stored in the cache, and return the last row."""
    place = ("--num", given.num, "--batch-size", 250, "--device", given.device)
    return sid("eval", f"{TEACHER},steps={TEACHER_STEPS}", *runs, *MEASURED, *place)["models"][-1]


def cell(entry: Entry, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one student, and return its row."""
    options = with_images(entry, given)
    steps, plan = steps_of(options, given.batch_size, given.tflops * 1e12)
    run = folder_of(entry, seed, given)
    common = ["--teacher", TEACHER, "--batch-size", given.batch_size, "--micro-batch", given.batch_size, "--steps", steps]
    trained = sid("distill", *options, *common, "--seed", seed, "--device", given.device, "-o", run)
    row = measure(given, run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {
        "objective": entry.name,
        "images used": entry.images,
        "seed": seed,
        "steps": steps,
        "images": trained["images"],
        "drawn in": row["sampling"],
        "tflops": round((steps * given.batch_size * plan["flops_per_image"] + plan["drawing_flops"]) / 1e12, 2),
        "seconds": record["seconds"],
        "memory_gb": trained["last"]["memory_gb"],
        "hardware": record["hardware"],
        **budget(given),
        "options": " ".join(entry.options),
        **{name: row["metrics"][name]["value"] for name in METRICS if name in row["metrics"]},
    }


def rows_of(given: argparse.Namespace, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the rows of the output that have this budget and the options of one of the entries."""
    known = {(entry.name, " ".join(entry.options)) for entry in entries}
    return [row for row in rows_with(given.output, budget(given)) if (row["objective"], row["options"]) in known]


def run_cells(entries: Sequence[Entry], given: argparse.Namespace) -> list[str]:
    """Run the cells that have no row yet in processes of their own, `beside` at a time, and return the names of those that failed.

    No cell starts after `minutes`. The first process draws the teacher's images, which every measurement needs.
    """
    present = {(row["objective"], row["seed"]) for row in rows_of(given, entries)}
    cells = [(entry.name, str(seed)) for seed in given.seeds for entry in entries if (entry.name, seed) not in present]
    this = (sys.executable, __file__, *sys.argv[1:], "--cell")
    tasks = [Task(" ".join(cell), (*this, *cell)) for cell in cells]
    if tasks:
        tasks.insert(0, Task(TEACHER, (*this, "", "")))

    def show(name: str) -> None:
        if name != TEACHER:
            print(table(rows_of(given, entries)), flush=True)

    failed, left = run_beside(tasks, given.beside, given.minutes, show=show)
    if left:
        print(f"not started within {given.minutes:g} minutes: {sum(name != TEACHER for name in left)} cells")
    return failed


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown: the mean over seeds and the range, objectives without images first."""
    lines = ["| objective | images | seeds | steps | emoji-FID | FID to teacher | CLIP | noun | bare noun | coverage |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    names = dict.fromkeys(row["objective"] for row in sorted(rows, key=lambda row: (row["images used"] == "scenes", row["fid"])))
    for name in names:
        own = [row for row in rows if row["objective"] == name]

        def shown(metric: str, decimals: int, unit: str = "", own: Sequence[dict[str, Any]] = own) -> str:
            values = [(100 if unit else 1) * row[metric] for row in own]
            spread = f" [{min(values):.{decimals}f}, {max(values):.{decimals}f}]" if len(values) > 1 else ""
            return f"{mean(values):.{decimals}f}{unit}{spread}"

        cells = [name, own[0]["images used"], str(len(own)), str(own[0]["steps"]), shown("fid", 1), shown("fid_teacher", 1)]
        cells += [shown("clip", 3), shown("noun", 1, "%"), shown("bare_noun", 1, "%"), shown("coverage", 2)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=60.0, help="of one training; 58 are the 4,800 images of `make demo`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, help="learning rate of the objectives that have none of their own above")
    parser.add_argument("--num", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--only", nargs="+", help="names of objectives; by default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--beside", type=int, default=1, help="cells at a time; more than one on a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no cell starts after this time")
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "leaderboard.jsonl", help="file of the rows; the picture is beside it"
    )
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)  # what a process of its own computes: objective and seed
    given = parser.parse_args()
    entries = [with_rate(entry, given.lr) for entry in ENTRIES if given.only is None or entry.name in given.only]
    if given.cell == ["", ""]:
        measure(given)
        return
    if given.cell:
        entry = next(entry for entry in entries if entry.name == given.cell[0])
        row = cell(entry, int(given.cell[1]), given)
        with given.output.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")
        return
    given.output.parent.mkdir(parents=True, exist_ok=True)
    if any(entry.images == "scenes" for entry in entries):
        write_scenes(given.runs / "scenes")  # once, before several processes need them
    failed = run_cells(entries, given)
    students = [run for entry in entries if ((run := folder_of(entry, given.seeds[0], given)) / "student").exists()]
    place = ("--picture", given.output.with_suffix(".png"), "--overwrite", "--device", given.device)
    sid("eval", TEACHER, *students, "--clip", "--num", 12, *place)
    print(table(rows_of(given, entries)))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
