"""Hugging Face datasets, streamed, from documents to batches of tokens.

Each process reads its own documents, tokenizes and packs them as it goes, and shuffles
among the next windows.
"""

import atexit
import functools
import threading
import weakref
from collections.abc import Generator, Iterator
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
from examples.training.checks import InputError, reason, require

_HUGGING_FACE = "hf:"
_TOKENIZER_DOCUMENTS = 10_000
"""Documents of a streamed dataset on which a tokenizer is trained, or tried."""


def is_streamed(config: DataConfig) -> bool:
    """Tells whether a source of the configuration is a Hugging Face dataset."""
    return any(source.startswith(_HUGGING_FACE) for source in config.data)


def open_splits(config: DataConfig) -> tuple[Any, Any]:
    """Opens the dataset that the configuration names.

    Returns:
        The split to train on and the split to validate on, each a
        ``datasets.IterableDataset``.

    Raises:
        InputError: for a dataset that cannot be had, or without such documents.
    """
    require(
        len(config.data) == 1,
        "data: a Hugging Face dataset is given alone, not beside other sources",
    )
    splits = _open_dataset(config.data[0])
    return (
        _take_split(splits, config, "train_split"),
        _take_split(splits, config, "validation_split"),
    )


def _import_datasets() -> Any:
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise InputError(
            "data: hf:... needs the package datasets; pip install '.[hf]'"
        ) from error
    return datasets


def _open_dataset(source: str) -> Any:
    """Opens the dataset ``hf:NAME`` or ``hf:NAME:CONFIG``: its splits by name."""
    require(
        not Path(source.removeprefix(_HUGGING_FACE)).is_file(),
        f"data: {source} is one file, and validation takes another; make a directory "
        "with a file train.* and a file validation.*, and pass --data hf:DIRECTORY",
    )
    datasets = _import_datasets()
    name, _, subset = source.removeprefix(_HUGGING_FACE).partition(":")
    try:
        return datasets.load_dataset(name, subset or None, streaming=True)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(f"data: cannot load {source} ({reason(error)})") from error


def _take_split(splits: Any, config: DataConfig, setting: str) -> Any:
    """Takes the split that the setting names, and checks that it has documents."""
    (source,) = config.data
    split = getattr(config, setting)
    option = "--" + setting.replace("_", "-")
    require(
        split in splits,
        f"{setting}: {source} has no split {split!r}; pass {option} and one of those "
        f"it has: {', '.join(splits)}",
    )
    row = _first_row(splits[split], source)
    require(row is not None, f"{setting}: the split {split!r} of {source} is empty")
    column = config.text_column
    require(
        isinstance(row.get(column, ""), str | None) and column in row,
        f"text_column: {source} has no column {column!r} of text; pass --text-column "
        f"and one of those it has: {', '.join(row)}",
    )
    return splits[split]


def _first_row(dataset: Any, source: str) -> Any:
    """Reads a row, or returns None where there is none."""
    try:
        return next(iter(dataset), None)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(f"data: cannot read {source} ({reason(error)})") from error


def stream_tokenizer(train: Any, config: DataConfig, vocab_size: int) -> Tokenizer:
    """Loads the tokenizer, or trains one on the first documents, or takes that one."""
    if tokenizer := given_tokenizer(config, vocab_size):
        report_loss(tokenizer, config, _first_documents(train, config))
        return tokenizer

    def fill(directory: Path) -> None:
        documents = list(_first_documents(train, config))
        tokenizer = train_tokenizer(documents, vocab_size, config.end_of_document)
        save_tokenizer(tokenizer, directory / "tokenizer.json")

    (source,) = config.data
    directory = Path(source.removeprefix(_HUGGING_FACE))
    key = [
        f"{_HUGGING_FACE}{directory.resolve()}" if directory.is_dir() else source,
        config.train_split,
        config.text_column,
        config.end_of_document,
        _TOKENIZER_DOCUMENTS,
        vocab_size,
    ]
    directory = cached(config.cache_dir, key, fill)
    return load_tokenizer(str(directory / "tokenizer.json"))


def _first_documents(dataset: Any, config: DataConfig) -> Iterator[str]:
    """Yields the documents that say what a tokenizer has to write."""
    texts = islice(_texts(dataset, config.text_column), _TOKENIZER_DOCUMENTS)
    try:
        yield from tqdm(texts, "Reading", unit="document", leave=False)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(
            f"data: cannot read {config.data[0]} ({reason(error)})"
        ) from error


def _texts(dataset: Any, column: str) -> Generator[str, None, None]:
    """Yields each document; one that is missing is empty."""
    for row in dataset:
        yield row.get(column) or ""


def stream_batches(
    dataset: Any,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[np.ndarray]:
    """Makes the training data of a process from a streamed dataset.

    Documents are packed end to end, so every token is in one window. Each process reads
    its own files; where their number is not a multiple of that of the processes, it
    reads all of them and keeps its own documents. To go on from a state, the
    ``shuffle_windows`` windows among which the next is drawn are read again.

    Args:
        dataset: a ``datasets.IterableDataset``.
        tokenizer: what to tokenize with.
        config: the configuration.
        seed: decides the order within the ``shuffle_windows`` windows.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Returns:
        This process's rows of each batch, without end.
    """
    split_dataset_by_node = _import_datasets().distributed.split_dataset_by_node
    own = split_dataset_by_node(dataset, process_index, process_count)
    require(
        _first_row(own, config.data[0]) is not None,
        f"data: too few documents in {config.train_split} for {process_count} "
        "processes; give more of them",
    )
    tokenize = functools.partial(
        encode, tokenizer=tokenizer, end_of_document=config.end_of_document
    )
    documents = _Documents(own, config.text_column)
    tokens = documents.batch(DOCUMENTS_AT_ONCE, batch_fn=list).map(tokenize)
    windows = grain.experimental.WindowShuffleIterDataset(
        _Windows(tokens, config.sequence_length + 1),
        window_size=config.shuffle_windows,
        # The number of the shuffle is added to it, and the sum has to fit 32 bits.
        seed=seed % 2**31,
    )
    rows = config.batch_size // process_count
    return _Prefetch(
        windows.batch(rows),
        # A shuffle begins when all its windows are there: read them during the last.
        max(2, config.shuffle_windows // rows),
    )


def first_batches(dataset: Any, tokenizer: Tokenizer, config: DataConfig) -> np.ndarray:
    """Takes the first windows of a streamed dataset, to validate on.

    Returns:
        Tokens, ``[validation_batches, batch_size, sequence_length + 1]``.
    """
    length = config.sequence_length + 1
    count = config.validation_batches * config.batch_size
    texts = _texts(dataset, config.text_column)
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
        f"{config.batch_size}; pass fewer --validation-batches",
    )
    tokens = np.concatenate(parts)[: count * length]
    return tokens.reshape(config.validation_batches, config.batch_size, length)


class _Documents(grain.IterDataset[str]):  # type: ignore[misc]
    """The documents of a streamed dataset, pass after pass in the same order."""

    def __init__(self, dataset: Any, column: str) -> None:
        super().__init__()
        self._dataset = dataset
        self._column = column

    def __iter__(self) -> grain.DatasetIterator[str]:
        return _DocumentIterator(self._dataset, self._column)


class _DocumentIterator(grain.DatasetIterator[str]):  # type: ignore[misc]
    def __init__(self, dataset: Any, column: str) -> None:
        super().__init__()
        self._source = dataset
        self._column = column
        self._begin(None)

    def _begin(self, position: Any) -> None:
        """Begins a pass, or goes on with one where the position is not None."""
        # A dataset holds the position of its iteration, and one that was loaded stays
        # for the passes to come. Each pass takes the only shard of one: a copy that
        # shares no position.
        self._dataset = self._source.shard(num_shards=1, index=0)
        if position is not None:
            self._dataset.load_state_dict(position)
        self._position = position
        self._texts = _texts(self._dataset, self._column)

    def __next__(self) -> str:
        if _ending.is_set():
            raise RuntimeError("the program ends")
        text = next(self._texts, None)
        if text is None:
            self._begin(None)
            text = next(self._texts)
        self._position = self._dataset.state_dict()
        return text

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin(state["position"])

    def close(self) -> None:
        super().close()
        self._texts.close()


class _Windows(grain.IterDataset[np.ndarray]):  # type: ignore[misc]
    """Concatenates the arrays of its parent and cuts the stream at equal distances."""

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
        # The state from which the parent gives the array, and what is cut from it.
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


_ending = threading.Event()
_running: weakref.WeakSet[grain.DatasetIterator[np.ndarray]] = weakref.WeakSet()


class _Prefetch(grain.IterDataset[np.ndarray]):  # type: ignore[misc]
    """Prefetches in a thread that ends before the interpreter does.

    Else a thread which is inside of a tokenizer by then aborts the process.
    """

    def __init__(self, parent: grain.IterDataset[np.ndarray], size: int) -> None:
        super().__init__(parent)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        iterator = _PrefetchIterator(iter(self._parent), self._size)
        _running.add(iterator)
        return iterator


class _PrefetchIterator(
    grain.experimental.ThreadPrefetchDatasetIterator  # type: ignore[misc]
):
    def close(self) -> None:
        # It is closed again when it is deleted, maybe after the modules it needs.
        if not self._closed:
            super().close()


@atexit.register
def _end_threads() -> None:
    _ending.set()
    for iterator in list(_running):
        iterator.close()
