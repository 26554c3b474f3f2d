"""Decoding of images in any format of Pillow, and cropping to RGB squares."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from examples.training.checks import InputError, reason

Example = dict[str, np.ndarray]
"""An image and the seed of its mask, under the keys ``image`` and ``seed``; or a batch
of them."""

_RATIO = math.log(4 / 3)
"""Logarithm of the largest aspect ratio of a random crop, 4:3."""
_TRIES = 10


def suffixes() -> frozenset[str]:
    """Return the suffixes, with the dot, of the formats that Pillow can decode."""
    kinds = Image.registered_extensions()  # This imports all plugins.
    return frozenset(suffix for suffix, kind in kinds.items() if _decodes(kind))


def _decodes(kind: str) -> bool:
    """Return whether Pillow can decode a format rather than only identify it."""
    if kind not in Image.OPEN or Image.MIME.get(kind, "").startswith("video/"):
        return False
    opens, _ = Image.OPEN[kind]
    return not (isinstance(opens, type) and issubclass(opens, ImageFile.StubImageFile))


def read_picture(path: Path) -> Image.Image:
    """Read an image file and convert it with ``to_colours``.

    Raises:
        InputError: if the file is not an image, or is truncated.
    """
    try:
        with Image.open(path) as image:
            return to_colours(image)
    except Exception as error:  # Pillow's plugins raise errors of many types.
        raise InputError(f"data: cannot read {path} ({reason(error)}).") from error


def check_picture(content: bytes, path: Path) -> None:
    """Raise an ``InputError`` naming the file unless it is a complete image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            # Decode a JPEG at an eighth of its size, which is faster.
            image.draft(None, (1, 1))
            to_colours(image)
    except UnidentifiedImageError as error:
        raise InputError(f"data: cannot read {path} (not an image).") from error
    except Exception as error:  # Pillow's plugins raise errors of many types.
        raise InputError(f"data: cannot read {path} ({reason(error)}).") from error


def to_colours(image: Image.Image) -> Image.Image:
    """Apply an image's EXIF orientation and convert it to RGB.

    Transparency is blended with white. 16-bit values lose their lower 8 bits. Only the
    first frame of an animation is used.

    Raises:
        ValueError: for floating-point pixels, whose black and white are unknown.
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
    """Crop the largest centered square of an image and resize it.

    Args:
        image: in any mode that converts to RGB.
        size: pixels along each side of the result.

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
    """Take a random crop of an image, resize it, and flip it at random.

    Args:
        image: in any mode that converts to RGB.
        size: pixels along each side of the result.
        crop_min: smallest fraction of the area that a crop may cover; None for the
            crop of ``prepare``.
        flip: whether to flip horizontally with probability 0.5.
        rng: draws the crop and the flip.

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
    """Build one row of a training batch.

    Args:
        image: in any mode that converts to RGB.
        rng: draws the seed and the augmentation.
        size: pixels along each side of the result.
        crop_min: as in ``augment``.
        flip: as in ``augment``.

    Returns:
        ``image``, ``[size, size, 3]`` in uint8, and ``seed``, ``[]`` in uint32.
    """
    # Draw the seed first, so that masks do not depend on the augmentation.
    seed = rng.integers(2**32, size=(), dtype=np.uint32)
    return {"image": augment(image, size, crop_min, flip, rng), "seed": seed}


_Box = tuple[float, float, float, float]


def _resize(image: Image.Image, size: int, box: _Box) -> np.ndarray:
    """Resize a box of an image to a square, ``[size, size, 3]``."""
    image = image.convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


def _square(width: int, height: int) -> _Box:
    """Compute the box of the largest centered square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(
    width: int, height: int, crop_min: float, rng: np.random.Generator
) -> _Box:
    """Draw a random crop: area and aspect ratio first, then the position.

    If none of ten draws fits into the image, return the largest centered square.
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
