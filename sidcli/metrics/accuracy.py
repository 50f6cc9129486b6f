"""Noun and colour accuracy: exact scores that only a world with ground truth has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidcli.emoji import world
from sidcli.metrics.features import EmojiExtractor


class Accuracy:
    """Counts how often the classifier sees the noun and the background colour that the caption asked for."""

    def __init__(self, extractor: EmojiExtractor):
        self.net = extractor.net
        self.nouns = self.colours = 0

    @torch.no_grad()
    def add(self, images: Tensor, scenes: Sequence[world.Scene]) -> None:
        """images uint8 [B, 64, 64, 3] and the scenes their captions describe, colours named."""
        noun, colour = (logits.argmax(1).tolist() for logits in self.net(images.permute(0, 3, 1, 2).float()))
        self.nouns += sum(world.NOUN_LIST[a] == b.noun for a, b in zip(noun, scenes, strict=True))
        self.colours += sum(world.COLOUR_LIST[a] == b.colour for a, b in zip(colour, scenes, strict=True))
