"""Training and validation data: glyphs, image files, or a Hugging Face dataset.

Each process gets its rows of every batch. An iterator over the batches can be resumed
exactly from its state.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.mae.config import DataConfig
from examples.mae.glyphs import draw_glyphs, font_files
from examples.mae.pictures import (
    Example,
    check_picture,
    make_example,
    prepare,
    read_picture,
    suffixes,
)
from examples.mae.streaming import first_pictures, open_stream, stream_batches
from examples.mae.workers import WorkerBatches
from examples.training.checks import InputError, require
from examples.training.files import files_below, list_some, split_hashes
from examples.training.huggingface import is_streamed
from examples.training.task import Data

_THREADS = min(16, os.cpu_count() or 1)


def load_data(
    config: DataConfig,
    image_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Load the configured data.

    The rows of all processes together form a batch. Batches of glyphs and files do not
    depend on the number of processes; batches of a Hugging Face dataset do, because
    each process reads its own images.

    Args:
        config: the configuration.
        image_size: S, pixels along each side of the images.
        seed: determines the order, augmentation and masks of the training images;
            below ``2**32``.
        process_index: index of this process.
        process_count: number of processes that share each batch.

    Returns:
        Batches with ``image``, ``[rows, S, S, 3]`` in uint8, and ``seed``, ``[rows]``
        in uint32, from which the noise of each image's mask is drawn. The validation
        batches are the same in every run. The fingerprint covers all glyphs or files;
        for a Hugging Face dataset, which is never read completely, it covers the
        validation images.

    Raises:
        InputError: if the images cannot be loaded, or are too few.
    """
    load = _load_stream if is_streamed(config.data) else _load_corpus
    return load(config, image_size, seed, process_index, process_count)


@dataclass(frozen=True)
class _Corpus:
    """Images with random access, in disjoint training and validation splits."""

    train: grain.MapDataset[Image.Image]
    validation: grain.MapDataset[Image.Image]
    fingerprint: str
    kind: str
    """What the images are, in the plural."""


def _load_corpus(
    config: DataConfig,
    image_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Load glyphs or files."""
    corpus = _files(config) if config.data else _glyphs(config, image_size)
    train, validation = len(corpus.train), len(corpus.validation)
    count = config.validation_batches * config.batch_size
    require(
        train >= config.batch_size,
        f"data: {train} training {corpus.kind} are too few for a batch of "
        f"{config.batch_size}; provide more data or reduce --batch-size.",
    )
    require(
        validation >= count,
        f"data: {validation} validation {corpus.kind} are too few for "
        f"{config.validation_batches} batches of {config.batch_size}; provide more "
        "data, increase --validation-fraction or reduce --validation-batches.",
    )
    own = slice(process_index, None, process_count)
    data = Data(
        _train_batches(corpus, config, image_size, seed, own),
        _validation_batches(corpus, config, image_size, own),
        corpus.fingerprint,
    )
    if process_index == 0:
        print(
            f"Corpus: {train:,} training and {validation:,} validation {corpus.kind}.",
            flush=True,
        )
    return data


def _load_stream(
    config: DataConfig,
    image_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Load a Hugging Face dataset."""
    require(
        config.workers == 0,
        "workers must be 0 for a Hugging Face dataset, which is read by threads, got "
        f"{config.workers}.",
    )
    train, validation = open_stream(config)
    batches = stream_batches(
        train,
        _example_of(config, image_size),
        config,
        seed,
        process_index,
        process_count,
    )
    images = first_pictures(validation, config, image_size)
    own = slice(process_index, None, process_count)
    data = Data(
        batches,
        {"image": images[:, own], "seed": _validation_seeds(config)[:, own]},
        _hash(images.tobytes()).hex(),
    )
    if process_index == 0:
        same = config.validation_split == config.train_split
        print(
            f"Corpus: {config.data[0]}, streamed; validation on the first "
            f"{config.validation_batches * config.batch_size:,} images of "
            f"{config.validation_split}{', which are also trained on' * same}.",
            flush=True,
        )
    return data


def _glyphs(config: DataConfig, image_size: int) -> _Corpus:
    """Draw the glyphs of all fonts, and split them by character."""
    glyphs = draw_glyphs(image_size, font_files())
    hashes = {_hash(c.encode()): c for c in glyphs.characters}
    _, validation = split_hashes(hashes, config.validation_fraction)
    held_out = {hashes[key] for key in validation}
    chosen = np.array([c in held_out for c in glyphs.characters])
    sides = glyphs.images[~chosen], glyphs.images[chosen]
    datasets = [grain.MapDataset.source(side).map(Image.fromarray) for side in sides]
    fingerprint = _hash(*[_hash(side.tobytes()) for side in sides]).hex()
    return _Corpus(datasets[0], datasets[1], fingerprint, "glyphs")


def _files(config: DataConfig) -> _Corpus:
    """Find the configured image files, without exact duplicates."""
    require(
        "" not in config.data,
        "data: '' is not a file; omit --data to use the glyphs of fonts.",
    )
    found: dict[bytes, Path] = {}  # By the hash of the content.
    paths = list(find_pictures(map(Path, config.data)))
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(_hash_of_picture, paths)
        progress = tqdm(hashes, "Reading", len(paths), unit="file", leave=False)
        for path, digest in zip(paths, progress, strict=True):
            found.setdefault(digest, path)
    require(
        bool(found),
        f"data: no images in {' '.join(config.data)}; pass image files or directories "
        "of images to --data.",
    )
    require(
        len(found) > 1,
        "data: only one image, but training and validation need at least one each; "
        "provide more images.",
    )
    sides = split_hashes(found, config.validation_fraction)
    datasets = [
        grain.MapDataset.source([found[key] for key in side]).map(read_picture)
        for side in sides
    ]
    fingerprint = _hash(*[_hash(*side) for side in sides]).hex()
    return _Corpus(datasets[0], datasets[1], fingerprint, "images")


def _hash_of_picture(path: Path) -> bytes:
    """Read a file, check that it is a complete image, and hash its content."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data: cannot read {path} ({error.strerror}).") from error
    check_picture(content, path)
    return _hash(content)


def find_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the given files, and the image files below the given directories, in order.

    In a directory, hidden files are skipped, and so are files without the suffix of a
    format that Pillow can decode.

    Raises:
        InputError: if a path does not exist.
    """
    known = suffixes()
    for path in paths:
        require(path.exists(), f"data: {path} does not exist.")
        if not path.is_dir():
            yield path
            continue
        files = files_below(path)
        pictures = [file for file in files if file.suffix.lower() in known]
        others = sorted({*files} - {*pictures})
        if others:
            print(f"Ignored {len(others)} non-image files: {list_some(others)}.")
        yield from pictures


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def _train_batches(
    corpus: _Corpus, config: DataConfig, image_size: int, seed: int, own: slice
) -> grain.IterDataset[Example]:
    """Build the training data of a process.

    Images are reshuffled in each epoch. The augmentation and mask of an image depend
    only on the seed and on its position in the endless sequence.
    """
    dataset = corpus.train.shuffle(seed).repeat()
    dataset = dataset.random_map(_example_of(config, image_size), seed=seed)
    # Rows p, p + P, ... of the batch that a single process would read.
    dataset = dataset[own]
    # Nothing is dropped from an endless dataset, but with drop_remainder=False Grain
    # would round its length up, one row too far.
    dataset = dataset.batch(config.batch_size // own.step, drop_remainder=True)
    # All workers together use as many threads as a single process would.
    threads = max(1, _THREADS // max(1, config.workers))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    if config.workers:
        return WorkerBatches(dataset, config.workers, options)
    return dataset.to_iter_dataset(options)


def _example_of(config: DataConfig, image_size: int) -> partial[Example]:
    return partial(
        make_example, size=image_size, crop_min=config.crop_min, flip=config.flip
    )


def _validation_batches(
    corpus: _Corpus, config: DataConfig, image_size: int, own: slice
) -> Example:
    """Load evenly spaced images of the validation split."""
    seeds = _validation_seeds(config)
    chosen = np.linspace(0, len(corpus.validation) - 1, seeds.size).astype(int)
    chosen = chosen.reshape(seeds.shape)[:, own]

    def read(index: int) -> np.ndarray:
        return prepare(corpus.validation[index], image_size)

    with ThreadPoolExecutor(_THREADS) as pool:
        images = np.stack(list(pool.map(read, chosen.ravel().tolist())))
    images = images.reshape(*chosen.shape, image_size, image_size, 3)
    return {"image": images, "seed": seeds[:, own]}


def _validation_seeds(config: DataConfig) -> np.ndarray:
    """Draw the seeds of the validation masks, the same in every run."""
    shape = config.validation_batches, config.batch_size
    return np.random.default_rng(0).integers(2**32, size=shape, dtype=np.uint32)
