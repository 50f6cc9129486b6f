"""The emoji world: a synthetic text-to-image data set. An image is one emoji on a colored background, 64 x 64 pixels.

No download is needed: every scene is a pure function of (seed, index), so images, captions and ground truth (noun, color, scale,
position) are exact and unlimited in number. Teachers and students are evaluated on two kinds of held-out data, on which they are
not trained:

- `HELD_OUT_PAIRS`: about 5 % of the (noun, color) pairs never appear in a scene unless requested (composition);
- a tenth of all caption texts, chosen by their hash, never appear in the "train" split (word forms).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from sidcli.emoji.nouns import NOUNS
from sidcli.randomness import numpy_generator

SIZE = 64
TILE = 56
SHEET = Path(__file__).with_name("sprites.png")
SHEET_COLUMNS = 12
SPRITE_SIZES = (36, 40, 44, 48, 52, 56)
NOUN_LIST = tuple(NOUNS)

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 58, 52),
    "green": (72, 160, 80),
    "blue": (66, 120, 214),
    "yellow": (244, 208, 72),
    "purple": (136, 84, 190),
    "pink": (242, 150, 184),
    "brown": (134, 92, 60),
    "gray": (150, 152, 156),
    "white": (246, 246, 244),
    "black": (34, 34, 38),
}
COLOR_LIST = tuple(COLORS)

# Each purpose has its own seed, so that no set contains scenes of another set.
TEACHER_SEED, METRIC_SEED, REFERENCE_SEED, FLOOR_SEED, PROMPT_SEED = 1, 2, 3, 4, 5

Split = Literal["train", "eval"]

PLAIN_TEMPLATES = (
    "{a} {noun}",
    "{a} {noun}",
    "{noun}",
    "the {noun}",
    "{plural}",
    "{a} {adjective} {noun}",
    "{adjective} {noun}",
    "an emoji of {a} {noun}",
    "a picture of {a} {noun}",
    "a drawing of {a} {noun}",
    "one {noun}",
    "my {noun}",
    "this is {a} {noun}",
)
COLOR_TEMPLATES = (
    "{a} {noun} on {b} {color} background",
    "{a} {noun} on {b} {color} background",
    "{a} {noun} on {b} {color} background",
    "{a} {noun} on {color}",
    "{noun} on {color}",
    "{noun} on {b} {color} background",
    "the {noun} on {b} {color} background",
    "{plural} on {color}",
    "{plural} on {b} {color} background",
    "{a} {adjective} {noun} on {b} {color} background",
    "{a} {adjective} {noun} on {color}",
    "{adjective} {noun} on {color}",
    "{noun}, {color} background",
    "{a} {noun}, {color} background",
    "{a} {noun} with {b} {color} background",
    "{a} {noun} in front of {b} {color} background",
    "{color} background with {a} {noun}",
    "{b} {color} background with {a} {noun}",
    "an emoji of {a} {noun} on {b} {color} background",
    "a picture of {a} {noun} on {b} {color} background",
)
# A color before the noun describes the noun, never the background: "red apple on blue" has a blue background.
ADJECTIVES = ("cute", "little", "small", "big", "happy", "shiny", "nice", "beautiful", "round", "funny", "new", "old", *COLOR_LIST)
PLURALS = {
    "mouse": "mice",
    "wolf": "wolves",
    "fish": "fish",
    "sheep": "sheep",
    "ox": "oxen",
    "candy": "candies",
    "cherries": "cherries",
}
PLURAL_NOUNS = frozenset({"grapes", "cherries", "fries"})
MASS_NOUNS = frozenset({"corn", "broccoli", "bread", "cheese", "honey"})
"""Nouns that take neither "a" nor a plural."""


@dataclass(frozen=True)
class Scene:
    """The ground truth of one image. Size and position are in pixels, from the top left; `shade` scales the background color."""

    noun: str
    color: str
    size: int
    left: int
    top: int
    mirror: bool
    shade: float


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


HELD_OUT_PAIRS = frozenset(
    (noun, color) for noun in NOUN_LIST for color in COLOR_LIST if _text_hash(f"pair {noun} {color}") % 20 == 0
)


def scene(seed: int, index: int, held_out: bool = False) -> Scene:
    """Return scene `index` of the endless list of `seed`. Its (noun, color) pair is in HELD_OUT_PAIRS if and only if `held_out`."""
    rng = numpy_generator(seed, "scene", index)
    while True:
        noun = NOUN_LIST[rng.integers(len(NOUN_LIST))]
        color = COLOR_LIST[rng.integers(len(COLOR_LIST))]
        if ((noun, color) in HELD_OUT_PAIRS) == held_out:
            break
    size = SPRITE_SIZES[rng.integers(len(SPRITE_SIZES))]
    left, top = (int(place) for place in rng.integers(0, SIZE - size + 1, 2))
    return Scene(noun, color, size, left, top, bool(rng.integers(2)), float(rng.uniform(0.94, 1.04)))


def plural(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith("s") and noun in ("grapes", "fries"):
        return noun
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


def in_split(text: str, split: Split) -> bool:
    """Return whether a caption text belongs to a split: a tenth of all texts is for evaluation only."""
    return (_text_hash(text) % 10 == 0) == (split == "eval")


class Caption(NamedTuple):
    """A caption and the background color that it names, None if it names no background color."""

    text: str
    color: str | None


def caption(picture: Scene, seed: int, index: int, split: Split, name_color: float = 0.8) -> Caption:
    """Return a caption of the scene, a function of (seed, index). It names the background with probability `name_color`.

    Articles, plurals, adjectives and word order vary, as in prompts of users. Only texts of the split are returned.
    """
    wording = _wording(picture, seed, index, split, name_color)
    return Caption(wording.text(picture), picture.color if wording.template in COLOR_TEMPLATES else None)


def shown_caption(picture: Scene, seed: int, index: int, split: Split, name_color: float = 0.8) -> str:
    """Return the same caption for display: without the article or the plural that its noun does not take.

    `caption` keeps them ("a fries"), because the models were trained on its texts and continued runs need the same texts.
    """
    wording = _wording(picture, seed, index, split, name_color)
    template = wording.template
    if picture.noun in PLURAL_NOUNS | MASS_NOUNS:
        template = template.replace("{a} ", "").replace("one ", "some ").replace("{plural}", "{noun}")
    if picture.noun in PLURAL_NOUNS:
        template = template.replace("this is ", "these are ")
    return Wording(template, wording.adjective).text(picture)


def bare_caption(index: int) -> str:
    """Return the shortest prompt for noun `index` of the endless repetition of NOUN_LIST: the noun and its article."""
    noun = NOUN_LIST[index % len(NOUN_LIST)]
    return noun if noun in PLURAL_NOUNS | MASS_NOUNS else f"{article(noun)} {noun}"


class Wording(NamedTuple):
    """A caption template and the adjective to fill in."""

    template: str
    adjective: str

    def text(self, picture: Scene) -> str:
        first = self.adjective if "{a} {adjective}" in self.template else picture.noun
        return self.template.format(
            a=article(first),
            b=article(picture.color),
            noun=picture.noun,
            plural=plural(picture.noun),
            color=picture.color,
            adjective=self.adjective,
        )


def _wording(picture: Scene, seed: int, index: int, split: Split, name_color: float) -> Wording:
    rng = numpy_generator(seed, f"caption {split}", index)
    while True:
        templates = COLOR_TEMPLATES if rng.random() < name_color else PLAIN_TEMPLATES
        template = templates[rng.integers(len(templates))]
        wording = Wording(template, ADJECTIVES[rng.integers(len(ADJECTIVES))])
        if in_split(wording.text(picture), split):
            return wording


@cache
def digest() -> str:
    """Return a short hash of everything that determines the appearance of scenes."""
    rules = repr((NOUN_LIST, COLORS, SPRITE_SIZES, sorted(HELD_OUT_PAIRS)))
    return hashlib.blake2b(rules.encode() + SHEET.read_bytes(), digest_size=6).hexdigest()


@cache
def _sheet() -> Image.Image:
    with Image.open(SHEET, formats=["PNG"]) as sheet:
        return sheet.convert("RGBa")


@cache
def _sprite(position: int, size: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return one sprite at one size: premultiplied color [size, size, 3] in 0..255 and opacity [size, size, 1] in 0..1."""
    column, row = position % SHEET_COLUMNS * TILE, position // SHEET_COLUMNS * TILE
    tile = _sheet().crop((column, row, column + TILE, row + TILE)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(tile, dtype=np.float32)
    if mirror:
        pixels = pixels[:, ::-1]
    return pixels[..., :3], pixels[..., 3:] / 255.0


def render(picture: Scene) -> np.ndarray:
    """Return the scene as an image uint8 [64, 64, 3]."""
    color, opacity = _sprite(NOUN_LIST.index(picture.noun), picture.size, picture.mirror)
    background = np.minimum(np.asarray(COLORS[picture.color], dtype=np.float32) * picture.shade, 255.0)
    image = np.broadcast_to(background, (SIZE, SIZE, 3)).copy()
    window = image[picture.top : picture.top + picture.size, picture.left : picture.left + picture.size]
    window[:] = window * (1.0 - opacity) + color
    return (np.clip(image, 0.0, 255.0) + 0.5).astype(np.uint8)


def render_many(seed: int, indices: range, held_out: bool = False) -> np.ndarray:
    """Return images uint8 [len(indices), 64, 64, 3] of scenes (seed, index)."""
    return np.stack([render(scene(seed, index, held_out)) for index in indices])
