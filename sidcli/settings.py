"""Settings of a distillation: a frozen dataclass, its validation, presets, and reading from TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidcli import objectives
from sidcli.errors import InputError, UsageError
from sidcli.files import read_bytes
from sidcli.models.card import RENOISE
from sidcli.models.overrides import PREDICTIONS, Overrides
from sidcli.numeric import plain
from sidcli.objectives.base import Settings
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.objectives.sid import SidSettings

CHOICES = {
    "prediction_type": PREDICTIONS,
    "renoise": RENOISE,
    "optimizer": ("adam", "adam8bit"),
    "precision": ("auto", "fp32", "bf16"),
    "text_precision": ("fp32", "bf16"),
    "compile": ("auto", "on", "off"),
}
"""Allowed values of the fields of DistillConfig that are a choice."""
STRATEGIES: dict[str, float | None] = {"lsg": 2.0, "long": 2.0, "short": 0.5, "zero-cfg": None, "anti-cfg": None, "none": None}
"""Default guidance scale of each guidance strategy; None if the strategy fixes every scale."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """All settings that determine the result of `sid distill`. Two runs with equal fields that compute in the same precision give equal
    students.

    The docstring of a field is the help text of its option.
    """

    teacher: str = "emoji-teacher"
    """Embedded name, diffusers folder, run folder or hub id."""
    prediction_type: str = "auto"
    """What the teacher predicts, if its files do not say: epsilon or v_prediction."""
    model_config: str = ""
    """Diffusers folder whose JSON files describe a teacher in a single file."""
    width: int = 0
    """Width in pixels."""
    height: int = 0
    """Height in pixels."""
    objective: Settings = field(default_factory=SidSettings)
    """The distillation method, with its own settings."""
    prompts: str = "auto"
    """Text with one prompt per line, .csv, .tsv, .jsonl or .json; or general, emoji or emoji-nouns, which are built in."""
    column: str = ""
    """Column of a table given as --prompts."""
    data: str = ""
    """Images for objectives that need them: folder with captions, webdataset's .tar files, teacher (it draws them), or pairs of a run."""
    data_num: int = 0
    """Images of --data to use."""
    references: str = ""
    """Student that draws the reference images for a teacher that takes them, in place of the pairs of --data."""
    t_init: int = 625
    """Timestep at which the student starts; with a teacher of flow matching 1000, pure noise."""
    t_min: int = 20
    """Smallest timestep of the scores."""
    t_max: int = 980
    """Exclusive upper timestep of the scores."""
    init: str = ""
    """Model that the student starts from: a student, a run folder, a LoRA file, or "A - B", a difference to add to the teacher."""
    steps: int = 10000
    """Training steps."""
    batch_size: int = 512
    """Images per update, over all processes."""
    micro_batch: int = 8
    """Images computed at once; does not change the result."""
    lr_fake: float = 1e-6
    """Learning rate of the fake score, or of the discriminator of scflow and act."""
    lr_generator: float = 1e-6
    """Learning rate of the generator."""
    adam_eps: float = 1e-8
    """Adam epsilon of both optimizers."""
    ema_images: float = 50_000.0
    """Half-life of the weight average, in images; 0: no average."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the images seen so far."""
    seed: int = 0
    """Seed of prompts, noise and timesteps."""
    student_steps: int = 1
    """Denoising steps of the student; training stops after a random one of them."""
    renoise: str = "ddim"
    """Noise between a student's steps: predicted (ddim), the first (fixed) or fresh."""
    fake_warmup: int = 0
    """Steps at the start that train the fake score alone."""
    fake_updates: int = 1
    """Fake score updates per generator update."""
    optimizer: str = "adam"
    """adam, or adam8bit, which needs bitsandbytes."""
    fake_lora: int = 0
    """Rank of a LoRA fake score (scflow, act: discriminator) on the teacher's weights; 0: a full copy."""
    student_lora: int = 0
    """Rank of a LoRA student on the teacher's weights; 0: a full copy."""
    precision: str = "auto"
    """bf16 computes over float32 weights; auto: bf16 on a GPU that has it, and on a CPU if a short measurement finds it faster."""
    text_precision: str = "fp32"
    """Weights of the language model that reads the prompts, T5 or Gemma: bf16 takes half the memory."""
    tf32: bool = False
    """TF32 matrix products on the GPU."""
    teacher_bf16: bool = False
    """Keep the frozen teacher in bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    split_backward: bool = False
    """Keep one network's graph at a time."""
    offload_average: bool = False
    """Keep the weight average in CPU memory."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory."""
    offload_text: bool = False
    """Keep the text encoders in CPU memory, and encode prompts there."""
    compile: str = "auto"
    # Compilation of SD 1.5 did not finish within five minutes on an H200, and its speedup is not measured.
    """torch.compile; auto is off."""
    shard: bool = False
    """Split the networks over the processes (FSDP2)."""

    @property
    def overrides(self) -> Overrides:
        """How the teacher is read: what its files do not say, and the size of the images."""
        return Overrides(self.prediction_type, self.model_config, self.width, self.height)

    def __post_init__(self) -> None:
        rules = {
            "width": (self.width >= 0, "at least 0"),  # its multiple depends on the teacher
            "height": (self.height >= 0, "at least 0"),
            "data-num": (0 <= self.data_num <= 10**9, "at least 0 and at most 10^9"),
            "steps": (1 <= self.steps <= 10**9, "at least 1 and at most 10^9"),
            "batch-size": (self.batch_size >= 1, "at least 1"),
            "micro-batch": (self.micro_batch >= 1, "at least 1"),
            "t-min": (
                0 <= self.t_min < self.t_max,
                f"at least 0 and below --t-max {self.t_max}" if self.t_min >= 0 else "at least 0",
            ),
            "t-init": (self.t_init >= 1, "at least 1"),  # its greatest value depends on the teacher
            "lr-fake": (0 < self.lr_fake < math.inf, "positive"),
            "lr-generator": (0 < self.lr_generator < math.inf, "positive"),
            "adam-eps": (0 < self.adam_eps < math.inf, "positive"),
            "ema-images": (0 <= self.ema_images < math.inf, "at least 0"),
            "ema-rampup": (0 < self.ema_rampup < math.inf, "positive"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            "student-steps": (
                1 <= self.student_steps <= self.t_init,
                f"at least 1 and at most --t-init {self.t_init}" if self.student_steps >= 1 else "at least 1",
            ),
            "fake-warmup": (0 <= self.fake_warmup < self.steps, f"at least 0 and below --steps {self.steps}"),
            "fake-updates": (self.fake_updates >= 1, "at least 1"),
            "fake-lora": (0 <= self.fake_lora <= 1024, "at least 0 and at most 1024"),
            "student-lora": (0 <= self.student_lora <= 1024, "at least 0 and at most 1024"),
            "init": (not (self.init and self.student_lora), "left out with --student-lora, which starts at the teacher"),
            "shard": (not (self.shard and (self.offload_average or self.offload_optimizer)), "off where state is offloaded"),
        }
        for name, values in CHOICES.items():
            rules[name.replace("_", "-")] = (getattr(self, name) in values, f"one of {', '.join(values)}")
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"--{name} must be {wanted}, not {getattr(self, name.replace('-', '_'))}")


MAY_CHANGE = frozenset(
    {
        "steps",
        "micro_batch",
        "gradient_checkpointing",
        "split_backward",
        "offload_average",
        "offload_optimizer",
        "offload_text",
        "compile",
        "shard",
    }
)
"""Fields that a continued run may change: its length, and where and in which parts a step is computed, but not its result."""

NO_PATH = {"t_init": sys.maxsize, "t_min": 0, "t_max": sys.maxsize}
"""Fields whose defaults depend on the path of the teacher, with values that exclude none of the others. They replace the defaults
until the path is known."""

LORAS: dict[str, Any] = {"student_lora": 64, "fake_lora": 64, "teacher_bf16": True}
"""Fields whose defaults are these for a large teacher of transformers (`Kind.lora_above`): two LoRAs on one frozen teacher in bf16."""

TEACHER_DRAWS = "teacher"
"""Value of the field `data` for images that the teacher draws."""
SELECTS = {"prompts": "column", "data": "data_num"}
"""Fields that select a part of the content of another field."""

MEMORY: dict[str, dict[str, Any]] = {
    "fast": {},
    "24gb": {
        "micro_batch": 2,
        "gradient_checkpointing": True,
        "split_backward": True,
        "offload_average": True,
        "teacher_bf16": True,
    },
    "12gb": {
        "micro_batch": 1,
        "gradient_checkpointing": True,
        "split_backward": True,
        "offload_average": True,
        "offload_optimizer": True,
        "offload_text": True,
        "teacher_bf16": True,
        "fake_lora": 64,
    },
}
"""Fields that each `--memory` recipe sets, smallest effect on the result first. Single options override single fields."""
FITTED = ("16gb", "48gb", "80gb")
"""Amounts of memory that `--memory` accepts too: the first recipe whose plan fits a GPU of this memory, as `auto` for the GPU here."""


def strategy(name: str, scale: float | None) -> dict[str, float]:
    """Return kappa1 to kappa4 of a guidance strategy (arXiv 2406.01561).

    Raises UsageError for an unknown name, or for a scale if the strategy fixes every scale.
    """
    if name not in STRATEGIES:
        raise UsageError(f"--guidance-strategy must be one of {', '.join(STRATEGIES)}, not {name!r}")
    if scale is not None and STRATEGIES[name] is None:
        raise UsageError(f"--guidance-strategy {name} fixes every scale; --guidance {scale:g} has no effect", "leave it out")
    k = STRATEGIES[name] if scale is None else scale
    kappas = {
        "lsg": (k, k, k, k),
        "long": (1.0, 1.0, 1.0, k),
        "short": (1.0, k, k, 1.0),
        "zero-cfg": (0.0, 0.0, 0.0, 1.0),  # this one and the next: arXiv 2505.12674
        "anti-cfg": (-1.0, -1.0, -1.0, 1.0),
        "none": (1.0, 1.0, 1.0, 1.0),
    }[name]
    return {f"kappa{index}": float(value) for index, value in enumerate(kappas, 1) if value is not None}


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's recipe (arXiv 2406.01561), for a 24 GB GPU.
    "sd15": {},
    # For two CPU cores and a few minutes; tuned on the emoji teacher (README).
    "emoji": {
        "steps": 300,
        "batch_size": 16,
        "micro_batch": 16,
        "lr_fake": 1e-4,
        "lr_generator": 1e-4,
        "ema_images": 500.0,
    },
}
"""Initial fields of `sid distill`. Options and `--config` override single fields."""


def preset_for(teacher: str) -> str:
    """Return `emoji` for the embedded teacher and for folders and runs made from it, else `sd15`. Reads no weights."""
    return "emoji" if teacher == "emoji-teacher" or card_of(teacher).get("world") == "emoji" else "sd15"


def card_of(teacher: str) -> dict[str, Any]:
    """Return the content of sid.json in a folder or a run folder; empty if there is none that can be read."""
    for card in (Path(teacher) / "sid.json", Path(teacher) / "student" / "sid.json"):
        with suppress(OSError, ValueError, RecursionError):
            if isinstance(content := json.loads(read_bytes(card)), dict):
                return content
    return {}


def takes_reference(teacher: str) -> bool:
    """Return whether a teacher in a folder was tuned to take a reference image. Reads no weights."""
    config = card_of(teacher).get("config")
    table = config.get("objective") if isinstance(config, dict) else None
    return isinstance(table, dict) and table.get("name") == SelfDistillationSettings.name


def read_toml(path: Path) -> dict[str, Any]:
    """Return the fields of a config.toml. Raises InputError if the file is missing or not TOML, UsageError for unknown keys."""
    try:
        content = tomllib.loads(read_bytes(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path given to --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    return checked(nested(content), f"{path}: ", "key")


FIELDS = {field.name: dict if field.name == "objective" else type(field.default) for field in dataclasses.fields(DistillConfig)}
"""Type of each field of DistillConfig; the objective is a table of its settings."""


RATES = "write lr_fake and lr_generator, which --lr sets"
SHORTCUTS = {
    "guidance_strategy": "write kappa1 to kappa4 in the table [objective], which --guidance-strategy sets",
    "lr": RATES,
    "learning_rate": RATES,
    "images": "write steps, which --images sets",
    "memory": "write micro_batch and the other settings that --memory sets, or give --memory",
}
SHORTCUTS |= {
    name: f"give --{name.replace('_', '-')}, which is an option of the command only"
    for name in (
        *("output", "device", "processes", "resume", "tracker", "save_every", "save_minutes", "keep_checkpoints"),
        *("sample_every", "eval_every", "keep_best"),
    )
}
"""Options of `sid distill` that are no settings -> hint for a config file that has a key of this name."""
IN_TABLE = 'write the table [objective] with name = "{}"'


def checked(content: Mapping[str, Any], where: str, what: str) -> dict[str, Any]:
    """Return fields of DistillConfig with values of their types; numbers that convert exactly are accepted.

    Raises UsageError for unknown fields and other types. `where` and `what` are parts of the message.
    """
    values = dict(content)
    for name, value in content.items():
        if name not in FIELDS:
            if owners := [owner for owner, objective in objectives.OBJECTIVES.items() if name in objectives.names(objective)]:
                scales = "; sid has kappa1 to kappa4 instead" if name == "guidance" else ""
                raise UsageError(
                    f"{where}{name} is a setting of an objective", IN_TABLE.format(owners[0]) + f" and {name} below it{scales}"
                )
            if name in SHORTCUTS:
                raise UsageError(f"{where}unknown {what} {name!r}", SHORTCUTS[name])
            close = difflib.get_close_matches(name, FIELDS, 1)
            raise UsageError(f"{where}unknown {what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        kind = FIELDS[name]
        values[name] = value = plain(value, kind)
        if name == "objective" and type(value) is not dict:
            hint = "write [objective] with single brackets" if isinstance(value, list) else IN_TABLE.format(value)
            raise UsageError(f"{where}objective must be a table, not {value!r}", hint)
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{where}{name} must be {kind.__name__}, not {value!r}")
    return values


def nested(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with a table of the objective's settings. Older files have SiD's settings on the top level."""
    old = {name: content[name] for name in objectives.names(objectives.Sid) if name in content}
    rest = {name: value for name, value in content.items() if name not in old}
    if old and isinstance(table := rest.get("objective", {}), dict):
        rest["objective"] = old | table
    return rest


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of `dataclasses.asdict` on one level, for comparison; `objective` is the objective's name."""
    rest = nested(config)
    table = rest.pop("objective", None)
    if table is None:
        return rest
    own = dict(table) if isinstance(table, dict) else {"name": table}
    return {"objective": own.pop("name", "sid")} | rest | own


def differences(saved: dict[str, Any], given: DistillConfig, by_content: Collection[str] = ()) -> list[str]:
    """Return the fields, as `name: saved -> given`, whose difference prevents a run from being continued with the given settings.

    The fields in `by_content`, whose content is compared instead, are ignored, and so are the fields that select a part of it, and
    those that have no effect on the objective. A field that `saved` lacks has the value of `Settings.before`, else its default value,
    because an older version wrote the run; a field that only `saved` has is of a newer version.
    """
    now = flat(dataclasses.asdict(given))
    by_content = {*by_content, *(SELECTS[name] for name in by_content if name in SELECTS)}
    defaults = flat(dataclasses.asdict(DistillConfig(objective=type(given.objective)())))
    saved = defaults | dict(given.objective.before) | flat(saved)
    ignored = {*MAY_CHANGE, *by_content, *objectives.find(given.objective.name).unused}
    changed = [name for name in now if name not in ignored and saved[name] != now[name]]
    foreign = [name for name in saved if name not in now and saved["objective"] == now["objective"]]
    unknown = "a setting that this version of sid does not know"
    return [change(name, saved[name], now.get(name, unknown)) for name in changed + foreign]


def change(name: str, before: object, now: object) -> str:
    """Return the change of a field in words; an empty text is `none`."""
    before, now = ("none" if value == "" else value for value in (before, now))
    return f"{name}: {before} -> {now}"
