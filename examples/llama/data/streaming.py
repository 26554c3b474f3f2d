"""Streamed Hugging Face datasets, from documents to batches of tokens.

Each process reads its own documents, tokenizes and packs them on the fly, and shuffles
the resulting windows locally.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.llama.config import DataConfig
from examples.llama.data.cache import cached
from examples.llama.data.tokenizer import (
    DOCUMENTS_AT_ONCE,
    encode,
    given_tokenizer,
    load_tokenizer,
    report_loss,
    save_tokenizer,
    train_tokenizer,
)
from examples.training import huggingface
from examples.training.checks import InputError, reason, require
from examples.training.huggingface import Column, Prefetch, Rows, own_share, read_rows

_TOKENIZER_DOCUMENTS = 10_000
"""Documents of a streamed dataset used to train or to check a tokenizer."""


def is_streamed(config: DataConfig) -> bool:
    """Return whether a source in the settings is a Hugging Face dataset."""
    return huggingface.is_streamed(config.data)


def open_splits(config: DataConfig) -> tuple[Any, Any]:
    """Open the dataset that the settings name.

    Returns:
        The training split and the validation split, each a
        ``datasets.IterableDataset``.

    Raises:
        InputError: if the dataset cannot be loaded, or lacks a split or the text
            column.
    """
    splits = {
        "train_split": config.train_split,
        "validation_split": config.validation_split,
    }
    column = Column("text_column", config.text_column, "text", _is_text)
    train, validation = huggingface.open_splits(config.data, splits, column)
    return train, validation


def stream_tokenizer(train: Any, config: DataConfig, vocab_size: int) -> Tokenizer:
    """Load the given tokenizer, or train one on the first documents and cache it."""
    if tokenizer := given_tokenizer(config, vocab_size):
        report_loss(tokenizer, config, _first_documents(train, config))
        return tokenizer

    def fill(directory: Path) -> None:
        documents = list(_first_documents(train, config))
        tokenizer = train_tokenizer(documents, vocab_size, config.end_of_document)
        save_tokenizer(tokenizer, directory / "tokenizer.json")

    (source,) = config.data
    directory = Path(huggingface.name_of(source))
    key = [
        source,
        str(directory.resolve()) if directory.is_dir() else "",
        config.train_split,
        config.text_column,
        config.end_of_document,
        _TOKENIZER_DOCUMENTS,
        vocab_size,
    ]
    directory = cached(config.cache_dir, key, fill)
    return load_tokenizer(str(directory / "tokenizer.json"))


def _first_documents(dataset: Any, config: DataConfig) -> Iterator[str]:
    """Yield the documents used to train or to check a tokenizer."""
    texts = islice(read_rows(dataset, _text(config)), _TOKENIZER_DOCUMENTS)
    try:
        yield from tqdm(texts, "Reading", unit="document", leave=False)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(
            f"data: cannot read {config.data[0]} ({reason(error)})."
        ) from error


def stream_batches(
    dataset: Any,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[np.ndarray]:
    """Build the training data of a process from a streamed dataset.

    Documents are packed end to end, so every token is in exactly one window. Each
    process reads its own files; if their number is not a multiple of the number of
    processes, it reads all files and keeps its own documents. Resuming from a state
    reads the current block of ``shuffle_windows`` windows again.

    Args:
        dataset: a ``datasets.IterableDataset``.
        tokenizer: the tokenizer.
        config: the data settings.
        seed: seed of the order within each block of ``shuffle_windows`` windows.
        process_index: index of this process.
        process_count: number of processes that share each batch.

    Returns:
        An infinite dataset of this process's rows of each batch.
    """
    tokenize = partial(
        encode, tokenizer=tokenizer, end_of_document=config.end_of_document
    )
    own = own_share(dataset, config.data[0], process_index, process_count)
    documents = Rows(own, _text(config))
    tokens = documents.batch(DOCUMENTS_AT_ONCE, batch_fn=list).map(tokenize)
    windows = grain.experimental.WindowShuffleIterDataset(
        _Windows(tokens, config.sequence_length + 1),
        window_size=config.shuffle_windows,
        # Grain adds the number of the block, and the sum must fit in 32 bits.
        seed=seed % 2**31,
    )
    rows = config.batch_size // process_count
    return Prefetch(
        windows.batch(rows),
        # Grain reads a whole block before it yields from it: prefetch the next one.
        max(2, config.shuffle_windows // rows),
    )


def first_batches(dataset: Any, tokenizer: Tokenizer, config: DataConfig) -> np.ndarray:
    """Take the first windows of a streamed dataset for validation.

    Returns:
        Tokens, ``[validation_batches, batch_size, sequence_length + 1]``.
    """
    length = config.sequence_length + 1
    count = config.validation_batches * config.batch_size
    texts = read_rows(dataset, _text(config))
    parts: list[np.ndarray] = []
    have = 0
    with tqdm(total=count, desc="Tokenizing", unit="window", leave=False) as bar:
        while have < count * length and (
            some := list(islice(texts, DOCUMENTS_AT_ONCE))
        ):
            parts.append(encode(some, tokenizer, config.end_of_document))
            have += len(parts[-1])
            bar.update(min(have // length, count) - bar.n)
    require(
        have >= count * length,
        f"validation_split: the documents of {config.validation_split!r} fill "
        f"{have // length} windows, too few for {config.validation_batches} batches of "
        f"{config.batch_size}; pass fewer --validation-batches.",
    )
    tokens = np.concatenate(parts)[: count * length]
    return tokens.reshape(config.validation_batches, config.batch_size, length)


def _text(config: DataConfig) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that reads the document of a row, "" if it is missing."""
    return lambda row: row.get(config.text_column) or ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class _Windows(grain.IterDataset[np.ndarray]):  # type: ignore[misc]
    """Windows of equal length, cut from the concatenated arrays of the parent."""

    def __init__(self, parent: grain.IterDataset[np.ndarray], length: int) -> None:
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _WindowIterator(iter(self._parent), self._length)


class _WindowIterator(grain.DatasetIterator[np.ndarray]):  # type: ignore[misc]
    def __init__(self, parent: grain.DatasetIterator[np.ndarray], length: int) -> None:
        super().__init__(parent)
        self._length = length
        self._array: np.ndarray | None = None
        # The parent's state before the current array, and how much of it is used.
        self._before, self._taken = parent.get_state(), 0

    def __next__(self) -> np.ndarray:
        parts: list[np.ndarray] = []
        missing = self._length
        while missing:
            if self._array is None:
                self._array = next(self._parent)
            parts.append(self._array[self._taken : self._taken + missing])
            missing -= len(parts[-1])
            self._taken += len(parts[-1])
            if self._taken == len(self._array):
                self._array = None
                self._before, self._taken = self._parent.get_state(), 0
        return np.concatenate(parts)

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._array = None
        self._before, self._taken = state["before"], state["taken"]
        self._parent.set_state(self._before)
