"""Pictures of any kind that Pillow opens, made square, of one size and in colours."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from examples.training.checks import InputError, reason

Example = dict[str, np.ndarray]
"""A picture and the seed of its mask, by the names ``image`` and ``seed``; or a batch
of them."""

_RATIO = math.log(4 / 3)
"""The sides of a random part are at most as 4 to 3, in logarithm."""
_TRIES = 10


def suffixes() -> frozenset[str]:
    """Returns the suffixes of the files that Pillow can decode, with the dot."""
    kinds = Image.registered_extensions()  # Reading it imports what opens them.
    return frozenset(suffix for suffix, kind in kinds.items() if _decodes(kind))


def _decodes(kind: str) -> bool:
    """Returns whether Pillow decodes a format, and does not only identify it."""
    if kind not in Image.OPEN or Image.MIME.get(kind, "").startswith("video/"):
        return False
    opens, _ = Image.OPEN[kind]
    return not (isinstance(opens, type) and issubclass(opens, ImageFile.StubImageFile))


def read_picture(path: Path) -> Image.Image:
    """Reads a file as ``to_colours`` does.

    Raises:
        InputError: for one that is no picture, or not a whole one.
    """
    try:
        with Image.open(path) as image:
            return to_colours(image)
    except Exception as error:  # What opens the many formats raises many kinds.
        raise InputError(f"data: cannot read {path} ({reason(error)})") from error


def check_picture(content: bytes, path: Path) -> None:
    """Raises an ``InputError`` that names the file unless it is a whole picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            # A JPEG is decoded at an eighth of its size, which is faster.
            image.draft(None, (1, 1))
            to_colours(image)
    except UnidentifiedImageError as error:
        raise InputError(f"data: cannot read {path} (not a picture)") from error
    except Exception as error:  # What opens the many formats raises many kinds.
        raise InputError(f"data: cannot read {path} ({reason(error)})") from error


def to_colours(image: Image.Image) -> Image.Image:
    """Turns a picture the right way up, and its pixels to red, green and blue.

    What is transparent is white. Numbers of 16 bits lose the lower 8. Of an animation,
    the first picture is taken.

    Raises:
        ValueError: for pixels of which nothing says what is black and what white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):
        numbers = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(numbers.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def prepare(image: Image.Image, size: int) -> np.ndarray:
    """Takes the largest square in the middle.

    Args:
        image: of any mode that converts to colours.
        size: pixels along each side of what is returned.

    Returns:
        ``[size, size, 3]``, uint8.
    """
    return _resize(image, size, _square(*image.size))


def augment(
    image: Image.Image,
    size: int,
    crop_min: float | None,
    flip: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Takes a random part, which may be mirrored.

    Args:
        image: of any mode that converts to colours.
        size: pixels along each side of what is returned.
        crop_min: least share of the area that the part may have; None for the square
            that ``prepare`` takes.
        flip: mirrors every other picture.
        rng: decides both.

    Returns:
        ``[size, size, 3]``, uint8.
    """
    box = _square(*image.size)
    if crop_min is not None:
        box = _random_box(*image.size, crop_min, rng)
    pixels = _resize(image, size, box)
    return pixels[:, ::-1] if flip and rng.random() < 0.5 else pixels


def make_example(
    image: Image.Image,
    rng: np.random.Generator,
    size: int,
    crop_min: float | None,
    flip: bool,
) -> Example:
    """Makes one row of a training batch.

    Args:
        image: of any mode that converts to colours.
        rng: decides the seed, and what ``augment`` draws.
        size: pixels along each side of what is returned.
        crop_min: as in ``augment``.
        flip: likewise.

    Returns:
        ``image``, ``[size, size, 3]`` in uint8, and ``seed``, ``[]`` in uint32.
    """
    # The seed is drawn first, so that masks are the same with any augmentation.
    seed = rng.integers(2**32, size=(), dtype=np.uint32)
    return {"image": augment(image, size, crop_min, flip, rng), "seed": seed}


_Box = tuple[float, float, float, float]


def _resize(image: Image.Image, size: int, box: _Box) -> np.ndarray:
    """Scales a part of a picture to a square, ``[size, size, 3]``."""
    image = image.convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


def _square(width: int, height: int) -> _Box:
    """Finds the largest square in the middle."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(
    width: int, height: int, crop_min: float, rng: np.random.Generator
) -> _Box:
    """Draws a random crop: area and aspect ratio first, then the position.

    Where ten such draws do not fit into the picture, it is the square in the middle.
    """
    for _ in range(_TRIES):
        area = rng.uniform(crop_min, 1) * width * height
        ratio = math.exp(rng.uniform(-_RATIO, _RATIO))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left = rng.uniform(0, width - across)
            top = rng.uniform(0, height - down)
            return left, top, left + across, top + down
    return _square(width, height)
