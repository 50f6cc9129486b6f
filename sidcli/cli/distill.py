"""`sid distill`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sidcli import api, objectives
from sidcli.cli.common import launch_processes, open_console
from sidcli.cli.options import MACHINE, METHOD, DeviceOption, JsonOption, QuietOption, one_of, with_settings, within
from sidcli.devices import check_name
from sidcli.errors import UsageError
from sidcli.formats.outputs import check_named
from sidcli.progress import counted, duration
from sidcli.settings import FITTED, MEMORY, STRATEGIES, DistillConfig
from sidcli.training.gpus import Gpu, parse_gpu
from sidcli.training.intervals import Intervals
from sidcli.training.request import Request, method_of, read_config

if TYPE_CHECKING:
    from sidcli.cli.console import Console
    from sidcli.training.distill import Result

Model = Annotated[str | None, typer.Argument(metavar="[TEACHER]", help="The same as --teacher.")]
Teacher = Annotated[
    str | None,
    typer.Option(
        autocompletion=one_of("emoji-teacher"),
        show_default=DistillConfig.teacher,
        help="Embedded name, diffusers folder, single file, or hub id (@revision).",
    ),
]
Guidance = Annotated[
    float | None, typer.Option(show_default="2; 0.5 with short; that of the objective", help="Guidance scale of the objective.")
]
Images = Annotated[int | None, typer.Option(help="Training images per network, instead of --steps.")]
Output = Annotated[str | None, typer.Option("--output", "-o", show_default="runs/TEACHER-OBJECTIVE-gGUIDANCE", help="Run folder.")]
Resume = Annotated[Path | None, typer.Option(show_default="the newest", help="Checkpoint to continue from.")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings, such as a run's config.toml.")]
SaveEvery = Annotated[int, typer.Option(callback=within(1), help="Steps between checkpoints.")]
SaveMinutes = Annotated[float, typer.Option(callback=within(0.01), help="Minutes between checkpoints at most.")]
KeepCheckpoints = Annotated[int, typer.Option(callback=within(1), help="Checkpoints to keep.")]
SampleEvery = Annotated[int, typer.Option(callback=within(1), help="Steps between sample grids.")]
EvalEvery = Annotated[
    int, typer.Option(callback=within(0), help="Steps between quick measurements against the teacher's own images; 0: none.")
]
KeepBest = Annotated[
    bool, typer.Option("--keep-best", help="Write the student of the best measurement of --eval-every, not of the last step.")
]
Tracker = Annotated[Literal["tensorboard", "wandb"] | None, typer.Option(help="Log to this program too, if installed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings, memory, time and disk, and stop.")]
PlanFor = Annotated[
    str | None, typer.Option(help="Dry run for a GPU that is not here: its memory, such as 24gb, or a name, such as rtx-4090.")
]
Objective = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=METHOD,
        autocompletion=one_of(*objectives.OBJECTIVES),
        show_default="sid",
        help=f"Distillation method: {', '.join(objectives.OBJECTIVES)}.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", rich_help_panel=METHOD, help="A setting of the objective; see --list-settings."),
]
ListSettings = Annotated[
    bool, typer.Option("--list-settings", rich_help_panel=METHOD, help="Print the settings of the objective and stop.")
]
GuidanceStrategy = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=METHOD,
        autocompletion=one_of(*STRATEGIES),
        show_default="lsg",
        help="lsg, long, short, zero-cfg, anti-cfg or none.",
    ),
]
Lr = Annotated[
    float | None,
    typer.Option(
        "--lr",
        "--learning-rate",
        rich_help_panel=METHOD,
        show_default="1e-06; 0.0001 for emoji-teacher",
        help="Learning rate of fake score and generator.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        rich_help_panel=MACHINE,
        autocompletion=one_of("auto", *MEMORY, *FITTED),
        help="auto, fast, 24gb or 12gb: sets the options below. 16gb, 48gb or 80gb: as auto for a GPU of this memory.",
    ),
]
Processes = Annotated[int, typer.Option(callback=within(1), rich_help_panel=MACHINE, help="Processes on this machine.")]


@with_settings
def distill(
    model: Model = None,
    teacher: Teacher = None,
    guidance: Guidance = None,
    images: Images = None,
    output: Output = None,
    device: DeviceOption = "auto",
    resume: Resume = None,
    config: Config = None,
    save_every: SaveEvery = 100,
    save_minutes: SaveMinutes = 8.0,
    keep_checkpoints: KeepCheckpoints = 2,
    sample_every: SampleEvery = 50,
    eval_every: EvalEvery = 0,
    keep_best: KeepBest = False,
    tracker: Tracker = None,
    dry_run: DryRun = False,
    plan_for: PlanFor = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    objective: Objective = None,
    set_: Set = None,
    list_settings: ListSettings = False,
    guidance_strategy: GuidanceStrategy = None,
    lr: Lr = None,
    memory: Memory = "auto",
    processes: Processes = 1,
    *,
    settings: dict[str, Any],
) -> None:
    """Distill a teacher into a one-step student; run it again to continue.

    Example: sid distill --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance 1.5
    """
    if model is not None and teacher is not None:
        raise UsageError(f"two teachers: {model} and --teacher {teacher}", "give one of them")
    dry_run = dry_run or plan_for is not None
    if not dry_run:
        launch_processes(processes, device)
    gpu = check(output, device, plan_for)
    intervals = Intervals(save_every, sample_every, 60 * save_minutes, eval=eval_every, keep=keep_checkpoints, keep_best=keep_best)
    method = method_of(objective, config)
    if list_settings:
        from sidcli.cli.console import Console

        Console(as_json, quiet).result(objectives.listed(method), dataclasses.asdict(method.Settings()))
        return
    asked: dict[str, Any] = {"objective": objective, "guidance": guidance, "guidance_strategy": guidance_strategy}
    asked |= {"objective_settings": objectives.parse(method, set_ or []), "lr": lr, "images": images}
    asked |= {"memory": memory, "config": config}
    stopped = ("checkpoints are kept", "the same command again, to go on")
    with open_console(as_json, quiet, stopped, "--memory 12gb, or a smaller --micro-batch", hidden(config, settings)) as console:
        if dry_run:
            request = Request.of(teacher or model, Path(output) if output else None, **asked, settings=settings)
            plan_run(request, console, device, gpu, processes, intervals)
            return
        from sidcli.cli.console import DistillProgress

        where: dict[str, Any] = {"output": output, "device": device, "resume": resume, "tracker": tracker, "intervals": intervals}
        command = shlex.join(["sid", *sys.argv[1:]])
        with DistillProgress(console) as listener:
            result = api.distill(teacher or model, **where, **asked, command=command, listener=listener, **settings)
        tell(result, console)


def check(output: str | None, device: str, plan_for: str | None) -> Gpu | None:
    """Return the GPU that a dry run plans for, if any. Raises UsageError for invalid values, before any file is read."""
    check_name(device)
    check_named(output)
    if plan_for is not None and device == "cpu":
        raise UsageError(f"--device cpu and --plan-for {plan_for} exclude each other", "leave --device out")
    return None if plan_for is None else parse_gpu(plan_for)


def hidden(config: Path | None, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the libraries that diffusers and peft would import although this run does not need them."""
    chosen = {**(read_config(config) if config else {}), **settings}
    return () if chosen.get("optimizer") == "adam8bit" else ("bitsandbytes",)


def plan_run(request: Request, console: Console, device: str, gpu: Gpu | None, processes: int, intervals: Intervals) -> None:
    """Print the plan of a run."""
    with request.naming_file():
        request.check(True, bool(intervals.eval))
        request.prompts(console)
        request.images(console)
        resolved, gpu = request.resolve(console, device, True, gpu)
        from sidcli.training import plan

        made = plan.make(resolved, request.folder, device, processes, console, intervals.checkpoints, gpu)
    console.result(made.lines(), made.as_dict())


def tell(result: Result, console: Console) -> None:
    """Print the result of a run."""
    if result.taken:
        share = 100 * result.saving / max(result.seconds, 1e-9)
        console.note(
            f"finished: {counted(result.step, 'step')}, {counted(result.images, 'image')} per network; this command trained for "
            f"{duration(result.seconds)}, checkpointing overhead {share:.1f} %"
        )
    more = " --reference FILE" if result.takes_reference else ""
    console.note(f'generate with it: sid sample "a cat"{more} --model {shlex.quote(str(result.run))}')
    data = {"run": str(result.run), "student": str(result.student), "step": result.step, "images": result.images}
    times = {"seconds": round(result.seconds, 1), "saving_seconds": round(result.saving, 2)}
    console.result([str(result.student)], data | times | {"last": result.last})
