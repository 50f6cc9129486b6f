"""Identities of the emoji world: attributes of a subject that no caption names, and sheets that show one subject several times.

A subject is a noun with an identity: a tint, the color of an outline, and a badge at one of its corners, 120 identities for each noun.
Captions name the noun and the background. A model that sees only the text can therefore only guess an identity, and one that sees a
reference image can copy it. As in `world`, every image is a pure function of (seed, index), and its ground truth is exact.

Identities are in three disjoint sets: models train on "train", thresholds of judges are set on "judge", and results are measured on
"eval".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sidcli.emoji import world
from sidcli.emoji.world import COLOR_LIST, COLORS, NOUN_LIST, SIZE
from sidcli.randomness import numpy_generator

TINTS: dict[str, tuple[int, int, int] | None] = {
    "none": None,
    "red": (255, 70, 60),
    "yellow": (255, 225, 40),
    "green": (60, 220, 90),
    "blue": (70, 130, 255),
    "purple": (190, 90, 255),
}
TINT_STRENGTH = 0.6
# No background has one of these colors, so that an outline is visible on each of them.
OUTLINES = {"cyan": (0, 235, 235), "orange": (255, 140, 0), "magenta": (255, 0, 190), "lime": (170, 255, 0), "navy": (0, 0, 120)}
OUTLINE_WIDTH = 3
CORNERS = ("top left", "top right", "bottom left", "bottom right")
BADGE_RADIUS = 6
SPRITE_SIZES = (32, 36, 40, 44, 48)
MARGIN = 4
"""Least distance of a sprite from the border of the image, so that its outline and its badge are inside."""
BROKEN = 0.3
"""Share of the sheets in which some panel shows another identity."""
TINT_LIST, OUTLINE_LIST = tuple(TINTS), tuple(OUTLINES)

Panels = Literal[1, 2, 4]
Use = Literal["train", "judge", "eval"]
USES: tuple[Use, ...] = ("train",) * 8 + ("judge", "eval")


class Identity(NamedTuple):
    """Attributes of a subject, as positions in TINT_LIST, OUTLINE_LIST and CORNERS."""

    tint: int
    outline: int
    corner: int


COUNTS = Identity(len(TINT_LIST), len(OUTLINE_LIST), len(CORNERS))
"""Number of values of each attribute."""
IDENTITIES = tuple(Identity(*map(int, place)) for place in np.ndindex(*COUNTS))


@dataclass(frozen=True)
class Portrait:
    """The ground truth of one panel. Size and position are in pixels, from the top left of the panel."""

    noun: str
    identity: Identity
    color: str
    size: int
    left: int
    top: int
    mirror: bool
    shade: float


@dataclass(frozen=True)
class Sheet:
    """An image of 1, 2 or 4 panels: one, two side by side, or two rows of two."""

    panels: tuple[Portrait, ...]
    is_broken: bool
    """Whether the panels show different identities."""

    @property
    def noun(self) -> str:
        return self.panels[0].noun

    @property
    def colors(self) -> tuple[str, ...]:
        return tuple(panel.color for panel in self.panels)


def use_of(noun: str, identity: Identity) -> Use:
    """Return the set to which an identity of a noun belongs."""
    text = f"identity {noun} {identity.tint} {identity.outline} {identity.corner}"
    return USES[int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") % len(USES)]


def identities(noun: str, use: Use) -> list[Identity]:
    """Return the identities of a noun in a set."""
    return [identity for identity in IDENTITIES if use_of(noun, identity) == use]


def other_identity(identity: Identity, rng: np.random.Generator) -> Identity:
    """Return an identity that differs in one, two or three attributes, drawn at random."""
    changed = rng.permutation(len(COUNTS))[: rng.integers(1, len(COUNTS) + 1)]
    values = list(identity)
    for place in changed:
        values[place] = (values[place] + rng.integers(1, COUNTS[place])) % COUNTS[place]
    return Identity(*map(int, values))


def portrait(noun: str, identity: Identity, color: str, rng: np.random.Generator) -> Portrait:
    """Return a subject on a background at a random size and place."""
    size = int(SPRITE_SIZES[rng.integers(len(SPRITE_SIZES))])
    left, top = (int(place) for place in rng.integers(MARGIN, SIZE - MARGIN - size + 1, 2))
    return Portrait(noun, identity, color, size, left, top, bool(rng.integers(2)), float(rng.uniform(0.94, 1.04)))


def sheet(seed: int, index: int, panels: Panels, use: Use = "train", broken: float = BROKEN) -> Sheet:
    """Return sheet `index` of the endless list of `seed`. The backgrounds of its panels differ.

    In a share `broken` of the sheets, the last panel and perhaps others have another identity.
    """
    rng = numpy_generator(seed, f"sheet {panels} {use}", index)
    noun = NOUN_LIST[rng.integers(len(NOUN_LIST))]
    known = identities(noun, use)
    identity = known[rng.integers(len(known))]
    colors = [COLOR_LIST[place] for place in rng.permutation(len(COLOR_LIST))[:panels]]
    shown = [identity] * panels
    is_broken = panels > 1 and bool(rng.random() < broken)
    if is_broken:
        for place in range(1, panels):
            if place == panels - 1 or rng.integers(2):
                shown[place] = other_identity(identity, rng)
    return Sheet(tuple(portrait(noun, one, color, rng) for one, color in zip(shown, colors, strict=True)), is_broken)


def unknown(index: int) -> Sheet:
    """Return sheet `index` for evaluations: two panels of one subject, with an identity on which no model was trained."""
    return sheet(world.REFERENCE_SEED, index, 2, "eval", 0.0)


@cache
def digest() -> str:
    """Return a short hash of everything that determines the appearance of panels."""
    rules = repr((TINTS, TINT_STRENGTH, OUTLINES, OUTLINE_WIDTH, BADGE_RADIUS, SPRITE_SIZES, MARGIN, USES))
    return hashlib.blake2b(rules.encode() + world.digest().encode(), digest_size=6).hexdigest()


def sheet_caption(noun: str, colors: tuple[str, ...]) -> str:
    """Return the caption of a sheet, which names the noun and the background of each panel in reading order."""
    if len(colors) == 1:
        return f"{world.article(noun)} {noun} on {world.article(colors[0])} {colors[0]} background"
    count = {2: "two", 4: "four"}[len(colors)]
    return f"{count} of the same {noun}, " + ", ".join(f"on {color}" for color in colors)


def render(panel: Portrait) -> np.ndarray:
    """Return a panel as an image uint8 [64, 64, 3]."""
    color, opacity, ring = _figure(NOUN_LIST.index(panel.noun), panel.size, panel.mirror)
    tint = TINTS[TINT_LIST[panel.identity.tint]]
    color = color.astype(np.float32)
    if tint is not None:
        luminance = color @ np.asarray((0.3, 0.59, 0.11), np.float32)
        alpha = opacity[..., 0]  # `color` is premultiplied
        tinted = (0.35 * alpha * 255 + 0.65 * luminance)[..., None] * (np.asarray(tint, np.float32) / 255.0)
        color = (1 - TINT_STRENGTH) * color + TINT_STRENGTH * tinted
    background = np.minimum(np.asarray(COLORS[panel.color], dtype=np.float32) * panel.shade, 255.0)
    image = np.broadcast_to(background, (SIZE, SIZE, 3)).copy()
    edge = OUTLINE_WIDTH
    outer = slice(panel.top - edge, panel.top + panel.size + edge), slice(panel.left - edge, panel.left + panel.size + edge)
    image[outer] = image[outer] * (1.0 - ring) + ring * np.asarray(OUTLINES[OUTLINE_LIST[panel.identity.outline]], np.float32)
    inner = slice(panel.top, panel.top + panel.size), slice(panel.left, panel.left + panel.size)
    image[inner] = image[inner] * (1.0 - opacity) + color
    picture = Image.fromarray((np.clip(image, 0.0, 255.0) + 0.5).astype(np.uint8))
    _draw_badge(picture, panel)
    return np.asarray(picture)


def _draw_badge(picture: Image.Image, panel: Portrait) -> None:
    """Draw a white disc with a black ring over one corner of the sprite's box."""
    row, column = divmod(panel.identity.corner, 2)
    inset = BADGE_RADIUS - 2
    x = panel.left + (panel.size - inset if column else inset)
    y = panel.top + (panel.size - inset if row else inset)
    box = (x - BADGE_RADIUS, y - BADGE_RADIUS, x + BADGE_RADIUS, y + BADGE_RADIUS)
    ImageDraw.Draw(picture).ellipse(box, fill=(255, 255, 255), outline=(0, 0, 0), width=2)


def render_sheet(picture: Sheet) -> np.ndarray:
    """Return a sheet as an image uint8: [64, 64, 3], [64, 128, 3] or [128, 128, 3]."""
    drawn = [render(panel) for panel in picture.panels]
    rows = [np.concatenate(drawn[start : start + 2], 1) for start in range(0, len(drawn), 2)]
    return np.concatenate(rows)


@lru_cache(maxsize=4096)
def _figure(position: int, size: int, mirror: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a sprite at one size and its outline: premultiplied color uint8 [size, size, 3], opacity [size, size, 1] in 0..1, and
    the opacity of the outline [size + 6, size + 6, 1]."""
    color, opacity = world._sprite(position, size, mirror)
    alpha = np.pad(np.round(opacity[..., 0] * 255).clip(0, 255).astype(np.uint8), OUTLINE_WIDTH)
    ring = Image.fromarray(alpha).filter(ImageFilter.MaxFilter(2 * OUTLINE_WIDTH + 1)).filter(ImageFilter.GaussianBlur(0.5))
    return (
        np.clip(color, 0, 255).astype(np.uint8),
        opacity.astype(np.float16),
        (np.asarray(ring, np.float32) / 255.0)[..., None].astype(np.float16),
    )
