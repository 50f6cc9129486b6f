"""The judge `dino`: cosines of the class tokens of DINOv2. Captions are scored by the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from sidcli.curation.crops import subject
from sidcli.curation.features import Relevance
from sidcli.curation.judge import Pair, Verdict, in_batches, verdicts_of
from sidcli.metrics.features import DinoFeatures
from sidcli.models.loading import Model
from sidcli.progress import Progress, silent

BATCH = 8
"""Pairs in one call of a network."""


def dino_of(model: str, device: torch.device) -> DinoFeatures:
    """Return the extractor of the judge. `model`: see `metrics.features.DinoFeatures`."""
    return DinoFeatures(model, device, "the judge dino", "--set judge_model")


class DinoJudge:
    """Compares crops of the subjects by DINOv2. DINOv2 reads no text: `caption` is the teacher's `Relevance`.

    `model` is a folder or a hub id; see `metrics.features.DinoFeatures`.
    """

    name = "dino"
    unit = BATCH
    same_threshold = 0.7  # not measured
    caption_threshold = 0.0

    def __init__(self, model: str, teacher: Model, device: torch.device, seed: int = 0):
        self.dino = dino_of(model, device)
        self.relevance = Relevance(teacher, device, seed)

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        return in_batches(pairs, BATCH, self._judge, advance)

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        panels = [panel for pair in pairs for panel in pair.panels]
        seen = torch.from_numpy(self.dino([subject(panel) for panel in panels], ()))
        caption = self.relevance(self.relevance.encode(panels), [text for pair in pairs for text in pair.captions])
        return verdicts_of(F.cosine_similarity(seen[0::2], seen[1::2]).tolist(), caption.tolist())
