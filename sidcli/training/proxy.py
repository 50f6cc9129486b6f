"""Proxy metrics that show the progress of a distillation, which the losses of SiD do not. They use the teacher's images, no
dataset.

The teacher draws PROXY_IMAGES images once, which are stored in the cache. The student draws the same prompts and seeds in each
evaluation. An open_clip model embeds both sets: the CMMD between them should fall, and the CLIP score should rise to the teacher's.
Saturation, contrast and the diversity of images of one prompt are relative to the teacher's and should come close to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidcli.data.imagesets import Collection, DrawnSet
from sidcli.distributed import Share
from sidcli.engine import Engine
from sidcli.metrics.appearance import contrast, diversity, saturation
from sidcli.metrics.clip import Clip, Embeddings, Similarity
from sidcli.metrics.kid import cmmd
from sidcli.models.drawing import Plan, draw
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import WEIGHTS
from sidcli.progress import Progress, silent

PROXY_IMAGES = 128
DIVERSITY_IMAGES = 16
"""Images of one prompt, with different seeds."""
BATCH = 16
SMALLEST = 1e-4
"""Lower limit of a look of the teacher, by which those of the student are divided."""
PHOTO_CLIP = "ViT-B-32-quickgelu:openai"
"""The smallest widely used CLIP model: a proxy metric must be cheap, and its values are compared only with each other."""


@dataclass(frozen=True)
class TeacherDrawer:
    """Drawer that uses the teacher of an engine."""

    engine: Engine
    truncated = 0

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        advance: Progress = silent,
        references: np.ndarray | None = None,
    ) -> np.ndarray:
        return self.engine.teacher_images(prompts, seeds, plan, advance, references)


class Proxy:
    """Measures the proxy metrics; created once per run. Raises InputError if the CLIP model is not available."""

    def __init__(self, engine: Engine, texts: list[str], advance: Progress):
        model = engine.sampler.model
        self.device, self.texts = engine.device, texts
        hint = "--eval-every 0 trains without measuring"
        clip = Clip(str(WEIGHTS / "clip") if model.is_emoji else PHOTO_CLIP, self.device, hint)
        self.embeddings, self.similarity = Embeddings(clip), Similarity(clip)
        key = f"proxy {engine.prompts.digest} {engine.config.seed} {engine.config.prediction_type} {engine.arithmetic.bf16} {model.size}"
        key += model.text_precision
        self.same = [texts[0]] * DIVERSITY_IMAGES

        def drawn(prompts: list[str], kind: str) -> DrawnSet:
            return DrawnSet(model.source, plan_for(model), prompts, key + kind, 0, lambda: TeacherDrawer(engine), BATCH)

        samples, same = Collection(drawn(texts, ""), len(texts), texts), Collection(drawn(self.same, " one prompt"), len(self.same))
        samples.fill([self.embeddings, self.similarity], Share(), advance)
        same.fill([self.embeddings], Share(), advance)
        self.distance = cmmd(samples.features(self.embeddings))
        self.goal = float(samples.features(self.similarity).mean())
        images = samples.images.read(range(len(texts)))
        self.looks = looks(images, same.features(self.embeddings))
        """Saturation, contrast and diversity of the teacher's images."""

    def measure(self, student: Model, plan: Plan, advance: Progress) -> dict[str, float]:
        """Return `proxy_cmmd` between the student's and the teacher's images, with both ends of its 95 % interval, `proxy_clip` of the
        student's images, and `proxy_saturation`, `proxy_contrast` and `proxy_diversity` relative to those of the teacher's images."""
        sampler = Sampler(student, self.device)

        def images(prompts: list[str]) -> list[np.ndarray]:
            batches = draw(sampler, plan, prompts, range(len(prompts)), BATCH, advance)
            return [image for drawn in batches for image in drawn]

        drawn = images(self.texts)
        distance = self.distance(self.embeddings(drawn, ()))
        own = looks(drawn, self.embeddings(images(self.same), ()))
        found = {"cmmd": distance.value, "cmmd_low": distance.low, "cmmd_high": distance.high}
        found["clip"] = float(np.mean(self.similarity(drawn, self.texts)))
        found |= {name: value / max(self.looks[name], SMALLEST) for name, value in own.items()}
        return {f"proxy_{name}": round(value, 5) for name, value in found.items()}


def looks(images: Sequence[np.ndarray], embeddings: np.ndarray) -> dict[str, float]:
    """Return saturation and contrast of images, and the diversity of the embeddings of images of one prompt."""
    return {"saturation": saturation(images), "contrast": contrast(images), "diversity": diversity(embeddings)}
