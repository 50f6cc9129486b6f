"""`sid eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidcli import api
from sidcli.cli.common import launch_processes, open_console
from sidcli.cli.options import (
    BatchOption,
    ColumnOption,
    DeviceOption,
    DrawingPrecision,
    JsonOption,
    QuietOption,
    SeedOption,
    one_of,
    with_flags,
    within,
)
from sidcli.data.tables import check_column
from sidcli.devices import check_name
from sidcli.environment import cache_folder
from sidcli.errors import GateError
from sidcli.evaluation.spec import JUDGES, PROTOCOLS, JudgeSpec, ModelSpec, check_protocol, limits
from sidcli.files import check_new, check_writable
from sidcli.formats.outputs import check_named, check_picture
from sidcli.metrics.catalog import METRICS as MEASURED

if TYPE_CHECKING:
    from sidcli.cli.console import Console
    from sidcli.evaluation.run import Outcome

METRICS, NETWORKS = "Metrics", "Networks of the metrics"
STOPPED = ("images and features that are complete are kept", "the same command again, to go on")
"""What is kept of an interrupted command, and how to go on."""

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL ...]",
        autocompletion=one_of("emoji", "emoji-teacher"),
        help="Models, NAME[,steps=N][,guidance=G], or folders and zips of images; by default emoji and emoji-teacher.",
    ),
]
Everything = Annotated[
    bool,
    typer.Option(
        "--all",
        rich_help_panel=METRICS,
        help="Everything that the protocol measures, but FID infinity, and DINOv2 on the emoji world.",
    ),
]
Protocol = Annotated[
    str,
    typer.Option(
        autocompletion=one_of(*PROTOCOLS),
        help="emoji, emoji-subjects, subjects, coco2014-30k or custom; auto: the one that fits the models and --reference.",
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="Images to compare with: a folder or zip, or .npz statistics; COCO's folder for coco2014-30k; images and prompts for subjects."
    ),
]
Captions = Annotated[
    Path | None, typer.Option(help="Captions: text with one a line, .csv, .tsv, .jsonl, or COCO's captions_val2014.json.")
]
Num = Annotated[
    int | None,
    typer.Option(
        callback=within(2, 1_000_000), show_default="emoji: 300; COCO: 30000; else all captions", help="Images per model."
    ),
]
Steps = Annotated[int | None, typer.Option(show_default="50", help="Steps of the teachers.")]
Guidance = Annotated[float | None, typer.Option(show_default="their own best", help="Guidance scale of the teachers.")]
Untrained = Annotated[
    int,
    typer.Option(
        callback=within(0, 100),
        help="Also measure each teacher as a student of this many steps, where a distillation starts.",
    ),
]
Processes = Annotated[int, typer.Option(callback=within(1), help="Processes on this machine that share the drawing.")]
ImageFolder = Annotated[str | None, typer.Option(help="Keep the generated images in this folder instead of the cache.")]
Inception = Annotated[
    Path | None,
    typer.Option(rich_help_panel=NETWORKS, show_default="fetched once", help="Inception in TorchScript."),
]
ClipModel = Annotated[
    str | None, typer.Option(rich_help_panel=NETWORKS, help="open_clip folder or ARCHITECTURE:TAG of the CLIP score.")
]
CmmdModel = Annotated[str | None, typer.Option(rich_help_panel=NETWORKS, help="The same for the CMMD.")]
DinoModel = Annotated[str | None, typer.Option(rich_help_panel=NETWORKS, help="Folder or hub id of DINOv2.")]
Judge = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=METRICS,
        autocompletion=one_of(*JUDGES),
        help="http: concept preservation and prompt following, scored by a vision language model.",
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=NETWORKS,
        help="OpenAI-compatible endpoint of --judge http, such as http://localhost:8000/v1; its key: SID_API_KEY.",
    ),
]
JudgeModel = Annotated[str | None, typer.Option(rich_help_panel=NETWORKS, help="Name of the model at the endpoint.")]
Report = Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")]
Picture = Annotated[Path | None, typer.Option(help="Save a comparison of the same seeds here (.png).")]
Overwrite = Annotated[bool, typer.Option(help="Replace a --report or --picture that is there.")]
AsLatex = Annotated[bool, typer.Option("--latex", help="Print the table for a paper.")]
FailAbove = Annotated[
    list[str] | None,
    typer.Option(
        autocompletion=one_of(*(f"{name}=" for name in MEASURED)), help="METRIC=VALUE: exit with 5 if a model's is above."
    ),
]
FailBelow = Annotated[
    list[str] | None,
    typer.Option(
        autocompletion=one_of(*(f"{name}=" for name in MEASURED)), help="METRIC=VALUE: exit with 5 if a model's is below."
    ),
]
FLAGS = {
    "fid": typer.Option(rich_help_panel=METRICS, help="Frechet distance to the reference, and to a teacher's images."),
    "kid": typer.Option(rich_help_panel=METRICS, help="Kernel distance, unbiased for few images."),
    "prdc": typer.Option(rich_help_panel=METRICS, help="Precision, recall, density and coverage."),
    "clip": typer.Option(rich_help_panel=METRICS, help="CLIP score."),
    "cmmd": typer.Option(rich_help_panel=METRICS, help="Kernel distance of CLIP embeddings."),
    "dino": typer.Option("--dino", "--fd-dinov2", rich_help_panel=METRICS, help="Frechet distance of DINOv2 features."),
    "accuracy": typer.Option(rich_help_panel=METRICS, help="Noun and color accuracy, on the emoji world."),
    "composition": typer.Option(rich_help_panel=METRICS, help="Accuracy on noun and color pairs held out from training."),
    "identity": typer.Option(rich_help_panel=METRICS, help="Identity, prompt and copy score, of models with a reference image."),
    "dino_i": typer.Option(rich_help_panel=METRICS, help="Similarity to the reference image by DINOv2 (DINO-I)."),
    "clip_i": typer.Option(rich_help_panel=METRICS, help="Similarity to the reference image by CLIP (CLIP-I)."),
    "diversity": typer.Option(rich_help_panel=METRICS, help="Distance of images of one prompt and reference image."),
    "fid_infinity": typer.Option(rich_help_panel=METRICS, help="FID extrapolated to an infinite sample."),
}
"""Options that select the metrics."""


@with_flags(FLAGS, after="everything")
def evaluate(
    models: Models = None,
    everything: Everything = False,
    protocol: Protocol = "auto",
    reference: Reference = None,
    prompts: Captions = None,
    column: ColumnOption = None,
    num: Num = None,
    steps: Steps = None,
    guidance: Guidance = None,
    untrained: Untrained = 0,
    seed: SeedOption = 0,
    batch_size: BatchOption = 50,
    device: DeviceOption = "auto",
    precision: DrawingPrecision = "fp32",
    processes: Processes = 1,
    image_folder: ImageFolder = None,
    inception: Inception = None,
    clip_model: ClipModel = None,
    cmmd_model: CmmdModel = None,
    dino_model: DinoModel = None,
    judge: Judge = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    report: Report = None,
    picture: Picture = None,
    overwrite: Overwrite = False,
    as_latex: AsLatex = False,
    fail_above: FailAbove = None,
    fail_below: FailBelow = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    *,
    flags: dict[str, bool],
) -> None:
    """Evaluate models side by side; images are cached. Default metrics: FID, CLIP score and accuracy.

    Example: sid eval emoji emoji-teacher --fid --clip
    """
    check(protocol, column, prompts, device)
    JudgeSpec.of(judge, judge_url, judge_model)
    specs = ModelSpec.parse_all(models or ["emoji", "emoji-teacher"], steps, guidance)
    bounds = limits(fail_above or [], fail_below or [])
    networks: dict[str, Any] = dict(inception=inception, clip_model=clip_model, cmmd_model=cmmd_model, dino_model=dino_model)
    networks |= dict(judge=judge, judge_url=judge_url, judge_model=judge_model)
    data: dict[str, Any] = dict(protocol=protocol, reference=reference, prompts=prompts, column=column or "")
    drawn: dict[str, Any] = dict(num=num, seed=seed, untrained=untrained, image_folder=image_folder, batch_size=batch_size)
    drawn |= dict(device=device, precision=precision)
    check_places(report, picture, image_folder, overwrite)
    launch_processes(processes, device)
    smaller = "a smaller --batch-size" if batch_size > 1 else "models one at a time, which the cache puts together"
    with open_console(as_json, quiet, STOPPED, smaller) as console:
        outcome = api.evaluate(
            specs,
            [name for name, given in flags.items() if given],
            everything=everything,
            bounds=bounds,
            **data,
            **networks,
            **drawn,
            listener=console,
        )
        if outcome:
            show(outcome, console, as_json, as_latex, picture, report)


def check(protocol: str, column: str | None, prompts: Path | None, device: str) -> None:
    """Raises UsageError for invalid values, before any file is read."""
    check_protocol(protocol)
    check_column(column, prompts)
    check_name(device)


def check_places(report: Path | None, picture: Path | None, image_folder: str | None, overwrite: bool) -> None:
    """Raises UsageError or EnvironmentProblem for a path that cannot be written."""
    if picture:
        check_picture(picture)
    for file, option in ((report, "--report"), (picture, "--picture")):
        if file:
            check_new([file], option, overwrite)
    check_named(image_folder, "--image-folder")
    if image_folder:
        check_writable(Path(image_folder), "--image-folder")
    check_writable(cache_folder(), "cache with SID_CACHE_DIR")


def show(outcome: Outcome, console: Console, as_json: bool, as_latex: bool, picture: Path | None, report: Path | None) -> None:
    """Print and write the outcome of an evaluation. Raises GateError if a value is beyond its bound."""
    if as_latex and not as_json:
        console.result(outcome.latex().splitlines(), {})
    else:
        console.table(f"protocol {outcome.protocol}, values with their 95 % intervals", *outcome.table())
    if as_latex and as_json:
        console.note("note: --latex has no effect with --json")
    for warning in outcome.warnings:
        console.note(f"note: {warning}")
    outcome.write(picture, report)
    for what, file in (("comparison", picture), ("report", report)):
        if file:
            console.note(f"{what}: {file}")
    if as_json:
        files = {"picture": str(picture) if picture else None, "report": str(report) if report else None}
        console.result([], outcome.as_dict() | files)
    if outcome.beyond:
        raise GateError("; ".join(outcome.beyond))
