"""`sid export`: a student for other programs. Whatever is written is drawn with and compared before it gets its name."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from sidcli import __version__
from sidcli.errors import GateError, InputError, UsageError
from sidcli.files import atomic_folder, check_space, sha256
from sidcli.formats import lora, official_pkl
from sidcli.formats.card import provenance, terms_of
from sidcli.formats.order import Order
from sidcli.progress import Progress
from sidcli.sampler import T_INIT, Sampler, plan_for
from sidcli.teachers import Model

FORMATS = {
    "diffusers": "diffusers_folder",
    "single-file": "single_file_folder",
    "onnx": "onnx",
    "openvino": "openvino",
    "torch-export": "torch_export",
    "lora": "lora",
}
"""Format -> its module in sidcli.formats, with write() and draw(). Imported when asked for: some need an extra."""

PROMPT = "a cat on a blue background"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
TOLERANCE = {"fp32": 2, "fp16": 16, "bf16": 64}
"""Largest difference allowed between the exported model's image and ours, in 1/255; 1 where diffusers draws in fp32."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    files: dict[str, dict[str, object]]
    difference: int | None
    """Largest pixel difference between the exported model's image and `sid sample`'s, in 1/255; None if it was not verified."""
    loss: int | None
    """The same between a LoRA's image and the student's own: what the rank gives away; None for other formats."""


def check(format_name: str, order: Order) -> None:
    """Raises UsageError before a model is loaded."""
    if format_name not in FORMATS:
        raise UsageError(f"unknown format {format_name!r}", f"one of {', '.join(FORMATS)}")
    if format_name in ("onnx", "openvino") and order.dtype == "bf16":
        raise UsageError(f"--format {format_name} has no --dtype bf16: its convolutions do not compute in it", "fp32 or fp16")
    if order.variant and format_name != "diffusers":
        raise UsageError(f"--variant names files of diffusers folders; --format {format_name} has none", "leave it out")


def run(model: Model, format_name: str, output: Path, order: Order, verify: bool, advance: Progress) -> Exported:
    """Write the student. Raises GateError where the other program draws something else; nothing is left behind then."""
    if not model.is_student:
        raise InputError(f"{model.source.name} is not a student", "export a run folder, its student/, or `emoji`")
    if model.card.get("renoise", "ddim") != "ddim" and model.card.get("student_steps", 1) > 1:
        raise InputError(
            f"{model.source.name} renoises with {model.card['renoise']} noise, which no stock scheduler does",
            "draw with `sid sample`, or distil with --renoise ddim",
        )
    room = importlib.import_module(f"sidcli.formats.{FORMATS[format_name]}")
    difference = loss = None
    if format_name != "lora":  # some of the writers end the whole program where a disk is full
        nets = (model.unet, model.vae, *model.text_encoders)
        check_space(
            output, sum(value.numel() for net in nets for value in net.parameters()) * BYTES[order.dtype], "the export needs"
        )
    with atomic_folder(output) as folder:
        room.write(folder, model, order)
        advance(1)
        if verify:
            difference, loss = compare(model, folder, order, room)
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


def teacher_of(model: Model) -> str:
    """The name under which a student's teacher can be loaded again. Raises UsageError where its card does not say."""
    teacher = model.card.get("teacher", {})
    origin = str(teacher.get("origin", ""))
    kind, _, name = origin.partition(":")
    if kind == "hub":
        return f"{name}@{teacher['revision']}" if teacher.get("revision") else name
    if not origin:
        raise UsageError(f"{model.source.name} does not say which teacher it came from", "--teacher NAME")
    return name if kind == "embedded" else origin


def licensed(model: Model, name: str | None, needed: bool) -> Model:
    """The student with the licence that the user names. Raises UsageError where one is needed and nobody says which."""
    if name is not None:
        teacher = model.card.get("teacher", {}) | {"license": name}
        model = dataclasses.replace(model, card=model.card | {"teacher": teacher})
    if needed and not terms_of(model):
        raise UsageError(
            f"nothing says under which licence the teacher of {model.source.name} is; a student passes it on",
            "--license NAME, as the teacher's page on the hub gives it",
        )
    return model


def imported(file: Path, teacher: Model) -> Model:
    """One of the authors' released generators (.pkl) as a student around the networks of the teacher it came from.

    Raises InputError for a file that is no such generator, or does not fit the teacher.
    """
    weights = official_pkl.tensors(file)
    official_pkl.matching(weights, teacher.unet)
    unet = copy.deepcopy(teacher.unet)
    unet.load_state_dict(weights, assign=True)
    t_init = re.search(r"_t(\d+)_", file.name)
    card = {
        "kind": "student",
        "method": "SiD-LSG (arXiv 2406.01561), released by its authors",
        "t_init": int(t_init[1]) if t_init else T_INIT,
        "student_steps": 1,
        "renoise": "ddim",
        "teacher": provenance(teacher),
        "imported": {"file": file.name, "sha256": sha256(file)},
        "sid": __version__,
    }
    return dataclasses.replace(teacher, unet=unet.requires_grad_(False), card=card)


def compare(model: Model, folder: Path, order: Order, room: ModuleType) -> tuple[int, int | None]:
    """Draw one prompt with the export and with our sampler, from the same noise; the largest difference in 1/255.

    A LoRA stands for its merged weights; how far their image is from the student's is the second number.
    """
    theirs = room.draw(folder, model, order, PROMPT, 0)
    ours = picture(model)
    if order.teacher is None or room is not lora:
        return apart(ours, theirs), None
    approximated = picture(lora.merged(model, order.teacher, order.rank))
    return apart(approximated, theirs), apart(approximated, ours)


def picture(model: Model) -> np.ndarray:
    return Sampler(model, torch.device("cpu")).images([PROMPT], [0], plan_for(model))[0].numpy()


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())
