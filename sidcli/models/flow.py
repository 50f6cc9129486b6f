"""What the kinds that were trained by flow matching share: their scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sidcli.errors import InputError, SidError
from sidcli.files import read_json
from sidcli.models.card import MAX_SHIFT
from sidcli.models.compatibility import MAX_TIMESTEPS, OTHER_COPY, is_number, positive_integer, value_text
from sidcli.models.sources import find

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
HINT = "use a model with FlowMatchEulerDiscreteScheduler"
SIGMAS = "only the shift of the timesteps is supported"
ACCEPTED = frozenset(
    {
        *("num_train_timesteps", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        "time_shift_type",
    }
)
"""Entries of the scheduler's configuration that are accepted with any value; see `compatibility.Rules`."""
VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    **{entry: ((False, None), SIGMAS) for entry in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling")},
    **{entry: ((False, None), SIGMAS) for entry in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")},
    "shift_terminal": ((None,), SIGMAS),
}
"""Supported values of other entries."""


def is_flow(teacher: str) -> bool:
    """Return whether a teacher, by its name, was trained by flow matching, as the scheduler in its folder says. Reads no weights.

    The description of a teacher on the hub is fetched. Returns False if there is no scheduler that can be read: whoever reads the
    teacher says so.
    """
    with suppress(SidError):
        scheduler = read_json(find(teacher, descriptions_only=True).part("scheduler") / "scheduler_config.json")
        return scheduler.get("_class_name") in SCHEDULERS or scheduler.get("prediction_type") == "flow_prediction"
    return False


def check_schedule(place: str, scheduler: Mapping[str, Any], entry: str = "shift") -> None:
    """Raises InputError, naming the file `place`, if the number of timesteps or their shift, the value of `entry`, is invalid."""
    steps = positive_integer({"num_train_timesteps": 1000, **scheduler}, "num_train_timesteps", place)
    if steps > MAX_TIMESTEPS:
        raise InputError(f"{place}: num_train_timesteps is {steps}, more than {MAX_TIMESTEPS}", OTHER_COPY)
    shift = scheduler.get(entry, 1.0)
    if not (is_number(shift) and 0 < shift <= MAX_SHIFT):
        raise InputError(f"{place}: {entry} is {value_text(shift)}; it must be above 0 and at most {MAX_SHIFT}", OTHER_COPY)


def check_prediction(scheduler: Mapping[str, Any], models: str) -> None:
    """Raises InputError if the user gives the models another prediction type than the velocity."""
    if scheduler.get("prediction_type", "flow") != "flow":
        raise InputError(
            f"prediction type {scheduler['prediction_type']!r} is not supported: {models} predicts the velocity of its flow",
            "leave --prediction-type out",
        )
