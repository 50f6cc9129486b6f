"""What a command was asked to do: frozen dataclasses, their validation, presets, and TOML in and out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidcli.errors import InputError, UsageError

Device = str
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides what `sid distill` computes. Two runs with equal fields give equal students."""

    teacher: str = "emoji-teacher"
    """Embedded name, diffusers folder, run folder or hub id."""
    prompts: str = "auto"
    """Path of a prompt list, or `emoji` or `general` for those that ship; `auto` picks by teacher."""
    kappa1: float = 2.0
    """Guidance scale of the fake score in its own loss."""
    kappa2: float = 2.0
    """Guidance scale of the fake score in the difference y_real - y_fake of the generator loss."""
    kappa3: float = 2.0
    """Guidance scale of the fake score in the second factor of the generator loss."""
    kappa4: float = 2.0
    """Guidance scale of the teacher in the generator loss."""
    alpha: float = 1.0
    """Weight of the squared score difference in the generator loss."""
    t_init: int = 625
    """Timestep at which the one-step generator works."""
    t_min: int = 20
    """Smallest timestep at which scores are compared."""
    t_max: int = 980
    """First timestep above those at which scores are compared; never drawn itself."""
    steps: int = 10000
    """Training steps; each one updates the fake score and then the generator."""
    batch_size: int = 512
    """Images per update, over all micro-batches."""
    micro_batch: int = 8
    """Images computed at once; changes memory and speed, not the result."""
    lr_fake: float = 1e-6
    """Adam learning rate of the fake score."""
    lr_generator: float = 1e-6
    """Adam learning rate of the generator."""
    adam_eps: float = 1e-8
    """Adam epsilon of both optimizers."""
    ema_images: float = 50_000.0
    """Half-life of the generator's weight average, in images; 0 turns the average off."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the images seen so far."""
    dropout: float = 0.1
    """Share of captions emptied in the fake score's step, when it uses guidance."""
    seed: int = 0
    """Seed of prompts order, noise and timesteps."""
    precision: Precision = "auto"
    """bf16: autocast over float32 weights; fp32: nothing below float32; auto: bf16 on a GPU that has it."""

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 1, "at least 1"),
            "batch-size": (self.batch_size >= 1, "at least 1"),
            "micro-batch": (self.micro_batch >= 1, "at least 1"),
            "t-min": (0 <= self.t_min < self.t_max, "at least 0 and below t-max"),
            "t-init": (self.t_init >= 1, "at least 1"),
            "lr-fake": (0 < self.lr_fake < math.inf, "positive"),
            "lr-generator": (0 < self.lr_generator < math.inf, "positive"),
            "adam-eps": (0 < self.adam_eps < math.inf, "positive"),
            "ema-images": (0 <= self.ema_images < math.inf, "at least 0"),
            "ema-rampup": (0 < self.ema_rampup < math.inf, "positive"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            "alpha": (math.isfinite(self.alpha), "finite"),
            "precision": (self.precision in ("auto", "fp32", "bf16"), "one of auto, fp32, bf16"),
        }
        rules |= {f"kappa{n}": (math.isfinite(getattr(self, f"kappa{n}")), "finite") for n in (1, 2, 3, 4)}
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"--{name} must be {wanted}, not {getattr(self, name.replace('-', '_'))}")


MAY_CHANGE = frozenset({"steps", "micro_batch"})
"""Fields that a continued run may change: they do not alter what the steps already taken computed."""

PRESETS: dict[str, dict[str, Any]] = {
    # One 24 GB card and the paper's recipe (method 1.7).
    "sd15": {},
    # Two CPU cores and a few minutes, chosen by measurement on the emoji teacher (README).
    "emoji": {
        "kappa1": 2.0,
        "kappa2": 2.0,
        "kappa3": 2.0,
        "kappa4": 2.0,
        "steps": 300,
        "batch_size": 16,
        "micro_batch": 16,
        "lr_fake": 1e-4,
        "lr_generator": 1e-4,
        "ema_images": 500.0,
    },
}
"""What `sid distill` starts from; options and `--config` override single fields."""


def preset_for(teacher: str) -> str:
    """`emoji` for the embedded teacher and folders made from it, else `sd15`. Reads no weights."""
    if teacher == "emoji-teacher":
        return "emoji"
    card = Path(teacher) / "sid.json"
    try:
        return "emoji" if json.loads(card.read_text(encoding="utf-8")).get("world") == "emoji" else "sd15"
    except (OSError, ValueError, AttributeError):
        return "sd15"


def read_toml(path: Path) -> dict[str, Any]:
    """The fields of a config.toml. Raises InputError for a file that is not there or not TOML, UsageError for unknown keys."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path given to --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(DistillConfig)}
    for name, value in content.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            raise UsageError(f"{path}: unknown key {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        kind = type(fields[name].default)
        if kind is float and type(value) is int:
            content[name] = float(value)
        elif type(value) is not kind:
            raise UsageError(f"{path}: {name} must be {kind.__name__}, not {value!r}")
    return content


def differences(saved: dict[str, Any], given: DistillConfig) -> list[str]:
    """The fields, as `name: saved -> given`, that forbid continuing a run with the given settings."""
    now = dataclasses.asdict(given)
    return [f"{name}: {saved.get(name)} -> {now[name]}" for name in now if name not in MAY_CHANGE and saved.get(name) != now[name]]
