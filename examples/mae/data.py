"""What a process trains and validates on: glyphs, files, or a Hugging Face dataset.

Each process gets its rows of every batch, and an iterator over the batches has a state
from which another goes on exactly where it was.
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
    """Loads the data that the configuration names.

    The rows of all processes together are the batch. Of glyphs and of files, a batch
    is the same whatever the number of processes; of a Hugging Face dataset, it is not,
    as each process reads its own pictures.

    Args:
        config: the configuration.
        image_size: S, pixels along each side of the pictures.
        seed: decides the order of the training pictures, what is cut from them, and
            their masks; below ``2**32``.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Returns:
        Batches with ``image``, ``[rows, S, S, 3]`` in uint8, and ``seed``, ``[rows]``
        in uint32, from which the noise of each picture's mask is drawn; for validation,
        the same in every run. The fingerprint is of all glyphs or files, and of a
        Hugging Face dataset, which is never read whole, of the validation pictures.

    Raises:
        InputError: for pictures that cannot be had, or too few of them.
    """
    load = _load_stream if is_streamed(config.data) else _load_corpus
    return load(config, image_size, seed, process_index, process_count)


@dataclass(frozen=True)
class _Corpus:
    """Pictures that can be read in any order, in two parts that share none."""

    train: grain.MapDataset[Image.Image]
    validation: grain.MapDataset[Image.Image]
    fingerprint: str
    kind: str
    """What they are, in the plural."""


def _load_corpus(
    config: DataConfig,
    image_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Loads glyphs or files."""
    corpus = _files(config) if config.data else _glyphs(config, image_size)
    train, validation = len(corpus.train), len(corpus.validation)
    count = config.validation_batches * config.batch_size
    require(
        train >= config.batch_size,
        f"data: {train} {corpus.kind} to train on, too few for a batch of "
        f"{config.batch_size}; give more or a smaller --batch-size",
    )
    require(
        validation >= count,
        f"data: {validation} {corpus.kind} to validate on, too few for "
        f"{config.validation_batches} batches of {config.batch_size}; give more, a "
        "larger --validation-fraction or fewer --validation-batches",
    )
    own = slice(process_index, None, process_count)
    data = Data(
        _train_batches(corpus, config, image_size, seed, own),
        _validation_batches(corpus, config, image_size, own),
        corpus.fingerprint,
    )
    if process_index == 0:
        print(
            f"Corpus: {train:,} {corpus.kind} to train on and {validation:,} to "
            "validate on.",
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
    """Loads a Hugging Face dataset."""
    require(
        config.workers == 0,
        f"workers is {config.workers}: threads read a Hugging Face dataset; leave it 0",
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
            f"{config.validation_batches * config.batch_size:,} pictures of "
            f"{config.validation_split}{', which are trained on too' * same}.",
            flush=True,
        )
    return data


def _glyphs(config: DataConfig, image_size: int) -> _Corpus:
    """Draws the glyphs of all fonts; a character is on one side in all of them."""
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
    """Finds the pictures that the configuration names, without exact duplicates."""
    require(
        "" not in config.data,
        "data: '' is no file; leave --data out for the glyphs of fonts",
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
        f"data: no pictures in {' '.join(config.data)}; give --data pictures or "
        "directories of them",
    )
    require(
        len(found) > 1,
        "data: one picture only, and validation takes whole pictures; give more",
    )
    sides = split_hashes(found, config.validation_fraction)
    datasets = [
        grain.MapDataset.source([found[key] for key in side]).map(read_picture)
        for side in sides
    ]
    fingerprint = _hash(*[_hash(*side) for side in sides]).hex()
    return _Corpus(datasets[0], datasets[1], fingerprint, "pictures")


def _hash_of_picture(path: Path) -> bytes:
    """Reads a file, checks that it is a whole picture, and hashes its content."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data: cannot read {path} ({error.strerror})") from error
    check_picture(content, path)
    return _hash(content)


def find_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields each file that is named, and those below each directory, in order.

    In a directory, hidden files are left out, and files whose suffix is not that of a
    picture that Pillow can decode.

    Raises:
        InputError: for a path that does not exist.
    """
    known = suffixes()
    for path in paths:
        require(path.exists(), f"data: there is no {path}")
        if not path.is_dir():
            yield path
            continue
        files = files_below(path)
        pictures = [file for file in files if file.suffix.lower() in known]
        others = sorted({*files} - {*pictures})
        if others:
            print(f"Ignored {len(others)} other files: {list_some(others)}.")
        yield from pictures


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def _train_batches(
    corpus: _Corpus, config: DataConfig, image_size: int, seed: int, own: slice
) -> grain.IterDataset[Example]:
    """Makes the training data of a process.

    Pictures are shuffled anew in each pass over the corpus. What is drawn for a picture
    depends on the seed and on its place in the endless order only.
    """
    dataset = corpus.train.shuffle(seed).repeat()
    dataset = dataset.random_map(_example_of(config, image_size), seed=seed)
    # Rows p, p + P, ... of what is one batch of one process.
    dataset = dataset[own]
    # Nothing is dropped. Else Grain rounds the endless length up, for one row too far.
    dataset = dataset.batch(config.batch_size // own.step, drop_remainder=True)
    # All processes together have as many threads as one would.
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
    """Takes pictures at equal distances from those to validate on."""
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
    """Draws the seeds of the validation masks, the same in every run."""
    shape = config.validation_batches, config.batch_size
    return np.random.default_rng(0).integers(2**32, size=shape, dtype=np.uint32)
