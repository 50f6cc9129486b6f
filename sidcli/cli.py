"""The four commands: options -> config -> one call -> one result. Nothing heavy is imported before the options are known to be right."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidcli import __version__, objectives
from sidcli.config import CHOICES, MEMORY, PREDICTIONS, PRESETS, STRATEGIES, DistillConfig, preset_for, read_toml, strategy
from sidcli.devices import check_name, pick_device
from sidcli.environment import cache_folder, flag, group, group_or_alone, prepare
from sidcli.errors import EnvironmentProblem, GateError, InputError, Interrupted, SidError, UsageError, out_of_memory
from sidcli.files import check_new, check_unlocked, check_writable
from sidcli.formats.order import DTYPES, FORMATS
from sidcli.launch import catch
from sidcli.metrics.catalog import METRICS as MEASURED
from sidcli.outputs import Places, check_export, check_run
from sidcli.printable import prepare_streams, printable
from sidcli.progress import duration
from sidcli.wishes import PROTOCOLS, Wish, check_protocol, limits

if TYPE_CHECKING:
    import torch

    from sidcli.console import Console
    from sidcli.sampler import Drawer, Plan
    from sidcli.sources import Source
    from sidcli.teachers import Description, Model, Overrides

EPILOG = (
    "Exit codes: 0 ok, 1 the run failed, 2 usage, 3 model or prompts refused or not found, "
    "4 device, memory, disk or folder, 5 a verification failed, 129, 130, 138 or 143 stopped by a signal, a training after saving."
)
app = typer.Typer(
    name="sid",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)

METHOD, MACHINE, METRICS, NETWORKS = "Method", "Memory and speed", "Metrics", "Networks of the metrics"
SETTINGS = frozenset(DistillConfig.__dataclass_fields__) - {"teacher", "objective"}
SID_SETTINGS = frozenset(objectives.names(objectives.Sid))
"""Settings of the objective sid, which have options of their own."""
BACKENDS, TRACKERS = ("auto", "torch", "onnx", "openvino"), ("tensorboard", "wandb")


def _one_of(*values: str) -> Callable[[str], list[str]]:
    """Completion in the shell. Where no value fits, the shell completes paths."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def _within(least: float, most: float | None = None) -> Callable[..., Any]:
    """Callback that checks the range of an option; with `min` and `max` Typer would print it in the help. Raises UsageError."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not (least <= value and (most is None or value <= most)):
            below = "" if most is None else f" and at most {most}"
            raise UsageError(f"{param.opts[0]} must be at least {least}{below}, not {value}")
        return value

    return check


def _preset(name: str) -> str:
    """The default of a setting as the help shows it, and that of the emoji world where it differs."""
    if name in SID_SETTINGS:
        return f"{getattr(objectives.Sid.Settings, name):g}"
    usual, emoji = (preset.get(name, getattr(DistillConfig, name)) for preset in (PRESETS["sd15"], PRESETS["emoji"]))
    shown = [
        ("on" if value else "off") if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        for value in (usual, emoji)
    ]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]}; {shown[1]} for emoji-teacher"


DeviceOption = Annotated[
    str, typer.Option(autocompletion=_one_of("auto", "cpu", "cuda", "cuda:0"), help="auto, cpu, cuda or cuda:INDEX.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, an error as one on stderr.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Results only.")]
SeedOption = Annotated[int, typer.Option(callback=_within(0, 2**62), help="Seed of the noise.")]
PredictionOption = Annotated[
    str,
    typer.Option(
        autocompletion=_one_of(*PREDICTIONS), help="What the model predicts, if its files do not say: epsilon or v_prediction."
    ),
]
ConfigOption = Annotated[str, typer.Option(help="Diffusers folder whose JSON files describe a model in a single file.")]
ColumnOption = Annotated[
    str | None, typer.Option(help="Column of a table given as --prompts; by default caption, text, prompt, ...")
]
BatchOption = Annotated[int, typer.Option(callback=_within(1, 4096), help="Images computed at once.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sid {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a text-to-image diffusion model into one that draws in a single step."""


@app.command()
def distill(
    model: Annotated[str | None, typer.Argument(metavar="[TEACHER]", help="The same as --teacher.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            autocompletion=_one_of("emoji-teacher"),
            show_default=DistillConfig.teacher,
            help="Embedded name, diffusers folder, single file, or hub id (@revision).",
        ),
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(
            autocompletion=_one_of(*PREDICTIONS),
            show_default=_preset("prediction_type"),
            help="What the teacher predicts, if its files do not say: epsilon or v_prediction.",
        ),
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(help="Diffusers folder whose JSON files describe a teacher in a single file.")
    ] = None,
    width: Annotated[int | None, typer.Option(show_default="the teacher's own", help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(show_default="the teacher's own", help="Height in pixels.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            autocompletion=_one_of("emoji", "general"),
            show_default="general; emoji for emoji-teacher",
            help="Text with one prompt per line, .csv, .tsv, .jsonl or .json; or general or emoji, which are built in.",
        ),
    ] = None,
    column: ColumnOption = None,
    guidance: Annotated[
        float | None, typer.Option(show_default="2; 0.5 with short", help="Scale of the guidance strategy.")
    ] = None,
    steps: Annotated[int | None, typer.Option(show_default=_preset("steps"), help="Training steps.")] = None,
    images: Annotated[int | None, typer.Option(help="Training images per network, instead of --steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(show_default=_preset("batch_size"), help="Images per update, over all processes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default=_preset("seed"), help="Seed of prompts, noise and timesteps.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", show_default="runs/TEACHER-gGUIDANCE", help="Run folder.")
    ] = None,
    device: DeviceOption = "auto",
    resume: Annotated[Path | None, typer.Option(show_default="the newest", help="Checkpoint to continue from.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, such as a run's config.toml.")] = None,
    save_every: Annotated[int, typer.Option(callback=_within(1), help="Steps between checkpoints.")] = 100,
    save_minutes: Annotated[float, typer.Option(callback=_within(0.01), help="Minutes between checkpoints at most.")] = 8.0,
    keep_checkpoints: Annotated[int, typer.Option(callback=_within(1), help="Checkpoints to keep.")] = 2,
    sample_every: Annotated[int, typer.Option(callback=_within(1), help="Steps between sample grids.")] = 50,
    eval_every: Annotated[
        int, typer.Option(callback=_within(0), help="Steps between quick measurements against the teacher's own images; 0: none.")
    ] = 0,
    tracker: Annotated[
        str | None, typer.Option(autocompletion=_one_of(*TRACKERS), help="tensorboard or wandb, if installed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print settings, memory, time and disk, and stop.")] = False,
    plan_for: Annotated[
        str | None, typer.Option(help="Dry run for a GPU that is not here: its memory, such as 24gb, or a name, such as rtx-4090.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    objective: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=METHOD,
            autocompletion=_one_of(*objectives.OBJECTIVES),
            show_default="sid",
            help=f"Distillation method: {', '.join(objectives.OBJECTIVES)}.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", rich_help_panel=METHOD, help="A setting of the objective; see --list-settings."
        ),
    ] = None,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", rich_help_panel=METHOD, help="Print the settings of the objective and stop.")
    ] = False,
    guidance_strategy: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=METHOD,
            autocompletion=_one_of(*STRATEGIES),
            show_default="lsg",
            help="lsg, long, short, zero-cfg or none.",
        ),
    ] = None,
    kappa1: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=METHOD, show_default="from --guidance", help="Guidance scale of the fake score in its own loss."
        ),
    ] = None,
    kappa2: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=METHOD, show_default="from --guidance", help="Guidance scale of the fake score in the score difference."
        ),
    ] = None,
    kappa3: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=METHOD,
            show_default="from --guidance",
            help="Guidance scale of the fake score in the second factor of the loss.",
        ),
    ] = None,
    kappa4: Annotated[
        float | None, typer.Option(rich_help_panel=METHOD, show_default="from --guidance", help="Guidance scale of the teacher.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(rich_help_panel=METHOD, show_default=_preset("alpha"), help="Alpha of the SiD loss.")
    ] = None,
    student_steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=METHOD, show_default=_preset("student_steps"), help="Denoising steps of the student."),
    ] = None,
    renoise: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=METHOD,
            autocompletion=_one_of(*CHOICES["renoise"]),
            show_default=_preset("renoise"),
            help="Noise between a student's steps: ddim, fixed or fresh.",
        ),
    ] = None,
    t_init: Annotated[
        int | None,
        typer.Option(rich_help_panel=METHOD, show_default=_preset("t_init"), help="Timestep at which the student starts."),
    ] = None,
    t_min: Annotated[
        int | None, typer.Option(rich_help_panel=METHOD, show_default=_preset("t_min"), help="Smallest timestep of the scores.")
    ] = None,
    t_max: Annotated[
        int | None,
        typer.Option(rich_help_panel=METHOD, show_default=_preset("t_max"), help="Exclusive upper timestep of the scores."),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(rich_help_panel=METHOD, show_default=_preset("dropout"), help="Share of captions emptied.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            "--learning-rate",
            rich_help_panel=METHOD,
            show_default=_preset("lr_fake"),
            help="Learning rate of fake score and generator.",
        ),
    ] = None,
    lr_fake: Annotated[
        float | None, typer.Option(rich_help_panel=METHOD, show_default="--lr", help="Learning rate of the fake score.")
    ] = None,
    lr_generator: Annotated[
        float | None, typer.Option(rich_help_panel=METHOD, show_default="--lr", help="Learning rate of the generator.")
    ] = None,
    ema_images: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=METHOD, show_default=_preset("ema_images"), help="Half-life of the weight average, in images."
        ),
    ] = None,
    fake_warmup: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=METHOD, show_default=_preset("fake_warmup"), help="Steps at the start that train the fake score alone."
        ),
    ] = None,
    fake_updates: Annotated[
        int | None,
        typer.Option(rich_help_panel=METHOD, show_default=_preset("fake_updates"), help="Fake score updates per generator update."),
    ] = None,
    fake_lora: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=METHOD,
            show_default=_preset("fake_lora"),
            help="Rank of a LoRA fake score on the teacher's weights; 0: a full copy.",
        ),
    ] = None,
    student_lora: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=METHOD,
            show_default=_preset("student_lora"),
            help="Rank of a LoRA student on the teacher's weights; 0: a full copy.",
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            rich_help_panel=MACHINE,
            autocompletion=_one_of("auto", *MEMORY),
            help="auto, fast, 24gb or 12gb: sets the options below.",
        ),
    ] = "auto",
    micro_batch: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=MACHINE,
            show_default=_preset("micro_batch"),
            help="Images computed at once; does not change the result.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINE,
            autocompletion=_one_of(*CHOICES["precision"]),
            show_default=_preset("precision"),
            help="auto, fp32 or bf16.",
        ),
    ] = None,
    tf32: Annotated[
        bool | None, typer.Option(rich_help_panel=MACHINE, show_default=_preset("tf32"), help="TF32 matrix products on the GPU.")
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINE,
            autocompletion=_one_of(*CHOICES["compile"]),
            show_default=_preset("compile"),
            help="torch.compile: auto, on or off.",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINE,
            autocompletion=_one_of(*CHOICES["optimizer"]),
            show_default=_preset("optimizer"),
            help="adam or adam8bit.",
        ),
    ] = None,
    teacher_bf16: Annotated[
        bool | None,
        typer.Option(rich_help_panel=MACHINE, show_default=_preset("teacher_bf16"), help="Keep the frozen teacher in bf16."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=MACHINE,
            show_default=_preset("gradient_checkpointing"),
            help="Recompute activations in the backward pass.",
        ),
    ] = None,
    split_backward: Annotated[
        bool | None,
        typer.Option(rich_help_panel=MACHINE, show_default=_preset("split_backward"), help="Keep one network's graph at a time."),
    ] = None,
    offload_average: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=MACHINE, show_default=_preset("offload_average"), help="Keep the weight average in CPU memory."
        ),
    ] = None,
    offload_optimizer: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=MACHINE, show_default=_preset("offload_optimizer"), help="Keep the optimizer state in CPU memory."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(callback=_within(1), rich_help_panel=MACHINE, help="Processes on this machine.")] = 1,
    shard: Annotated[
        bool | None,
        typer.Option(rich_help_panel=MACHINE, show_default=_preset("shard"), help="Split the networks over the processes (FSDP2)."),
    ] = None,
) -> None:
    """Distill a teacher into a one-step student; run it again to continue.

    Example: sid distill --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance 1.5
    """
    arguments = dict(locals())
    if model is not None and teacher is not None:
        raise UsageError(f"two teachers: {model} and --teacher {teacher}", "give one of them")
    teacher, dry_run = teacher or model, dry_run or plan_for is not None
    if group().count == 1 and processes > 1 and not dry_run:
        sys.exit(_launch(processes, device))
    if steps is not None and images is not None:
        raise UsageError("--steps and --images exclude each other", "give one of them")
    if images is not None and images < 1:
        raise UsageError(f"--images must be at least 1, not {images}")
    if tracker not in (None, *TRACKERS):
        raise UsageError(f"--tracker must be tensorboard or wandb, not {tracker!r}")
    if tracker and find_spec(tracker) is None:
        raise EnvironmentProblem(f"--tracker {tracker} needs a package that is not installed", f"pip install {tracker}")
    check_name(device)
    if resume and not (resume / "manifest.json").is_file():
        raise InputError(f"{resume} is not a checkpoint", "give a folder such as runs/NAME/checkpoints/step-00000100")
    from_file = read_toml(config) if config else {}
    of_file = from_file.pop("teacher", "emoji-teacher")
    teacher = of_file if teacher is None else teacher
    table = from_file.pop("objective", {})
    if objective not in (None, table.get("name", "sid")):
        table = {"name": objective}  # a table of another objective does not apply
    method = objectives.find(table.get("name", "sid"))
    if list_settings:
        for line in objectives.listed(method):
            typer.echo(line)
        return
    if method is objectives.Sid and (guidance is not None or guidance_strategy is not None):
        table |= strategy(guidance_strategy or "lsg", guidance)
    elif guidance_strategy is not None:
        raise UsageError(f"--guidance-strategy is an option of objective sid, not of {objective}", "--guidance SCALE")
    elif guidance is not None:
        table |= {"guidance": guidance}
    table |= {name: value for name, value in arguments.items() if name in SID_SETTINGS and value is not None}
    table |= objectives.parse(method, set_ or [])
    settings = {**method.defaults, **PRESETS[preset_for(teacher)], **from_file, "objective": objectives.settings(table)}
    if memory not in ("auto", *MEMORY):
        raise UsageError(f"--memory must be one of auto, {', '.join(MEMORY)}, not {memory!r}")
    own = {name: value for name, value in arguments.items() if name in SETTINGS and value is not None}
    if prompts is not None and column is None:
        own["column"] = ""  # that of a --config belongs to its own prompts
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f"--lr must be positive, not {lr}")
    if lr is not None:
        own = {"lr_fake": lr, "lr_generator": lr} | own
    if images is not None:
        size = own.get("batch_size", settings.get("batch_size", DistillConfig.batch_size))
        own["steps"] = max(1, -(-images // max(1, size)))

    stopped = ("checkpoints are kept", "the same command again, to go on")
    with _console(as_json, quiet, stopped, "--memory 12gb, or a smaller --micro-batch", unused=()) as console:

        def resolve(recipe: dict[str, Any]) -> DistillConfig:
            if own.get("shard", settings.get("shard")):  # which spreads the state over the processes instead
                recipe = {name: value for name, value in recipe.items() if not name.startswith("offload")}
            merged = settings | recipe | own | {"teacher": teacher}
            batch = merged.get("batch_size", DistillConfig.batch_size)
            merged["micro_batch"] = min(merged.get("micro_batch", DistillConfig.micro_batch), max(1, batch))
            if merged.get("prompts", "auto") == "auto":
                merged["prompts"] = "emoji" if preset_for(teacher) == "emoji" else "general"
            return DistillConfig(**merged)

        resolved = resolve(MEMORY["fast" if memory == "auto" else memory])
        kinds = [name for name, usual in ((objective, "sid"), (guidance_strategy, "lsg")) if name not in (None, usual)]
        folder = output or Path("runs") / "-".join(
            [_slug(teacher), *kinds, f"g{getattr(resolved.objective, method.Settings.scale):g}"]
        )
        check_writable(folder) if dry_run else check_run(folder)
        if eval_every:
            check_writable(cache_folder(), "cache with SID_CACHE_DIR")
        if not dry_run and group().rank == 0:
            check_unlocked(folder)
        begun = memory == "auto" and (folder / "config.toml").is_file()
        if begun:  # however full the device is today, the run goes on as it began
            resolved = resolve({name: value for name, value in read_toml(folder / "config.toml").items() if name in MEMORY["12gb"]})
        from sidcli.prompts import PromptList, open_prompts

        source = open_prompts(resolved.prompts, resolved.column)
        if isinstance(source, PromptList) and source.note:
            console.note(source.note)
        planned_only = dry_run and (plan_for is not None or device.startswith("cuda"))  # for a GPU that need not be here
        on_gpu = not planned_only and _device(device, console).type == "cuda"
        from sidcli import plan

        card = plan.parse_card(plan_for) if plan_for else None
        if memory == "auto" and not begun and (on_gpu or card):
            resolved = plan.choose({name: resolve(recipe) for name, recipe in MEMORY.items()}, device, console, card)
        if dry_run:
            made = plan.make(resolved, folder, device, processes, console, keep_checkpoints, card)
            console.result(made.lines(), made.as_dict())
            return
        plan.check(resolved, folder, keep_checkpoints, console)
        if prompts is None and resolved.prompts in ("emoji", "general"):
            console.note(f"prompts: {source.name} (built in; override with --prompts FILE)")
        from sidcli import distill as driver
        from sidcli.console import DistillProgress

        known = {name: getattr(resolved, name) for name in ("prediction_type", "model_config", "width", "height")}
        loaded = _load(teacher, console, **known)
        rhythm = driver.Rhythm(save_every, sample_every, 60 * save_minutes, eval=eval_every, keep=keep_checkpoints)
        command = shlex.join(["sid", *sys.argv[1:]])
        with console.progress("distill", resolved.steps, "steps") as advance:
            listener = DistillProgress(console, advance)
            result = driver.run(loaded, resolved, source, folder, device, rhythm, resume, listener, tracker, command)
        if result.taken:
            share = 100 * result.saving / max(result.seconds, 1e-9)
            console.note(
                f"finished: {result.step} steps, {result.images} images per network; this command trained for "
                f"{duration(result.seconds)}, checkpointing overhead {share:.1f} %"
            )
        console.note(f'generate with it: sid sample "a cat" --model {shlex.quote(str(result.run))}')
        data = {"run": str(result.run), "student": str(result.student), "step": result.step, "images": result.images}
        times = {"seconds": round(result.seconds, 1), "saving_seconds": round(result.saving, 2)}
        console.result([str(result.student)], data | times | {"last": result.last})


@app.command()
def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    model: Annotated[
        str,
        typer.Option(
            autocompletion=_one_of("emoji", "emoji-teacher"),
            help="Embedded name, run folder, diffusers folder, single file, graphs, or hub id (@revision).",
        ),
    ] = "emoji",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default="named after the prompt", help="A .png for one image, a folder for more."),
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", callback=_within(1, 100_000), help="Images per prompt, with seeds seed, seed + 1, ...")
    ] = 1,
    seed: SeedOption = 0,
    steps: Annotated[
        int | None,
        typer.Option(show_default="50; a student's own", help="Denoising steps; a student takes at most its own."),
    ] = None,
    guidance: Annotated[float | None, typer.Option(show_default="its own best", help="Guidance scale of a teacher.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text with one prompt per line, .csv, .tsv, .jsonl or .json.")] = None,
    column: ColumnOption = None,
    width: Annotated[int, typer.Option(callback=_within(0), help="Width in pixels; 0: the model's own.")] = 0,
    height: Annotated[int, typer.Option(callback=_within(0), help="Height in pixels; 0: the model's own.")] = 0,
    prediction_type: PredictionOption = "auto",
    model_config: ConfigOption = "",
    backend: Annotated[
        str,
        typer.Option(autocompletion=_one_of(*BACKENDS), help="auto, torch, onnx or openvino; the last two run an exported graph."),
    ] = "auto",
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
    preview: Annotated[bool, typer.Option(help="Show the image, or the contact sheet of several, in the terminal.")] = False,
    list_prompts: Annotated[
        bool, typer.Option("--list-prompts", help="Print the words that the built-in models know, with example prompts, and stop.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Generate images from prompts.

    Example: sid sample "a cat" -o out.png
    """
    if list_prompts:
        from sidcli.console import Console
        from sidcli.emoji import vocabulary

        Console(as_json, quiet).result(vocabulary.lines(), vocabulary.summary())
        return
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}")
    texts, about_prompts = list(prompt or []), ""
    _check_column(column, prompts)
    if prompts:
        from sidcli.prompts import read_list

        listed = read_list(prompts, column or "")
        texts, about_prompts = [*texts, *listed.lines], listed.note
    if not texts:
        raise UsageError("nothing to draw: no prompt given", 'sid sample "a cat", or --prompts FILE')
    if any(not text.strip() for text in texts):
        raise UsageError("an empty prompt", "describe what to draw")
    check_name(device)
    count = len(texts) * num
    places = Places.of(output, count) if output else Places.unnamed(texts, num, seed)
    places.check(overwrite)
    stopped = ("images that were drawn are kept", "the other prompts alone, or --overwrite")
    smaller = "a smaller --batch-size" if batch_size > 1 else "a smaller --width and --height, or a smaller model"
    with _console(as_json, quiet, stopped, smaller, unused=("bitsandbytes", "peft", "scipy")) as console:
        if about_prompts:
            console.note(about_prompts)
        known = {"prediction_type": prediction_type, "model_config": model_config, "width": width, "height": height}
        found, drawer, plan = _drawer(model, backend, device, steps, guidance, console, **known)
        from sidcli import sample as driver
        from sidcli.emoji import vocabulary
        from sidcli.sources import read_card

        if read_card(found).get("world") == "emoji" and (about_words := vocabulary.remark(texts, found.name)):
            console.note(about_words)
        other = "; another model: --model NAME" if model == "emoji" else ""
        console.note(f"drawing with {found.name} ({plan.describe()}){other}")
        with console.progress("draw", count, "images") as advance:
            drawn, cut = driver.run(found, drawer, plan, texts, num, seed, places, batch_size, advance)
        if cut:
            console.note(f"{cut} prompts were longer than the text encoder reads and were truncated")
        if places.sheet:
            some = f" (the first {driver.SHEET_IMAGES} images)" if count > driver.SHEET_IMAGES else ""
            console.note(f"contact sheet: {places.sheet}{some}")
        if preview:
            from PIL import Image

            with Image.open(places.sheet or drawn[0].file) as picture:
                console.preview(picture)
        console.result([str(item.file) for item in drawn], driver.summary(drawn, places.sheet, found, plan))


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL ...]",
            autocompletion=_one_of("emoji", "emoji-teacher"),
            help="Models, NAME[,steps=N][,guidance=G], or folders and zips of images; by default emoji and emoji-teacher.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            rich_help_panel=METRICS,
            help="Everything that the protocol measures, but FID infinity, and DINOv2 on the emoji world.",
        ),
    ] = False,
    fid: Annotated[
        bool, typer.Option(rich_help_panel=METRICS, help="Frechet distance to the reference, and to a teacher's images.")
    ] = False,
    kid: Annotated[bool, typer.Option(rich_help_panel=METRICS, help="Kernel distance, unbiased for few images.")] = False,
    prdc: Annotated[bool, typer.Option(rich_help_panel=METRICS, help="Precision, recall, density and coverage.")] = False,
    clip: Annotated[bool, typer.Option(rich_help_panel=METRICS, help="CLIP score.")] = False,
    cmmd: Annotated[bool, typer.Option(rich_help_panel=METRICS, help="Kernel distance of CLIP embeddings.")] = False,
    dino: Annotated[
        bool, typer.Option("--dino", "--fd-dinov2", rich_help_panel=METRICS, help="Frechet distance of DINOv2 features.")
    ] = False,
    accuracy: Annotated[bool, typer.Option(rich_help_panel=METRICS, help="Noun and color accuracy, on the emoji world.")] = False,
    composition: Annotated[
        bool, typer.Option(rich_help_panel=METRICS, help="Accuracy on noun and color pairs held out from training.")
    ] = False,
    fid_infinity: Annotated[bool, typer.Option(rich_help_panel=METRICS, help="FID extrapolated to an infinite sample.")] = False,
    protocol: Annotated[
        str,
        typer.Option(
            autocompletion=_one_of(*PROTOCOLS),
            help="emoji, coco2014-30k or custom; auto: emoji for emoji models, custom with a --reference or --prompts.",
        ),
    ] = "auto",
    reference: Annotated[
        Path | None,
        typer.Option(help="Images to compare with: a folder or zip, or .npz statistics; COCO's folder for coco2014-30k."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Captions: text with one a line, .csv, .tsv, .jsonl, or COCO's captions_val2014.json.")
    ] = None,
    column: ColumnOption = None,
    num: Annotated[
        int | None,
        typer.Option(
            callback=_within(2, 1_000_000), show_default="emoji: 300; COCO: 30000; else all captions", help="Images per model."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(show_default="50", help="Steps of the teachers.")] = None,
    guidance: Annotated[float | None, typer.Option(show_default="their own best", help="Guidance scale of the teachers.")] = None,
    untrained: Annotated[
        int,
        typer.Option(
            callback=_within(0, 100),
            help="Also measure each teacher as a student of this many steps, where a distillation starts.",
        ),
    ] = 0,
    seed: SeedOption = 0,
    batch_size: BatchOption = 50,
    device: DeviceOption = "auto",
    processes: Annotated[int, typer.Option(callback=_within(1), help="Processes on this machine that share the drawing.")] = 1,
    image_folder: Annotated[
        Path | None, typer.Option(help="Keep the generated images in this folder instead of the cache.")
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(rich_help_panel=NETWORKS, show_default="fetched once", help="Inception in TorchScript."),
    ] = None,
    clip_model: Annotated[
        str | None, typer.Option(rich_help_panel=NETWORKS, help="open_clip folder or ARCHITECTURE:TAG of the CLIP score.")
    ] = None,
    cmmd_model: Annotated[str | None, typer.Option(rich_help_panel=NETWORKS, help="The same for the CMMD.")] = None,
    dino_model: Annotated[str | None, typer.Option(rich_help_panel=NETWORKS, help="Folder or hub id of DINOv2.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Save a comparison of the same seeds here (.png).")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a --report or --picture that is there.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print the table for a paper.")] = False,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=_one_of(*(f"{name}=" for name in MEASURED)), help="METRIC=VALUE: exit with 5 if a model's is above."
        ),
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=_one_of(*(f"{name}=" for name in MEASURED)), help="METRIC=VALUE: exit with 5 if a model's is below."
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate models side by side; images are cached. Default metrics: FID, CLIP score and accuracy.

    Example: sid eval emoji emoji-teacher --fid --clip
    """
    flags = {"fid": fid, "kid": kid, "prdc": prdc, "clip": clip, "cmmd": cmmd, "dino": dino, "accuracy": accuracy}
    flags |= {"composition": composition, "fid_infinity": fid_infinity}
    check_protocol(protocol)
    _check_column(column, prompts)
    bounds = limits(fail_above or [], fail_below or [])
    wishes = [Wish.parse(text, steps, guidance) for text in models or ["emoji", "emoji-teacher"]]
    check_name(device)
    for file, option in ((report, "--report"), (picture, "--picture")):
        if file:
            check_new([file], option, overwrite)
    if image_folder:
        check_writable(image_folder, "--image-folder")
    check_writable(cache_folder(), "cache with SID_CACHE_DIR")
    if group().count == 1 and processes > 1:
        sys.exit(_launch(processes, device))
    stopped = ("what was drawn and looked at is kept", "the same command again, to go on")
    smaller = "a smaller --batch-size" if batch_size > 1 else "models one at a time, which the cache puts together"
    with _console(as_json, quiet, stopped, smaller) as console:
        where = _device(device, console)
        from sidcli import evaluate as driver
        from sidcli.entrants import entrants, look_up
        from sidcli.parallel import Team
        from sidcli.protocols import Networks, choose, open_protocol
        from sidcli.scores import Evaluation, chosen
        from sidcli.teachers import quiet_libraries

        team = Team(where)
        quiet_libraries()
        found = [one for wish in wishes for one in look_up(wish, untrained, console)]
        models_are_emoji = {one.is_emoji for one in found if one.files is None} == {True}
        has_images = any(one.files is not None for one in found)
        name = choose(protocol, models_are_emoji, has_images, bool(reference or prompts))
        networks = Networks(team.device, console, inception, clip_model, cmmd_model, dino_model)
        rules = open_protocol(name, networks, reference, prompts, column or "")
        rows_to_be = entrants(found, rules, team.device, num, seed, batch_size, image_folder)
        asked = [option for option, given in flags.items() if given]
        metrics = chosen(asked, rules, everything, rows_to_be, [bound.metric for bound in bounds])
        evaluation = Evaluation(rules, rows_to_be, metrics, num, team)
        evaluation.fill(console)
        if not team.leads:
            return
        rows = evaluation.rows(console)
        header, cells = driver.table(rows, metrics)
        warnings = [*evaluation.warnings(rows), *driver.unjudged(rows, bounds)]
        protocol_record = evaluation.record(seed)
        if as_latex and not as_json:
            console.result(driver.latex(rows, metrics).splitlines(), {})
        else:
            console.table(f"protocol {rules.name}, values with their 95 % intervals", header, cells)
        for warning in warnings:
            console.note(f"note: {warning}")
        drawn = driver.pictures(evaluation) if picture or report else []
        if picture:
            driver.save_comparison(drawn, picture)
            console.note(f"comparison: {picture}")
        if report:
            from sidcli.report.page import write

            write(driver.page(evaluation, rows, drawn, seed), report)
            console.note(f"report: {report}")
        data: dict[str, Any] = {
            "protocol": protocol_record,
            "models": [row.as_dict() for row in rows],
            "warnings": warnings,
            "beyond": driver.beyond(rows, bounds),
            "picture": str(picture) if picture else None,
            "report": str(report) if report else None,
        }
        if as_json:
            console.result([], data)
        if data["beyond"]:
            raise GateError("; ".join(data["beyond"]))


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            autocompletion=_one_of("emoji"), help="A run folder, a student folder or file, emoji, or the authors' FILE.pkl."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", autocompletion=_one_of(*FORMATS), help="diffusers, single-file, onnx, openvino, torch-export or lora."
        ),
    ] = "diffusers",
    dtype: Annotated[str, typer.Option(autocompletion=_one_of(*DTYPES), help="fp32, fp16 or bf16.")] = "fp32",
    variant: Annotated[
        str | None, typer.Option(autocompletion=_one_of("fp16"), help="Variant in the names of diffusers' weight files: fp16.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(show_default="the student's own", help="The model that a LoRA or a .pkl belongs to.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(callback=_within(1, 1024), show_default="64; that of --student-lora if it was used", help="LoRA rank."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Draw with the export and compare before the folder appears.")] = True,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this repository, OWNER/NAME.")] = None,
    public: Annotated[bool, typer.Option(help="Create the repository as public; default: private.")] = False,
    license: Annotated[
        str | None, typer.Option(help="License of the teacher, such as openrail++, where its files do not say.")
    ] = None,
    prediction_type: PredictionOption = "auto",
    model_config: ConfigOption = "",
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a student for other programs.

    Example: sid export runs/emoji-teacher-g2 --format diffusers -o cat-drawer
    """
    is_pickle = Path(model).suffix.lower() == ".pkl"
    if is_pickle and teacher is None:
        raise UsageError("a .pkl holds a UNet alone", "--teacher ID: the model that it was distilled from")
    if push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", push_to_hub):
        raise UsageError(f"--push-to-hub must be OWNER/NAME, not {push_to_hub!r}")
    from sidcli.formats.order import DEFAULT_RANK, Order, check

    order = Order(dtype, variant, rank or DEFAULT_RANK)
    check(format, order)
    output = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    check_export(output, overwrite)
    stopped, smaller = ("nothing half-written is left", "the same command again"), "free some memory, or pass --no-verify"
    with _console(as_json, quiet, stopped, smaller, () if format == "lora" else ("bitsandbytes", "peft")) as console:
        from sidcli import export as driver

        known = {"prediction_type": prediction_type, "model_config": model_config}
        of_teacher = known if teacher and teacher.endswith(".safetensors") else {}
        base: tuple[str, dict[str, Any]] | None = None
        if is_pickle:
            base = str(teacher), known
            described = driver.released(Path(model), _describe(base[0], **base[1]))
        else:
            of_student = {} if of_teacher else known
            described = _describe(model, **of_student)
            if format == "lora":
                recorded = described.card.get("config", {})
                again = {name: recorded[name] for name in known if name in recorded}
                base = (teacher, of_teacher) if teacher else (driver.teacher_of(described), again)
                order = Order(dtype, variant, rank or driver.trained_rank(described.card) or DEFAULT_RANK)
        described_base = _describe(base[0], **base[1]) if base and format == "lora" else None
        driver.check(described, described_base, format, order, output)
        driver.licensed(described, license, needed=push_to_hub is not None)
        if push_to_hub:
            driver.check_upload(push_to_hub)
        weights = None
        if is_pickle:
            console.note(f"reading {model} in a separate process")
            weights = driver.weights_of(Path(model), described)
        loaded_base = _load(base[0], console, **base[1]) if base else None
        if weights is not None and loaded_base is not None:
            loaded = driver.imported(described, Path(model), weights, loaded_base)
        else:
            loaded = _load(model, console, **of_student)
        if format == "lora":
            order = Order(dtype, variant, order.rank, loaded_base)
        loaded = driver.licensed(loaded, license, needed=push_to_hub is not None)
        with console.progress(f"export {format}", 3, "stages") as advance:
            done = driver.run(loaded, format, output, order, verify, advance)
        if done.difference is not None:
            console.note(f"verified: the export draws the same image as sid, at most {done.difference}/255 apart")
        if done.loss is not None:
            console.note(f"the LoRA's image is at most {done.loss}/255 from the student's own; a higher --rank keeps more")
        if push_to_hub:
            from sidcli.hub import upload

            url = upload(done.folder, push_to_hub, not public, console)
            console.note(f"uploaded to {url} ({'public' if public else 'private, if it was made now'})")
        data = {"folder": str(done.folder), "files": done.files, "difference_255": done.difference, "lora_loss_255": done.loss}
        console.result([str(done.folder)], data)


def _is_text(prompt: str) -> bool:
    """False for bytes that the shell handed over and that are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_column(column: str | None, prompts: Path | None) -> None:
    if column and not prompts:
        raise UsageError(f"--column {column} names a column of --prompts, which is not given", "--prompts FILE")


def _slug(teacher: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", Path(teacher).name or teacher).strip("-.") or "teacher"


@contextmanager
def _console(
    as_json: bool, quiet: bool, stopped: tuple[str, str], smaller: str, unused: Sequence[str] = ("bitsandbytes", "peft")
) -> Iterator[Console]:
    """The console of a command; libraries are told to keep quiet before any of them is imported.

    Raises Interrupted for a signal, with what `stopped` says: what is left of the work, and how to go on. Raises EnvironmentProblem
    where memory runs out, with what would be `smaller`.
    """
    for name in unused:  # diffusers and transformers import these where they find them, which takes seconds
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if not flag("SID_DEBUG"):
        logging.disable()  # what libraries advise about their extras, or say of errors that we report ourselves
    from sidcli.console import Console

    try:
        yield Console(as_json, quiet)
    except SystemExit as stop:  # of `_stop`, or of a training that is told twice
        raise Interrupted(int(str(stop.code)) - 128, f"stopped; {stopped[0]}", stopped[1]) from stop
    except EnvironmentProblem:  # which says already what to do
        raise
    except Exception as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise EnvironmentProblem(f"out of memory: {said}", smaller) from error


def _launch(processes: int, device: str) -> int:
    """Run this command in several processes. Raises EnvironmentProblem where there are fewer GPUs, before any of them is started."""
    if device != "cpu":
        from sidcli.parallel import check_cards

        check_cards(pick_device(device).type, processes)
    from sidcli.launch import launch

    return launch(processes, sys.argv[1:])


def _device(name: str, console: Console) -> torch.device:
    """The device by name, before anything is looked for or downloaded: work for nothing would be worse than an error."""
    device = pick_device(name)
    if name == "auto":
        console.note(f"--device auto: {device}")
    return device


def _describe(name: str, **overrides: Any) -> Description:
    """What is known of a model before its weights are read or downloaded."""
    checked = _overrides(**overrides)
    from sidcli.sources import find
    from sidcli.teachers import describe, quiet_libraries

    quiet_libraries()
    return describe(find(name, descriptions_only=True), checked)


def _overrides(**overrides: Any) -> Overrides:
    if overrides.get("prediction_type", "auto") not in PREDICTIONS:
        raise UsageError(f"--prediction-type must be one of {', '.join(PREDICTIONS)}, not {overrides['prediction_type']!r}")
    from sidcli.teachers import Overrides

    return Overrides(**overrides)


def _load(name: str, console: Console, **overrides: Any) -> Model:
    checked = _overrides(**overrides)
    console.note(f"loading {name}")
    from sidcli.sources import find
    from sidcli.teachers import load, quiet_libraries

    quiet_libraries()
    return load(find(name, console), checked, console)


def _drawer(
    name: str, backend: str, device: str, steps: int | None, guidance: float | None, console: Console, **overrides: Any
) -> tuple[Source, Drawer, Plan]:
    """Whatever draws for `sid sample`: networks in torch, or the graphs of an export."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    from sidcli.sources import find, graph_format, read_card

    graphs = graph_format(Path(name)) if Path(name).is_dir() else None
    if graphs is None and backend in ("onnx", "openvino"):
        raise UsageError(
            f"--backend {backend} draws with an export, which {name} is not", f"sid export {name} --format {backend} -o FOLDER"
        )
    if graphs is None:
        where = _device(device, console)
        from sidcli.sampler import Sampler, plan_for

        loaded = _load(name, console, **overrides)
        plan = plan_for(loaded, steps, guidance)
        return loaded.source, Sampler(loaded, where), plan
    if backend == "torch" or graphs not in BACKENDS:
        raise UsageError(f"{name} holds {graphs} graphs, which sid does not run", "draw with the model it was made from")
    console.note(f"loading {name}")
    from sidcli.formats.runtime import open_graphs
    from sidcli.sampler import student_plan

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


def _stop(number: int, frame: FrameType | None) -> None:
    """A command that is asked to stop unwinds, so that nothing half-written stays; a training saves first."""
    sys.exit(128 + number)


def main() -> None:
    """Entry point of `sid`: errors of ours and of the options become one line and their exit code, others a traceback and 1."""
    catch(_stop)
    prepare_streams()
    prepare()
    try:
        for argument in sys.argv[1:]:
            if not _is_text(argument):
                raise UsageError(f"{argument!r} is not valid UTF-8", "check the encoding of your terminal or script")
        sys.exit(app(prog_name="sid", standalone_mode=False))
    except typer.TyperException as error:
        if message := error.format_message():  # of a bare `sid` there is none: it has shown its help
            _say(UsageError(message, f"{getattr(getattr(error, 'ctx', None), 'command_path', 'sid')} --help"))
        sys.exit(error.exit_code)
    except SidError as error:
        if flag("SID_DEBUG"):
            _show_traceback()
        # What stops one of several processes stops all for the same reason, unless it is that process's own memory or disk.
        if group_or_alone().local_rank == 0 or isinstance(error, EnvironmentProblem):
            _say(error)
        sys.exit(error.exit_code)
    except Exception as error:
        _show_traceback()
        if _json_asked():
            _say(SidError(f"unexpected {type(error).__name__}: {error}", "report it, with the traceback above"))
        sys.exit(1)


def _json_asked() -> bool:
    """Whether --json is among the arguments, which may be too wrong to be parsed."""
    arguments = sys.argv[1:]
    return "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments


def _say(error: SidError) -> None:
    from sidcli.console import Console

    Console(as_json=_json_asked()).error(error)


def _show_traceback() -> None:
    """As Python has it, without a value of any variable, but with what texts of others might do to a terminal made visible."""
    sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
