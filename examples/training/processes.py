"""Coordination of several processes: startup, agreement and shutdown."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.training.checks import InputError, require


@dataclass(frozen=True)
class Processes:
    """The processes of a distributed run.

    On a TPU slice and under Slurm, --distributed is enough.
    """

    distributed: bool = False
    """Train one model with several processes, of which this is one."""
    coordinator: str | None = None
    """Address and port of the first process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""

    def join(self) -> None:
        """Wait for the other processes.

        Raises:
            InputError: if an address or a number is given without ``distributed``, or
                the other processes are not found.
        """
        given = (self.coordinator, self.num_processes, self.process_id)
        if not self.distributed:
            names = ("coordinator", "num_processes", "process_id")
            for name, value in zip(names, given, strict=True):
                require(value is None, f"{name} requires --distributed.")
            return
        try:
            jax.distributed.initialize(*given)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"distributed: {error}") from error


@contextmanager
def together() -> Iterator[None]:
    """Raise an ``InputError`` in all processes if one process raises one.

    Otherwise, the others would wait for that process forever.
    """
    error = None
    try:
        yield
    except InputError as raised:
        error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is None and failed.any():
            error = InputError(
                f"process {int(np.argmax(failed))} cannot start; see its error message."
            )
    if error is not None:
        raise error


def require_same(name: str, *texts: str) -> None:
    """Check that some strings are the same in all processes.

    Args:
        name: what the strings describe, such as "data".
        texts: the strings.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256("".join(texts).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    different = (digests != digests[0]).any(axis=1)
    require(
        not different.any(),
        f"{name}: process {int(np.argmax(different))} has different {name} from "
        "process 0; pass the same to all processes.",
    )


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yield a function that returns, after a step, whether to save and stop.

    It returns True after SIGTERM or the first Ctrl-C; a second Ctrl-C ends the program
    immediately. If there are several processes, all stop after the same step.
    """
    received = threading.Event()

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)
        # Ctrl-C may interrupt a print, and may also end the reader of a pipe.
        with suppress(OSError):
            os.write(2, b"\nStopping after this step; press Ctrl-C again to exit.\n")

    handlers: dict[signal.Signals, Any] = {signal.SIGINT: interrupt}
    several = jax.process_count() > 1
    if not several:  # Otherwise JAX's own handler informs all processes.
        handlers[signal.SIGTERM] = lambda *_: received.set()
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield (
            multihost_utils.reached_preemption_sync_point
            if several
            else lambda step: received.is_set()
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
