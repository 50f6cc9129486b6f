"""Run an evaluation (`sid eval`) and write its results: table, LaTeX table, violated bounds, report page, comparison picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from sidcli.data.imagesets import DrawnSet
from sidcli.devices import warn_of_slow_bf16
from sidcli.distributed import Distributed
from sidcli.evaluation.candidates import Drawing, check_used, resolve, to_measure
from sidcli.evaluation.protocols import Networks, choose, open_protocol
from sidcli.evaluation.scores import NEEDS_REFERENCE, Evaluation, Listener, Row, chosen
from sidcli.evaluation.spec import Bound, JudgeSpec, Request
from sidcli.formats.outputs import check_picture
from sidcli.formats.pictures import contact_sheet, save_png
from sidcli.metrics.catalog import METRICS
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.loading import quiet_libraries
from sidcli.printable import json_text, printable
from sidcli.progress import counted
from sidcli.report.page import Cell, Facts, Gallery, IntervalRows, Page, Scores, Section, Table, write
from sidcli.report.run import run_sections

if TYPE_CHECKING:
    from sidcli.curation.ratings import Rater

SHOWN = 12


@dataclass(frozen=True)
class Outcome:
    """An evaluation and its results."""

    evaluation: Evaluation
    rows: Sequence[Row]
    warnings: Sequence[str]
    beyond: Sequence[str]
    """One sentence for each value that violates its bound."""
    seed: int

    @property
    def protocol(self) -> str:
        return self.evaluation.protocol.name

    def table(self) -> tuple[list[str], list[list[str]]]:
        return table(self.rows, self.evaluation.metrics)

    def latex(self) -> str:
        return latex(self.rows, self.evaluation.metrics)

    def write(self, picture: str | Path | None, report: str | Path | None) -> None:
        """Write the comparison picture and the report page; None skips a file."""
        if picture:
            check_picture(Path(picture))
        drawn = pictures(self.evaluation) if picture or report else []
        if picture:
            save_comparison([*shown(self.evaluation, drawn), *drawn], Path(picture))
        if report:
            write(page(self.evaluation, self.rows, drawn, self.seed), Path(report))

    def as_dict(self) -> dict[str, Any]:
        return {
            "protocol": self.evaluation.record(self.seed),
            "models": [row.as_dict() for row in self.rows],
            "warnings": list(self.warnings),
            "beyond": list(self.beyond),
        }


def run(request: Request, device: torch.device, listener: Listener) -> Outcome | None:
    """Generate the missing images and measure all candidates. Returns None in all processes except the main process.

    Raises InputError if a model, image or network is missing or unreadable, UsageError if the protocol does not allow the request.
    """
    distributed, rules, rater = Distributed(device), request.protocol, open_rater(request.judge)
    quiet_libraries()
    found = [one for spec in request.models for one in resolve(spec, rules.untrained, listener)]
    check_used(found, rules.untrained)
    models_are_emoji = {one.is_emoji for one in found if one.files is None} == {True}
    images_are_emoji = {one.is_emoji for one in found if one.files is not None}
    have_references = {one.takes_reference for one in found if one.files is None} == {True}
    name = choose(rules.name, models_are_emoji, images_are_emoji, bool(rules.reference or rules.prompts), have_references)
    files = request.networks
    networks = Networks(distributed.device, listener, files.inception, files.clip, files.cmmd, files.dino)
    protocol = open_protocol(name, networks, rules.reference, rules.prompts, rules.column)
    warn_of_slow_bf16(distributed.device, request.precision, listener)
    drawing = Drawing(distributed.device, rules.seed, request.batch_size, request.image_folder, request.precision)
    candidates = to_measure(found, protocol, rules.num, drawing)
    gated = [bound.metric for bound in request.bounds]
    metrics = chosen(request.metrics, protocol, request.everything, candidates, gated, rater is not None)
    evaluation = Evaluation(protocol, candidates, metrics, rules.num, distributed, rater)
    for note in without_effect(request, evaluation):
        listener.note(f"note: {note}")
    evaluation.fill(listener)
    if not distributed.is_main:
        return None
    rows = evaluation.rows(listener)
    warnings = [*evaluation.warnings(rows), *not_applicable(rows, request.bounds)]
    return Outcome(evaluation, rows, warnings, beyond(rows, request.bounds), rules.seed)


def open_rater(judge: JudgeSpec | None) -> Rater | None:
    """Return the judge of drawings. Raises UsageError for an invalid URL, EnvironmentProblem for an invalid key."""
    if judge is None:
        return None
    from sidcli.curation.endpoint import Chat
    from sidcli.curation.ratings import Rater

    return Rater(Chat(judge.url, judge.model, hint="check --judge-url and --judge-model"))


def without_effect(request: Request, evaluation: Evaluation) -> list[str]:
    """Return one sentence for each option that this evaluation does not use. A script may give the paths of all networks at once."""
    files, protocol = request.networks, evaluation.protocol
    has_references = protocol.references is not None
    networks = {
        "--inception": (files.inception, ("features",), "--fid, --kid or --prdc"),
        # These protocols have one CLIP model for the CLIP score and for what compares images with each other.
        "--clip-model": (files.clip, ("clip", *["embeddings"] * (protocol.is_emoji or has_references)), "--clip"),
        "--cmmd-model": (files.cmmd, ("embeddings",), "--cmmd"),
        "--dino-model": (files.dino, ("dino", "crops"), "--dino-i" if has_references else "--dino"),
    }
    said = [
        f"{option} {file} has no effect without {metrics}"
        for option, (file, extractors, metrics) in networks.items()
        if file is not None and evaluation.extractors.keys().isdisjoint(extractors)
    ]
    if protocol.name == "custom" and request.protocol.reference and set(NEEDS_REFERENCE).isdisjoint(evaluation.metrics):
        said.append(f"--reference {request.protocol.reference} has no effect: no metric of this table compares with it")
    if not any(isinstance(candidate.images, DrawnSet) for candidate in evaluation.candidates):
        drawing = {"--image-folder": request.image_folder, "--seed": request.protocol.seed or None}
        said += [f"{option} {value} has no effect: no model draws" for option, value in drawing.items() if value is not None]
    return said


def listed(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of each row: model, sampling, n, values with intervals, and seconds per image if known."""

    def write(metric: str, row: Row) -> str:
        one = row.metrics.get(metric)
        return "-" if one is None else METRICS[metric].write_measured(one)

    header = ["model", "sampling", "n", *(METRICS[metric].label for metric in metrics)]
    cells = [[row.model, row.sampling, str(row.n), *(write(metric, row) for metric in metrics)] for row in rows]
    if any(row.seconds_per_image is not None for row in rows):
        header.append("s/image")
        for line, row in zip(cells, rows, strict=True):
            line.append("-" if row.seconds_per_image is None else f"{row.seconds_per_image:.3f}")
    return header, cells


def table(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of `listed`, transposed if there are more metrics than models."""
    header, cells = listed(rows, metrics)
    return turned(header, cells) if len(metrics) > len(rows) else (header, cells)


def turned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Transpose a table."""
    first, *others = (list(line) for line in zip(header, *cells, strict=True))
    return first, others


SPECIAL = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$", "\\": r"\textbackslash{}"}
SPECIAL |= {"{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
# In the default font encoding, LaTeX prints these three as a dash and as Spanish punctuation.
SPECIAL |= {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}
"""Characters that LaTeX needs in escaped form."""


def latex(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return the table as LaTeX with booktabs rules. The best value of each metric is bold, including equally printed values."""

    def escaped(text: str) -> str:
        # Control characters first: an escape such as \u001b that is made later would be a command of LaTeX.
        found = "".join(SPECIAL.get(character, character) for character in printable(text))
        # The command that ends the row before takes a [ or * at the start of a cell for its own argument.
        return f"{{}}{found}" if found.startswith(("[", "*")) else found

    header, cells = listed(rows, metrics)
    lines = [[escaped(cell) for cell in line] for line in [header, *cells]]
    for column, metric in enumerate(metrics, header.index("n") + 1):
        for row in leading(rows, metric):
            value = escaped(METRICS[metric].write(rows[row].metrics[metric].value))
            lines[row + 1][column] = rf"\textbf{{{value}}}" + lines[row + 1][column].removeprefix(value)
    if len(metrics) > len(rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    body = [" & ".join(line) + r" \\" for line in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
    )


def leading(rows: Sequence[Row], metric: str) -> list[int]:
    """Return the indices of the rows with the best printed value; empty for fewer than two values. Real scenes are excluded."""
    values = {
        index: float(METRICS[metric].write(row.metrics[metric].value).removesuffix(" %"))
        for index, row in enumerate(rows)
        if not row.is_real and metric in row.metrics and math.isfinite(row.metrics[metric].value)
    }
    best = (min if METRICS[metric].lower_is_better else max)(values.values(), default=math.nan)
    return [index for index, value in values.items() if value == best] if len(values) > 1 else []


def beyond(rows: Sequence[Row], bounds: Sequence[Bound]) -> list[str]:
    """Return one sentence for each value that violates a bound. Real scenes are excluded, because no model generated them."""
    said = []
    for bound in bounds:
        for row in rows:
            one = row.metrics.get(bound.metric)
            if row.is_real or one is None:
                continue
            # The comparison is negated so that NaN violates every bound.
            if not (one.value <= bound.value if bound.is_above else one.value >= bound.value):
                metric, side = METRICS[bound.metric], "above" if bound.is_above else "below"
                said.append(f"{metric.label} of {row.model} ({row.sampling}) is {one.value:.5g}, {side} {bound.value:g}")
    return said


def not_applicable(rows: Sequence[Row], bounds: Sequence[Bound]) -> list[str]:
    """Return one sentence for each gated metric that a row lacks, except `fid_teacher`, which the teacher itself always lacks."""
    return [
        f"the gate on {METRICS[metric].label} does not apply to {row.model} ({row.sampling}), of which it is not measured"
        for metric in dict.fromkeys(bound.metric for bound in bounds if bound.metric != "fid_teacher")
        for row in rows
        if metric not in row.metrics
    ]


def pictures(evaluation: Evaluation) -> list[tuple[str, list[Image.Image]]]:
    """Return the first images of each candidate, with the same captions and seeds in every row."""
    count = min(SHOWN, *evaluation.counts)
    return [
        (f"{candidate.name}, {candidate.sampling}", [Image.fromarray(image) for image in candidate.images.read(range(count))])
        for candidate in evaluation.candidates
    ]


def shown(evaluation: Evaluation, drawn: Sequence[tuple[str, list[Image.Image]]]) -> list[tuple[str, list[Image.Image]]]:
    """Return a row of the reference images of the first captions in the size of the images; no row if models get none."""
    references = evaluation.protocol.references
    if references is None:
        return []
    first = drawn[0][1]
    images = [crop_and_resize(references.read(index), image.height, image.width) for index, image in enumerate(first)]
    return [("reference images", [Image.fromarray(image) for image in images])]


def page(evaluation: Evaluation, rows: Sequence[Row], drawn: Sequence[tuple[str, list[Image.Image]]], seed: int) -> Page:
    """Return the report page: table, intervals, images of the same captions and seeds, and training runs of the students."""
    names, metrics, protocol = [name for name, _ in drawn], evaluation.metrics, evaluation.protocol
    header, cells = turned(*listed(rows, metrics))
    captions = protocol.captions.first(SHOWN) if protocol.captions else [f"image {index}" for index in range(SHOWN)]
    scores = [
        IntervalRows(
            METRICS[metric], [(name, row.metrics[metric]) for name, row in zip(names, rows, strict=True) if metric in row.metrics]
        )
        for metric in metrics
    ]
    best = {METRICS[metric].label: _best(rows, metric) for metric in metrics}
    lines = [
        [Cell(name), *(Cell(cell, emphasis=best.get(name) is row) for cell, row in zip(line, rows, strict=True))]
        for name, *line in cells
    ]
    sections: list[Section] = [
        Table(
            "Scores",
            header,
            lines,
            [*evaluation.warnings(rows), "Bold where a model is better than every other beyond the intervals."],
        ),
        Scores("Scores with their 95 % intervals", scores),
        Gallery("The same captions and seeds", captions[: len(drawn[0][1])], [*shown(evaluation, drawn), *drawn]),
        Facts("Protocol", [(name, json_text(value)) for name, value in evaluation.record(seed).items()]),
    ]
    for candidate in evaluation.candidates:
        if (Path(candidate.name) / "metrics.jsonl").is_file():
            sections += [
                replace(section, title=f"{candidate.name}: {section.title}") for section in run_sections(Path(candidate.name))
            ]
    summary = f"{counted(len(rows), 'row')} of {counted(max(evaluation.counts), 'image')}, values with their 95 % intervals"
    return Page("Evaluation", f"protocol {protocol.name}", summary, sections)


def _best(rows: Sequence[Row], metric: str) -> Row | None:
    """Return the row with the best value if its interval overlaps no other row's interval, else None. Real scenes are excluded."""
    sign = 1 if METRICS[metric].lower_is_better else -1
    judged = sorted(
        (row for row in rows if not row.is_real and metric in row.metrics), key=lambda row: sign * row.metrics[metric].value
    )
    if len(judged) < 2:
        return None
    best, others = judged[0].metrics[metric], [row.metrics[metric] for row in judged[1:]]
    apart = all(other.low > best.high if sign > 0 else other.high < best.low for other in others)
    return judged[0] if apart else None


def save_comparison(rows: Sequence[tuple[str, list[Image.Image]]], file: Path) -> None:
    """Save a picture with one row per model, and the same prompts and seeds in every column."""
    # A whole name is too long for the label of one image, so its parts are the labels of the first images of its row.
    labelled = [
        (image, label) for name, row in rows for image, label in zip(row, [*name.split(", "), *[""] * len(row)], strict=False)
    ]
    save_png(contact_sheet([image for image, _ in labelled], [label for _, label in labelled], len(rows[0][1])), file)
