"""What several processes do together: begin, agree on what they have, and end."""

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.llama.checks import InputError, require
from examples.llama.data import Data


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
            require(given == (None,) * 3, "coordinator: give --distributed, too")
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


def require_same_data(data: Data) -> None:
    """Checks that all processes have the same text and the same tokenizer."""
    if jax.process_count() == 1:
        return
    text = data.fingerprint + data.tokenizer.to_str()
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    different = (digests != digests[0]).any(axis=1)
    require(
        not different.any(),
        f"data: process {int(np.argmax(different))} has other text, or another "
        "tokenizer, than process 0; give the same to all",
    )


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Gives the function that says, after a step, whether SIGTERM has come.

    With several processes it says so to all of them after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
