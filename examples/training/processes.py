"""What several processes do together: begin, agree on what they have, and end."""

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
    """How several processes find each other.

    On a TPU slice and under Slurm, --distributed is enough.
    """

    distributed: bool = False
    """This is one of several processes, which train one model together."""
    coordinator: str | None = None
    """Address and port of the first of them."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which this is, from 0."""

    def join(self) -> None:
        """Waits for the others.

        Raises:
            InputError: for an address or a number without ``distributed``, and where
                the others are not found.
        """
        given = (self.coordinator, self.num_processes, self.process_id)
        if not self.distributed:
            names = ("coordinator", "num_processes", "process_id")
            for name, value in zip(names, given, strict=True):
                require(value is None, f"{name}: give --distributed, too")
            return
        try:
            jax.distributed.initialize(*given)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"distributed: {error}") from error


@contextmanager
def together() -> Iterator[None]:
    """Ends all processes where an ``InputError`` ends one.

    One that ended alone would leave the others waiting for it.
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
                f"process {int(np.argmax(failed))} cannot start; its message says why"
            )
    if error is not None:
        raise error


def require_same(name: str, *texts: str) -> None:
    """Checks that all processes have the same of something.

    Args:
        name: what it is, such as "data".
        texts: what has to be equal.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256("".join(texts).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    different = (digests != digests[0]).any(axis=1)
    require(
        not different.any(),
        f"{name}: process {int(np.argmax(different))} has different {name} from "
        "process 0; give the same to all",
    )


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function that returns, after a step, whether to save and stop.

    That is after SIGTERM or the first Ctrl-C; a second Ctrl-C ends the program at
    once. With several processes, all of them stop after the same step.
    """
    came = threading.Event()

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)
        # It may have come in the middle of a print, and to the reader of a pipe, too.
        with suppress(OSError):
            os.write(2, b"\nStopping after this step; Ctrl-C once more ends at once.\n")

    handlers: dict[signal.Signals, Any] = {signal.SIGINT: interrupt}
    several = jax.process_count() > 1
    if not several:  # Else JAX has its own, which tells the others.
        handlers[signal.SIGTERM] = lambda *_: came.set()
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield (
            multihost_utils.reached_preemption_sync_point
            if several
            else lambda step: came.is_set()
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
