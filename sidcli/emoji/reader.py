"""The reader of the emoji world's identities. It predicts noun, background, tint, outline and badge of a panel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sidcli.emoji import identities, world
from sidcli.emoji.classifier import FEATURES, Classifier
from sidcli.emoji.identities import Identity

HEADS = {"noun": len(world.NOUN_LIST), "color": len(world.COLOR_LIST), **identities.COUNTS._asdict()}
"""Predicted attribute -> number of its values."""


class Reading(NamedTuple):
    """What a panel shows. Noun and color are positions in NOUN_LIST and COLOR_LIST of `world`."""

    noun: int
    color: int
    identity: Identity


class Reader(nn.Module):
    """Maps images float32 [B, 3, 64, 64] in 0..255 to the logits of each attribute in HEADS, [B, values] each."""

    def __init__(self) -> None:
        super().__init__()
        body = Classifier()
        self.stem, self.body = body.stem, body.body
        # The corner of a badge is a place, which an average over the image would lose.
        self.hidden = nn.Sequential(nn.Linear(FEATURES * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(2 * FEATURES, count) for name, count in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        grid = self.body(self.stem(x / 127.5 - 1.0))
        features = torch.cat([grid.mean((2, 3)), self.hidden(grid.flatten(1))], 1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pixels: Tensor) -> list[Reading]:
        """Return the most probable attributes of images uint8 [B, 64, 64, 3]."""
        logits = self(pixels.permute(0, 3, 1, 2).float())
        best = {name: value.argmax(1).tolist() for name, value in logits.items()}
        places = zip(*(best[name] for name in Identity._fields), strict=True)
        return [
            Reading(noun, color, Identity(*place)) for noun, color, place in zip(best["noun"], best["color"], places, strict=True)
        ]
