"""Pictures without a download: the glyphs of all fonts that matplotlib ships."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

_MARGIN = 1
"""Pixels that stay white on each side of a large glyph."""


@dataclass(frozen=True)
class Glyphs:
    """Different glyphs, black on white."""

    images: np.ndarray
    """``[glyphs, size, size]``, uint8."""
    characters: list[str]
    """The character that each of them shows."""


def font_files() -> list[Path]:
    """Lists the font files of matplotlib, of all families and styles."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
    # This one has a placeholder for every character there is.
    return sorted(font for font in fonts if not font.name.startswith("LastResort"))


def draw_glyphs(size: int, fonts: Iterable[Path]) -> Glyphs:
    """Draws every character that each font has.

    A glyph has the size of its font, unless it has to be smaller to be seen whole, and
    is in the middle of its picture. One without ink is left out, and so is one that
    looks the same as another before it, be it of another character or font.

    Args:
        size: pixels along each side of a picture.
        fonts: TrueType files.
    """
    found: dict[bytes, str] = {}  # The character by the pixels.
    for path in tqdm(list(fonts), "Drawing glyphs", unit="font", leave=False):
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(FT2Font(str(path)).get_charmap()):
            image = _draw(chr(code), font, size)
            if image.getextrema() != (255, 255):
                found.setdefault(image.tobytes(), chr(code))
    images = np.frombuffer(b"".join(found), np.uint8).reshape(-1, size, size)
    return Glyphs(images, list(found.values()))


def _draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """Draws a character in the middle of a picture of shades of grey."""
    room = max(1, size - 2 * _MARGIN)
    left, top, right, bottom = font.getbbox(character)
    while (longest := max(right - left, bottom - top)) > room and font.size > 1:
        font = font.font_variant(size=max(1, font.size * room / longest))
        left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (size, size), 255)
    corner = (size - left - right) // 2, (size - top - bottom) // 2
    ImageDraw.Draw(image).text(corner, character, fill=0, font=font)
    return image
