"""`sid sample`: prompts -> images. Image i depends on its prompt, its seed and the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sidcli.formats.outputs import Places
from sidcli.formats.pictures import contact_sheet, save_png
from sidcli.models.sampler import Drawer, Plan, draw, png_info
from sidcli.models.sources import Source
from sidcli.progress import Progress

SHEET_IMAGES = 100
"""Images on a contact sheet, the first ones."""


@dataclass(frozen=True)
class Drawn:
    file: Path
    prompt: str
    seed: int


def run(
    source: Source,
    drawer: Drawer,
    plan: Plan,
    prompts: Sequence[str],
    num: int,
    seed: int,
    places: Places,
    batch_size: int,
    advance: Progress,
) -> tuple[list[Drawn], int]:
    """Draw `num` images of every prompt with seeds seed, seed + 1, ... into their places.

    Returns the images and how many prompts were cut to the encoder's length.
    """
    jobs = [(prompt, seed + index) for prompt in prompts for index in range(num)]
    drawn: list[Drawn] = []
    thumbnails: list[Image.Image] = []
    batches = draw(drawer, plan, [job[0] for job in jobs], [job[1] for job in jobs], batch_size, advance)
    images = (image for batch in batches for image in batch)
    for (prompt, image_seed), file, pixels in zip(jobs, places.files, images, strict=True):
        picture = Image.fromarray(pixels.numpy())
        save_png(picture, file, png_info(prompt, image_seed, source, plan))
        drawn.append(Drawn(file, prompt, image_seed))
        if places.sheet and len(thumbnails) < SHEET_IMAGES:
            thumbnails.append(picture)
    if places.sheet:
        labels = [f"{item.prompt} (seed {item.seed})" for item in drawn[:SHEET_IMAGES]]
        save_png(contact_sheet(thumbnails, labels), places.sheet)
    return drawn, drawer.truncated


def summary(drawn: Sequence[Drawn], sheet: Path | None, source: Source, plan: Plan) -> dict[str, Any]:
    return {
        "model": source.origin,
        "sampling": plan.describe(),
        "images": [{"file": str(item.file), "prompt": item.prompt, "seed": item.seed} for item in drawn],
        "sheet": str(sheet) if sheet else None,
    }
