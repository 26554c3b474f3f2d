"""Figures of reconstructions: originals, visible patches, predictions."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.mae.model import Reconstruction
from examples.mae.pictures import Example

_COLUMNS = 8
"""Maximum number of images side by side; the others wrap below."""
_SIDE = 128
"""Smaller images are enlarged to about this many pixels along each side."""
_DPI = 128
"""A power of two, so that pixels convert to inches exactly."""
_FONT_SIZE = 9
"""In points, for an image that is one inch wide."""
_FRAME = 204
_WHITE = 255


def choose(validation: Example, count: int) -> Example:
    """Select evenly spaced examples from all batches.

    Args:
        validation: the batches, ``[batches, B, ...]``.
        count: number of examples.

    Returns:
        ``[count, ...]``, or all examples if there are fewer.
    """
    rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in validation.items()}
    total = len(rows["seed"])
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    return {name: x[chosen] for name, x in rows.items()}


def draw(models: Mapping[str, Reconstruction], path: Path) -> None:
    """Plot originals, visible patches and each model's reconstructions to a PNG.

    Small images are enlarged by an integer factor, without smoothing.

    Args:
        models: reconstructions of the same images and masks, by model name.
        path: the PNG file.
    """
    first = next(iter(models.values()))
    rows = {"original": first.original, "what the encoder saw": first.seen}
    rows |= {name: made.filled for name, made in models.items()}
    pictures = np.stack([np.asarray(row) for row in rows.values()])
    scale = max(1, round(_SIDE / pictures.shape[2]))
    pictures = pictures.repeat(scale, axis=2).repeat(scale, axis=3)
    side = pictures.shape[2]
    gap = side // 16
    bands = _arrange(pictures, gap)

    count, band_height, sheet_width, _ = bands.shape
    width, height = side + sheet_width, count * band_height
    figure = Figure(figsize=(width / _DPI, height / _DPI))
    figure.figimage(bands.reshape(height, sheet_width, 3), xo=side, origin="upper")
    row_height = (band_height - gap) / len(rows)
    for band in range(count):
        for row, name in enumerate(rows):
            center = band * band_height + (row + 0.5) * row_height
            figure.text(
                (side - gap / 2) / width,
                1 - center / height,
                textwrap.fill(name, 12, break_long_words=False),
                fontsize=_FONT_SIZE * side / _DPI,
                horizontalalignment="right",
                verticalalignment="center",
            )
    figure.savefig(path, dpi=_DPI, format="png")


def _arrange(pictures: np.ndarray, gap: int) -> np.ndarray:
    """Tile images side by side, each in a thin frame.

    Args:
        pictures: ``[rows, N, S, S, 3]``.
        gap: pixels between images, and below each band.

    Returns:
        ``[bands, height, width, 3]``; a band holds all rows of up to eight images.
    """
    rows, count, *_ = pictures.shape
    columns = min(count, _COLUMNS)
    pictures = _pad(pictures, 1, 1, _FRAME, (2, 3))
    pictures = _pad(pictures, gap // 2, gap - gap // 2, _WHITE, (2, 3))
    pictures = _pad(pictures, 0, -count % columns, _WHITE, (1,))
    side = pictures.shape[2]
    bands = pictures.reshape(rows, -1, columns, side, side, 3)
    bands = bands.transpose(1, 0, 3, 2, 4, 5)
    bands = bands.reshape(-1, rows * side, columns * side, 3)
    return _pad(bands, 0, gap, _WHITE, (1,))


def _pad(
    x: np.ndarray, before: int, after: int, value: int, axes: tuple[int, ...]
) -> np.ndarray:
    widths = [(before, after) if i in axes else (0, 0) for i in range(x.ndim)]
    return np.pad(x, widths, constant_values=value)
