"""`sid sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidcli.cli.common import check_column, choose_device, load_model, open_console
from sidcli.cli.options import (
    BatchOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    PredictionOption,
    QuietOption,
    SeedOption,
    one_of,
    within,
)
from sidcli.devices import check_name
from sidcli.errors import UsageError
from sidcli.formats.outputs import Places

if TYPE_CHECKING:
    from sidcli.cli.console import Console
    from sidcli.models.sampler import Drawer, Plan
    from sidcli.models.sources import Source

BACKENDS = ("auto", "torch", "onnx", "openvino")

Prompt = Annotated[list[str] | None, typer.Argument(help="One or more prompts.")]
Model = Annotated[
    str,
    typer.Option(
        autocompletion=one_of("emoji", "emoji-teacher"),
        help="Embedded name, run folder, diffusers folder, single file, graphs, or hub id (@revision).",
    ),
]
Output = Annotated[
    Path | None,
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
Prompts = Annotated[Path | None, typer.Option(help="Text with one prompt per line, .csv, .tsv, .jsonl or .json.")]
Width = Annotated[int, typer.Option(callback=within(0), help="Width in pixels; 0: the model's own.")]
Height = Annotated[int, typer.Option(callback=within(0), help="Height in pixels; 0: the model's own.")]
Backend = Annotated[
    str,
    typer.Option(autocompletion=one_of(*BACKENDS), help="auto, torch, onnx or openvino; the last two run an exported graph."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace files that are there.")]
Preview = Annotated[bool, typer.Option(help="Show the image, or the contact sheet of several, in the terminal.")]
ListPrompts = Annotated[
    bool, typer.Option("--list-prompts", help="Print the words that the built-in models know, with example prompts, and stop.")
]


def sample(
    prompt: Prompt = None,
    model: Model = "emoji",
    output: Output = None,
    num: Num = 1,
    seed: SeedOption = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    column: ColumnOption = None,
    width: Width = 0,
    height: Height = 0,
    prediction_type: PredictionOption = "auto",
    model_config: ConfigOption = "",
    backend: Backend = "auto",
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
        from sidcli.cli.console import Console
        from sidcli.emoji import vocabulary

        Console(as_json, quiet).result(vocabulary.lines(), vocabulary.summary())
        return
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}")
    check_column(column, prompts)
    texts, about_prompts = read_prompts(prompt or [], prompts, column or "")
    check_name(device)
    places = Places.of(output, len(texts) * num) if output else Places.unnamed(texts, num, seed)
    places.check(overwrite)
    stopped = ("images that were drawn are kept", "the other prompts alone, or --overwrite")
    smaller = "a smaller --batch-size" if batch_size > 1 else "a smaller --width and --height, or a smaller model"
    with open_console(as_json, quiet, stopped, smaller, unused=("bitsandbytes", "peft", "scipy")) as console:
        if about_prompts:
            console.note(about_prompts)
        known = {"prediction_type": prediction_type, "model_config": model_config, "width": width, "height": height}
        drawer = open_drawer(model, backend, device, steps, guidance, console, **known)
        draw(console, drawer, model, texts, num, seed, places, batch_size, preview)


def read_prompts(given: list[str], file: Path | None, column: str) -> tuple[list[str], str]:
    """The prompts of the command line and of a file, and what is to be said about the file.

    Raises UsageError where there is none or an empty one, InputError for a file that cannot be read.
    """
    texts, about = list(given), ""
    if file:
        from sidcli.data.prompts import read_list

        listed = read_list(file, column)
        texts, about = [*texts, *listed.lines], listed.note
    if not texts:
        raise UsageError("nothing to draw: no prompt given", 'sid sample "a cat", or --prompts FILE')
    if any(not text.strip() for text in texts):
        raise UsageError("an empty prompt", "describe what to draw")
    return texts, about


def draw(
    console: Console,
    opened: tuple[Source, Drawer, Plan],
    model: str,
    texts: list[str],
    num: int,
    seed: int,
    places: Places,
    batch_size: int,
    preview: bool,
) -> None:
    """Draw each prompt `num` times, and say what was drawn."""
    from sidcli.emoji import vocabulary
    from sidcli.formats import images as driver
    from sidcli.models.sources import read_card

    source, drawer, plan = opened
    if read_card(source).get("world") == "emoji" and (about_words := vocabulary.remark(texts, source.name)):
        console.note(about_words)
    other = "; another model: --model NAME" if model == "emoji" else ""
    console.note(f"drawing with {source.name} ({plan.describe()}){other}")
    count = len(texts) * num
    with console.progress("draw", count, "images") as advance:
        drawn, cut = driver.run(source, drawer, plan, texts, num, seed, places, batch_size, advance)
    if cut:
        console.note(f"{cut} prompts were longer than the text encoder reads and were truncated")
    if places.sheet:
        some = f" (the first {driver.SHEET_IMAGES} images)" if count > driver.SHEET_IMAGES else ""
        console.note(f"contact sheet: {places.sheet}{some}")
    if preview:
        from PIL import Image

        with Image.open(places.sheet or drawn[0].file) as picture:
            console.preview(picture)
    console.result([str(item.file) for item in drawn], driver.summary(drawn, places.sheet, source, plan))


def open_drawer(
    name: str, backend: str, device: str, steps: int | None, guidance: float | None, console: Console, **overrides: Any
) -> tuple[Source, Drawer, Plan]:
    """Whatever draws for `sid sample`: networks in torch, or the graphs of an export."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    from sidcli.models.sources import find, graph_format, read_card

    graphs = graph_format(Path(name)) if Path(name).is_dir() else None
    if graphs is None and backend in ("onnx", "openvino"):
        raise UsageError(
            f"--backend {backend} draws with an export, which {name} is not", f"sid export {name} --format {backend} -o FOLDER"
        )
    if graphs is None:
        where = choose_device(device, console)
        from sidcli.models.sampler import Sampler, plan_for

        loaded = load_model(name, console, **overrides)
        plan = plan_for(loaded, steps, guidance)
        return loaded.source, Sampler(loaded, where), plan
    if backend == "torch" or graphs not in BACKENDS:
        raise UsageError(f"{name} holds {graphs} graphs, which sid does not run", "draw with the model it was made from")
    console.note(f"loading {name}")
    from sidcli.formats.runtime import open_graphs
    from sidcli.models.sampler import student_plan

    source = find(name, console)
    card = read_card(source)
    plan = student_plan(card, None, guidance, name)
    if steps not in (None, plan.steps):
        raise UsageError(f"the graphs of {name} draw in {plan.steps} steps, not {steps}", "leave --steps out")
    if overrides["prediction_type"] != "auto" or overrides["model_config"] or device not in ("auto", "cpu"):
        raise UsageError(f"{name} holds graphs: they run on the CPU, and what they predict is inside", "leave those options out")
    drawer = open_graphs(source.path, graphs if backend == "auto" else backend)
    drawer.resize(overrides["height"], overrides["width"])
    return source, drawer, plan
