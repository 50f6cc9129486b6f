"""Curation of pairs for Diffusion Self-Distillation (arXiv 2411.18616): judges of pairs, gates, and their agreement with the truth.

Importing this package imports no large library. `open_judge` imports the module of the judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sidcli.errors import UsageError
from sidcli.objectives import self_distillation

if TYPE_CHECKING:
    import torch

    from sidcli.curation.judge import Judge
    from sidcli.models.loading import Known, Model

JUDGES = {name: options for name, options in self_distillation.JUDGES.items() if name != "none"}
"""Judge -> its options; see the class in its module."""
NEEDED = {"vlm": ("model",), "http": ("url", "model")}


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown judge or option, or a missing option. Reads no file."""
    if name not in JUDGES:
        raise UsageError(f"no judge {name!r}", f"choose one of {', '.join(JUDGES)}")
    if unknown := sorted(set(given) - set(JUDGES[name])):
        raise UsageError(
            f"the judge {name} has no option {', '.join(unknown)}", f"its options: {', '.join(JUDGES[name]) or 'none'}"
        )
    if missing := [option for option in NEEDED.get(name, ()) if given.get(option) is None]:
        raise UsageError(f"the judge {name} needs {' and '.join(missing)}", " ".join(f"--set judge_{one}=..." for one in missing))


def open_judge(name: str, teacher: Model | None, device: torch.device, **options: Any) -> Judge:
    """Return the judge of a name. Options that are None are left out.

    `teacher` is the diffusion model that drew the panels; `features` and `dino` score with it, and `clip` uses the open_clip model of
    the emoji world if it draws that. Raises UsageError for an unknown judge or option, a missing option or a missing teacher, and
    InputError if the model of a judge cannot be read.
    """
    given = {option: value for option, value in options.items() if value is not None}
    check_options(name, given)
    match name:
        case "features":
            from sidcli.curation.features import FeaturesJudge

            return FeaturesJudge(_present(teacher, name), device, **given)
        case "clip":
            from sidcli.curation.clip import ClipJudge, usual_model

            return ClipJudge(given.get("model", usual_model(teacher)), device)
        case "dino":
            from sidcli.curation.dino import DinoJudge
            from sidcli.metrics.features import DINO

            return DinoJudge(**{"model": DINO, **given}, teacher=_present(teacher, name), device=device)
        case "vlm":
            from sidcli.curation.vlm import VlmJudge

            return VlmJudge(given["model"], device)
        case "http":
            from sidcli.curation.endpoint import HttpJudge

            return HttpJudge(**given)
        case _:
            from sidcli.curation.oracle import OracleJudge
            from sidcli.metrics.reader import load_reader

            return OracleJudge(load_reader(), device)


def check_model(name: str, teacher: Known, **options: Any) -> None:
    """Check that the model of a judge is there; its weights are not loaded. Arguments are those of `open_judge`.

    Raises the InputError that `open_judge`, or the judge at its first pair, would raise for a missing model.
    """
    import torch

    given, device = {option: value for option, value in options.items() if value is not None}, torch.device("cpu")
    match name:
        case "clip":
            from sidcli.curation.clip import HINT, usual_model
            from sidcli.metrics.clip import Clip

            Clip(given.get("model", usual_model(teacher)), device, HINT)
        case "dino":
            from sidcli.curation.dino import dino_of
            from sidcli.metrics.features import DINO

            dino_of(given.get("model", DINO), device).check()
        case "vlm":
            from sidcli.curation.vlm import folder_of

            folder_of(given["model"])


def _present(teacher: Model | None, name: str) -> Model:
    """Return the teacher. Raises UsageError if there is none."""
    if teacher is None:
        raise UsageError(f"the judge {name} scores with a teacher", "name the teacher, or choose another judge")
    return teacher
