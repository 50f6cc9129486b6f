"""The judge `features`: the diffusion teacher scores pairs with its own network, so that no other model is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sidcli.curation.crops import subject
from sidcli.curation.judge import Pair, Verdict, in_batches, verdicts_of
from sidcli.metrics.transforms import crop_and_resize
from sidcli.models.kind import Cond
from sidcli.models.loading import Model
from sidcli.models.sampler import Sampler
from sidcli.progress import Progress, silent
from sidcli.randomness import normal

SAME_TIME = 0.1
"""Share of the timesteps at which features of panels are compared."""
CAPTION_TIMES = (0.8, 0.9)
"""Shares of the timesteps at which the predictions with and without a caption are compared. A background shows early."""
BATCH = 8
"""Pairs in one call of the network."""


class Relevance:
    """Scores captions with a teacher: how much a caption improves its prediction of the noise in a panel.

    The score of panel x with caption c is the mean over latents and over CAPTION_TIMES of

        (eps - eps(x_t, ""))^2 - (eps - eps(x_t, c))^2,

    which is positive if the caption helps. The noise is a function of `seed` and the same for all panels.
    """

    def __init__(self, teacher: Model, device: torch.device, seed: int = 0):
        self.model, self.device, self.seed = teacher, device, seed
        self.sampler = Sampler(teacher, device)
        self.empty = self.sampler.encode([""])

    @torch.no_grad()
    def encode(self, panels: Sequence[np.ndarray]) -> Tensor:
        """Return the latents [B, C, h, w] of images uint8 [H, W, 3] of any size, at the size of the teacher's images."""
        size = self.model.size
        fitted = [panel if panel.shape[:2] == size else crop_and_resize(panel, *size) for panel in panels]
        return self.sampler.encode_images(fitted)

    def noised(self, x: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, the noise in it [B, C, h, w] and the timesteps t [B] at a share of the path's timesteps."""
        path = self.model.path
        t = int(time * path.steps)
        noise = normal(self.model.latent_shape, self.seed, "judge", t, [0]).to(self.device).expand_as(x)
        return path.noised(x, noise, t), noise, torch.full((len(x),), t, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the teacher's output [B, C, h, w]."""
        return self.model.kind.denoise(self.sampler.denoiser, x_t, t, cond).float()

    @torch.no_grad()
    def __call__(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the scores float32 [B] of panels, given by their latents [B, C, h, w], and their captions."""
        cond = self.sampler.encode(captions).cat(self.empty.expand(len(captions)))
        total = torch.zeros(len(captions), device=self.device)
        for time in CAPTION_TIMES:
            x_t, noise, t = (torch.cat([value, value]) for value in self.noised(latents, time))
            error = self.model.path.noise(self.predict(x_t, t, cond), x_t, t) - noise
            told, untold = error.square().flatten(1).mean(1).chunk(2)
            total += untold - told
        return total / len(CAPTION_TIMES)


class FeaturesJudge:
    """Compares the features of the middle block of a teacher, averaged over positions, by their cosine.

    The crops of the subjects are noised with the same noise at SAME_TIME, and the prompt is the subject. `caption` is the `Relevance` of
    the captions to the whole panels.
    """

    name = "features"
    unit = BATCH
    same_threshold = 0.83  # the best F1 score of the emoji teacher on rendered panels
    caption_threshold = 0.0  # the captions help

    def __init__(self, teacher: Model, device: torch.device, seed: int = 0):
        self.relevance = Relevance(teacher, device, seed)

    @torch.no_grad()
    def features(self, latents: Tensor, subjects: Sequence[str]) -> Tensor:
        """Return the features float32 [B, channels] of panels, given by their latents [B, C, h, w]."""
        relevance = self.relevance
        model = relevance.model
        x_t, _, t = relevance.noised(latents, SAME_TIME)
        with model.kind.features(relevance.sampler.denoiser) as found:
            relevance.predict(x_t, t, relevance.sampler.encode(subjects))
        return found[0].float().mean((2, 3))

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        return in_batches(pairs, BATCH, self._judge, advance)

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        panels = [panel for pair in pairs for panel in pair.panels]
        subjects = self.relevance.encode([subject(panel) for panel in panels])
        seen = self.features(subjects, [pair.subject for pair in pairs for _ in pair.panels])
        caption = self.relevance(self.relevance.encode(panels), [text for pair in pairs for text in pair.captions])
        return verdicts_of(F.cosine_similarity(seen[0::2], seen[1::2]).tolist(), caption.tolist())
