"""`sid eval`: draw from each model once, feed every metric from that one pass, and put all models in one table.

On the emoji world the protocol is fixed: prompt i is the caption of scene (PROMPT_SEED, i), worded as no model was trained on and
always naming the background; image i has seed `seed + i`; the FID compares with 10,000 scenes of REFERENCE_SEED. The scenes'
own FID against other scenes is the floor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sidcli.emoji import world
from sidcli.errors import InputError
from sidcli.metrics.accuracy import Accuracy
from sidcli.metrics.clip_score import ClipScore
from sidcli.metrics.features import EmojiExtractor, extract, scene_statistics
from sidcli.metrics.fid import frechet_distance, statistics
from sidcli.pictures import contact_sheet, save_png
from sidcli.sampler import Plan, Progress, Sampler, draw
from sidcli.teachers import Model

REFERENCE_SCENES = 10_000
SHOWN = 12


@dataclass(frozen=True)
class Metrics:
    """Which metrics were asked for."""

    fid: bool
    clip: bool
    accuracy: bool


@dataclass(frozen=True)
class Row:
    """What was measured of one model; None for what was not asked for. `seconds_per_image` is the drawing alone."""

    model: str
    sampling: str
    n: int
    fid: float | None
    clip: float | None
    noun_accuracy: float | None
    colour_accuracy: float | None
    seconds_per_image: float | None

    def as_dict(self) -> dict[str, object]:
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


def protocol(num: int, seed: int, held_out: bool = False) -> tuple[list[world.Scene], list[str], list[int]]:
    """Scenes, captions and image seeds of the emoji protocol; with `held_out`, only (noun, colour) pairs no model was shown."""
    scenes = [world.scene(world.PROMPT_SEED, index, held_out) for index in range(num)]
    prompts = [world.caption(scene, world.PROMPT_SEED, index, "eval", 1.0).text for index, scene in enumerate(scenes)]
    return scenes, prompts, [seed + index for index in range(num)]


def check(model: Model) -> None:
    """Raises InputError, before any work, for a model that no protocol fits."""
    if not model.is_emoji:
        raise InputError(
            f"{model.source.name} does not draw the emoji world; other protocols are not available yet",
            "evaluate an emoji model, or a student distilled from one",
        )


def prepare(metrics: Metrics, advance: Progress) -> None:
    """Fill the cache of reference statistics, so that it is done once and under a progress bar of its own."""
    if metrics.fid:
        scene_statistics(EmojiExtractor(), world.REFERENCE_SEED, REFERENCE_SCENES, advance)


class Scorer:
    """Feeds every metric from one pass over images that answer `prompts`, in order."""

    def __init__(self, scenes: Sequence[world.Scene], prompts: Sequence[str], metrics: Metrics, device: torch.device):
        self.scenes, self.prompts, self.metrics = scenes, prompts, metrics
        self.extractor = EmojiExtractor()
        self.accuracy = Accuracy(self.extractor)
        self.clip = ClipScore(True, device) if metrics.clip else None
        self.features: list[np.ndarray] = []
        self.done = 0

    def add(self, images: torch.Tensor) -> None:
        """The next images, uint8 [B, H, W, 3]."""
        here = slice(self.done, self.done + len(images))
        self.features.append(extract(self.extractor, images))
        self.accuracy.add(images, self.scenes[here])
        if self.clip:
            self.clip.add(images, self.prompts[here])
        self.done += len(images)

    def row(self, name: str, sampling: str, seconds: float | None) -> Row:
        fid = None
        if self.metrics.fid:
            reference = scene_statistics(self.extractor, world.REFERENCE_SEED, REFERENCE_SCENES)
            fid = frechet_distance(statistics(np.concatenate(self.features)), reference)
        nouns, colours = (hits / self.done for hits in (self.accuracy.nouns, self.accuracy.colours))
        judged = self.metrics.accuracy
        clip = self.clip.value if self.clip else None
        return Row(name, sampling, self.done, fid, clip, nouns if judged else None, colours if judged else None, seconds)


def measure(
    model: Model,
    plan: Plan,
    device: torch.device,
    metrics: Metrics,
    num: int,
    seed: int,
    held_out: bool,
    batch_size: int,
    advance: Progress,
) -> tuple[Row, torch.Tensor]:
    """One row of the table, `num` images of the emoji protocol drawn by `model`, and the first of those images."""
    scenes, prompts, seeds = protocol(num, seed, held_out)
    scorer = Scorer(scenes, prompts, metrics, device)
    shown: list[torch.Tensor] = []
    drawing, mark = 0.0, time.monotonic()
    for images in draw(Sampler(model, device), plan, prompts, seeds, batch_size, advance):
        drawing += time.monotonic() - mark
        shown = shown or [images[:SHOWN]]
        scorer.add(images)
        mark = time.monotonic()
    return scorer.row(model.source.name, plan.describe(), drawing / num), shown[0]


def measure_scenes(device: torch.device, metrics: Metrics, num: int, held_out: bool) -> Row:
    """The floor: scenes themselves in place of drawn images, the same captions, other seeds than the reference."""
    scenes, prompts, _ = protocol(num, 0, held_out)
    scorer = Scorer(scenes, prompts, metrics, device)
    for start in range(0, num, 200):
        scorer.add(torch.from_numpy(np.stack([world.render(scene) for scene in scenes[start : start + 200]])))
    return scorer.row("scenes (floor)", "real", None)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells for people; columns nobody asked for are left out."""
    columns = [
        ("emoji-FID", "fid", "{:.2f}"),
        ("CLIP", "clip", "{:.4f}"),
        ("noun", "noun_accuracy", "{:.1%}"),
        ("colour", "colour_accuracy", "{:.1%}"),
        ("s/image", "seconds_per_image", "{:.3f}"),
    ]
    used = [column for column in columns if any(getattr(row, column[1]) is not None for row in rows)]
    cells = []
    for row in rows:
        values = ((form, getattr(row, name)) for _, name, form in used)
        cells.append([row.model, row.sampling, *("-" if value is None else form.format(value) for form, value in values)])
    return ["model", "sampling", *(title for title, _, _ in used)], cells


def record(num: int, seed: int, held_out: bool) -> dict[str, object]:
    """What the numbers depend on, for whoever compares them."""
    return {
        "name": "emoji",
        "images": num,
        "seed": seed,
        "held_out_pairs": held_out,
        "world": world.digest(),
        "reference_scenes": REFERENCE_SCENES,
        "features": "emoji classifier, 128 dimensions (an emoji-FID is not a COCO FID)",
        "clip": "emoji open_clip, cosine as a fraction",
    }


def save_comparison(pictures: Sequence[tuple[str, torch.Tensor]], file: Path) -> None:
    """One row per model, the same prompts and seeds in every column."""
    # The parts of a name stand under the first images of its row, where one of them alone would not fit.
    labelled = [
        (Image.fromarray(image.numpy()), label)
        for name, row in pictures
        for image, label in zip(row, [*name.split(", "), *[""] * len(row)], strict=False)
    ]
    columns = min(len(row) for _, row in pictures)
    save_png(contact_sheet([picture for picture, _ in labelled], [label for _, label in labelled], columns), file)
