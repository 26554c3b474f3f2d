"""Paired timing on the device at hand: both sides in one process, taking turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.steps import Shape, make_optimizer, optimizer_step

WARM_UP = 3


class Pair(NamedTuple):
    """The times of a base and of what is compared with it, round by round."""

    base: list[float]
    """Seconds of a step."""
    other: list[float]
    """Seconds of a step."""

    @property
    def ratios(self) -> list[float]:
        """How many times as long as the base the other took, in each round."""
        return [b / a for a, b in zip(self.base, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The ratios that half of the rounds lie between."""
        first, _, third = statistics.quantiles(self.ratios, n=4)
        return first, third


class Stepper:
    """A compiled optimizer step with its parameters, state and fixed gradients."""

    def __init__(self, name: str, shapes: Sequence[Shape]) -> None:
        """Makes the arrays and compiles the step."""
        tx = make_optimizer(name)
        self.params = normal_like(shapes, seed=0)
        self.grads = normal_like(shapes, seed=1)
        self.state = jax.jit(tx.init)(self.params)
        step = jax.jit(optimizer_step(tx), donate_argnums=(0, 1))
        self.step = step.lower(self.params, self.state, self.grads).compile()

    @property
    def temporaries(self) -> int:
        """Bytes that a step takes besides its arguments and results."""
        analysis: Any = self.step.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    def __call__(self) -> None:
        """Takes a step, and waits for it."""
        arguments = (self.params, self.state, self.grads)
        self.params, self.state = jax.block_until_ready(self.step(*arguments))


class Comparison(NamedTuple):
    """What the steps of two optimizers on the same leaves take."""

    pair: Pair
    base_temporaries: int
    """Bytes."""
    temporaries: int
    """Bytes."""


def compare(
    base_name: str, name: str, shapes: Sequence[Shape], rounds: int, bar: "tqdm[Any]"
) -> Comparison:
    """Times two optimizers in turns, and moves the bar on by one for each round."""
    bar.set_description(f"Compiling {name}")
    base, other = Stepper(base_name, shapes), Stepper(name, shapes)
    bar.set_description(name)
    seconds = take_turns([base, other], rounds, bar)
    pair = Pair(*seconds)
    return Comparison(pair, base.temporaries, other.temporaries)


def take_turns(
    steps: Sequence[Callable[[], None]], rounds: int, bar: "tqdm[Any]"
) -> list[list[float]]:
    """Takes a step of each in turns, and moves the bar on by one for each round.

    Args:
        steps: each waits for its step.
        rounds: how many are timed, after a few that are not.
        bar: the progress bar.

    Returns:
        For each, the seconds of its steps.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for i in range(WARM_UP + rounds):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if i >= WARM_UP:
                times.append(time.perf_counter() - start)
        if i >= WARM_UP:
            bar.update()
    return seconds


def normal_like(shapes: Sequence[Shape], seed: int) -> list[jax.Array]:
    """Draws arrays of the size that weights and gradients have."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    return [jnp.asarray(0.02 * draw(s, dtype=np.float32)) for s in shapes]
