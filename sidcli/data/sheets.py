"""Prompts of sheets: images with several panels that show one subject in different scenes. A prompt is a function of (seed, index).

- The emoji world: a noun on backgrounds of different colors, in the words of its sheets (`emoji.identities`).
- The built-in grammar: things and subjects of `prompts/general.json`, each at several of its places.
- A list of the user: each prompt is a subject, at places of the grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from sidcli.data.prompts import EmojiPrompts, Grammar, Prompts, shipped_folder
from sidcli.randomness import numpy_generator

COUNTS = {2: "two", 4: "four"}
SIDES = {2: ("left", "right"), 4: ("top left", "top right", "bottom left", "bottom right")}
"""Number of panels -> their places, in reading order."""


class SheetPrompt(NamedTuple):
    """The prompt of a sheet, its subject, and a caption for each panel alone."""

    text: str
    subject: str
    captions: tuple[str, ...]


def sheet_prompt(prompts: Prompts, seed: int, index: int, panels: int) -> SheetPrompt:
    """Return the prompt of sheet `index` with 2 or 4 panels, for a source of prompts."""
    rng = numpy_generator(seed, "sheet prompt", index)
    if isinstance(prompts, EmojiPrompts):
        from sidcli.emoji import identities, world

        noun = world.NOUN_LIST[rng.integers(len(world.NOUN_LIST))]
        colors = tuple(world.COLOR_LIST[place] for place in rng.permutation(len(world.COLOR_LIST))[:panels])
        captions = tuple(identities.sheet_caption(noun, (color,)) for color in colors)
        return SheetPrompt(identities.sheet_caption(noun, colors), noun, captions)
    words = places().words
    if isinstance(prompts, Grammar):
        kind = rng.integers(2)
        subject = _word(rng, words["subject"]) if kind else f"{_word(rng, words['attribute'])} {_word(rng, words['thing'])}"
    else:
        subject = prompts.at(seed, index)
    return sheet_of(subject, [words["place"][place] for place in rng.permutation(len(words["place"]))[:panels]])


def sheet_of(subject: str, scenes: Sequence[str]) -> SheetPrompt:
    """Return the prompt of a sheet that shows a subject in 2 or 4 scenes."""
    captions = tuple(f"{subject} {scene}" for scene in scenes)
    listed = "; ".join(f"{side}: {caption}" for side, caption in zip(SIDES[len(scenes)], captions, strict=True))
    return SheetPrompt(f"a grid of {COUNTS[len(scenes)]} images of the same subject, {listed}", subject, captions)


@cache
def places() -> Grammar:
    return Grammar.read(shipped_folder() / "general.json")


def _word(rng: object, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]  # type: ignore[attr-defined, no-any-return]
