"""The judge `clip`: cosines of the embeddings of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sidcli.curation.crops import subject
from sidcli.curation.judge import Pair, Verdict, in_batches, verdicts_of
from sidcli.metrics.clip import Clip
from sidcli.models.loading import Known
from sidcli.models.sources import WEIGHTS
from sidcli.progress import Progress, silent

EMOJI = str(WEIGHTS / "clip")
"""The open_clip model of the emoji world."""
PUBLIC = "ViT-L-14-336-quickgelu:openai"
HINT = "--set judge_model=FOLDER with open_clip_config.json and open_clip_model.safetensors, or --set judge_model=ARCHITECTURE:TAG"
EMOJI_THRESHOLDS = 0.9, -0.25
"""Of `same`, the best F1 score on rendered panels; of `caption`, which hardly tells captions apart on subjects with an identity, what nine
in ten true pairs of captions reach."""
THRESHOLDS = 0.85, 0.2
"""Of other models; not measured."""
BATCH = 32
"""Pairs in one call of the network."""


def usual_model(teacher: Known | None) -> str:
    """Return the default model: that of the emoji world for its teachers."""
    return EMOJI if teacher is not None and teacher.is_emoji else PUBLIC


class ClipJudge:
    """Compares crops of the subjects with each other, and each whole panel with its caption.

    `model` is a folder or ARCHITECTURE:TAG; see `metrics.clip.Clip`.
    """

    name = "clip"
    unit = BATCH

    def __init__(self, model: str, device: torch.device):
        self.clip = Clip(model, device, HINT)
        self.same_threshold, self.caption_threshold = EMOJI_THRESHOLDS if model == EMOJI else THRESHOLDS

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        return in_batches(pairs, BATCH, self._judge, advance)

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        panels = [panel for pair in pairs for panel in pair.panels]
        subjects = self.clip.see([subject(panel) for panel in panels])
        captions = self.clip.read([caption for pair in pairs for caption in pair.captions])
        caption = (self.clip.see(panels) * captions).sum(1)
        return verdicts_of((subjects[0::2] * subjects[1::2]).sum(1).tolist(), caption.tolist())
