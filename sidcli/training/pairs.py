"""Draw sheets of one subject with the teacher, judge their pairs of panels, and keep the good pairs (Diffusion Self-Distillation,
section 3.1 of arXiv 2411.18616).

Sheets are drawn in units of UNIT, each sheet is a file, and the scores of a judge are appended to a file, so that interrupted work
resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sidcli import randomness
from sidcli.data.pairs import Box
from sidcli.data.sheets import SheetPrompt, sheet_prompt
from sidcli.engine import Engine
from sidcli.errors import InputError
from sidcli.files import read_json, write_json
from sidcli.formats.pictures import save_png
from sidcli.models.codec import to_bytes
from sidcli.models.drawing import Plan
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.progress import RunListener

UNIT = 16
"""Sheets that are drawn together."""
COLUMNS = 2


def prepare(engine: Engine, folder: Path, teacher: str, listener: RunListener) -> Path:
    """Return the folder with the pairs of a run, after what is missing was drawn and judged. `teacher` is its fingerprint.

    Raises InputError if the folder holds sheets of other settings, or if no pair is kept.
    """
    if engine.distributed.is_main:
        draw_sheets(engine, folder, teacher, listener)
        curate(engine, folder, listener)
    engine.distributed.wait()
    return folder


def settings_of(engine: Engine) -> SelfDistillationSettings:
    assert isinstance(engine.config.objective, SelfDistillationSettings)
    return engine.config.objective


def sheet_file(index: int) -> str:
    return f"sheets/{index:08d}.png"


def draw_sheets(engine: Engine, folder: Path, teacher: str, listener: RunListener) -> None:
    """Draw the sheets that the folder lacks."""
    config, settings = engine.config, settings_of(engine)
    check_same(folder, engine, teacher)
    units = [range(start, min(start + UNIT, settings.sheets)) for start in range(0, settings.sheets, UNIT)]
    missing = [unit for unit in units if not all((folder / sheet_file(index)).is_file() for index in unit)]
    if not missing:
        return
    with listener.progress("draw sheets", sum(map(len, missing)), "sheets") as advance:
        for unit in missing:
            prompts = [sheet_prompt(engine.prompts, config.seed, index, settings.panels) for index in unit]
            images = drawn(engine, unit, prompts, partial(advance, len(unit) / settings.sheet_steps))
            for index, image in zip(unit, images, strict=True):
                save_png(Image.fromarray(image), folder / sheet_file(index))
    engine.sampler.model.vae.to("cpu")  # training does not use the VAE


def check_same(folder: Path, engine: Engine, teacher: str) -> None:
    """Record what determines the sheets. Raises InputError if the folder has sheets of other settings."""
    config, s = engine.config, settings_of(engine)
    settings: dict[str, Any] = {"teacher": teacher, "prompts": engine.prompts.digest, "seed": config.seed, "panels": s.panels}
    settings |= {"pairs": s.pairs, "guidance": s.sheet_guidance, "steps": s.sheet_steps, "size": list(engine.sampler.model.size)}
    file = folder / "sheets.json"
    if file.exists() and (before := read_json(file)) != settings:
        changed = [f"{key}: {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
        raise InputError(f"{folder} holds sheets of other settings: {'; '.join(changed)}", "choose another --output for a new run")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def drawn(engine: Engine, indices: range, prompts: Sequence[SheetPrompt], stepped: Any) -> np.ndarray:
    """Return sheets uint8 [B, H, W, 3] with panels of the model's size."""
    settings, model = settings_of(engine), engine.sampler.model
    rows = settings.panels // COLUMNS
    plan = Plan(settings.sheet_steps, settings.sheet_guidance)
    channels, height, width = model.latent_shape
    shape = channels, rows * height, COLUMNS * width
    noise = randomness.normal(shape, engine.config.seed, "sheet", 0, indices)
    if settings.pairs == "grid":
        latents = engine.teacher_latents(plan, [prompt.text for prompt in prompts], noise, stepped)
    else:
        captions = [caption for prompt in prompts for caption in prompt.captions]
        with shared_attention(engine, settings.panels):
            latents = joined(engine.teacher_latents(plan, captions, cut(noise, rows), stepped), rows)
    codec = model.codec.to(engine.device)
    with torch.no_grad():
        decoded = torch.cat([codec.decode(one[None].to(engine.device)) for one in latents])
    return to_bytes(decoded, [prompt.text for prompt in prompts], list(indices), "a smaller --set sheet_guidance")


def cut(sheets: Tensor, rows: int) -> Tensor:
    """Return the panels [B rows 2, C, h, w] of sheets [B, C, rows h, 2 w], those of a sheet in reading order."""
    panels = [part for row in sheets.chunk(rows, -2) for part in row.chunk(COLUMNS, -1)]
    return torch.stack(panels, 1).flatten(0, 1)


def joined(panels: Tensor, rows: int) -> Tensor:
    """Return the sheets [B, C, rows h, 2 w] of panels [B rows 2, C, h, w]."""
    parts = panels.unflatten(0, (-1, rows, COLUMNS))
    return torch.cat([torch.cat(list(row.unbind(1)), -1) for row in parts.unbind(1)], -2)


@contextmanager
def shared_attention(engine: Engine, panels: int) -> Iterator[None]:
    """Context in which the teacher draws `panels` consecutive images of a batch with one self-attention over all of them.

    It makes panels of one subject with models that cannot draw sheets, without training (arXiv 2405.01434, arXiv 2402.03286).
    Raises InputError if the teacher is no UNet.
    """
    engine.kind.share_attention(engine.teacher, panels)
    try:
        yield
    finally:
        engine.kind.share_attention(engine.teacher, 1)


def boxes(model_size: tuple[int, int], panels: int) -> list[Box]:
    """Return the boxes of the panels of a sheet in pixels, in reading order."""
    height, width = model_size
    places = [divmod(place, COLUMNS) for place in range(panels)]
    return [(column * width, row * height, (column + 1) * width, (row + 1) * height) for row, column in places]


def curate(engine: Engine, folder: Path, listener: RunListener) -> None:
    raise NotImplementedError
