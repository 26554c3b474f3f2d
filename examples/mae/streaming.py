"""Images streamed from a Hugging Face dataset.

Each process reads its own images and shuffles them within a window, still compressed.
Threads decode them afterwards.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import grain
import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.mae.config import DataConfig
from examples.mae.pictures import Example, prepare, to_colours
from examples.training.checks import InputError, reason, require
from examples.training.huggingface import (
    Column,
    Prefetch,
    Rows,
    open_splits,
    own_share,
    read_rows,
)


def open_stream(config: DataConfig) -> tuple[Any, Any]:
    """Open the configured dataset.

    Returns:
        The training split and the validation split, each a
        ``datasets.IterableDataset`` whose images are not decoded.

    Raises:
        InputError: if the dataset cannot be loaded, or lacks a split or the images.
    """
    train, validation = open_splits(
        config.data,
        {
            "train_split": config.train_split,
            "validation_split": config.validation_split,
        },
        Column("image_column", config.image_column, "images", _is_picture),
    )
    return _encoded(train, config), _encoded(validation, config)


def stream_batches(
    dataset: Any,
    example: Callable[[Image.Image, np.random.Generator], Example],
    config: DataConfig,
    seed: int,
    process_index: int,
    process_count: int,
) -> grain.IterDataset[Example]:
    """Build the training data of a process from a streamed dataset.

    Resuming from a state reads the current window of ``shuffle_images`` images again.

    Args:
        dataset: a ``datasets.IterableDataset``.
        example: builds a row of a batch.
        config: the configuration.
        seed: determines the order within each window, and the augmentation and mask of
            each image.
        process_index: index of this process.
        process_count: number of processes that share each batch.

    Returns:
        An endless dataset of this process's rows of each batch.
    """
    own = own_share(dataset, config.data[0], process_index, process_count)
    own_seed = int(np.random.SeedSequence([seed, process_index]).generate_state(1)[0])
    rows = config.batch_size // process_count
    pictures = grain.experimental.WindowShuffleIterDataset(
        Rows(own, partial(_value, name=config.image_column)),
        window_size=config.shuffle_images,
        # Grain adds the index of the window, and the sum must fit into 32 bits.
        seed=own_seed % 2**31,
    )
    batches = (
        pictures.random_map(_with_seed, seed=own_seed)
        .batch(rows, batch_fn=list)
        .map(partial(_make_batch, example=example))
    )
    # Shuffling waits for a full window: read the next one during the current one.
    return Prefetch(batches, max(2, config.shuffle_images // rows))


def first_pictures(dataset: Any, config: DataConfig, image_size: int) -> np.ndarray:
    """Load the first images of a streamed dataset, for validation.

    Returns:
        ``[validation_batches, batch_size, S, S, 3]``, uint8.
    """
    shape = config.validation_batches, config.batch_size
    count = shape[0] * shape[1]
    values = islice(
        read_rows(dataset, partial(_value, name=config.image_column)), count
    )
    images = [
        prepare(_decode(value), image_size)
        for value in tqdm(values, "Reading", count, unit="image", leave=False)
    ]
    require(
        len(images) == count,
        f"validation_split: {config.validation_split!r} has {len(images)} images, "
        f"too few for {shape[0]} batches of {shape[1]}; reduce "
        "--validation-batches.",
    )
    return np.stack(images).reshape(*shape, image_size, image_size, 3)


def _is_picture(value: Any) -> bool:
    """Return whether the value of a row is an image, decoded or not."""
    return isinstance(value, Image.Image | bytes) or (
        isinstance(value, dict) and {"bytes", "path"} <= value.keys()
    )


def _value(row: Mapping[str, Any], name: str) -> Any:
    return row.get(name)


def _encoded(dataset: Any, config: DataConfig) -> Any:
    """Disable the decoding of a dataset's images."""
    import datasets

    name = config.image_column
    if isinstance((dataset.features or {}).get(name), datasets.Image):
        return dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _decode(value: Any) -> Image.Image:
    """Decode an image of a dataset."""
    import datasets

    try:
        if isinstance(value, bytes):
            value = {"bytes": value, "path": None}
        if isinstance(value, dict):
            value = datasets.Image().decode_example(value)
        return to_colours(value)
    except Exception as error:  # Pillow's plugins raise errors of many types.
        raise InputError(
            f"data: cannot read an image of the dataset ({reason(error)})."
        ) from error


def _with_seed(value: Any, rng: np.random.Generator) -> tuple[Any, int]:
    return value, int(rng.integers(2**63))


def _make_batch(
    rows: Sequence[tuple[Any, int]],
    example: Callable[[Image.Image, np.random.Generator], Example],
) -> Example:
    """Build a batch from rows of an encoded image and its random seed."""

    def make(row: tuple[Any, int]) -> Example:
        value, seed = row
        return example(_decode(value), np.random.default_rng(seed))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = list(pool.map(make, rows))
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}
