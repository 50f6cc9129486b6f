"""Distillation methods (objectives), one module each, and their lookup by name."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sidcli.errors import UsageError
from sidcli.numeric import plain
from sidcli.objectives.act import Act
from sidcli.objectives.base import Objective, Settings
from sidcli.objectives.boot import Boot
from sidcli.objectives.dmd import Dmd
from sidcli.objectives.dmd2 import Dmd2
from sidcli.objectives.lcm import Lcm
from sidcli.objectives.regression import Regression
from sidcli.objectives.scflow import Scflow
from sidcli.objectives.self_distillation import SelfDistillation
from sidcli.objectives.sid import Sid
from sidcli.objectives.sida import Sida
from sidcli.objectives.tlcm import Tlcm
from sidcli.objectives.tlcm2 import Tlcm2
from sidcli.objectives.vsd import Vsd

OBJECTIVES: dict[str, type[Objective]] = {
    "sid": Sid,
    "sida": Sida,
    "dmd": Dmd,
    "dmd2": Dmd2,
    "vsd": Vsd,
    "regression": Regression,
    "lcm": Lcm,
    "tlcm": Tlcm,
    "tlcm2": Tlcm2,
    "scflow": Scflow,
    "act": Act,
    "boot": Boot,
    "self-distillation": SelfDistillation,
}

REFERENCE_HINT = "--objective sid, vsd, or dmd2 without its GAN"
"""The objectives that distill a teacher that takes a reference image."""


def find(name: object) -> type[Objective]:
    """Return the objective class with this name. Raises UsageError for an unknown name."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UsageError(f"--objective must be one of {', '.join(OBJECTIVES)}, not {name!r}")
    return OBJECTIVES[name]


def check_reference(settings: Settings, teacher: str) -> None:
    """Raises UsageError if an objective does not distill a teacher that takes a reference image. `teacher` is its name."""
    if settings.needs_images or not find(settings.name).takes_references:
        raise UsageError(
            f"{teacher} takes a reference image, and objective {settings.name} does not distill such a teacher", REFERENCE_HINT
        )


def check_flow(settings: Settings, teacher: str) -> None:
    """Raises UsageError if an objective does not distill a teacher of flow matching. `teacher` is its name."""
    if find(settings.name).discrete:
        able = ", ".join(name for name, method in OBJECTIVES.items() if not method.discrete and method.makes == "student")
        raise UsageError(
            f"objective {settings.name} needs the discrete timesteps of a diffusion; {teacher} was trained by flow matching",
            f"one of --objective {able}",
        )


def names(objective: type[Objective]) -> list[str]:
    """Return the names of the objective's settings."""
    return [field.name for field in dataclasses.fields(objective.Settings) if field.name != "name"]


def types(objective: type[Objective]) -> dict[str, type]:
    return {name: type(value) for name, value in dataclasses.asdict(objective.Settings()).items()}


def help_of(owner: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields by field name, each on one line. Inherited fields come first."""
    classes = [one for one in reversed(owner.__mro__) if dataclasses.is_dataclass(one)]
    bodies = [ast.parse(inspect.cleandoc("\n" + inspect.getsource(one))).body[0].body for one in classes]  # type: ignore[attr-defined]
    found, name = {}, ""
    for statement in (statement for body in bodies for statement in body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found[name], name = " ".join(str(statement.value.value).split()), ""
    return found


def listed(objective: type[Objective]) -> list[str]:
    """Return the settings of an objective with defaults and help texts, one line each."""
    texts, defaults = help_of(objective.Settings), objective.Settings()
    texts |= {name: f"{texts[name]} With the emoji teacher: {value}." for name, value in objective.emoji_settings.items()}
    rows = [(f"{name}={getattr(defaults, name)}", texts[name]) for name in names(objective)]
    width = max(len(setting) for setting, _ in rows)
    return [f"{setting:<{width}}  {text}" for setting, text in rows]


KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}
"""Types of settings that not every text is a value of, in words."""


def parse(objective: type[Objective], texts: Sequence[str]) -> dict[str, Any]:
    """Return the settings in NAME=VALUE texts. Raises UsageError for a text without `=` or a value of another type."""
    kinds = types(objective)
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, not {text!r}")
        name = name.strip().replace("-", "_")
        kind = kinds.get(name, str)
        try:
            found[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UsageError(f"--set {name} takes {KINDS[kind]}, not {value!r}") from None
    return found


def settings(table: Mapping[str, Any]) -> Settings:
    """Return settings of the objective `name` (default: sid) with the other values of a table.

    Raises UsageError for an unknown objective, a setting that the objective does not have, or a value of another type.
    """
    name = table.get("name", "sid")
    objective = find(name)
    kinds = types(objective)
    values = dict(table)
    for setting, value in table.items():
        if setting not in kinds:
            raise UsageError(
                f"{setting!r} is not a setting of objective {name}{_elsewhere(setting, str(name))}", _instead(setting, objective)
            )
        values[setting] = plain(value, kinds[setting])
        if type(values[setting]) is not kinds[setting]:
            raise UsageError(f"{setting} must be {kinds[setting].__name__}, not {value!r}")
    return objective.Settings(**values)


def _elsewhere(setting: str, name: str) -> str:
    """Return the end of an error message: which objectives have the setting, and the closest name among the settings of `name`."""
    owners = [other for other, objective in OBJECTIVES.items() if setting in names(objective)]
    close = difflib.get_close_matches(setting, names(OBJECTIVES[name]), 1, 0.5)
    listed = " and ".join([", ".join(owners[:-1]), *owners[-1:]] if len(owners) > 1 else owners)
    owner = f", it is one of {listed}" if owners else ""
    return owner + (f"; did you mean {close[0]!r}?" if close else f"; {name} has {', '.join(names(OBJECTIVES[name]))}")


def _instead(setting: str, objective: type[Objective]) -> str:
    """Return a hint for a guidance setting of another objective, or ""."""
    scales = {other.Settings.scale for other in OBJECTIVES.values()}
    if not objective.Settings.scale or setting not in {"guidance_strategy", *scales}:
        return ""
    if issubclass(objective, Sid):
        options = "--guidance-strategy NAME" if setting == "guidance_strategy" else "--guidance SCALE"
        return f"{options}, which sets kappa1, kappa2, kappa3 and kappa4 of {objective.Settings.name}, or write these"
    return f"--guidance SCALE, or write {objective.Settings.scale}"
