"""The classifier of the emoji world. It predicts noun and background color of an image; the emoji FID uses its features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidcli.emoji.world import COLOR_LIST, NOUN_LIST

FEATURES = 128


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.GroupNorm(8, outside),
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inside, outside, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.body(x) + self.skip(x))


class Classifier(nn.Module):
    """Maps images float32 [B, 3, 64, 64] in 0..255 (the input format of clean-fid's networks) to features or logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.SiLU())
        self.body = nn.Sequential(Residual(24, 32), Residual(32, 64), Residual(64, 128), Residual(128, FEATURES))
        self.noun = nn.Linear(FEATURES, len(NOUN_LIST))
        self.color = nn.Linear(FEATURES, len(COLOR_LIST))

    def features(self, x: Tensor) -> Tensor:
        """Return features float32 [B, 128]: the average over the last 4 x 4 grid."""
        return self.body(self.stem(x / 127.5 - 1.0)).mean((2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits over NOUN_LIST [B, nouns] and over COLOR_LIST [B, 10]."""
        features = self.features(x)
        return self.noun(features), self.color(features)
