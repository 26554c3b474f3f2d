"""Images without a download: glyphs of the fonts that ship with matplotlib."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

_MARGIN = 1
"""White pixels on each side of a large glyph."""


@dataclass(frozen=True)
class Glyphs:
    """Distinct glyphs, black on white."""

    images: np.ndarray
    """``[glyphs, size, size]``, uint8."""
    characters: list[str]
    """The character of each glyph."""


def font_files() -> list[Path]:
    """List the font files of matplotlib, of all families and styles."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
    # LastResort has a placeholder for every Unicode character.
    return sorted(font for font in fonts if not font.name.startswith("LastResort"))


def draw_glyphs(size: int, fonts: Iterable[Path]) -> Glyphs:
    """Render every character of each font.

    Glyphs are centered, and shrunk if they do not fit into the image at the font's
    size. Blank glyphs are skipped, and so are duplicates of an earlier glyph, even of
    another character or font.

    Args:
        size: pixels along each side of an image; also the font size.
        fonts: TrueType files.
    """
    found: dict[bytes, str] = {}  # Characters by pixels.
    for path in tqdm(list(fonts), "Drawing glyphs", unit="font", leave=False):
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(FT2Font(str(path)).get_charmap()):
            image = _draw(chr(code), font, size)
            if image.getextrema() != (255, 255):
                found.setdefault(image.tobytes(), chr(code))
    images = np.frombuffer(b"".join(found), np.uint8).reshape(-1, size, size)
    return Glyphs(images, list(found.values()))


def _draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """Render a character in the center of a greyscale image."""
    room = max(1, size - 2 * _MARGIN)
    left, top, right, bottom = font.getbbox(character)
    while (longest := max(right - left, bottom - top)) > room and font.size > 1:
        font = font.font_variant(size=max(1, font.size * room / longest))
        left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (size, size), 255)
    corner = (size - left - right) // 2, (size - top - bottom) // 2
    ImageDraw.Draw(image).text(corner, character, fill=0, font=font)
    return image
