"""`sid distill`."""

from __future__ import annotations

import math
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sidcli import objectives
from sidcli.cli.common import choose_device, launch_processes, load_model, open_console
from sidcli.cli.options import MACHINE, METHOD, DeviceOption, JsonOption, QuietOption, one_of, with_settings, within
from sidcli.devices import check_name
from sidcli.environment import cache_folder, group
from sidcli.errors import EnvironmentProblem, InputError, UsageError
from sidcli.files import check_unlocked, check_writable
from sidcli.formats.outputs import check_run
from sidcli.progress import duration
from sidcli.settings import MEMORY, PRESETS, STRATEGIES, DistillConfig, preset_for, read_toml, strategy

if TYPE_CHECKING:
    from sidcli.cli.console import Console
    from sidcli.data.prompts import Prompts
    from sidcli.training.distill import Result
    from sidcli.training.plan import Card

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
Output = Annotated[Path | None, typer.Option("--output", "-o", show_default="runs/TEACHER-gGUIDANCE", help="Run folder.")]
Resume = Annotated[Path | None, typer.Option(show_default="the newest", help="Checkpoint to continue from.")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings, such as a run's config.toml.")]
SaveEvery = Annotated[int, typer.Option(callback=within(1), help="Steps between checkpoints.")]
SaveMinutes = Annotated[float, typer.Option(callback=within(0.01), help="Minutes between checkpoints at most.")]
KeepCheckpoints = Annotated[int, typer.Option(callback=within(1), help="Checkpoints to keep.")]
SampleEvery = Annotated[int, typer.Option(callback=within(1), help="Steps between sample grids.")]
EvalEvery = Annotated[
    int, typer.Option(callback=within(0), help="Steps between quick measurements against the teacher's own images; 0: none.")
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
        help="lsg, long, short, zero-cfg or none.",
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
        autocompletion=one_of("auto", *MEMORY),
        help="auto, fast, 24gb or 12gb: sets the options below.",
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
    if group().count == 1 and processes > 1 and not dry_run:
        sys.exit(launch_processes(processes, device))
    check(settings, images, tracker, resume, memory, lr)
    check_name(device)
    from_file = read_toml(config) if config else {}
    of_file = from_file.pop("teacher", DistillConfig.teacher)
    teacher = teacher or model or of_file
    method, table = objective_table(from_file.pop("objective", {}), objective, guidance, guidance_strategy)
    if list_settings:
        typer.echo("\n".join(objectives.listed(method)))
        return
    table |= {name: settings.pop(name) for name in objectives.names(objectives.Sid) if name in settings}
    table |= objectives.parse(method, set_ or [])
    start = {**method.defaults, **PRESETS[preset_for(teacher)], **from_file, "objective": objectives.settings(table)}
    request = Request(teacher, start, typed(settings, start, lr, images), memory)
    folder = output or request.folder(objective, guidance_strategy)
    stopped = ("checkpoints are kept", "the same command again, to go on")
    with open_console(as_json, quiet, stopped, "--memory 12gb, or a smaller --micro-batch", unused=()) as console:
        if dry_run:
            plan_run(request, console, folder, device, plan_for, processes, keep_checkpoints, eval_every)
        else:
            times = {"save": save_every, "sample": sample_every, "save_seconds": 60 * save_minutes}
            times |= {"eval": eval_every, "keep": keep_checkpoints}
            tell(train(request, console, folder, device, times, resume, tracker), console)


def plan_run(
    request: Request, console: Console, folder: Path, device: str, plan_for: str | None, processes: int, keep: int, eval_every: int
) -> None:
    """Print the plan of a run."""
    request.check(folder, True, bool(eval_every))
    request.prompts(console)
    resolved, card = request.on(console, folder, device, True, plan_for)
    from sidcli.training import plan

    made = plan.make(resolved, folder, device, processes, console, keep, card)
    console.result(made.lines(), made.as_dict())


def train(
    request: Request, console: Console, folder: Path, device: str, times: dict[str, Any], resume: Path | None, tracker: str | None
) -> Result:
    """Run the training; `times` are the fields of distill.Intervals."""
    request.check(folder, False, bool(times["eval"]))
    source = request.prompts(console)
    resolved, _ = request.on(console, folder, device, False, None)
    from sidcli.training import plan

    plan.check(resolved, folder, times["keep"], console)
    if "prompts" not in request.own and resolved.prompts in ("emoji", "general"):
        console.note(f"prompts: {source.name} (built in; override with --prompts FILE)")
    from sidcli.cli.console import DistillProgress
    from sidcli.training import distill as driver

    known = {name: getattr(resolved, name) for name in ("prediction_type", "model_config", "width", "height")}
    loaded = load_model(request.teacher, console, **known)
    command = shlex.join(["sid", *sys.argv[1:]])
    with console.progress("distill", resolved.steps, "steps") as advance:
        listener = DistillProgress(console, advance)
        return driver.run(loaded, resolved, source, folder, device, driver.Intervals(**times), resume, listener, tracker, command)


def check(
    settings: dict[str, Any], images: int | None, tracker: str | None, resume: Path | None, memory: str, lr: float | None
) -> None:
    """Refuse options that cannot be, before anything is read. Raises UsageError, InputError or EnvironmentProblem."""
    if "steps" in settings and images is not None:
        raise UsageError("--steps and --images exclude each other", "give one of them")
    if images is not None and images < 1:
        raise UsageError(f"--images must be at least 1, not {images}")
    if memory not in ("auto", *MEMORY):
        raise UsageError(f"--memory must be one of auto, {', '.join(MEMORY)}, not {memory!r}")
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f"--lr must be positive, not {lr}")
    if tracker and find_spec(tracker) is None:
        raise EnvironmentProblem(f"--tracker {tracker} needs a package that is not installed", f"pip install {tracker}")
    if resume and not (resume / "manifest.json").is_file():
        raise InputError(f"{resume} is not a checkpoint", "give a folder such as runs/NAME/checkpoints/step-00000100")


def objective_table(
    table: dict[str, Any], name: str | None, guidance: float | None, guidance_strategy: str | None
) -> tuple[type[objectives.Objective], dict[str, Any]]:
    """The objective, and its settings after those of a config file (`table`) and the options for guidance."""
    if name not in (None, table.get("name", "sid")):
        table = {"name": name}  # a table of another objective does not apply
    method = objectives.find(table.get("name", "sid"))
    if method is not objectives.Sid and guidance_strategy is not None:
        raise UsageError(f"--guidance-strategy is an option of objective sid, not of {table['name']}", "--guidance SCALE")
    if method is not objectives.Sid and guidance is not None:
        return method, table | {"guidance": guidance}
    if guidance is not None or guidance_strategy is not None:
        return method, table | strategy(guidance_strategy or "lsg", guidance)
    return method, dict(table)


def typed(settings: dict[str, Any], start: dict[str, Any], lr: float | None, images: int | None) -> dict[str, Any]:
    """The settings that options give, `start` those without them."""
    own = dict(settings)
    if "prompts" in own and "column" not in own:
        own["column"] = ""  # that of a --config belongs to its own prompts
    if lr is not None:
        own = {"lr_fake": lr, "lr_generator": lr} | own
    if images is not None:
        size = own.get("batch_size", start.get("batch_size", DistillConfig.batch_size))
        own["steps"] = max(1, -(-images // max(1, size)))
    return own


@dataclass(frozen=True)
class Request:
    """What is asked for: settings to start from, those that options give, and a memory recipe between the two."""

    teacher: str
    start: dict[str, Any]
    own: dict[str, Any]
    memory: str

    def config(self, recipe: dict[str, Any]) -> DistillConfig:
        """Raises UsageError for a value that is not possible."""
        if self.own.get("shard", self.start.get("shard")):  # which spreads the state over the processes instead
            recipe = {name: value for name, value in recipe.items() if not name.startswith("offload")}
        merged = self.start | recipe | self.own | {"teacher": self.teacher}
        batch = merged.get("batch_size", DistillConfig.batch_size)
        merged["micro_batch"] = min(merged.get("micro_batch", DistillConfig.micro_batch), max(1, batch))
        if merged.get("prompts", "auto") == "auto":
            merged["prompts"] = "emoji" if preset_for(self.teacher) == "emoji" else "general"
        return DistillConfig(**merged)

    def folder(self, objective: str | None, guidance_strategy: str | None) -> Path:
        """The run folder where none is given."""
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(self.teacher).name or self.teacher).strip("-.") or "teacher"
        kinds = [kind for kind, usual in ((objective, "sid"), (guidance_strategy, "lsg")) if kind not in (None, usual)]
        table = self.start["objective"]
        return Path("runs") / "-".join([name, *map(str, kinds), f"g{getattr(table, table.scale):g}"])

    @property
    def recipe(self) -> dict[str, Any]:
        return MEMORY["fast" if self.memory == "auto" else self.memory]

    def check(self, folder: Path, dry_run: bool, evaluates: bool) -> None:
        """Raises UsageError, InputError or EnvironmentProblem for settings or folders that cannot be."""
        self.config(self.recipe)
        check_writable(folder) if dry_run else check_run(folder)
        if evaluates:
            check_writable(cache_folder(), "cache with SID_CACHE_DIR")
        if not dry_run and group().rank == 0:
            check_unlocked(folder)

    def prompts(self, console: Console) -> Prompts:
        from sidcli.data.prompts import PromptList, open_prompts

        config = self.config(self.recipe)
        source = open_prompts(config.prompts, config.column)
        if isinstance(source, PromptList) and source.note:
            console.note(source.note)
        return source

    def on(
        self, console: Console, folder: Path, device: str, dry_run: bool, plan_for: str | None
    ) -> tuple[DistillConfig, Card | None]:
        """The settings on this device, or on a GPU that is planned for, which is returned too.

        Raises UsageError or EnvironmentProblem for a device that cannot be.
        """
        recipe = self.recipe
        begun = self.memory == "auto" and (folder / "config.toml").is_file()
        if begun:  # however full the device is today, the run goes on as it began
            recipe = {name: value for name, value in read_toml(folder / "config.toml").items() if name in MEMORY["12gb"]}
        planned_only = dry_run and (plan_for is not None or device.startswith("cuda"))  # for a GPU that need not be here
        on_gpu = not planned_only and choose_device(device, console).type == "cuda"
        from sidcli.training import plan

        card = plan.parse_card(plan_for) if plan_for else None
        if self.memory == "auto" and not begun and (on_gpu or card):
            return plan.choose({name: self.config(recipe) for name, recipe in MEMORY.items()}, device, console, card), card
        return self.config(recipe), card


def tell(result: Result, console: Console) -> None:
    """What a run has made."""
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
