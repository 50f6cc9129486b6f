"""Settings of `sid distill` from presets, a config file, a memory recipe and options, checked before torch is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidcli import objectives
from sidcli.curation import check_options
from sidcli.data.pairs import HINT as PAIRS_HINT
from sidcli.data.pairs import folder_of
from sidcli.devices import choose_device
from sidcli.environment import cache_folder, group
from sidcli.errors import EnvironmentProblem, InputError, UsageError
from sidcli.files import check_unlocked, check_writable, read_json
from sidcli.formats.outputs import check_run
from sidcli.models.overrides import check_guidance
from sidcli.objectives.base import FAKE_OPTIONS
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.settings import (
    FITTED,
    LORAS,
    MEMORY,
    NO_PATH,
    PRESETS,
    SELECTS,
    TEACHER_DRAWS,
    DistillConfig,
    checked,
    preset_for,
    read_toml,
    strategy,
    takes_reference,
)
from sidcli.training.gpus import parse_gpu

if TYPE_CHECKING:
    from sidcli.data.captioned import CaptionedImages
    from sidcli.data.prompts import Prompts
    from sidcli.progress import Listener
    from sidcli.training.gpus import Gpu


TRACKERS = ("tensorboard", "wandb")
EMOJI_PROMPTS = ("emoji", "emoji-nouns")
"""Built-in prompts of the emoji world."""
RATES = ("lr_fake", "lr_generator")
"""Settings that --lr sets."""
PROMPT_SETTINGS = ("prompts", "column", "data_num")
"""Settings that select prompts or images, which pairs of a run do not need."""


@dataclass(frozen=True)
class Request:
    """A request for a run. The memory recipe overrides the initial settings `start`; the given settings `own` override both."""

    teacher: str
    start: dict[str, Any]
    own: dict[str, Any]
    memory: str
    folder: Path
    """The run folder."""
    notes: tuple[str, ...] = ()
    """Messages on settings that are not used."""
    file: Path | None = None
    """The config file."""
    of_file: frozenset[str] = field(default_factory=frozenset)
    """Settings whose values are those of the config file."""
    of_method: frozenset[str] = field(default_factory=frozenset)
    """Settings whose values are defaults of the objective. Defaults that depend on the path of the teacher replace them."""
    has_scale: bool = True
    """Whether the guidance scale of the objective is given, or does not depend on the teacher."""

    @classmethod
    def of(
        cls,
        teacher: str | None,
        output: Path | None,
        objective: str | None,
        guidance: float | None,
        guidance_strategy: str | None,
        objective_settings: Mapping[str, Any],
        lr: float | None,
        images: int | None,
        memory: str,
        config: Path | None,
        settings: Mapping[str, Any],
    ) -> Request:
        """Return the request for these arguments. `settings` are fields of DistillConfig or settings of the objective.

        Raises UsageError for unknown names or invalid values, InputError if the config file cannot be read.
        """
        check_values(settings, guidance, lr, images, memory)
        from_file = read_config(config) if config else {}
        teacher = teacher or from_file.pop("teacher", DistillConfig.teacher)
        from_file.pop("teacher", None)
        from_file, replaced = of_objective(from_file, objective, teacher)
        method, table = objective_table(from_file.pop("objective", {}), objective, guidance, guidance_strategy)
        of_objectives = {name for known in objectives.OBJECTIVES.values() for name in objectives.names(known)}
        others = {name: value for name, value in settings.items() if name in of_objectives}
        own = checked({name: value for name, value in settings.items() if name not in of_objectives}, "", "setting")
        if twice := sorted(others.keys() & objective_settings.keys()):
            name = twice[0]
            both = f"--{name} {others[name]} and --set {name}={objective_settings[name]}"
            raise UsageError(f"{both} exclude each other", "give one of them")
        if "name" in objective_settings:
            raise UsageError("--set name: the objective is not one of its own settings", "--objective NAME")
        others |= objective_settings
        check_scales(method, others, guidance, guidance_strategy)
        if guidance is not None and not issubclass(method, objectives.Sid) and (scale := method.Settings.scale) in others:
            raise UsageError(f"--guidance {guidance:g} and --set {scale}={others[scale]} exclude each other", "give one of them")
        preset = method.emoji_settings if preset_for(teacher) == "emoji" else {}
        chosen = objectives.settings({**preset, **table, **others})
        start = {**defaults_of(method, teacher), **from_file, "objective": chosen}
        of_method = frozenset(method.defaults.keys() - from_file.keys())
        has_scale = not chosen.has_scale_of_teacher or chosen.scale in {**preset, **table, **others}
        folder = output or default_folder(teacher, start, objective, guidance_strategy, has_scale)
        own = with_shortcuts(own, start, lr, images)
        used = start | MEMORY.get(memory, {}) | own
        data = used.get("data")
        pairs = folder_of(data) if data else None if chosen.draws_pairs or used.get("references") else pairs_of_run(teacher)
        off = without_effect(used, {**settings, **others}, (data or teacher) if pairs else "")
        notes = [*about_replaced(replaced, used, config), *off, *without_start(used)]
        of_file = frozenset(from_file.keys() - own.keys())
        return cls(teacher, start, own, memory, folder, tuple(notes), config, of_file, of_method, has_scale)

    @property
    def recipe(self) -> dict[str, Any]:
        return MEMORY.get(self.memory, MEMORY["fast"])

    @property
    def unused(self) -> frozenset[str]:
        """Settings of a fake score, and the renoising, that have no effect on the objective."""
        return frozenset({*FAKE_OPTIONS, "renoise"} & {*objectives.find(self.start["objective"].name).unused})

    def config(self, recipe: dict[str, Any], of_path: Mapping[str, Any] | None = None) -> DistillConfig:
        """Return the settings with a memory recipe. Those of a fake score that the objective does not have, and the
        renoising of one that fixes it, keep their defaults. `of_path` are the defaults that depend on the path of the teacher.

        Raises UsageError for an invalid value, also of a given setting that is not used.
        """
        if self.own.get("shard", self.start.get("shard")):  # sharding splits the state over the processes instead
            recipe = {name: value for name, value in recipe.items() if not name.startswith("offload")}
        path = of_path or {}
        start = {name: value for name, value in self.start.items() if name not in self.of_method & path.keys()}
        given = {**path, **start, **recipe, **self.own, "teacher": self.teacher}
        unused = self.unused
        merged = {name: value for name, value in given.items() if name not in unused}
        batch = merged.get("batch_size", DistillConfig.batch_size)
        merged["micro_batch"] = min(merged.get("micro_batch", DistillConfig.micro_batch), max(1, batch))
        if merged.get("prompts", "auto") == "auto":
            merged["prompts"] = "emoji" if preset_for(self.teacher) == "emoji" else "general"
        DistillConfig(**merged | {name: value for name, value in self.own.items() if name in unused})
        has_references = self.start["objective"].draws_pairs or merged.get("references")
        if not merged.get("data") and not has_references and (folder := pairs_of_run(self.teacher)):
            merged["data"] = str(folder)
        return DistillConfig(**merged)

    @property
    def before_path(self) -> DistillConfig:
        """The settings before the path of the teacher is known: those that depend on it and are not given exclude no others."""
        return self.config(self.recipe, NO_PATH)

    @contextmanager
    def naming_file(self) -> Iterator[None]:
        """Context in which an error about a setting of the config file names the file, and the key instead of the option."""
        try:
            yield
        except (UsageError, InputError) as error:
            message, names = with_keys(error.message, self.of_file)
            if not names:
                raise
            hint = error.hint or f"write another value there, or give --{names[0].replace('_', '-')}"
            raise type(error)(f"{self.file}: {message}", re.sub("leave --([a-z-]+) out", "leave it out", hint)) from error

    def check(self, dry_run: bool, evaluates: bool, tracker: str | None = None, resume: Path | None = None) -> None:
        """Raises UsageError, InputError or EnvironmentProblem for invalid settings, folders or trackers."""
        if tracker not in (None, *TRACKERS):
            raise UsageError(f"--tracker must be one of {', '.join(TRACKERS)}, not {tracker!r}")
        if tracker and find_spec(tracker) is None:
            raise EnvironmentProblem(f"--tracker {tracker} needs a package that is not installed", f"pip install {tracker}")
        if resume and not (resume / "manifest.json").is_file():
            raise InputError(f"{resume} is not a checkpoint", "give a folder such as runs/NAME/checkpoints/step-00000100")
        config = self.before_path
        if takes_reference(self.teacher) and not config.objective.draws_pairs:
            objectives.check_reference(config.objective, self.teacher)  # before the images that it lacks: they would not help
        if objectives.find(config.objective.name).discrete:
            from sidcli.models.flow import is_flow

            if is_flow(self.teacher):
                objectives.check_flow(config.objective, self.teacher)
        check_objective(config)
        check_writable(self.folder) if dry_run else check_run(self.folder)
        if evaluates or config.data:
            check_writable(cache_folder(), "cache with SID_CACHE_DIR")
        if not dry_run and group().rank == 0:
            check_unlocked(self.folder)

    def prompts(self, listener: Listener) -> Prompts:
        from sidcli.data.prompts import PromptList, open_prompts

        config = self.before_path
        source = open_prompts(config.prompts, config.column)
        if isinstance(source, PromptList) and source.note:
            listener.note(source.note)
        return source

    def images(self, listener: Listener) -> CaptionedImages | None:
        """Return the images to train on; None if there are none or the teacher draws them. Raises InputError if they are invalid."""
        config = self.before_path
        if config.data in ("", TEACHER_DRAWS) or folder_of(config.data):
            return None
        from sidcli.data.captioned import open_captioned

        images = open_captioned(config.data)
        for note in images.files.notes:
            listener.note(note)
        if config.data_num > (count := len(images)):
            listener.note(f"--data-num {config.data_num}: only {count:,} {'image has' if count == 1 else 'images have'} a caption")
        return images

    def resolve(
        self, listener: Listener, device: str, dry_run: bool = False, gpu: Gpu | None = None
    ) -> tuple[DistillConfig, Gpu | None]:
        """Return the settings for this device or for the GPU `gpu`, and that GPU.

        Raises UsageError or EnvironmentProblem for a device that is invalid or not available.
        """
        for note in self.notes:
            listener.note(note)
        recipe = self.recipe
        fitted = parse_gpu(self.memory) if self.memory in FITTED else None
        begun = self.memory not in MEMORY and self.record.is_file()
        if begun:  # a continued run keeps its recipe, whatever memory is free now
            recipe = {name: value for name, value in read_toml(self.record).items() if name in MEMORY["12gb"]}
        planned_only = dry_run and (gpu is not None or device.startswith("cuda"))  # the GPU does not have to be present
        on_gpu = not planned_only and choose_device(device, listener).type == "cuda"
        from sidcli.training import plan

        known = plan.described(self.config(recipe, NO_PATH), listener)
        asked = self if self.has_scale else self.with_scale(known.default_guidance)
        usual = known.path.settings | (asked.loras(recipe, listener) if plan.is_large(known) else {})
        if self.memory not in MEMORY and not begun and (on_gpu or gpu or fitted):
            recipes = {name: asked.config(recipe, usual) for name, recipe in MEMORY.items()}
            return plan.choose(recipes, device, listener, fitted or gpu, grows="micro_batch" not in self.own), gpu
        return asked.config(recipe, usual), gpu

    def with_scale(self, guidance: float) -> Request:
        """Return the request with this guidance scale of the objective."""
        objective = self.start["objective"]
        return replace(self, start=self.start | {"objective": replace(objective, **{objective.scale: guidance})})

    @property
    def record(self) -> Path:
        """The settings of the run in the run folder, if one has begun there."""
        return self.folder / "config.toml"

    def loras(self, recipe: Mapping[str, Any], listener: Listener) -> dict[str, Any]:
        """Return the defaults LORAS of a large teacher, as far as they apply; the listener is told so.

        They do not apply where the student starts at another model (--init), where networks are sharded, which adapters are not, and
        where the ranks are given as 0. A continued run keeps what it began with.
        """
        if self.record.is_file():
            before = read_toml(self.record)
            return {name: before[name] for name in LORAS if name in before}
        given = {**self.start, **recipe, **self.own}
        ranks = [name for name in LORAS if name.endswith("lora") and name not in self.unused]
        chosen = {name: LORAS[name] for name in ranks if name not in given}
        if given.get("init") or given.get("shard") or not (chosen or any(given[name] for name in ranks)):
            return {}
        if chosen:
            options = " ".join(f"--{name.replace('_', '-')} {{}}" for name in chosen)
            listener.note(
                f"{self.teacher} is large: {options.format(*chosen.values())} by default, on the frozen teacher in bf16;"
                f" {options.format(*[0] * len(chosen))} trains all weights"
            )
        return LORAS


def with_keys(message: str, names: Collection[str]) -> tuple[str, list[str]]:
    """Return a message with the keys of a config file instead of the options of these settings, and the settings that it names."""
    found = [name for option in re.findall(r"--([a-z][a-z-]*)", message) if (name := option.replace("-", "_")) in names]
    for name in found:
        message = re.sub(rf"--{name.replace('_', '-')}(?![a-z-])", name, message)
    return message, found


def check_values(settings: Mapping[str, Any], guidance: float | None, lr: float | None, images: int | None, memory: str) -> None:
    """Raises UsageError for options that exclude each other and for invalid values."""
    check_guidance(guidance)
    if "steps" in settings and images is not None:
        raise UsageError("--steps and --images exclude each other", "give one of them")
    if images is not None and images < 1:
        raise UsageError(f"--images must be at least 1, not {images}")
    if memory not in (known := ("auto", *MEMORY, *FITTED)):
        raise UsageError(f"--memory must be one of {', '.join(known)}, not {memory!r}")
    if lr is not None and not 0 < lr < math.inf:
        raise UsageError(f"--lr must be positive, not {lr}")


def check_scales(
    method: type[objectives.Objective], given: Mapping[str, Any], guidance: float | None, guidance_strategy: str | None
) -> None:
    """Raises UsageError if the guidance options are given beside settings of the objective that replace all of their scales."""
    kappas = tuple(strategy("none", None))
    if not issubclass(method, objectives.Sid) or not set(kappas) <= given.keys():
        return
    for option, value in (("--guidance", guidance), ("--guidance-strategy", guidance_strategy)):
        if value is not None:
            raise UsageError(f"{option} {value} has no effect: {kappas[0]} to {kappas[-1]} set every scale", f"leave {option} out")


def without_effect(settings: Mapping[str, Any], given: Mapping[str, Any], pairs: str) -> list[str]:
    """Return one sentence for each setting of the command line (`given`) that other settings turn off, or the pairs in the place `pairs`.

    Another says that the run ends before the adversarial term of sida joins, wherever the settings that cause it are from.
    """
    scores = settings["objective"]
    unused = [name for name in objectives.find(scores.name).unused if name in given]
    said = [f"note: --{name.replace('_', '-')} {given[name]} has no effect on objective {scores.name}" for name in unused]
    if "renoise" in given and "renoise" not in unused and settings.get("student_steps", DistillConfig.student_steps) == 1:
        said.append(f"note: --renoise {given['renoise']} has no effect on a student of one step; --student-steps N sets more")
    if "dropout" in given and isinstance(scores, objectives.Sid.Settings) and scores.kappa1 == scores.kappa2 == scores.kappa3 == 1:
        said.append(
            f"note: --dropout {given['dropout']} has no effect: no guidance uses the unconditional branch of the fake score"
        )
    if "gan_fake" in given and isinstance(scores, objectives.Dmd2.Settings) and not scores.gan:
        said.append(f"note: --set gan_fake={given['gan_fake']} has no effect without a GAN; --set gan=0.001 adds it")
    if pairs:
        beside = f"has no effect beside the pairs of {pairs}, which have captions"
        said += [f"note: --{name.replace('_', '-')} {given[name]} {beside}" for name in PROMPT_SETTINGS if name in given]
    if isinstance(scores, SelfDistillationSettings):
        off = scores.without_effect(given, pairs)
        said += [f"note: --set {name}={given[name]} has no effect {reason}" for name, reason in off.items()]
    if scores.discriminates and (joining := scores.joining_images):
        size = max(1, settings.get("batch_size", DistillConfig.batch_size))
        joins, images = -(-joining // size) * size, settings.get("steps", DistillConfig.steps) * size
        if joins >= images:
            said.append(f"note: the adversarial term joins after {joins:,} images, and the run has {images:,}")
    return said


def without_start(settings: Mapping[str, Any]) -> list[str]:
    """Return one sentence if the objective continues from students of another one, and the run starts from none."""
    name = settings["objective"].name
    first = objectives.find(name).continues
    if not first or settings.get("init"):
        return []
    return [
        f"note: objective {name} continues from a student of {first}, and --init is not given: the student starts at the teacher"
    ]


def check_objective(config: DistillConfig) -> None:
    """Raises UsageError if the objective would never train the student, lacks the images that it needs, or does not use those given."""
    name, method = config.objective.name, objectives.find(config.objective.name)
    if method.is_one_step and config.student_steps > 1:
        made = "a one-step student" if method.makes == "student" else "no student"
        raise UsageError(
            f"objective {name} trains {made}, and --student-steps is {config.student_steps}",
            "leave --student-steps out, or choose another --objective",
        )
    if (first := method.first_step(config)) >= config.steps:
        raise UsageError(
            f"objective {name} trains the student from step {first + 1} on, and --steps is {config.steps}",
            "more --steps, or other settings; --list-settings prints them",
        )
    if config.references:
        check_drawn_references(config)
    is_pairs = folder_of(config.data) is not None
    if config.objective.draws_pairs and config.data and not is_pairs:
        raise UsageError(f"--data {config.data} holds no pairs.jsonl, which objective {name} trains on", PAIRS_HINT)
    if config.objective.needs_images and not (config.data or config.objective.draws_pairs):
        raise UsageError(
            f"objective {name} trains on images, and --data is not given",
            "--data teacher"
            if config.objective.needs_pairs
            else "--data FOLDER or --data FILE.tar; --data teacher lets the teacher draw them",
        )
    if config.objective.needs_pairs and config.data != TEACHER_DRAWS:
        raise UsageError(
            f"--data {config.data}: objective {name} trains on images with the noise from which the teacher drew them",
            f"--data {TEACHER_DRAWS}",
        )
    if config.data and not (config.objective.needs_images or is_pairs):
        raise UsageError(
            f"--data {config.data}: objective {name} trains on prompts alone",
            'leave it out, or --data "" if a config file has it; objectives that train on images are'
            " sida, dmd, dmd2 --set gan=0.001, regression, lcm and tlcm",
        )
    if isinstance(config.objective, SelfDistillationSettings) and not config.data:
        check_judge(config.objective, config.prompts)
    if config.objective.discriminates and config.compile == "on":
        raise UsageError(f"--compile on does not support the discriminator of objective {name}", "--compile off")
    if config.data_num and not config.data:
        raise UsageError(f"--data-num {config.data_num} is a number of images of --data, which is not given", "leave it out")


def pairs_of_run(place: str) -> Path | None:
    """Return the folder of the pairs on which the run at `place` was tuned: its own pairs, or those of another run, by its run.json; None
    if `place` is no such run."""
    record = Path(place) / "run.json"
    data = read_json(record, "give the pairs as --data").get("data") if record.is_file() else None
    return folder_of(place) or (folder_of(str(data.get("pairs", ""))) if isinstance(data, dict) else None)


def check_drawn_references(config: DistillConfig) -> None:
    """Raises UsageError if the objective uses no reference images, or if pairs of images give them too."""
    if config.objective.needs_images or not objectives.find(config.objective.name).takes_references:
        raise UsageError(
            f"--references {config.references}: objective {config.objective.name} does not train on the reference images of a student",
            f"{objectives.REFERENCE_HINT}, or leave --references out",
        )
    if config.data:
        raise UsageError(
            f"--data {config.data} and --references {config.references} exclude each other: both give the reference images",
            'give one of them; --data "" if a config file has it',
        )


def check_judge(settings: SelfDistillationSettings, prompts: str) -> None:
    """Raises UsageError if the judge lacks an option, or does not know the captions of the prompts or of the scenes."""
    if settings.scenes == "http" and prompts in EMOJI_PROMPTS:
        raise UsageError(
            f"--set scenes=http writes other scenes than those of the emoji world, and --prompts is {prompts}", "leave it out"
        )
    if settings.judge == "none":
        return
    check_options(settings.judge, {name: value for name, value in settings.judge_options.items() if value is not None})
    if settings.judge == "oracle" and prompts not in EMOJI_PROMPTS:
        raise UsageError(
            f"--set judge=oracle knows the captions of the emoji world only, and --prompts is {prompts}",
            f"another --set judge, or --prompts {EMOJI_PROMPTS[0]}",
        )


def read_config(file: Path) -> dict[str, Any]:
    """Return the settings of a config file. Raises UsageError, naming the file, also for an invalid table of the objective."""
    content = read_toml(file)
    table = content.get("objective", {})
    if (name := table.get("name", "sid")) not in tuple(objectives.OBJECTIVES):
        raise UsageError(f"{file}: name in [objective] must be one of {', '.join(objectives.OBJECTIVES)}, not {name!r}")
    try:
        objectives.settings(table)
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", error.hint) from error
    return content


def method_of(objective: str | None, config: Path | None) -> type[objectives.Objective]:
    """Return the objective class with the name `objective`, else that of a config file, else of sid."""
    table = read_config(config).get("objective", {}) if config else {}
    return objectives.find(objective or table.get("name", "sid"))


def defaults_of(method: type[objectives.Objective], teacher: str) -> dict[str, Any]:
    """Return the settings of a run whose defaults depend on the objective or the teacher."""
    preset = preset_for(teacher)
    return {**method.defaults, **PRESETS[preset], **(method.emoji_defaults if preset == "emoji" else {})}


def of_objective(from_file: dict[str, Any], name: str | None, teacher: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a config file that apply to the objective `name`, and those that do not.

    If the file is of another objective, its table does not apply, and neither do settings with the defaults of that objective.
    """
    table = from_file.get("objective", {})
    before = table.get("name", "sid")
    if name in (None, before):
        return from_file, {}
    methods = objectives.find(before), objectives.find(name)
    depends = {field for method in methods for field in {**method.defaults, **method.emoji_defaults}}
    usual = {field: getattr(DistillConfig, field) for field in depends} | defaults_of(methods[0], teacher)
    replaced = {field: value for field, value in from_file.items() if field in depends and value == usual[field]}
    kept = {field: value for field, value in from_file.items() if field not in (*replaced, "objective")}
    return kept, replaced | {"objective": {"name": before} | table}


def about_replaced(replaced: Mapping[str, Any], settings: Mapping[str, Any], config: Path | None) -> list[str]:
    """Return one sentence for the settings of the table of a config file that do not apply, and one for its other settings.

    `replaced` are those of `of_objective`, `settings` those of the run.
    """
    if not replaced:
        return []
    table, now = replaced["objective"], settings["objective"]
    old = [f"{field} = {value}" for field, value in table.items() if field != "name"]
    changed = {field: settings.get(field, getattr(DistillConfig, field)) for field in replaced if field != "objective"}
    shared = [f"{field} = {replaced[field]} -> {value}" for field, value in changed.items() if value != replaced[field]]
    said = {
        f"the table [objective] of {config} is of {table['name']} and is not used": old,
        f"settings of {config} that are defaults of {table['name']} have other values": shared,
    }
    return [f"--objective {now.name}: {what}: {', '.join(listed)}" for what, listed in said.items() if listed]


def objective_table(
    table: dict[str, Any], name: str | None, guidance: float | None, guidance_strategy: str | None
) -> tuple[type[objectives.Objective], dict[str, Any]]:
    """Return the objective class and its settings: those of a config file (`table`), overridden by the guidance options."""
    table = table or {"name": name or "sid"}
    method = objectives.find(table.get("name", "sid"))
    has_strategy = issubclass(method, objectives.Sid)
    if not has_strategy and guidance_strategy is not None:
        raise UsageError(f"--guidance-strategy is an option of objectives sid and sida, not of {table['name']}", "--guidance SCALE")
    if not has_strategy and guidance is not None and not method.Settings.scale:
        raise UsageError(f"--guidance {guidance:g}: objective {table['name']} takes no step of the teacher", "leave --guidance out")
    if not has_strategy and guidance is not None:
        return method, table | {method.Settings.scale: guidance}
    if guidance is not None or guidance_strategy is not None:
        return method, table | strategy(guidance_strategy or "lsg", guidance)
    return method, dict(table)


def with_shortcuts(settings: Mapping[str, Any], start: Mapping[str, Any], lr: float | None, images: int | None) -> dict[str, Any]:
    """Return `settings` with the fields that `lr` and `images` set. `start` has the batch size if `settings` does not.

    Raises UsageError if `lr` sets no learning rate of the objective.
    """
    own = dict(settings)
    for whole, part in SELECTS.items():
        if whole in own and part not in own:
            own[part] = getattr(DistillConfig, part)  # that of a config file belongs to the prompts or images of that file
    if lr is not None:
        name = start["objective"].name
        rates = [rate for rate in RATES if rate not in objectives.find(name).unused]
        if set(rates) <= own.keys():
            others = " and ".join(f"--{rate.replace('_', '-')}" for rate in rates)
            what = "set both rates" if len(rates) > 1 else f"sets the only rate of objective {name}"
            raise UsageError(f"--lr {lr:g} has no effect: {others} {what}", "leave --lr out")
        own = dict.fromkeys(RATES, lr) | own
    if images is not None:
        size = own.get("batch_size", start.get("batch_size", DistillConfig.batch_size))
        own["steps"] = max(1, -(-images // max(1, size)))
    return own


def default_folder(
    teacher: str, start: Mapping[str, Any], objective: str | None, guidance_strategy: str | None, has_scale: bool = True
) -> Path:
    """Return the default run folder. Without `has_scale` its name has no guidance scale, which is known after the teacher is read."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(teacher).name or teacher).strip("-.") or "teacher"
    kinds = [kind for kind, usual in ((objective, "sid"), (guidance_strategy, "lsg")) if kind not in (None, usual)]
    table = start["objective"]
    scale = [f"g{getattr(table, table.scale):g}"] if table.scale and has_scale else []
    return Path("runs") / "-".join([name, *map(str, kinds), *scale])
