"""Options that several commands share, and functions that make options from the fields of settings classes."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import typer

from sidcli import objectives
from sidcli.errors import UsageError
from sidcli.models.overrides import PREDICTIONS
from sidcli.settings import CHOICES, PRESETS, DistillConfig

Command = Callable[..., None]
METHOD, MACHINE = "Method", "Memory and speed"
SID_SETTINGS = tuple(objectives.names(objectives.Sid))
"""Settings of the objective sid, which have options of their own."""


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Return a shell completion function for these values. If no value matches, the shell completes paths."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def within(least: float, most: float | None = None) -> Callable[..., Any]:
    """Return a callback that raises UsageError outside a range. Typer's own `min` and `max` would print the range in the help."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not (least <= value and (most is None or value <= most)):
            below = "" if most is None else f" and at most {most}"
            raise UsageError(f"{param.opts[0]} must be at least {least}{below}, not {value}")
        return value

    return check


DeviceOption = Annotated[
    str, typer.Option(autocompletion=one_of("auto", "cpu", "cuda", "cuda:0"), help="auto, cpu, cuda or cuda:INDEX.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, an error as one on stderr.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Results only.")]
SeedOption = Annotated[int, typer.Option(callback=within(0, 2**62), help="Seed of the noise.")]
PredictionOption = Annotated[
    str,
    typer.Option(
        autocompletion=one_of(*PREDICTIONS), help="What the model predicts, if its files do not say: epsilon or v_prediction."
    ),
]
ConfigOption = Annotated[str, typer.Option(help="Diffusers folder whose JSON files describe a model in a single file.")]
ColumnOption = Annotated[
    str | None, typer.Option(help="Column of a table given as --prompts; by default caption, text, prompt, ...")
]
DrawingPrecision = Annotated[
    Literal["fp32", "bf16"],
    typer.Option(
        "--precision",
        help="Arithmetic of the networks; bf16 is faster on GPUs and on CPUs with AMX or AVX512-BF16.",
    ),
]
BatchOption = Annotated[int, typer.Option(callback=within(1, 4096), help="Images computed at once.")]


COMMON = (
    "prediction_type",
    "model_config",
    "width",
    "height",
    "prompts",
    "column",
    "data",
    "data_num",
    "references",
    "init",
    "steps",
    "batch_size",
    "seed",
)
PANELS = {
    METHOD: (
        *("student_steps", "renoise", "t_init", "t_min", "t_max", "lr_fake", "lr_generator", "ema_images"),
        *("fake_warmup", "fake_updates", "fake_lora", "student_lora"),
    ),
    "Objective sid": SID_SETTINGS,
    MACHINE: (
        *("micro_batch", "precision", "text_precision", "tf32", "compile", "optimizer", "teacher_bf16", "gradient_checkpointing"),
        *("split_backward", "offload_average", "offload_optimizer", "offload_text", "shard"),
    ),
}
"""Settings that have an option, by panel of the help. Other settings can only be set in a config file."""
LARGE = "for transformers of more than 1 billion weights"
SHOWN = {
    "width": "the teacher's own",
    "height": "the teacher's own",
    "prompts": "general; emoji for emoji-teacher",
    "column": "the first one with a usual name",
    "data": "none",
    "data_num": "all; 1000 of teacher",
    "references": "those of pairs",
    "init": "the teacher",
    **dict.fromkeys(("fake_lora", "student_lora"), f"0; 64 {LARGE}"),
    "teacher_bf16": f"off; on {LARGE}",
    "lr_fake": "--lr",
    "lr_generator": "--lr",
    **{f"kappa{index}": "from --guidance" for index in (1, 2, 3, 4)},
}
"""Texts in the help for defaults that depend on another option or on the teacher."""


COMPLETED = {"prompts": ("general", "emoji", "emoji-nouns"), "data": ("teacher",)}
"""Values of settings that are paths or one of these words."""


def with_settings(command: Command) -> Command:
    """Return a command with options instead of the parameter `settings`: COMMON after the option `teacher`, PANELS at the end.

    The command receives the settings that were given. Help texts are the docstrings of the fields of the settings classes.
    """
    common = [_option(name, None) for name in COMMON]
    more = [_option(name, panel) for panel, names in PANELS.items() for name in names]
    return with_options(command, "settings", common, "teacher", more)


def with_flags(flags: dict[str, Any], after: str) -> Callable[[Command], Command]:
    """Return a decorator that replaces the parameter `flags` of a command by an option for each flag, after the option `after`."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default=False, annotation=Annotated[bool, option]) for name, option in flags.items()
    ]
    return lambda command: with_options(command, "flags", parameters, after)


def with_options(
    command: Command, name: str, parameters: list[inspect.Parameter], after: str, more: Sequence[inspect.Parameter] = ()
) -> Command:
    """Return a command with options instead of the parameter `name`: `parameters` after the option `after`, `more` at the end.

    The command receives a dict of the options that were given.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.name != name
    ]
    place = [parameter.name for parameter in own].index(after) + 1

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {parameter.name: arguments.pop(parameter.name) for parameter in [*parameters, *more]}
        command(**arguments, **{name: {key: value for key, value in given.items() if value is not None}})

    merged = [*own[:place], *parameters, *own[place:], *more]
    wrapped.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return wrapped


def _option(name: str, panel: str | None) -> inspect.Parameter:
    """Return the option of a setting."""
    owner: type = objectives.Sid.Settings if name in SID_SETTINGS else DistillConfig
    kind, choices = KINDS[owner][name], CHOICES.get(name, ())
    if choices:
        kind = Literal[choices]
    option = typer.Option(
        rich_help_panel=panel,
        autocompletion=one_of(*COMPLETED[name]) if name in COMPLETED else None,
        show_default=SHOWN.get(name) or _default(owner, name),
        help=HELP[owner][name],
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _default(owner: type, name: str) -> str:
    """Return the default of a setting as the help shows it, and the default for the emoji teacher if it differs."""
    usual, emoji = (preset.get(name, getattr(owner, name)) for preset in (PRESETS["sd15"], PRESETS["emoji"]))
    shown = [
        ("on" if value else "off") if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        for value in (usual, emoji)
    ]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]}; {shown[1]} for emoji-teacher"


OWNERS: tuple[type, ...] = (DistillConfig, objectives.Sid.Settings)
HELP = {owner: objectives.help_of(owner) for owner in OWNERS}
KINDS = {owner: typing.get_type_hints(owner) for owner in OWNERS}
