"""Samples of a run: a sheet of the student's images at intervals, and one of the teacher's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sidcli.data.prompts import EmojiPrompts
from sidcli.emoji import world
from sidcli.engine import Engine
from sidcli.files import read_json, write_json
from sidcli.formats.pictures import grid, save_png
from sidcli.models.codec import to_bytes
from sidcli.models.drawing import Drawer, Plan, draw
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler, plan_for
from sidcli.progress import RunListener
from sidcli.training.proxy import TeacherDrawer

GRID_IMAGES = 8


class Painter:
    """Draws samples of the same prompts and noise in each call, so that steps can be compared, and the teacher's samples once,
    after step 0.

    The teacher's samples take as many forward passes as hundreds of training steps of a small batch, so the first step does not
    wait for them.
    """

    def __init__(self, engine: Engine, folder: Path, listener: RunListener):
        self.engine, self.folder, self.listener = engine, folder, listener
        self.texts = sample_prompts(engine, folder / "prompts.json")
        # A new run in an existing folder may have another teacher.
        self.has_teacher = engine.step > 0 and (folder / "teacher.png").exists()
        self.references: np.ndarray | None = None
        if engine.layout:
            self.texts, reference = engine.subjects_at([-1 - index for index in range(GRID_IMAGES)])
            with torch.no_grad():
                self.references = to_bytes(engine.sampler.model.codec.decode(reference), self.texts, range(GRID_IMAGES), "")
        if engine.distributed.is_main:
            write_json(folder / "prompts.json", {"prompts": self.texts, "seeds": list(range(GRID_IMAGES))})

    def paint(self, student: Model) -> None:
        engine = self.engine
        self.draw("samples", Sampler(student, engine.device), engine.plan, f"{engine.step:08d}", self.references)
        if engine.step and not self.has_teacher:
            known = self.references if engine.sampler.model.layout else None
            self.draw("teacher samples", TeacherDrawer(engine), plan_for(engine.sampler.model), "teacher", known)
            self.has_teacher = True

    def draw(self, what: str, drawer: Drawer, plan: Plan, name: str, references: np.ndarray | None) -> None:
        """Draw the samples to a file, below the reference images if there are any."""
        size = min(GRID_IMAGES, self.engine.config.micro_batch)
        with self.listener.progress(what, GRID_IMAGES, "images") as advance:
            batches = list(draw(drawer, plan, self.texts, range(GRID_IMAGES), size, advance, references))
        rows = [np.concatenate(batches)] if references is None else [references, np.concatenate(batches)]
        save_png(grid(rows), self.folder / f"{name}.png")


def sample_prompts(engine: Engine, file: Path) -> list[str]:
    """Return the prompts of the samples: those that a continued run has used so far, else those of `prompts_for`.

    Captions of the emoji world are changed to correct English ("fries", not "a fries"), because they are not used for training.
    """
    known = read_json(file).get("prompts") if engine.step and file.exists() else None
    if isinstance(known, list) and len(known) == GRID_IMAGES and all(isinstance(text, str) for text in known):
        return known
    if isinstance(engine.prompts, EmojiPrompts):
        positions = [-1 - index for index in range(GRID_IMAGES)]
        scenes = [world.scene(world.PROMPT_SEED, position) for position in positions]
        return [
            world.shown_caption(scene, engine.config.seed, position, "train")
            for scene, position in zip(scenes, positions, strict=True)
        ]
    return prompts_for(engine, 0, GRID_IMAGES)


def prompts_for(engine: Engine, first: int, count: int) -> list[str]:
    """Return prompts for samples and proxy metrics, from positions before those that are used for training."""
    return [engine.prompts.at(engine.config.seed, -1 - index) for index in range(first, first + count)]
