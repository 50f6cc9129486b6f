"""Pairs of panels of the emoji world whose truth is known, and pairs of anything."""

from __future__ import annotations

import numpy as np

from sidcli.curation.judge import Pair
from sidcli.emoji.identities import Sheet, render, sheet, sheet_caption


def pair_of(picture: Sheet) -> Pair:
    """The first two panels of a sheet with their own captions."""
    one, other = picture.panels[:2]
    captions = sheet_caption(one.noun, (one.color,)), sheet_caption(other.noun, (other.color,))
    return Pair(render(one), render(other), one.noun, captions)


def rendered(count: int, seed: int = 7) -> tuple[list[Pair], list[bool]]:
    """Pairs of which half show other identities, and whether each shows one subject."""
    sheets = [sheet(seed, index, 2, "judge", broken=0.5) for index in range(count)]
    return [pair_of(picture) for picture in sheets], [not picture.is_broken for picture in sheets]


def noise(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def noise_pair(seed: int, height: int = 64, width: int = 64) -> Pair:
    first, second = (noise(2 * seed + place, height, width) for place in (0, 1))
    return Pair(first, second, "key", ("a key on a red background", "a key on a blue background"))
