"""`--init`: the weights that a student starts from, in place of those of the teacher.

NAME      a student, a run folder, or another model of the teacher's architecture
FILE      a LoRA on the teacher, under the names of diffusers or kohya, or the folder of an exported LoRA
A - B     the teacher's weights plus the difference of two models, for example of a student and its own teacher
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidcli.errors import InputError, UsageError, first_line
from sidcli.files import sha256
from sidcli.formats import lora
from sidcli.formats.card import license_files, license_of, provenance
from sidcli.models.drawing import student_plan
from sidcli.models.loading import Description, Model, describe, load
from sidcli.models.sources import find, fingerprint
from sidcli.objectives.base import Objective
from sidcli.progress import Listener

LORA_FILE = "pytorch_lora_weights.safetensors"
HINT = "--init takes a student, a run folder, a LoRA file, or A - B; all of the teacher's architecture"


@dataclass
class Initial:
    """Weights of the denoiser by name, a digest of the files that they are from, and the name, origin and license of each model.

    `licenses` are the LICENSE files of the models, each with the name of its model.
    """

    weights: Mapping[str, Tensor]
    digest: str
    sources: tuple[dict[str, Any], ...]
    licenses: tuple[tuple[str, Path], ...] = ()

    def take(self) -> Mapping[str, Tensor]:
        """Return the weights, which this object then no longer holds: a training must not keep them in memory."""
        weights, self.weights = self.weights, {}
        return weights


def lora_file(name: str) -> Path | None:
    """Return the file of a LoRA, or None if the name is that of something else. Raises InputError for a damaged file."""
    path = Path(os.path.expanduser(name))
    path = path / LORA_FILE if os.path.isdir(path) else path
    if path.suffix.lower() != ".safetensors" or not os.path.isfile(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            return path if any(".lora" in key or "lora_" in key for key in file.keys()) else None  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {first_line(error)}", "download it again") from error


def names(init: str) -> list[str]:
    """Return the names of the models in `init`: two for a difference, which has a minus sign between spaces, else one."""
    first, minus, second = init.partition(" - ")
    found = [init] if not minus or os.path.exists(os.path.expanduser(init)) else [first.strip(), second.strip()]
    if "" in found:
        raise UsageError(f"--init {init!r} lacks the name of a model", HINT)
    return found


def check(init: str, teacher: Description, listener: Listener) -> list[Description | None]:
    """Return the descriptions of the models; None for a LoRA. Reads no weights.

    Raises InputError if a model is not found or is of another architecture than the teacher.
    """
    found: list[Description | None] = []
    for name in names(init):
        if lora_file(name):
            if "lora" not in teacher.kind.formats:
                raise InputError(f"--init {name} is a LoRA, which is not read for {teacher.kind.models}", HINT)
            found.append(None)
            continue
        known = describe(find(name, listener, descriptions_only=True), None, listener)
        if known.kind is not teacher.kind:
            raise InputError(f"--init {name} is {known.kind.models}, and the teacher is {teacher.kind.models}", HINT)
        ours, theirs = teacher.denoiser_config, known.denoiser_config
        other = next((entry for entry in teacher.kind.architecture if ours.get(entry) != theirs.get(entry)), None)
        if other:
            raise InputError(
                f"--init {name}: its {known.kind.title} is not that of the teacher: {other} is {theirs.get(other)}, not {ours.get(other)}",
                HINT,
            )
        if known.path.prediction != teacher.path.prediction:
            raise InputError(
                f"--init {name} predicts {known.path.prediction}, and the teacher predicts {teacher.path.prediction}", HINT
            )
        found.append(known)
    return found


def remarks(init: str, first: Description | None, objective: Objective, sampling: Mapping[str, Any]) -> list[str]:
    """Return one sentence if the student that a run starts from draws at other timesteps than that of the run, and one if the
    objective continues from students of another objective. `first` is the first model of `init`, None for a LoRA; `sampling` are the
    entries of the card of the run's student.
    """
    if first is None:
        return []
    said, name = [], names(init)[0]
    if first.is_student and (own := student_plan(first.card).describe()) != (new := student_plan(sampling).describe()):
        said.append(
            f"note: --init {name} draws in {own}, and the student of this run in {new}; --student-steps and --t-init set the latter"
        )
    trained = first.card.get("config", {}).get("objective", {}).get("name") if first.is_student else "none"
    if objective.continues and trained not in (None, objective.continues, objective.settings.name):
        kind = f"a student of {trained}" if first.is_student else "no student"
        said.append(
            f"note: objective {objective.settings.name} continues from a student of {objective.continues}, and --init {name} is {kind}"
        )
    return said


def open_initial(init: str, teacher: Model, listener: Listener) -> Initial:
    """Return the weights that `init` describes.

    Raises InputError if a model is not found, or if its weights do not fit the teacher's denoiser.
    """
    listener.note(f"the student starts from {init}")
    found = [_weights(name, teacher, listener) for name in names(init)]
    own = teacher.denoiser.state_dict()
    for name, one in zip(names(init), found, strict=True):
        wrong = next((key for key, value in own.items() if one.weights.get(key, value[..., :0]).shape != value.shape), None)
        if wrong:
            raise InputError(f"--init {name}: {wrong} does not fit the teacher's {teacher.kind.title}", HINT)
    if len(found) == 1:
        return found[0]
    (first, second), digest = found, hashlib.sha256(" ".join(one.digest for one in found).encode()).hexdigest()
    weights = {key: value + (first.weights[key] - second.weights[key]) for key, value in own.items()}
    return Initial(weights, digest, first.sources + second.sources, first.licenses + second.licenses)


def _weights(name: str, teacher: Model, listener: Listener) -> Initial:
    if file := lora_file(name):
        origin = {"name": name, "origin": str(file)} | license_of(file.parent)
        return Initial(lora.applied(teacher, file, listener), sha256(file), (origin,), _licenses(name, file.parent))
    source = find(name, listener)
    model = load(source, None, listener)
    sources = provenance(model), *model.card.get("init", ())
    return Initial(model.denoiser.state_dict(), fingerprint(source), sources, _licenses(name, source.folder))


def _licenses(name: str, folder: Path) -> tuple[tuple[str, Path], ...]:
    return tuple((name, file) for file in license_files(folder))
