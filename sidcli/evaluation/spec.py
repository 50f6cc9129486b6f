"""The request of `sid eval`, as parsed from the command line before heavy libraries are imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidcli.errors import UsageError
from sidcli.metrics.catalog import METRICS, metric_named
from sidcli.models.overrides import check_sampling

PROTOCOLS = ("auto", "emoji", "emoji-subjects", "subjects", "coco2014-30k", "custom")
JUDGES = ("http",)


@dataclass(frozen=True)
class ModelSpec:
    """A model or a set of images to measure, as named on the command line, and its sampling settings.

    `stated` are the settings that were given with the name, "steps" or "guidance"; others are the settings of all teachers.
    """

    name: str
    steps: int | None = None
    guidance: float | None = None
    untrained: int = 0
    stated: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether the name states a setting."""
        return bool(self.stated)

    @classmethod
    def parse(cls, text: str, steps: int | None, guidance: float | None) -> ModelSpec:
        """Parse `NAME[,steps=N][,guidance=G]`. Raises UsageError for another setting or an invalid value."""
        name, *settings = text.split(",")
        if Path(text).exists():  # a path may contain commas
            name, settings = text, []
        spec = cls(name, steps, guidance)
        kinds: dict[str, Callable[[str], Any]] = {"steps": int, "guidance": float}
        for setting in settings:
            key, _, value = setting.partition("=")
            try:
                spec = replace(spec, stated=(*spec.stated, key.strip()), **{key.strip(): kinds[key.strip()](value)})
            except (KeyError, ValueError) as error:
                raise UsageError(
                    f"{text!r}: {setting!r} is neither steps=N nor guidance=G", "such as emoji-teacher,steps=10"
                ) from error
        check_sampling(spec.steps, spec.guidance)
        return spec

    @classmethod
    def parse_all(cls, models: Sequence[str | ModelSpec], steps: int | None, guidance: float | None) -> list[ModelSpec]:
        """Parse several names. Raises UsageError if all of them state a setting that is also given for all teachers."""
        specs = [cls.parse(one, steps, guidance) if isinstance(one, str) else one for one in models]
        for name, value in (("steps", steps), ("guidance", guidance)):
            if value is not None and specs and all(name in spec.stated for spec in specs):
                raise UsageError(f"--{name} {value:g} has no effect: every model states its own {name}", f"leave --{name} out")
        return specs


@dataclass(frozen=True)
class Bound:
    """A bound of a gate: the metric must not be above the value (if `is_above`) or not below it."""

    metric: str
    is_above: bool
    value: float


@dataclass(frozen=True)
class Rules:
    """The name of the protocol and its options: reference images, captions (and their column), number of images per model, seed."""

    name: str
    reference: Path | None
    prompts: Path | None
    column: str
    num: int | None
    seed: int
    untrained: int
    """Number of steps with which each teacher is also measured as an untrained student; 0 to leave this out."""


@dataclass(frozen=True)
class Files:
    """The locations of the metric networks; None for the default location."""

    inception: Path | None
    clip: str | None
    cmmd: str | None
    dino: str | None


@dataclass(frozen=True)
class JudgeSpec:
    """The endpoint of a vision language model that scores images: its URL and the name of the model there."""

    url: str
    model: str

    @classmethod
    def of(cls, judge: str | None, url: str | None, model: str | None) -> JudgeSpec | None:
        """Return the judge of the options, None without one. Raises UsageError if an option is missing, unknown or has no effect."""
        if judge is None:
            for option, value in (("--judge-url", url), ("--judge-model", model)):
                if value is not None:
                    raise UsageError(f"{option} {value} has no effect without a judge", "--judge http")
            return None
        if judge not in JUDGES:
            raise UsageError(f"--judge must be {', '.join(JUDGES)}, not {judge!r}")
        if not url or not model:
            raise UsageError(f"--judge {judge} needs an endpoint", "--judge-url http://localhost:8000/v1 --judge-model NAME")
        return cls(url, model)


@dataclass(frozen=True)
class Request:
    """All options of an evaluation, as given on the command line."""

    models: Sequence[ModelSpec]
    metrics: Sequence[str]
    everything: bool
    bounds: Sequence[Bound]
    protocol: Rules
    networks: Files
    batch_size: int
    image_folder: Path | None
    judge: JudgeSpec | None = None
    precision: str = "fp32"
    """Precision in which models draw; exported graphs have their own."""


def limits(above: Sequence[str], below: Sequence[str]) -> list[Bound]:
    """Parse the `METRIC=VALUE` options of a gate. Raises UsageError if an option is malformed or its value is impossible."""
    found = []
    for texts, is_above in ((above, True), (below, False)):
        option = "--fail-above" if is_above else "--fail-below"
        for text in texts:
            given, _, value = text.partition("=")
            name = metric_named(given)
            if name is None:
                raise UsageError(f"{option} must be METRIC=VALUE, not {text!r}", f"METRIC is one of {', '.join(METRICS)}")
            try:
                bound = float(value)
            except ValueError:
                bound = math.nan
            if not math.isfinite(bound):
                raise UsageError(f"{option} must be METRIC=VALUE with a number, not {text!r}", f"for example {name}=0.5")
            metric = METRICS[name]
            if not metric.low <= bound <= metric.high:
                possible = f"at least {metric.low}" if metric.high == math.inf else f"between {metric.low} and {metric.high}"
                fraction = f"{name}={bound / 100:g}" if metric.high == 1 and 1 < bound <= 100 else ""
                raise UsageError(f"{option} {text}: {metric.label} is {possible}", fraction)
            found.append(Bound(name, is_above, bound))
    return found


def check_protocol(name: str) -> None:
    """Raises UsageError if no protocol has this name."""
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol must be one of {', '.join(PROTOCOLS)}, not {name!r}")
