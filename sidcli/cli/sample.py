"""`sid sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sidcli import api
from sidcli.cli.common import open_console
from sidcli.cli.options import (
    BatchOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    DrawingPrecision,
    JsonOption,
    PredictionOption,
    QuietOption,
    SeedOption,
    one_of,
    within,
)
from sidcli.data.tables import check_column
from sidcli.formats.outputs import BACKENDS, unnamed

if TYPE_CHECKING:
    from sidcli.cli.console import Console
    from sidcli.formats.images import Samples

Prompt = Annotated[list[str] | None, typer.Argument(help="One or more prompts.")]
Model = Annotated[
    str,
    typer.Option(
        autocompletion=one_of("emoji", "emoji-teacher"),
        help="Embedded name, run folder, diffusers folder, single file, graphs, or hub id (@revision).",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", show_default="named after the prompt", help="A .png for one image, a folder for more."),
]
Num = Annotated[
    int, typer.Option("--num", "-n", callback=within(1, 100_000), help="Images per prompt, with seeds seed, seed + 1, ...")
]
Steps = Annotated[
    int | None,
    typer.Option(show_default="50; a student's own", help="Denoising steps; a student takes at most its own."),
]
Guidance = Annotated[float | None, typer.Option(show_default="its own best", help="Guidance scale of a teacher.")]
Reference = Annotated[
    list[Path] | None,
    typer.Option(
        show_default=False,
        help="Image whose subject is drawn, for a model of --objective self-distillation or its student; one, one for each prompt, or "
        "several of one subject for one prompt (layout frames).",
    ),
]
ReferenceGuidance = Annotated[
    float | None, typer.Option(show_default="1, no guidance", help="Guidance scale of the reference image, 0 to 100.")
]
Prompts = Annotated[Path | None, typer.Option(help="Text with one prompt per line, .csv, .tsv, .jsonl or .json.")]
Width = Annotated[int, typer.Option(callback=within(0), help="Width in pixels; 0: the model's own.")]
Height = Annotated[int, typer.Option(callback=within(0), help="Height in pixels; 0: the model's own.")]
Backend = Annotated[
    str,
    typer.Option(autocompletion=one_of(*BACKENDS), help="auto, torch, onnx or openvino; the last two run an exported graph."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace files that are there; a folder then holds the images of this call only.")]
Preview = Annotated[bool, typer.Option(help="Show the image, or the contact sheet of several, in the terminal.")]
ListPrompts = Annotated[
    bool, typer.Option("--list-prompts", help="Print the words that the built-in models know, with example prompts, and stop.")
]
STOPPED = (
    "images that were drawn are kept",
    "the same command with --overwrite, which draws them again, or the missing prompts with another --output",
)
"""What is kept of an interrupted command, and how to go on."""


def sample(
    prompt: Prompt = None,
    model: Model = "emoji",
    output: Output = None,
    num: Num = 1,
    seed: SeedOption = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    reference: Reference = None,
    reference_guidance: ReferenceGuidance = None,
    prompts: Prompts = None,
    column: ColumnOption = None,
    width: Width = 0,
    height: Height = 0,
    prediction_type: PredictionOption = "auto",
    model_config: ConfigOption = "",
    backend: Backend = "auto",
    precision: DrawingPrecision = "fp32",
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    overwrite: Overwrite = False,
    preview: Preview = False,
    list_prompts: ListPrompts = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Generate images from prompts.

    Example: sid sample "a cat" -o out.png
    """
    if list_prompts:
        show_vocabulary(as_json, quiet)
        return
    check_column(column, prompts)
    texts, about_prompts = read_prompts(prompt or [], prompts, column or "")
    smaller = "a smaller --batch-size" if batch_size > 1 else "a smaller --width and --height, or a smaller model"
    with open_console(as_json, quiet, STOPPED, smaller) as console:
        if about_prompts:
            console.note(about_prompts)
        drawn = api.sample(
            texts,
            model,
            num=num,
            seed=seed,
            steps=steps,
            guidance=guidance,
            reference=reference or None,
            reference_guidance=reference_guidance,
            output=unnamed(texts, num, seed) if output is None and texts else output,
            overwrite=overwrite,
            width=width,
            height=height,
            prediction_type=prediction_type,
            model_config=model_config,
            backend=backend,
            precision=precision,
            batch_size=batch_size,
            device=device,
            listener=console,
        )
        if model == "emoji":
            console.note("another model: --model NAME")
        tell(drawn, console, preview)


def show_vocabulary(as_json: bool, quiet: bool) -> None:
    """Print the words that the built-in models know."""
    from sidcli.cli.console import Console
    from sidcli.emoji import vocabulary

    Console(as_json, quiet).result(vocabulary.lines(), vocabulary.summary())


def read_prompts(given: list[str], file: Path | None, column: str) -> tuple[list[str], str]:
    """Return the prompts of the command line and of a file, and a note about the file.

    Raises InputError if the file cannot be read.
    """
    texts, about = list(given), ""
    if file:
        from sidcli.data.prompts import read_list

        listed = read_list(file, column)
        texts, about = [*texts, *listed.lines], listed.note
    return texts, about


def tell(drawn: Samples, console: Console, preview: bool) -> None:
    """Print the paths of the images, and show a preview if requested."""
    from PIL import Image

    from sidcli.formats.images import SHEET_IMAGES

    files = [str(one.file) for one in drawn.drawn]
    if drawn.sheet:
        some = f" (the first {SHEET_IMAGES} images)" if len(files) > SHEET_IMAGES else ""
        console.note(f"contact sheet: {drawn.sheet}{some}")
    if preview:
        with Image.open(drawn.sheet or files[0]) as picture:
            console.preview(picture)
    console.result(files, drawn.as_dict())
