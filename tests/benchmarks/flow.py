"""Students of the emoji teacher of flow matching: of one step and of four by SiD, of one step by DMD2, beside the teacher and the start.

    python -m sidcli.emoji.train flow --output build/emoji
    python -m tests.benchmarks.flow --teacher build/emoji/flow
    python -m tests.benchmarks.flow --teacher build/emoji/flow --device cuda --beside 8 --batch-size 64 --lr 2e-4
    python -m tests.benchmarks.flow --sizes          (parameters and FLOPs of the teachers, without a measurement)

A row of results/flow.jsonl is the teacher at a guidance scale, the teacher as an untrained student, or a student. A row that is there is
not measured again, and an interrupted run continues: its trainings are runs of `sid distill`. Below the table is how the FID of each
student compares with that of the untrained start and with that of the teacher at its best scale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sidcli.emoji import models
from sidcli.models.sources import find, fingerprint
from tests.benchmarks.beside import Table, add_options
from tests.benchmarks.leaderboard import sid

METRICS = ("fid", "clip", "noun", "color", "bare_noun")
SCALES = (1.5, 2.0, 2.5, 3.0, 3.5)
BELOW_START, ABOVE_TEACHER = 5.0, 1.5
"""A student should have an FID at most that of the untrained start divided by the first number; one of four steps, also at most that of
the teacher times the second one."""


@dataclass(frozen=True)
class Cell:
    """A row of the table. `steps`: denoising steps of a student, trained or not. `after` names the cell that must have ended before
    this one starts."""

    name: str
    kind: str
    steps: int = 1
    guidance: float = 0.0
    options: tuple[str, ...] = ()
    after: str = ""


def teacher(scale: float) -> Cell:
    return Cell(f"teacher, guidance {scale:g}", "teacher", guidance=scale)


def untrained(steps: int) -> Cell:
    """Return the cell of the untrained start. It is measured beside the teacher, whose images are in the cache by then."""
    return Cell(f"untrained, steps {steps}", "untrained", steps, SCALES[0], after=teacher(SCALES[0]).name)


CELLS = (
    Cell("sid, steps 4", "student", 4, options=("--objective", "sid", "--student-steps", "4")),
    Cell("sid, steps 1", "student", options=("--objective", "sid")),
    Cell("dmd2, steps 1", "student", options=("--objective", "dmd2", "--fake-updates", "1")),
    *map(teacher, SCALES),
    untrained(1),
    untrained(4),
)
"""The longest ones first."""


def folder_of(cell: Cell, given: argparse.Namespace) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in cell.name)
    return given.runs / f"{name}-{settings_of(given)['teacher']}"


def row_of(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one cell, and return its row."""
    place = ("--device", given.device)
    models: list[object] = [f"{given.teacher},steps={given.draw_steps},guidance={cell.guidance:g}"]
    more: dict[str, Any] = {}
    if cell.kind == "untrained":
        models += ["--untrained", cell.steps]
    if cell.kind == "student":
        run = folder_of(cell, given)
        options = ["--teacher", given.teacher, "--steps", given.steps, "--batch-size", given.batch_size, *cell.options]
        options += ["--lr", given.lr] if given.lr else []
        trained = sid("distill", *options, "--precision", given.precision, *place, "-o", run)
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        models = [run]
        more = {"images": trained["images"], "seconds": record["seconds"], "hardware": record["hardware"]}
    row = sid("eval", *models, "--fid", "--clip", "--accuracy", "--num", given.num, "--batch-size", 250, *place)["models"][-1]
    values = {name: row["metrics"][name]["value"] for name in METRICS if name in row["metrics"]}
    return {
        "name": cell.name,
        "kind": cell.kind,
        "of": cell.steps,
        "drawn in": row["sampling"],
        **settings_of(given),
        **more,
        **values,
    }


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the rows of one table share. A teacher that was trained again is another one."""
    names = ("steps", "batch_size", "lr", "num", "draw_steps")
    return {"teacher": fingerprint(find(str(given.teacher)))[:16], **{name: getattr(given, name) for name in names}}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown, and below it the comparisons of the students for which there are rows to compare with."""
    lines = ["| | drawn in | emoji-FID | CLIP | noun | color | bare noun | seconds |", f"| --- | --- |{' ---: |' * 6}"]
    for row in sorted(found, key=lambda row: ("teacher", "untrained", "student").index(row["kind"])):
        shares = [f"{100 * row[name]:.1f}%" if name in row else "" for name in ("noun", "color", "bare_noun")]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        values = [row["name"], row["drawn in"], f"{row['fid']:.2f}", f"{row['clip']:.4f}", *shares, seconds]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join([*lines, "", *map(verdict, compared(found))])


def compared(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each student its FID, how many times below the untrained start and above the teacher's best it is, and whether it is
    as good as it should be. A number for which there is no row is None."""
    best = min((row["fid"] for row in found if row["kind"] == "teacher"), default=None)
    starts = {row["of"]: row["fid"] for row in found if row["kind"] == "untrained"}
    results = []
    for row in (row for row in found if row["kind"] == "student"):
        below = starts[row["of"]] / row["fid"] if row["of"] in starts else None
        above = row["fid"] / best if best else None
        good = [below >= BELOW_START] if below else []
        good += [above <= ABOVE_TEACHER] if above and row["of"] > 1 else []
        results.append({"name": row["name"], "fid": row["fid"], "below_start": below, "above_teacher": above, "good": all(good)})
    return results


def verdict(result: dict[str, Any]) -> str:
    """Return a comparison as a sentence."""
    start = f"{result['below_start']:.1f} times below the untrained start" if result["below_start"] else "no start"
    best = f"{result['above_teacher']:.2f} times the teacher's best" if result["above_teacher"] else "no teacher"
    return f"{result['name']}: {start}, {best}{'' if result['good'] else ': NOT GOOD ENOUGH'}"


def sizes() -> str:
    """Return the parameters of the UNet and of the transformer, and the FLOPs of a forward pass of one image, as a table in Markdown."""
    lines = ["| | parameters | GFLOP |", "| --- | ---: | ---: |"]
    with torch.device("meta"):
        x, t, pooled = torch.empty(1, 4, 16, 16), torch.empty(1), torch.empty(1, models.TEXT_WIDTH + models.BLANK_WIDTH)
        unet, transformer = models.new_unet(), models.new_transformer()
        tokens = {count: torch.empty(1, models.TOKENS + count, pooled.shape[1]) for count in (1, 256)}
        states = torch.empty(1, models.TOKENS, models.TEXT_WIDTH)
    calls = {
        "UNet": (unet, (x, t, states)),
        **{f"transformer, T5 tokens: {count}": (transformer, (x, text, pooled, t)) for count, text in tokens.items()},
    }
    for name, (net, inputs) in calls.items():
        with FlopCounterMode(display=False) as counter:
            net(*inputs)
        count = sum(value.numel() for value in net.parameters())
        lines.append(f"| {name} | {count / 1e6:.1f} M | {counter.get_total_flops() / 1e9:.2f} |")
    return "\n".join(lines)


TABLE = Table(CELLS, row_of, settings_of, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="build/emoji/flow", help="folder of the teacher")
    parser.add_argument("--steps", type=int, default=600, help="of a distillation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="learning rate; by default that of `sid distill`")
    parser.add_argument("--num", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--draw-steps", type=int, default=25, help="denoising steps of the teacher")
    parser.add_argument("--sizes", action="store_true", help="print parameters and FLOPs alone")
    add_options(parser, "flow")
    given = parser.parse_args()
    if given.sizes:
        print(sizes())
        return
    TABLE.main(given)


if __name__ == "__main__":
    main()
