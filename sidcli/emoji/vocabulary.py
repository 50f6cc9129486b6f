"""The words that models of the emoji world were trained on, and notes on prompts with unknown words."""

from __future__ import annotations

import difflib
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import count, islice
from typing import Any

from sidcli.emoji.nouns import NOUNS
from sidcli.emoji.world import (
    ADJECTIVES,
    COLOR_LIST,
    COLOR_TEMPLATES,
    MASS_NOUNS,
    PLAIN_TEMPLATES,
    PLURAL_NOUNS,
    PROMPT_SEED,
    caption,
    plural,
    scene,
)

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SHOWN, LONGEST, EXAMPLES, WIDTH = 5, 40, 12, 100


@cache
def nouns() -> frozenset[str]:
    """Return all nouns in singular and plural."""
    return frozenset(form for noun in NOUNS for form in (noun, plural(noun)))


@cache
def words() -> frozenset[str]:
    """Return every word of the captions that the models were trained on."""
    templates = " ".join((*PLAIN_TEMPLATES, *COLOR_TEMPLATES))
    return nouns() | {*COLOR_LIST, *ADJECTIVES, "a", "an", *WORD.findall(re.sub(r"\{\w+\}", " ", templates))}


def spelled(text: str) -> list[str]:
    """Return the words of a text, in lower case and without a possessive 's, followed by each of its emoji."""
    found = [re.sub(r"['\u2019]s$", "", word) for word in WORD.findall(text.casefold())]
    return found + [character for character in text if unicodedata.category(character) in ("So", "Cn")]


def close(word: str) -> list[str]:
    """Return known words to suggest for an unknown word: the noun of an emoji, or up to two words with a similar spelling."""
    pictured = [noun for noun, emoji in NOUNS.items() if word in emoji]
    return pictured or (difflib.get_close_matches(word, [*NOUNS, *COLOR_LIST], 2, 0.7) if len(word) > 3 else [])


def remark(texts: Sequence[str], model: str) -> str:
    """Return a note on unknown words in prompts and on a prompt without a noun; empty if there is nothing to report."""
    unknown: dict[str, None] = {}
    idle = ""
    for text in texts:
        found = spelled(text)
        odd = [word for word in found if word not in words()]
        unknown |= dict.fromkeys(odd)
        if not odd and not idle and nouns().isdisjoint(found):
            idle = text
    said = []
    if unknown:
        shown = [
            f"{word[:LONGEST]!r}" + (f" ({' or '.join(near)}?)" if (near := close(word)) else "") for word in list(unknown)[:SHOWN]
        ]
        said.append(
            f"{model} does not know {', '.join(shown)}" + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
        )
    if idle:
        said.append(f"{idle[:LONGEST]!r} names nothing to draw")
    hint = f"`sid sample --list-prompts` prints the {len(NOUNS)} nouns and {len(COLOR_LIST)} colors it knows"
    return f"note: {'; '.join(said)}; {hint}" if said else ""


def summary() -> dict[str, Any]:
    """Return the nouns, colors and adjectives that the models know, and example captions."""
    pictures = ((index, scene(PROMPT_SEED, index)) for index in count())
    # Training captions of plural and mass nouns can be ungrammatical ("one cherries"), so they are not used as examples.
    regular = ((index, picture) for index, picture in pictures if picture.noun not in PLURAL_NOUNS | MASS_NOUNS)
    examples = [caption(picture, PROMPT_SEED, index, "train").text for index, picture in islice(regular, EXAMPLES)]
    adjectives = [word for word in ADJECTIVES if word not in COLOR_LIST]
    return {"nouns": list(NOUNS), "colors": list(COLOR_LIST), "adjectives": adjectives, "examples": examples}


def lines() -> list[str]:
    """Return the summary as lines of text."""
    content = summary()
    shown = []
    for name in ("nouns", "colors", "adjectives"):
        title = f"{len(content[name])} {'background colors' if name == 'colors' else name}:"
        shown += [title, *textwrap.wrap(", ".join(content[name]), WIDTH, initial_indent="  ", subsequent_indent="  "), ""]
    return [*shown, "examples:", *(f"  {text}" for text in content["examples"])]
