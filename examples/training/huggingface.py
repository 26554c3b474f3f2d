"""Streaming of Hugging Face datasets, resumable from an exact row.

A source is written ``hf:NAME`` or ``hf:NAME:CONFIG``, where NAME is a dataset on the
Hugging Face Hub or a local directory in its format.
"""

import atexit
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grain

from examples.training.checks import InputError, reason, require

_HUGGING_FACE = "hf:"

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A column that a dataset must have."""

    setting: str
    """Setting that names the column, such as "text_column"."""
    name: str
    kind: str
    """Kind of its values for error messages, such as "text"."""
    holds: Callable[[Any], bool]
    """Predicate for values of this kind. Missing values are None."""


def is_streamed(data: Sequence[str]) -> bool:
    """Return whether one of the sources is a Hugging Face dataset."""
    return any(source.startswith(_HUGGING_FACE) for source in data)


def name_of(source: str) -> str:
    """Return the name or the directory of the dataset in a source."""
    return source.removeprefix(_HUGGING_FACE).partition(":")[0]


def open_splits(
    data: Sequence[str], splits: Mapping[str, str], *columns: Column
) -> list[Any]:
    """Open the splits of a dataset.

    Args:
        data: the dataset, as the only source.
        splits: names of splits, by the setting that names each.
        columns: the columns that each split must have.

    Returns:
        A ``datasets.IterableDataset`` per split.

    Raises:
        InputError: if the dataset cannot be loaded, or lacks a split or a column.
    """
    require(
        len(data) == 1,
        "data: a Hugging Face dataset cannot be combined with other sources; pass it "
        "alone.",
    )
    (source,) = data
    opened = _open_dataset(source)
    return [
        _take_split(opened, source, setting, split, columns)
        for setting, split in splits.items()
    ]


def own_share(dataset: Any, source: str, process_index: int, process_count: int) -> Any:
    """Return the rows of the training split that a process reads.

    Each process reads its own files. If the number of files is not a multiple of the
    number of processes, each process reads all files and keeps its own rows.

    Args:
        dataset: the split, a ``datasets.IterableDataset``.
        source: the source of the dataset, for error messages.
        process_index: index of this process.
        process_count: number of processes that share each batch.

    Raises:
        InputError: if there are no rows for this process.
    """
    split_dataset_by_node = import_datasets().distributed.split_dataset_by_node
    own = split_dataset_by_node(dataset, process_index, process_count)
    require(
        _first_row(own, source) is not None,
        f"data: {source} has too few training rows for {process_count} processes; add "
        "rows or use fewer processes.",
    )
    return own


def read_rows(
    dataset: Any, read: Callable[[dict[str, Any]], T | None]
) -> Generator[T, None, None]:
    """Yield the value read from each row, skipping None."""
    for row in dataset:
        if (value := read(row)) is not None:
            yield value


def import_datasets() -> Any:
    """Import the datasets package; raise an ``InputError`` if it is missing."""
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise InputError(
            "data: hf:... needs the datasets package; run pip install '.[hf]'."
        ) from error
    return datasets


def _open_dataset(source: str) -> Any:
    """Open a dataset, as a mapping from names to splits."""
    require(
        not Path(source.removeprefix(_HUGGING_FACE)).is_file(),
        f"data: {source} is one file, but validation needs another; make a directory "
        "with a file train.* and a file validation.*, and pass --data hf:DIRECTORY.",
    )
    datasets = import_datasets()
    name, _, subset = source.removeprefix(_HUGGING_FACE).partition(":")
    try:
        return datasets.load_dataset(name, subset or None, streaming=True)
    except Exception as error:  # The package may raise any error.
        raise InputError(f"data: cannot load {source} ({reason(error)}).") from error


def _take_split(
    splits: Any, source: str, setting: str, split: str, columns: Sequence[Column]
) -> Any:
    """Return the split that a setting names, after checking its first row."""
    require(
        split in splits,
        f"{setting}: {source} has no split {split!r}; pass {_option(setting)} with one "
        f"of: {', '.join(splits)}.",
    )
    row = _first_row(splits[split], source)
    require(row is not None, f"{setting}: the split {split!r} of {source} is empty.")
    for column in columns:
        require_column(row, column, source)
    return splits[split]


def require_column(row: Mapping[str, Any], column: Column, source: str) -> None:
    """Raise an ``InputError`` if a row lacks a column of the right kind."""
    name = column.name
    require(
        name in row and (row[name] is None or column.holds(row[name])),
        f"{column.setting}: {source} has no column {name!r} of {column.kind}; pass "
        f"{_option(column.setting)} with one of: {', '.join(row)}.",
    )


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _first_row(dataset: Any, source: str) -> Any:
    """Read the first row, or return None if there is none."""
    try:
        return next(iter(dataset), None)
    except Exception as error:  # The package may raise any error.
        raise InputError(f"data: cannot read {source} ({reason(error)}).") from error


class Rows(grain.IterDataset[T]):  # type: ignore[misc]
    """Values read from the rows of a streamed dataset, in the same order every pass."""

    def __init__(
        self, dataset: Any, read: Callable[[dict[str, Any]], T | None]
    ) -> None:
        """Wrap a ``datasets.IterableDataset``; ``read`` is as in ``read_rows``."""
        super().__init__()
        self._dataset = dataset
        self._read = read

    def __iter__(self) -> grain.DatasetIterator[T]:
        """Start at the first row."""
        return _RowIterator(self._dataset, self._read)


class _RowIterator(grain.DatasetIterator[T]):  # type: ignore[misc]
    def __init__(
        self, dataset: Any, read: Callable[[dict[str, Any]], T | None]
    ) -> None:
        super().__init__()
        self._source = dataset
        self._read = read
        self._begin(None)

    def _begin(self, position: Any) -> None:
        """Start a pass, or resume one if the position is not None."""
        # A dataset stores its iteration position, and a loaded position would also
        # apply to later passes. Sharding into one part copies the dataset, so that each
        # pass has its own position.
        self._dataset = self._source.shard(num_shards=1, index=0)
        if position is not None:
            self._dataset.load_state_dict(position)
        self._position = position
        self._values = read_rows(self._dataset, self._read)

    def __next__(self) -> T:
        if _ending.is_set():
            raise RuntimeError("the program is shutting down")
        try:
            value = next(self._values, None)
            if value is None:
                self._begin(None)
                value = next(self._values)
        except OSError as error:  # Includes network errors.
            raise InputError(
                f"data: cannot read the dataset ({reason(error)}); run the same "
                "command to resume."
            ) from error
        self._position = self._dataset.state_dict()
        return value

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin(state["position"])

    def close(self) -> None:
        super().close()
        self._values.close()


_ending = threading.Event()
_running: weakref.WeakSet[grain.DatasetIterator[Any]] = weakref.WeakSet()


class Prefetch(grain.IterDataset[T]):  # type: ignore[misc]
    """Prefetching in a thread that ends before the interpreter does.

    A thread that is inside compiled code when the interpreter ends may abort the
    process.
    """

    def __init__(self, parent: grain.IterDataset[T], size: int) -> None:
        """Prefetch up to ``size`` elements of the parent."""
        super().__init__(parent)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator[T]:
        """Start at the first element."""
        iterator = _PrefetchIterator(iter(self._parent), self._size)
        _running.add(iterator)
        return iterator


class _PrefetchIterator(
    grain.experimental.ThreadPrefetchDatasetIterator  # type: ignore[misc]
):
    def close(self) -> None:
        # Called again on deletion, possibly after the modules it needs are deleted.
        if not self._closed:
            super().close()


@atexit.register
def _end_threads() -> None:
    _ending.set()
    for iterator in list(_running):
        iterator.close()
