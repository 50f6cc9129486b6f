"""Read and check the card of a model: the content of sid.json in its folder, or of `sid.card` in the header of a single file.

A model that sid did not write has no card.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sidcli.errors import InputError
from sidcli.files import json_object, read_json
from sidcli.models.compatibility import MAX_TIMESTEPS, OTHER_COPY, value_text

RENOISE = ("ddim", "fixed", "fresh")
"""Kinds of noise between the steps of a student."""
SAMPLERS = ("lcm",)
"""Samplers of students that have one of their own: multistep consistency sampling, as LCMScheduler of diffusers computes it."""
KINDS = ("student", "teacher")
GRAPHS = ("onnx", "openvino", "torch-export")
MAX_SHIFT = 100
"""Maximum shift of the timesteps of flow matching. That of published models is 3."""
MAX_SIDE = 1 << 16
"""Maximum side of an image in pixels, and maximum number of tokens. A larger value is an error."""

Rule = tuple[Callable[[Any], bool], str]
"""(Whether a value is allowed, description of the allowed values)."""


def _one_of(values: tuple[str, ...]) -> Rule:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _whole(least: int, most: int) -> Rule:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"


def _wholes(counts: tuple[int, ...], what: str) -> Rule:
    allowed, _ = _whole(1, MAX_SIDE)
    return lambda value: isinstance(value, list) and len(value) in counts and all(map(allowed, value)), what


NUMBER: Rule = (lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max, "a finite number")
TEXT: Rule = (lambda value: isinstance(value, str), "a text")
OBJECT: Rule = (lambda value: isinstance(value, dict), "a JSON object")
TEXTS: Rule = (lambda value: isinstance(value, dict) and all(map(TEXT[0], value.values())), "a JSON object of texts")
SOURCES: Rule = (
    lambda value: isinstance(value, list) and all(TEXTS[0](one) and "name" in one for one in value),
    "a list of JSON objects of texts, each with a name",
)

CARD: dict[str, Rule] = {
    "kind": _one_of(KINDS),
    "t_init": _whole(1, MAX_TIMESTEPS),
    "student_steps": _whole(1, MAX_TIMESTEPS - 1),
    "renoise": _one_of(RENOISE),
    "sampler": _one_of(SAMPLERS),
    "solver_steps": _whole(1, MAX_TIMESTEPS),
    "guidance": NUMBER,
    "shift": (lambda value: NUMBER[0](value) and 0 < value <= MAX_SHIFT, f"a number above 0 and at most {MAX_SHIFT}"),
    "teacher": TEXTS,
    "references": TEXTS,
    "init": SOURCES,
    "config": OBJECT,
    "graph": OBJECT,
    "call": OBJECT,
}
"""Entry of a card -> its rule. Other entries are only shown to the user."""
GRAPH: dict[str, Rule] = {
    "format": _one_of(GRAPHS),
    "latent_shape": _wholes((3,), "a list of three positive whole numbers: channels, height and width"),
    "size": _wholes((2,), "a list of two positive whole numbers: height and width in pixels"),
    "multiple": _whole(0, MAX_SIDE),
    "tokens": _wholes((1, 2), "a list of one or two positive whole numbers, one per text encoder"),
}
"""Entry of `graph` -> its rule. All of them are required."""
CONFIG: dict[str, Rule] = {
    "prediction_type": TEXT,
    "model_config": TEXT,
    "width": _whole(0, MAX_SIDE),
    "height": _whole(0, MAX_SIDE),
    "objective": OBJECT,
}
OBJECTIVE: dict[str, Rule] = {"name": TEXT} | {f"kappa{index}": NUMBER for index in (1, 2, 3, 4)}


def read_file(file: Path) -> dict[str, Any]:
    """Return the card in a JSON file. Raises InputError if it cannot be read or has an invalid value."""
    return _checked(read_json(file), str(file))


def in_header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the card in the header of a single file, or {} if there is none. Raises InputError if the card is damaged or invalid."""
    if "sid.card" not in metadata:
        return {}
    return _checked(json_object(metadata["sid.card"], place_of(file), OTHER_COPY), place_of(file))


def place_of(path: Path) -> str:
    """Return the place of a card, for messages; `path` is the folder or the single file of a model."""
    return str(path / "sid.json") if path.is_dir() else f"sid.card in the header of {path}"


def check_start(card: Mapping[str, Any], place: str, starts: tuple[int, int], sampling: Mapping[str, Any]) -> None:
    """Raises InputError if a student starts at another timestep than those from starts[0] to starts[1] that its model has, or if its
    card lacks the entries `sampling` of the path of the model, or contradicts them."""
    if card.get("kind") != "student":
        return
    if card["t_init"] > starts[1]:
        raise InputError(
            f"{place}: t_init is {card['t_init']}; it must be below {starts[1] + 1}, the timesteps of the model's schedule",
            OTHER_COPY,
        )
    if card["t_init"] < starts[0]:
        raise InputError(f"{place}: t_init is {card['t_init']}; students of this model start at {starts[0]}", OTHER_COPY)
    for entry, wanted in {"shift": None, **sampling}.items():
        if card.get(entry) != wanted:
            raise InputError(
                f"{place}: {entry} is {value_text(card.get(entry))}; the scheduler of the model has {value_text(wanted)}",
                OTHER_COPY,
            )


def check_agrees(card: Mapping[str, Any], place: str, start: int) -> None:
    """Raises InputError if a card contradicts the scheduler of the model, which is that of a student that starts at timestep `start`."""
    if card.get("kind") == "teacher":
        said, right = "kind is 'teacher'", f'for a one-step student, write {{"kind": "student", "t_init": {start}}}'
    elif card.get("kind") == "student" and card["t_init"] != start:
        said, right = f"t_init is {card['t_init']}", f"write t_init {start}, or take another copy of the model"
    else:
        return
    raise InputError(f"{place}: {said}, but the scheduler of the model is that of a student that starts at timestep {start}", right)


def _checked(card: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a card. Raises InputError, naming the first missing or invalid entry."""
    is_student = card.get("kind") == "student"
    _check(card, CARD, place, ("kind", "t_init") if is_student else ("kind",))
    if is_student and card.get("student_steps", 1) > card["t_init"]:
        raise InputError(
            f"{place}: student_steps is {card['student_steps']}; it must be at most t_init, {card['t_init']}", OTHER_COPY
        )
    if is_student and "sampler" in card:
        _check_sampler(card, place)
    if "graph" in card:
        graph = card["graph"]
        _check(graph, GRAPH, place, tuple(GRAPH), "graph.")
        if any(side % latent for side, latent in zip(graph["size"], graph["latent_shape"][1:], strict=True)):
            raise InputError(
                f"{place}: graph.size is {graph['size']}; it must be a multiple of the height and width of graph.latent_shape,"
                f" {graph['latent_shape']}",
                OTHER_COPY,
            )
    config = card.get("config", {})
    _check(config, CONFIG | OBJECTIVE, place, prefix="config.")  # older versions wrote the objective's settings to `config`
    _check(config.get("objective", {}), OBJECTIVE, place, prefix="config.objective.")
    return card


def _check_sampler(card: Mapping[str, Any], place: str) -> None:
    """Raises InputError if the steps of consistency sampling do not fit the timesteps."""
    _check(card, CARD, place, ("solver_steps",))
    most, timesteps = card["solver_steps"], card["t_init"] + 1
    if timesteps % most:
        raise InputError(f"{place}: solver_steps is {most}; it must divide t_init + 1, {timesteps}", OTHER_COPY)
    if card.get("student_steps", 1) > most:
        raise InputError(f"{place}: student_steps is {card['student_steps']}; it must be at most solver_steps, {most}", OTHER_COPY)


def _check(
    values: Mapping[str, Any], rules: Mapping[str, Rule], place: str, required: tuple[str, ...] = (), prefix: str = ""
) -> None:
    for key, (allowed, what) in rules.items():
        if key in values and not allowed(values[key]):
            raise InputError(f"{place}: {prefix}{key} is {value_text(values[key])}; it must be {what}", OTHER_COPY)
        if key in required and key not in values:
            raise InputError(f"{place}: {prefix}{key} is missing; it must be {what}", OTHER_COPY)
