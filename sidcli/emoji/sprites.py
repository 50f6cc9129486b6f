"""Draw the sprite sheet of the emoji world: one tile per noun, from the Noto Color Emoji font.

The sheet and the font's license are committed in this folder. Run this module by hand when the list of nouns changes:

    python -m sidcli.emoji.sprites /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sidcli.emoji.nouns import NOUNS

TILE = 56
COLUMNS = 12
SHEET = Path(__file__).with_name("sprites.png")
# The Debian build of the font holds bitmaps of this size only.
FONT_SIZE = 109


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """Return one emoji as a TILE x TILE RGBA image, cropped and centered. Raises ValueError if the font has no glyph for it."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no glyph for {character!r} (U+{ord(character[0]):X})")
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    # Without premultiplied alpha, resizing would mix the transparent black around the emoji into its edges.
    return square.convert("RGBa").resize((TILE, TILE), Image.Resampling.LANCZOS).convert("RGBA")


def main(font_path: str) -> None:
    font = ImageFont.truetype(font_path, FONT_SIZE)
    rows = -(-len(NOUNS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE), (0, 0, 0, 0))
    for position, character in enumerate(NOUNS.values()):
        sheet.paste(draw_glyph(font, character), (position % COLUMNS * TILE, position // COLUMNS * TILE))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
