"""`sid sample`: draw images for prompts. An image depends only on its prompt, its seed and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sidcli.devices import choose_device, warn_of_slow_bf16
from sidcli.errors import UsageError
from sidcli.formats.outputs import BACKENDS, Places
from sidcli.formats.pictures import contact_sheet, save_png
from sidcli.models.drawing import Drawer, Plan, Record, draw, png_info, student_plan
from sidcli.models.overrides import Overrides
from sidcli.models.sources import Source, find, graph_format, read_card
from sidcli.progress import Listener, Progress, counted

if TYPE_CHECKING:
    from sidcli.models.loading import Model

SHEET_IMAGES = 100
"""Maximum number of images on a contact sheet, which shows the first images."""


@dataclass(frozen=True)
class Drawn:
    """One drawn image: in `file`, or in memory as `image` if no output was given."""

    prompt: str
    seed: int
    file: Path | None
    image: Image.Image | None
    reference: Record | None = None
    """The record of its reference image: file and SHA-256. A list of them if it has several."""

    def as_dict(self) -> dict[str, Any]:
        made = {"file": str(self.file), "prompt": self.prompt, "seed": self.seed}
        return made | ({"reference": self.reference} if self.reference else {})


@dataclass(frozen=True)
class Samples:
    """The images of one call, ordered by prompt, and the model and plan that drew them."""

    drawn: Sequence[Drawn]
    sheet: Path | None
    """The contact sheet, if images were written to a folder."""
    source: Source
    plan: Plan
    truncated: int
    """Number of prompts that were longer than the maximum length of the text encoder."""

    @property
    def images(self) -> list[Image.Image]:
        """RGB images in the order of the prompts and seeds. Images that were written to files are read from these files."""
        return [one.image or Image.open(str(one.file)).convert("RGB") for one in self.drawn]

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.source.origin,
            "sampling": self.plan.describe(),
            "images": [one.as_dict() for one in self.drawn],
            "sheet": str(self.sheet) if self.sheet else None,
        }


@dataclass(frozen=True, eq=False)
class Shown:
    """The reference of an image in the size of a model, and its record for the images that are drawn from it.

    K references of one image are side by side in `pixels`, uint8 [H, K W, 3], and have a list of records.
    """

    pixels: np.ndarray
    record: Record


@dataclass(frozen=True)
class Opened:
    """A model that is ready to draw: networks in torch, or the graphs of an export."""

    source: Source
    drawer: Drawer
    plan: Plan
    reference_size: tuple[int, int] | None = None
    """Height and width in pixels of the reference image that the model takes; None if it takes none."""
    several_references: bool = False
    """Whether the model can draw one image from several references."""


def run(
    opened: Opened,
    prompts: Sequence[str],
    num: int,
    seed: int,
    places: Places | None,
    batch_size: int,
    advance: Progress,
    replace: bool = True,
    references: Sequence[Shown] = (),
) -> Samples:
    """Draw `num` images of each prompt with seeds seed, seed + 1, ..., in files at `places`, or in memory if it is None.

    `references` are those of the prompts, one for each, if the model takes a reference image.

    Raises UsageError if a file exists and `replace` is False.
    """
    source, plan = opened.source, opened.plan
    jobs = [(prompt, seed + index) for prompt in prompts for index in range(num)]
    shown = [one for one in references for _ in range(num)]
    drawn: list[Drawn] = []
    thumbnails: list[Image.Image] = []
    pixels = [one.pixels for one in shown] or None
    batches = draw(opened.drawer, plan, [job[0] for job in jobs], [job[1] for job in jobs], batch_size, advance, pixels)
    images = (Image.fromarray(image) for batch in batches for image in batch)
    for index, ((prompt, image_seed), picture) in enumerate(zip(jobs, images, strict=True)):
        file = places.files[index] if places else None
        record = shown[index].record if shown else None
        if file:
            save_png(picture, file, png_info(prompt, image_seed, source, plan, record), replace)
        drawn.append(Drawn(prompt, image_seed, file, None if file else picture, record))
        if places and places.sheet and index < SHEET_IMAGES:
            thumbnails.append(picture)
    sheet = places.sheet if places else None
    if sheet:
        save_png(
            contact_sheet(thumbnails, [f"{one.prompt} (seed {one.seed})" for one in drawn[:SHEET_IMAGES]]), sheet, replace=replace
        )
    return Samples(drawn, sheet, source, plan, opened.drawer.truncated)


def open_drawer(
    model: str | Model,
    backend: str,
    device: str,
    steps: int | None,
    guidance: float | None,
    listener: Listener,
    known: Overrides,
    precision: str = "fp32",
) -> Opened:
    """Open a model, given by name or already loaded.

    Raises UsageError if the model does not support the backend, the number of steps, the guidance scale or the precision.
    """
    graphs = graph_format(Path(model)) if isinstance(model, str) and Path(model).is_dir() else None
    if isinstance(model, str) and graphs:
        if precision != "fp32":
            raise UsageError(f"{model} holds graphs, which have a precision of their own", "leave --precision out")
        return open_graphs(model, graphs, backend, device, steps, guidance, listener, known)
    name = model if isinstance(model, str) else model.source.name
    if backend in ("onnx", "openvino"):
        raise UsageError(
            f"--backend {backend} draws with an export, which {name} is not", f"sid export {name} --format {backend} -o FOLDER"
        )
    from sidcli.models.loading import open_model  # these import torch
    from sidcli.models.sampler import Sampler, plan_for

    where = choose_device(device, listener)
    loaded = open_model(model, listener, known) if isinstance(model, str) else model
    warn_of_slow_bf16(where, precision, listener)
    plan = replace(plan_for(loaded, steps, guidance), precision=precision)
    layout = loaded.layout
    return Opened(
        loaded.source, Sampler(loaded, where), plan, loaded.size if layout else None, layout is not None and layout.several
    )


def open_graphs(
    name: str,
    graphs: str,
    backend: str,
    device: str,
    steps: int | None,
    guidance: float | None,
    listener: Listener,
    known: Overrides,
) -> Opened:
    """Open a folder of exported graphs in the format `graphs`. Raises UsageError for options that the graphs do not support."""
    if backend == "torch" or graphs not in BACKENDS:
        raise UsageError(f"{name} holds {graphs} graphs, which sid does not run", "draw with the model it was made from")
    listener.note(f"loading {name}")
    from sidcli.formats import runtime

    source = find(name, listener)
    plan = student_plan(read_card(source), None, guidance, name)
    if steps not in (None, plan.steps):
        raise UsageError(f"the graphs of {name} draw in {counted(plan.steps, 'step')}, not {steps}", "leave --steps out")
    if known.prediction_type != "auto" or known.model_config or device not in ("auto", "cpu"):
        raise UsageError(f"{name} holds graphs: they run on the CPU, and what they predict is inside", "leave those options out")
    drawer = runtime.open_graphs(source.path, graphs if backend == "auto" else backend)
    drawer.resize(known.height, known.width)
    return Opened(source, drawer, plan, tuple(drawer.size) if drawer.card["graph"].get("reference") else None)
