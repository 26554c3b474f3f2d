"""Pictures of a Hugging Face dataset, streamed.

Each process reads its own pictures, and shuffles them, still as small as in their
files, among the next. Threads decode them.
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
    """Opens the dataset that the configuration names.

    Returns:
        The split to train on and the split to validate on, each a
        ``datasets.IterableDataset`` whose pictures are not decoded.

    Raises:
        InputError: for a dataset that cannot be had, or without such pictures.
    """
    train, validation = open_splits(
        config.data,
        {
            "train_split": config.train_split,
            "validation_split": config.validation_split,
        },
        Column("image_column", config.image_column, "pictures", _is_picture),
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
    """Makes the training data of a process from a streamed dataset.

    To go on from a state, the ``shuffle_images`` pictures among which the next is drawn
    are read again.

    Args:
        dataset: a ``datasets.IterableDataset``.
        example: makes a row of a batch.
        config: the configuration.
        seed: decides the order within the ``shuffle_images`` pictures, and what is
            drawn for each.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Returns:
        This process's rows of each batch, without end.
    """
    own = own_share(dataset, config.data[0], process_index, process_count)
    own_seed = int(np.random.SeedSequence([seed, process_index]).generate_state(1)[0])
    rows = config.batch_size // process_count
    pictures = grain.experimental.WindowShuffleIterDataset(
        Rows(own, partial(_value, name=config.image_column)),
        window_size=config.shuffle_images,
        # The number of the shuffle is added to it, and the sum has to fit 32 bits.
        seed=own_seed % 2**31,
    )
    batches = (
        pictures.random_map(_with_seed, seed=own_seed)
        .batch(rows, batch_fn=list)
        .map(partial(_make_batch, example=example))
    )
    # A shuffle begins when all its pictures are there: read them during the last.
    return Prefetch(batches, max(2, config.shuffle_images // rows))


def first_pictures(dataset: Any, config: DataConfig, image_size: int) -> np.ndarray:
    """Takes the first pictures of a streamed dataset, to validate on.

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
        for value in tqdm(values, "Reading", count, unit="picture", leave=False)
    ]
    require(
        len(images) == count,
        f"validation_split: {config.validation_split!r} has {len(images)} pictures, "
        f"too few for {shape[0]} batches of {shape[1]}; pass fewer "
        "--validation-batches",
    )
    return np.stack(images).reshape(*shape, image_size, image_size, 3)


def _is_picture(value: Any) -> bool:
    """Tells whether the value of a row is a picture, decoded or not."""
    return isinstance(value, Image.Image | bytes) or (
        isinstance(value, dict) and {"bytes", "path"} <= value.keys()
    )


def _value(row: Mapping[str, Any], name: str) -> Any:
    return row.get(name)


def _encoded(dataset: Any, config: DataConfig) -> Any:
    """Turns off the decoding of a dataset's pictures."""
    import datasets

    name = config.image_column
    if isinstance((dataset.features or {}).get(name), datasets.Image):
        return dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _decode(value: Any) -> Image.Image:
    """Decodes a picture of a dataset."""
    import datasets

    try:
        if isinstance(value, bytes):
            value = {"bytes": value, "path": None}
        if isinstance(value, dict):
            value = datasets.Image().decode_example(value)
        return to_colours(value)
    except Exception as error:  # What opens the many formats raises many kinds.
        raise InputError(
            f"data: cannot read a picture of the dataset ({reason(error)})"
        ) from error


def _with_seed(value: Any, rng: np.random.Generator) -> tuple[Any, int]:
    return value, int(rng.integers(2**63))


def _make_batch(
    rows: Sequence[tuple[Any, int]],
    example: Callable[[Image.Image, np.random.Generator], Example],
) -> Example:
    """Makes a batch of pictures, each with the seed of what is drawn for it."""

    def make(row: tuple[Any, int]) -> Example:
        value, seed = row
        return example(_decode(value), np.random.default_rng(seed))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = list(pool.map(make, rows))
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}
