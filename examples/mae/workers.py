"""Worker processes that prefetch batches, with a state independent of their number."""

import multiprocessing
import os
import signal
import threading
from typing import Any, TypeVar

import grain
from absl import flags

T = TypeVar("T")


class WorkerBatches(grain.IterDataset[T]):  # type: ignore[misc]
    """The elements of a dataset, in order, read by worker processes."""

    def __init__(
        self, dataset: grain.MapDataset[T], workers: int, options: grain.ReadOptions
    ) -> None:
        """Set the number of processes and the threads of each."""
        super().__init__()
        self._dataset = dataset
        self._workers = workers
        self._options = options
        # Grain reads absl flags, which are parsed only if absl runs the program.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()

    def __iter__(self) -> grain.DatasetIterator[T]:
        """Start at the first element."""
        return _WorkerIterator(self)

    def begin(self, index: int) -> grain.DatasetIterator[T]:
        """Start the processes at the element with this index."""
        rest = self._dataset[index:].to_iter_dataset(self._options)
        workers = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(rest.mp_prefetch(workers, _leave_signals_to_parent))


def _leave_signals_to_parent(index: int, count: int) -> None:
    """Make a worker ignore signals, and exit when its parent does.

    Ctrl-C in a terminal and SIGTERM from many schedulers reach the whole process group,
    but the parent needs its workers until it has saved a checkpoint.
    """
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _WorkerIterator(grain.DatasetIterator[T]):  # type: ignore[misc]
    """An iterator with the same state as one without workers.

    Grain's own state depends on the number of workers.
    """

    def __init__(self, dataset: WorkerBatches[T]) -> None:
        super().__init__()
        self._dataset = dataset
        self._running: grain.DatasetIterator[T] | None = None
        self._next = 0

    def __next__(self) -> T:
        if self._running is None:
            self._running = self._dataset.begin(self._next)
        element = next(self._running)
        self._next += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._next = state["next_index"]

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
