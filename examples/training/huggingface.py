"""Hugging Face datasets, streamed, row by row from an exact position.

A source is written ``hf:NAME`` or ``hf:NAME:CONFIG``, where the name is that of a
dataset on the hub or of a local directory in its format.
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
    """The column that a dataset has to have."""

    setting: str
    """The setting that names it, such as "text_column"."""
    name: str
    kind: str
    """What it holds, for messages, such as "text"."""
    holds: Callable[[Any], bool]
    """Tells whether a value is of this kind. One that is missing is None."""


def is_streamed(data: Sequence[str]) -> bool:
    """Tells whether one of the sources is a Hugging Face dataset."""
    return any(source.startswith(_HUGGING_FACE) for source in data)


def name_of(source: str) -> str:
    """Takes the name of a dataset, or its directory, from a source."""
    return source.removeprefix(_HUGGING_FACE).partition(":")[0]


def open_splits(
    data: Sequence[str], splits: Mapping[str, str], *columns: Column
) -> list[Any]:
    """Opens the splits of a dataset.

    Args:
        data: the dataset, alone.
        splits: names of splits, by the setting that names each.
        columns: what each split has to have.

    Returns:
        For each split, a ``datasets.IterableDataset``.

    Raises:
        InputError: for a dataset that cannot be had, or without such splits.
    """
    require(
        len(data) == 1,
        "data: a Hugging Face dataset is given alone, not beside other sources",
    )
    (source,) = data
    opened = _open_dataset(source)
    return [
        _take_split(opened, source, setting, split, columns)
        for setting, split in splits.items()
    ]


def own_share(dataset: Any, source: str, process_index: int, process_count: int) -> Any:
    """Takes the rows of the training split that a process reads.

    Each process reads its own files; where their number is not a multiple of that of
    the processes, it reads all of them and keeps its own rows.

    Args:
        dataset: the split, a ``datasets.IterableDataset``.
        source: where it comes from, for messages.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Raises:
        InputError: where no rows are left for it.
    """
    split_dataset_by_node = import_datasets().distributed.split_dataset_by_node
    own = split_dataset_by_node(dataset, process_index, process_count)
    require(
        _first_row(own, source) is not None,
        f"data: too few rows to train on in {source} for {process_count} processes; "
        "give more of them",
    )
    return own


def read_rows(
    dataset: Any, read: Callable[[dict[str, Any]], T | None]
) -> Generator[T, None, None]:
    """Yields what is read of each row; None is left out."""
    for row in dataset:
        if (value := read(row)) is not None:
            yield value


def import_datasets() -> Any:
    """Imports the package datasets; raises an ``InputError`` if it is missing."""
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise InputError(
            "data: hf:... needs the package datasets; pip install '.[hf]'"
        ) from error
    return datasets


def _open_dataset(source: str) -> Any:
    """Opens a dataset: its splits by name."""
    require(
        not Path(source.removeprefix(_HUGGING_FACE)).is_file(),
        f"data: {source} is one file, and validation takes another; make a directory "
        "with a file train.* and a file validation.*, and pass --data hf:DIRECTORY",
    )
    datasets = import_datasets()
    name, _, subset = source.removeprefix(_HUGGING_FACE).partition(":")
    try:
        return datasets.load_dataset(name, subset or None, streaming=True)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(f"data: cannot load {source} ({reason(error)})") from error


def _take_split(
    splits: Any, source: str, setting: str, split: str, columns: Sequence[Column]
) -> Any:
    """Takes the split that the setting names, and checks its first row."""
    require(
        split in splits,
        f"{setting}: {source} has no split {split!r}; pass {_option(setting)} and one "
        f"of those it has: {', '.join(splits)}",
    )
    row = _first_row(splits[split], source)
    require(row is not None, f"{setting}: the split {split!r} of {source} is empty")
    for column in columns:
        require_column(row, column, source)
    return splits[split]


def require_column(row: Mapping[str, Any], column: Column, source: str) -> None:
    """Raises an ``InputError`` for a row without a column of its kind."""
    name = column.name
    require(
        name in row and (row[name] is None or column.holds(row[name])),
        f"{column.setting}: {source} has no column {name!r} of {column.kind}; pass "
        f"{_option(column.setting)} and one of those it has: {', '.join(row)}",
    )


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _first_row(dataset: Any, source: str) -> Any:
    """Reads a row, or returns None where there is none."""
    try:
        return next(iter(dataset), None)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(f"data: cannot read {source} ({reason(error)})") from error


class Rows(grain.IterDataset[T]):  # type: ignore[misc]
    """What is read of a streamed dataset's rows, pass after pass in the same order."""

    def __init__(
        self, dataset: Any, read: Callable[[dict[str, Any]], T | None]
    ) -> None:
        """Takes a ``datasets.IterableDataset``, and what ``read_rows`` takes."""
        super().__init__()
        self._dataset = dataset
        self._read = read

    def __iter__(self) -> grain.DatasetIterator[T]:
        """Begins at the first row."""
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
        """Starts a pass, or resumes one where the position is not None."""
        # A dataset holds the position of its iteration, and one that was loaded stays
        # for the passes to come. Each pass takes the only shard of one: a copy that
        # shares no position.
        self._dataset = self._source.shard(num_shards=1, index=0)
        if position is not None:
            self._dataset.load_state_dict(position)
        self._position = position
        self._values = read_rows(self._dataset, self._read)

    def __next__(self) -> T:
        if _ending.is_set():
            raise RuntimeError("the program ends")
        try:
            value = next(self._values, None)
            if value is None:
                self._begin(None)
                value = next(self._values)
        except OSError as error:  # Errors of the network among them.
            raise InputError(
                f"data: cannot read the dataset ({reason(error)}); run the same "
                "command to resume"
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
    """Prefetches in a thread that ends before the interpreter does.

    Else a thread which is inside of a compiled package by then may abort the process.
    """

    def __init__(self, parent: grain.IterDataset[T], size: int) -> None:
        """Keeps up to ``size`` elements of the parent ready."""
        super().__init__(parent)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator[T]:
        """Begins at the first element."""
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
