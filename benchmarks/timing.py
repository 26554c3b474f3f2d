"""Paired timings on the current device, taken in turns in one process."""

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
    """Step times of a base and of what is compared with it, round by round."""

    base: list[float]
    """Seconds per step, one per round."""
    other: list[float]
    """Seconds per step, one per round."""

    @property
    def ratios(self) -> list[float]:
        """The time of the other divided by that of the base, per round."""
        return [b / a for a, b in zip(self.base, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and upper quartiles of the ratios."""
        first, _, third = statistics.quantiles(self.ratios, n=4)
        return first, third


class Stepper:
    """A compiled optimizer step with its parameters, state and fixed gradients."""

    def __init__(self, name: str, shapes: Sequence[Shape]) -> None:
        """Create the arrays and compile the step."""
        tx = make_optimizer(name)
        self.params = normal_like(shapes, seed=0)
        self.grads = normal_like(shapes, seed=1)
        self.state = jax.jit(tx.init)(self.params)
        step = jax.jit(optimizer_step(tx), donate_argnums=(0, 1))
        self.step = step.lower(self.params, self.state, self.grads).compile()

    @property
    def temporaries(self) -> int:
        """Temporary memory of a step in bytes, without arguments and results."""
        analysis: Any = self.step.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    def __call__(self) -> None:
        """Take a step and wait for it to finish."""
        arguments = (self.params, self.state, self.grads)
        self.params, self.state = jax.block_until_ready(self.step(*arguments))


class Comparison(NamedTuple):
    """Step times and temporary memory of two optimizers on the same leaves."""

    pair: Pair
    base_temporaries: int
    """In bytes."""
    temporaries: int
    """In bytes."""


def compare(
    base_name: str, name: str, shapes: Sequence[Shape], rounds: int, bar: "tqdm[Any]"
) -> Comparison:
    """Time two optimizers in turns, advancing the bar by one per round."""
    bar.set_description(f"Compiling {name}")
    base, other = Stepper(base_name, shapes), Stepper(name, shapes)
    bar.set_description(name)
    seconds = take_turns([base, other], rounds, bar)
    pair = Pair(*seconds)
    return Comparison(pair, base.temporaries, other.temporaries)


def take_turns(
    steps: Sequence[Callable[[], None]], rounds: int, bar: "tqdm[Any]"
) -> list[list[float]]:
    """Time a step of each in turns, advancing the bar by one per round.

    Args:
        steps: functions that take a step and wait for it to finish.
        rounds: number of timed rounds, after a few warm-up rounds.
        bar: the progress bar.

    Returns:
        For each function, the seconds of its timed steps.
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
    """Draw normal arrays of a magnitude typical for weights and gradients."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    return [jnp.asarray(0.02 * draw(s, dtype=np.float32)) for s in shapes]
