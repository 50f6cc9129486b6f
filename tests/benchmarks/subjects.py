"""Pairs of a teacher of sheets, the judges of these pairs, models tuned on them, and one-step students: one table of all of them.

    python -m sidcli.emoji.train sheets --output build/emoji
    python -m tests.benchmarks.subjects --teacher build/emoji/sheets
    python -m tests.benchmarks.subjects --teacher build/emoji/sheets --device cuda --beside 6

The teacher draws its sheets once; every judge scores the same pairs. A row of results/subjects.jsonl is a judge with its yield, precision
and recall against the oracle, or a model with its identity, text and copy scores. A row that is there is not measured again, and an
interrupted run continues: its trainings are runs of `sid distill`. `--picture FILE` shows the first 32 references, and what the tuned model
and its one-step student draw from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sidcli import objectives
from sidcli.cli.console import Console, DistillProgress
from sidcli.data.prompts import open_prompts
from sidcli.devices import pick_device
from sidcli.emoji import identities
from sidcli.engine import Engine
from sidcli.errors import NothingKept
from sidcli.evaluation.protocols import subject_captions
from sidcli.formats.pictures import contact_sheet
from sidcli.metrics.reader import ReaderFeatures
from sidcli.models.loading import load
from sidcli.models.overrides import PRECISIONS
from sidcli.models.sources import find, fingerprint
from sidcli.settings import DistillConfig
from sidcli.training import pairs
from tests.benchmarks.beside import Table, add_options
from tests.benchmarks.leaderboard import sid

JUDGES = ("none", "oracle", "features", "clip")
"""The first one draws the sheets of all."""
METRICS = ("identity", "subject_text", "copy")


@dataclass(frozen=True)
class Cell:
    """A row of the table. `after` names the cell that must have ended before this one starts."""

    name: str
    kind: str
    options: tuple[str, ...] = ()
    after: str = ""


def judged(judge: str) -> Cell:
    return Cell(f"judge {judge}", "judge", (judge,), "" if judge == JUDGES[0] else f"judge {JUDGES[0]}")


def tuned(layout: str, judge: str) -> Cell:
    return Cell(f"{layout}, pairs of {judge}", "tuned", (layout, judge), f"judge {judge}")


def student(objective: str, teacher: Cell) -> Cell:
    return Cell(f"one step by {objective}", "student", (objective, teacher.name), teacher.name)


BEST = tuned("diptych", "oracle")
ONE_STEP = student("sid", BEST)
SHOWN = 32
CELLS = (
    *map(judged, JUDGES),
    Cell("text only", "teacher"),
    BEST,
    tuned("diptych", "clip"),
    tuned("diptych", "none"),
    tuned("frames", "oracle"),
    tuned("channels", "oracle"),
    ONE_STEP,
    student("dmd2", BEST),
)


def folder_of(name: str, given: argparse.Namespace) -> Path:
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return given.runs / plain


def images_of(cell: Cell, given: argparse.Namespace) -> Path:
    """Return the folder of the images that the model of a row draws in its measurement."""
    return given.runs / "images" / folder_of(cell.name, given).name


def judge_pairs(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """Judge the pairs of all sheets, which the first judge draws, and return what `curation.json` says.

    Pairs are written as a run of `sid distill` writes them, without a training.
    """
    folder, first = folder_of(cell.name, given), folder_of(f"judge {JUDGES[0]}", given)
    if folder != first and not (folder / "sheets.json").exists():
        shutil.copytree(first / "sheets", folder / "sheets", dirs_exist_ok=True)
        shutil.copy(first / "sheets.json", folder)
    settings = objectives.SelfDistillation.Settings(
        judge=cell.options[0],
        sheets=given.sheets,
        sheet_steps=given.sheet_steps,
        sheet_guidance=given.sheet_guidance,
        shared_noise=given.shared_noise,
    )
    config = DistillConfig(teacher=given.teacher, prompts="emoji", objective=settings, precision=given.precision)
    teacher = load(find(given.teacher))
    engine = Engine(teacher, config, open_prompts("emoji"), pick_device(given.device))
    with suppress(NothingKept):  # the counts say so, too
        pairs.prepare(engine, folder, fingerprint(teacher.source), DistillProgress(Console()))
    found = json.loads((folder / "curation.json").read_text(encoding="utf-8"))
    return {"pairs": found["pairs"], "counts": found["counts"], **found["oracle"]}


def train(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """Tune a model, or distill one to a single step, and return its row."""
    run, options = folder_of(cell.name, given), ["--batch-size", given.batch_size, "--device", given.device]
    if cell.kind == "tuned":
        layout, judge = cell.options
        options += ["--teacher", given.teacher, "--objective", "self-distillation", "--steps", given.steps]
        options += ["--set", f"layout={layout}", "--data", folder_of(f"judge {judge}", given)]
        options += ["--lr", given.lr] if given.lr else []
    else:
        objective, teacher = cell.options
        options += ["--teacher", folder_of(teacher, given), "--objective", objective, "--steps", given.student_steps]
    trained = sid("distill", *options, "--precision", given.precision, "-o", run)
    seconds = json.loads((run / "run.json").read_text(encoding="utf-8"))["seconds"]
    drawn = f"{run},steps={given.draw_steps}" if cell.kind == "tuned" else str(run)
    return {"images": trained["images"], "seconds": seconds, **measured(cell, drawn, given)}


def measured(cell: Cell, model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a model under the protocol of subjects, and return the values and intervals of its metrics."""
    options = ["--protocol", "emoji-subjects", "--identity", "--num", given.num, "--batch-size", 64, "--device", given.device]
    options += ["--image-folder", images_of(cell, given), "--precision", given.draw_precision]
    row = sid("eval", model, *options)["models"][-1]
    metrics = {name: row["metrics"][name] for name in METRICS if name in row["metrics"]}
    return {"drawn in": row["sampling"], **metrics, **attributes(images_of(cell, given))}


def attributes(folder: Path) -> dict[str, float]:
    """Return the shares of the images in the folder of a measurement with the tint, the outline and the corner of their reference."""
    files = sorted(folder.glob("*/*.png"))
    seen = ReaderFeatures()([np.asarray(Image.open(file)) for file in files])[:, 2:]
    right = seen == [identities.unknown(index).panels[0].identity for index in range(len(files))]
    return dict(zip(identities.Identity._fields, right.mean(0).round(4).tolist(), strict=True))


def row_of(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    if cell.kind == "judge":
        values = judge_pairs(cell, given)
    elif cell.kind == "teacher":
        values = measured(cell, f"{given.teacher},steps={given.draw_steps}", given)
    else:
        values = train(cell, given)
    return {"name": cell.name, "kind": cell.kind, **settings_of(given), **values}


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the rows of one table share."""
    names = (
        "sheets",
        "sheet_steps",
        "sheet_guidance",
        "shared_noise",
        "steps",
        "lr",
        "student_steps",
        "batch_size",
        "num",
        "draw_steps",
    )
    return {name: getattr(given, name) for name in names}


def shown(value: object) -> str:
    if isinstance(value, dict):  # a metric with its interval
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the tables of judges and of models as Markdown."""
    lines = []
    for kinds, columns in (
        (("judge",), ("pairs", "good", "kept", "precision", "recall")),
        (("teacher", "tuned", "student"), ("drawn in", *METRICS, *identities.Identity._fields, "seconds")),
    ):
        own = [row for row in found if row["kind"] in kinds]
        if own:
            lines += [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
            lines += [f"| {row['name']} | {' | '.join(shown(row.get(column)) for column in columns)} |" for row in own]
            lines.append("")
    return "\n".join(lines)


def picture(given: argparse.Namespace) -> Image.Image:
    """Return the first references of the measurement, each beside what the tuned model and its one-step student draw from it."""
    shown, labels = [], []
    for index, text in enumerate(subject_captions(SHOWN)):
        drawn = [next(images_of(cell, given).glob(f"*/{index:06d}.png")) for cell in (BEST, ONE_STEP)]
        images = [identities.render(identities.unknown(index).panels[0]), *(np.asarray(Image.open(file)) for file in drawn)]
        shown.append(Image.fromarray(np.concatenate(images, 1)))
        labels.append(text)
    return contact_sheet(shown, labels, 4)


TABLE = Table(CELLS, row_of, settings_of, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="build/emoji/sheets", help="folder of the teacher of sheets")
    parser.add_argument("--sheets", type=int, default=8000)
    parser.add_argument("--sheet-steps", type=int, default=15)
    parser.add_argument("--sheet-guidance", type=float, default=2.0)
    parser.add_argument("--shared-noise", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=3000, help="of a tuning")
    parser.add_argument("--lr", type=float, help="of a tuning; by default that of the objective")
    parser.add_argument("--student-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num", type=int, default=300, help="references of a measurement")
    parser.add_argument("--draw-steps", type=int, default=15, help="denoising steps of tuned models in a measurement")
    parser.add_argument("--draw-precision", choices=PRECISIONS, default="fp32", help="of all measurements")
    parser.add_argument("--picture", type=Path, help="write the picture of references and results, once their rows are there")
    add_options(parser, "subjects")
    given = parser.parse_args()
    TABLE.main(given)
    if given.picture and not given.cell:
        picture(given).save(given.picture)


if __name__ == "__main__":
    main()
