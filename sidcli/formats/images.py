"""`sid sample`: prompts -> images. Image i depends on its prompt, its seed and the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sidcli.devices import choose_device
from sidcli.errors import UsageError
from sidcli.formats.outputs import BACKENDS, Places
from sidcli.formats.pictures import contact_sheet, save_png
from sidcli.models.loading import Model, open_model
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Drawer, Plan, Sampler, draw, plan_for, png_info, student_plan
from sidcli.models.sources import Source, find, graph_format, read_card
from sidcli.progress import Listener, Progress

SHEET_IMAGES = 100
"""Images on a contact sheet, the first ones."""


@dataclass(frozen=True)
class Drawn:
    """One image: in a file, or in memory where no output was given."""

    prompt: str
    seed: int
    file: Path | None
    image: Image.Image | None


@dataclass(frozen=True)
class Samples:
    """The images of one call, prompt by prompt, and how they were drawn."""

    drawn: Sequence[Drawn]
    sheet: Path | None
    """The contact sheet, where several images were written."""
    source: Source
    plan: Plan
    truncated: int
    """Prompts that were longer than the text encoder reads."""

    @property
    def images(self) -> list[Image.Image]:
        """RGB images in the order of the prompts and seeds, read from their files where they were written."""
        return [one.image or Image.open(str(one.file)).convert("RGB") for one in self.drawn]

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.source.origin,
            "sampling": self.plan.describe(),
            "images": [{"file": str(one.file), "prompt": one.prompt, "seed": one.seed} for one in self.drawn],
            "sheet": str(self.sheet) if self.sheet else None,
        }


@dataclass(frozen=True)
class Opened:
    """A model that is ready to draw: networks in torch, or the graphs of an export."""

    source: Source
    drawer: Drawer
    plan: Plan


def run(
    opened: Opened, prompts: Sequence[str], num: int, seed: int, places: Places | None, batch_size: int, advance: Progress
) -> Samples:
    """Draw `num` images of every prompt with seeds seed, seed + 1, ... into their places, or into memory."""
    source, plan = opened.source, opened.plan
    jobs = [(prompt, seed + index) for prompt in prompts for index in range(num)]
    drawn: list[Drawn] = []
    thumbnails: list[Image.Image] = []
    batches = draw(opened.drawer, plan, [job[0] for job in jobs], [job[1] for job in jobs], batch_size, advance)
    images = (Image.fromarray(image.numpy()) for batch in batches for image in batch)
    for index, ((prompt, image_seed), picture) in enumerate(zip(jobs, images, strict=True)):
        file = places.files[index] if places else None
        if file:
            save_png(picture, file, png_info(prompt, image_seed, source, plan))
        drawn.append(Drawn(prompt, image_seed, file, None if file else picture))
        if places and places.sheet and index < SHEET_IMAGES:
            thumbnails.append(picture)
    sheet = places.sheet if places else None
    if sheet:
        save_png(contact_sheet(thumbnails, [f"{one.prompt} (seed {one.seed})" for one in drawn[:SHEET_IMAGES]]), sheet)
    return Samples(drawn, sheet, source, plan, opened.drawer.truncated)


def open_drawer(
    model: str | Model, backend: str, device: str, steps: int | None, guidance: float | None, listener: Listener, known: Overrides
) -> Opened:
    """Open a model by name, or one that is loaded. Raises UsageError for a backend, steps or a guidance that it does not have."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    graphs = graph_format(Path(model)) if isinstance(model, str) and Path(model).is_dir() else None
    if isinstance(model, str) and graphs:
        return open_graphs(model, graphs, backend, device, steps, guidance, listener, known)
    name = model if isinstance(model, str) else model.source.name
    if backend in ("onnx", "openvino"):
        raise UsageError(
            f"--backend {backend} draws with an export, which {name} is not", f"sid export {name} --format {backend} -o FOLDER"
        )
    where = choose_device(device, listener)
    loaded = open_model(model, listener, known) if isinstance(model, str) else model
    plan = plan_for(loaded, steps, guidance)
    return Opened(loaded.source, Sampler(loaded, where), plan)


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
    """Open the folder of an export of the format `graphs`."""
    if backend == "torch" or graphs not in BACKENDS:
        raise UsageError(f"{name} holds {graphs} graphs, which sid does not run", "draw with the model it was made from")
    listener.note(f"loading {name}")
    from sidcli.formats import runtime

    source = find(name, listener)
    plan = student_plan(read_card(source), None, guidance, name)
    if steps not in (None, plan.steps):
        raise UsageError(f"the graphs of {name} draw in {plan.steps} steps, not {steps}", "leave --steps out")
    if known.prediction_type != "auto" or known.model_config or device not in ("auto", "cpu"):
        raise UsageError(f"{name} holds graphs: they run on the CPU, and what they predict is inside", "leave those options out")
    drawer = runtime.open_graphs(source.path, graphs if backend == "auto" else backend)
    drawer.resize(known.height, known.width)
    return Opened(source, drawer, plan)
