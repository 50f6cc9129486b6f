"""Proxy metrics that show the progress of a distillation, which the losses of SiD do not. They use the teacher's images, no
dataset.

The teacher draws PROXY_IMAGES images once, which are stored in the cache. The student draws the same prompts and seeds in each
evaluation. An open_clip model embeds both sets: the CMMD between them should fall, and the CLIP score should rise to the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidcli.data.imagesets import Collection, DrawnSet
from sidcli.distributed import Share
from sidcli.engine import Engine
from sidcli.metrics.clip import Clip, Embeddings, Similarity
from sidcli.metrics.kid import cmmd
from sidcli.models.drawing import Plan, draw
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import WEIGHTS
from sidcli.progress import Progress, silent

PROXY_IMAGES = 128
BATCH = 16
PHOTO_CLIP = "ViT-B-32-quickgelu:openai"
"""The smallest widely used CLIP model: a proxy metric must be cheap, and its values are compared only with each other."""


@dataclass(frozen=True)
class TeacherDrawer:
    """Drawer that uses the teacher of an engine."""

    engine: Engine
    truncated = 0

    def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> np.ndarray:
        return self.engine.teacher_images(prompts, seeds, plan, advance)


class Proxy:
    """Measures the proxy metrics; created once per run. Raises InputError if the CLIP model is not available."""

    def __init__(self, engine: Engine, texts: list[str], advance: Progress):
        model = engine.sampler.model
        self.device, self.texts = engine.device, texts
        hint = "--eval-every 0 trains without measuring"
        clip = Clip(str(WEIGHTS / "clip") if model.is_emoji else PHOTO_CLIP, self.device, hint)
        self.embeddings, self.similarity = Embeddings(clip), Similarity(clip)
        key = f"proxy {engine.prompts.digest} {engine.config.seed} {engine.config.prediction_type} {engine.arithmetic.bf16} {model.size}"
        drawn = DrawnSet(model.source, plan_for(model), texts, key, 0, lambda: TeacherDrawer(engine), BATCH)
        samples = Collection(drawn, len(texts), texts)
        samples.fill([self.embeddings, self.similarity], Share(), advance)
        self.distance = cmmd(samples.features(self.embeddings))
        self.goal = float(samples.features(self.similarity).mean())

    def measure(self, student: Model, plan: Plan, advance: Progress) -> dict[str, float]:
        """Return `proxy_cmmd` between the student's and the teacher's images, and `proxy_clip` of the student's images."""
        batches = draw(Sampler(student, self.device), plan, self.texts, range(len(self.texts)), BATCH, advance)
        images = [image for drawn in batches for image in drawn]
        found = self.distance(self.embeddings(images, ()))
        score = float(np.mean(self.similarity(images, self.texts)))
        return {"proxy_cmmd": round(found.value, 5), "proxy_clip": round(score, 5)}
