"""`sid export`: write a student in the format of another program. An export is verified before its folder is created: the other
program draws one image, which is compared with the image that sid draws."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sidcli import __version__
from sidcli.errors import GateError, InputError, UsageError
from sidcli.files import atomic_folder, check_space, sha256
from sidcli.formats import lora, single_file_folder
from sidcli.formats.card import has_stock_sampler, provenance, terms_of
from sidcli.formats.graph import example_references
from sidcli.formats.order import DEFAULT_RANK, FORMATS, Order
from sidcli.models import official_pkl
from sidcli.models.drawing import is_consistency
from sidcli.models.kind import Kind
from sidcli.models.loading import Description, Model, describe_model, open_model
from sidcli.models.overrides import STOCK_STEP, Overrides
from sidcli.models.sampler import T_INIT, Sampler, plan_for
from sidcli.progress import Listener, Progress

Known = TypeVar("Known", Model, Description)

PROMPT = "a cat on a blue background"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
TOLERANCE = {"fp32": 2, "fp16": 16, "bf16": 64}
"""Largest allowed difference between the images of the export and of sid, in 1/255. In fp32, diffusers differs by at most 1."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    files: dict[str, dict[str, object]]
    difference: int | None
    """Largest pixel difference between the images of the export and of `sid sample`, in 1/255; None if it was not verified."""
    loss: int | None
    """Largest pixel difference between the images of a LoRA and of the student, in 1/255: the error of the low-rank approximation.
    None for other formats."""


def check(known: Description, teacher: Description | None, format_name: str, order: Order, output: Path) -> None:
    """Check, before any weights are read, whether a student can be exported in this format.

    `teacher` is the teacher of a LoRA. Raises InputError if the model is not a student or cannot be exported in this format, and
    EnvironmentProblem if the disk is too small.
    """
    name, nets = known.source.name, networks(known)
    if not known.is_student:
        raise InputError(
            f"{name} is not a student",
            f"distill it first: sid distill --teacher {shlex.quote(name)}; sid sample --model draws with it as it is",
        )
    if format_name not in known.kind.formats:
        reason = known.kind.missing_formats.get(format_name, "")
        raise InputError(
            f"{name} is {known.kind.models}, which --format {format_name} does not support{reason and ': '}{reason}",
            f"use --format {' or '.join(known.kind.formats)}",
        )
    if known.layout and FORMATS[format_name].in_diffusers:
        able = " or ".join(other for other, form in FORMATS.items() if not form.in_diffusers)
        raise InputError(f"{name} takes a reference image, which --format {format_name} does not support", f"use --format {able}")
    if problem := known.kind.stock_problem(known.texts):
        raise InputError(f"{name} is not exported: {problem}", "draw with `sid sample`")
    if not has_stock_sampler(known.card):
        raise InputError(
            f"{name} adds {known.card['renoise']} noise between its steps, which no other program does",
            "draw with `sid sample`, or distill with --renoise ddim",
        )
    if is_consistency(known.card) and not FORMATS[format_name].has_scheduler:
        able = " or ".join(other for other, form in FORMATS.items() if form.has_scheduler)
        raise InputError(
            f"{name} draws by multistep consistency sampling, which --format {format_name} does not include",
            f"use --format {able}, or draw with `sid sample`",
        )
    if FORMATS[format_name].in_diffusers and any(side % STOCK_STEP for side in known.size):
        raise InputError(
            f"{name} draws {known.size[1]}x{known.size[0]} pixels; pipelines of diffusers draw multiples of {STOCK_STEP} only",
            "use --format onnx",
        )
    if format_name == "single-file":
        single_file_folder.check(known, nets[known.kind.component])
    if teacher is not None:
        check_is_teacher(teacher)
        lora.check_teacher(nets[known.kind.component], networks(teacher)[teacher.kind.component])
    check_space(output, space(known.kind, nets, format_name, order), "the export needs")


def check_is_teacher(known: Description) -> None:
    """Raises InputError if the model given as the teacher is a student."""
    if known.is_student:
        raise InputError(f"--teacher {known.source.name} is a student", "--teacher NAME, the model that it was distilled from")


def networks(known: Description) -> dict[str, Any]:
    """Return a described model's networks on the meta device, where they take no memory.

    Raises InputError if a config does not describe a network.
    """
    try:
        with torch.device("meta"):
            return {name: known.kind.build(name, config) for name, config in known.networks.items()}
    except Exception as error:  # an invalid config can make the libraries raise any exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the description of {known.source.name} does not describe a network: {reason}", "take another copy of the model"
        ) from error


def space(kind: Kind, nets: Mapping[str, Any], format_name: str, order: Order) -> int:
    """Return the disk space in bytes that the weights of an export take while it is written, at most."""
    width, denoiser = BYTES[order.dtype], kind.component
    if format_name == "lora":
        return width * lora.size(kind, nets[denoiser], order.rank)
    sizes = {name: sum(value.numel() for value in net.parameters()) for name, net in nets.items()}
    if format_name == "single-file" and not kind.is_ldm:
        return width * sum(value.numel() for value in nets[denoiser].state_dict().values())
    drawing = sizes[denoiser] + sizes["vae"]
    texts = sum(sizes.values()) - drawing
    if FORMATS[format_name].in_diffusers:
        return width * (drawing + texts)
    # The text encoders of graphs stay in float32. OpenVINO files are written while their source, the ONNX graph, still exists.
    return 4 * texts + width * drawing * (2 if format_name == "openvino" else 1)


@dataclass(frozen=True)
class Request:
    """The model to export and the format to write. `known` applies to the model, to the teacher of a .pkl file, or to a single file
    that is the teacher of a LoRA."""

    model: str
    format_name: str
    order: Order
    rank: int | None
    teacher: str | None
    """The teacher of a LoRA or of a .pkl file; it is required for a .pkl file."""
    known: Overrides
    license: str | None
    repository: str | None
    """The hub repository that the export is uploaded to."""

    def open(self, output: Path, listener: Listener) -> tuple[Model, Order]:
        """Return the student, and the order with the teacher of a LoRA. All checks run before any weights are read."""
        if Path(self.model).suffix.lower() == ".pkl":
            student, order = self.open_released(output, listener)
        elif self.format_name == "lora":
            student, order = self.open_with_teacher(output, listener)
        else:
            self.check(describe_model(self.model, self.known), None, self.order, output)
            student, order = open_model(self.model, listener, self.known), self.order
        stated = terms_of(student).get("license", "")
        if self.license and stated not in ("", self.license):
            listener.note(f"note: --license {self.license} replaces {stated}, the license that the model states")
        return licensed(student, self.license, needed=self.repository is not None), order

    def check(self, described: Description, teacher: Description | None, order: Order, output: Path) -> None:
        check(described, teacher, self.format_name, order, output)
        licensed(described, self.license, needed=self.repository is not None)
        if self.repository:
            check_upload(self.repository)

    def open_released(self, output: Path, listener: Listener) -> tuple[Model, Order]:
        """Return the student of a .pkl file that the authors of SiD-LSG released, and the order. The file contains only a UNet."""
        file, teacher, is_lora = Path(self.model), str(self.teacher), self.format_name == "lora"
        base = describe_model(teacher, self.known)
        described = released(file, base)
        self.check(described, base if is_lora else None, self.order, output)
        listener.note(f"reading {self.model} in a separate process")
        weights = weights_of(file, described)
        loaded = open_model(teacher, listener, self.known)
        return imported(described, file, weights, loaded), dataclasses.replace(self.order, teacher=loaded if is_lora else None)

    def open_with_teacher(self, output: Path, listener: Listener) -> tuple[Model, Order]:
        """Return a student, and the order with its teacher for a LoRA.

        The rank is `self.rank`, else the rank that the student was trained with, else DEFAULT_RANK.
        """
        of_teacher = self.known if self.teacher and self.teacher.endswith(".safetensors") else Overrides()
        of_student = self.known if of_teacher == Overrides() else Overrides()
        described = describe_model(self.model, of_student)
        recorded = described.card.get("config", {})
        names = [field.name for field in dataclasses.fields(Overrides)]
        again = Overrides(**{name: recorded[name] for name in names if name in recorded})
        teacher, known = (self.teacher, of_teacher) if self.teacher else (teacher_of(described), again)
        order = dataclasses.replace(self.order, rank=self.rank or trained_rank(described.card) or DEFAULT_RANK)
        self.check(described, describe_model(teacher, known), order, output)
        base = open_model(teacher, listener, known)
        return open_model(self.model, listener, of_student), dataclasses.replace(order, teacher=base)


def run(
    model: Model, format_name: str, output: Path, order: Order, verify: bool, advance: Progress, replace: bool = True
) -> Exported:
    """Write a student that passed `check`.

    Raises GateError if the other program draws a different image, and UsageError if `output` exists and `replace` is False; then
    nothing is written.
    """
    exporter = importlib.import_module(f"sidcli.formats.{FORMATS[format_name].module}")
    difference = loss = None
    with atomic_folder(output, replace) as folder:
        exporter.write(folder, model, order)
        advance(1)
        if verify:
            difference, loss = compare(model, folder, order, exporter)
            if difference > TOLERANCE[order.dtype]:
                raise GateError(
                    f"the export draws another image: {difference}/255 apart, {TOLERANCE[order.dtype]}/255 allowed",
                    "please report this model; nothing was written",
                )
        advance(1)
    files = {
        str(file.relative_to(output)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(output.rglob("*"))
        if file.is_file()
    }
    advance(1)
    return Exported(output, files, difference, loss)


def teacher_of(student: Known) -> str:
    """Return the name under which a student's teacher can be loaded. Raises UsageError if sid.json does not name it."""
    teacher = student.card.get("teacher", {})
    origin = str(teacher.get("origin", ""))
    kind, _, name = origin.partition(":")
    if kind == "hub":
        return f"{name}@{teacher['revision']}" if teacher.get("revision") else name
    if not origin:
        raise UsageError(f"{student.source.name} does not say which teacher it came from", "--teacher NAME")
    return name if kind == "embedded" else origin


def trained_rank(card: Mapping[str, Any]) -> int:
    """Return the rank of a student that was trained as a LoRA, 0 for other students.

    A LoRA of this rank contains the whole difference between student and teacher.
    """
    config = card.get("config")
    rank = config.get("student_lora") if isinstance(config, dict) else None
    return rank if type(rank) is int and 1 <= rank <= 1024 else 0


def licensed(student: Known, name: str | None, needed: bool) -> Known:
    """Return the student with the license `name` if it is given. Raises UsageError if a license is needed and none is known."""
    if name is not None:
        teacher = student.card.get("teacher", {}) | {"license": name}
        student = dataclasses.replace(student, card=student.card | {"teacher": teacher})
    if needed and not terms_of(student):
        raise UsageError(
            f"the license of {student.source.name}'s teacher is unknown, and a student falls under it",
            "--license NAME, as the teacher's page on the hub gives it",
        )
    return student


def released(file: Path, base: Description) -> Description:
    """Return the description of a student that the authors of SiD-LSG released as a .pkl file; `base` is its teacher.

    Only the name of the file is used. Raises InputError if the file does not exist or `base` is a student.
    """
    check_is_teacher(base)
    if not file.is_file():
        raise InputError(f"{file}: no such file", "pass a .pkl that the authors released")
    t_init = re.search(r"_t(\d+)_", file.name)
    card = {
        "kind": "student",
        "method": "SiD-LSG (arXiv 2406.01561), released by its authors",
        "t_init": int(t_init[1]) if t_init else T_INIT,
        "student_steps": 1,
        "renoise": "ddim",
        "teacher": provenance(base),
        "imported": {"file": file.name},
        "sid": __version__,
    }
    return dataclasses.replace(base, card=card)


def check_upload(repo: str) -> None:
    """Raises InputError if an upload cannot start because there is no token or because HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set", "unset it, or leave --push-to-hub out")
    if not get_token():
        raise InputError(f"--push-to-hub {repo} needs a token", "hf auth login, or set HF_TOKEN to a token that may write there")


def weights_of(file: Path, known: Description) -> dict[str, Tensor]:
    """Return the weights of a released .pkl file.

    Raises InputError if the file is not a released student or its weights do not fit the described UNet.
    """
    weights = official_pkl.tensors(file)
    official_pkl.matching(weights, networks(known)[known.kind.component])
    return weights


def imported(known: Description, file: Path, weights: dict[str, Tensor], base: Model) -> Model:
    """Return the student of a released .pkl file: a UNet with `weights` and the other networks of its teacher `base`."""
    unet = copy.deepcopy(base.denoiser)
    unet.load_state_dict(weights, assign=True)
    card = known.card | {"imported": {"file": file.name, "sha256": sha256(file)}}
    return dataclasses.replace(base, denoiser=unet.requires_grad_(False), card=card)


def compare(model: Model, folder: Path, order: Order, exporter: ModuleType) -> tuple[int, int | None]:
    """Draw one prompt with the export and with sid's sampler from the same noise; return the largest pixel difference in 1/255.

    A LoRA is compared with sid's image of the teacher with the LoRA merged; the second number is the difference between that image
    and the student's image, and None for other formats.
    """
    theirs = exporter.draw(folder, model, order, PROMPT, 0)
    ours = picture(model)
    if order.teacher is None or exporter is not lora:
        return apart(ours, theirs), None
    approximated = picture(lora.merged(model, order.teacher, order.rank))
    return apart(approximated, theirs), apart(approximated, ours)


def picture(model: Model) -> np.ndarray:
    return Sampler(model, torch.device("cpu")).images([PROMPT], [0], plan_for(model), references=example_references(model))[0]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())
