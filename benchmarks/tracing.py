"""What caution adds to tracing, to compilation, and to a step without jit.

``python -m benchmarks.tracing`` traces and compiles the steps of each cautious
optimizer and of its base in turns, for models of 10, 100 and 1000 small leaves, and
times steps on 10 leaves without jit. It prints median times and median ratios.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from tqdm import tqdm

import optax_cautious
from benchmarks.steps import Shape, llama_shapes, markdown_table, optimizer_step
from benchmarks.timing import Pair, normal_like, take_turns

_Make = Callable[[], optax.GradientTransformation]

PAIRS: list[tuple[str, _Make, str, _Make]] = [
    (
        "optax.adamw",
        lambda: optax.adamw(1e-3),
        "cautious_adamw",
        lambda: optax_cautious.cautious_adamw(1e-3),
    ),
    (
        "optax.adamw",
        lambda: optax.adamw(1e-3),
        "cautious_adamw(monitor=True)",
        lambda: optax_cautious.cautious_adamw(1e-3, monitor=True),
    ),
    (
        "optax.adamw",
        lambda: optax.adamw(1e-3),
        "with_caution(optax.adamw)",
        lambda: optax_cautious.with_caution(optax.adamw(1e-3)),
    ),
    (
        "optax.lion",
        lambda: optax.lion(1e-3),
        "cautious_lion",
        lambda: optax_cautious.cautious_lion(1e-3),
    ),
    (
        "optax.sgd",
        lambda: optax.sgd(1e-3, 0.9),
        "cautious_sgd",
        lambda: optax_cautious.cautious_sgd(1e-3, 0.9),
    ),
]
"""Each base and cautious optimizer, with their names in the table."""


class Seconds(NamedTuple):
    """The time to trace and to compile one step."""

    trace: float
    compile: float
    """From the jaxpr to an executable."""


def first_step(make: _Make, shapes: Sequence[Shape]) -> Seconds:
    """Trace and compile a step with empty caches, as in a new process."""
    tx = make()
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(optimizer_step(tx), donate_argnums=(0, 1))
    jax.clear_caches()
    gc.collect()  # Garbage of the previous step must not slow this one.
    start = time.perf_counter()
    traced = step.trace(params, state, params)
    between = time.perf_counter()
    traced.lower().compile()
    return Seconds(between - start, time.perf_counter() - between)


class EagerStep:
    """A step without jit."""

    def __init__(self, make: _Make, shapes: Sequence[Shape]) -> None:
        """Create the arrays and the optimizer's state."""
        tx = make()
        self.step = optimizer_step(tx)
        self.params, self.grads = (normal_like(shapes, seed) for seed in (0, 1))
        self.state = tx.init(self.params)

    def __call__(self) -> None:
        """Take a step and wait for it to finish."""
        arguments = (self.params, self.state, self.grads)
        self.params, self.state = jax.block_until_ready(self.step(*arguments))


def leaves(n: int) -> list[Shape]:
    """List the shapes of `n` leaves of a small Llama that does not scan its layers."""
    return llama_shapes(64, 172, layers=n // 9 + 1, vocabulary=256)[1 : n + 1]


def row(seconds: Pair) -> list[str]:
    """Format the median times in ms and the median ratio."""
    base, other = map(statistics.median, seconds)
    return [f"{1e3 * base:.0f}", f"{1e3 * other:.0f}", f"{seconds.ratio:.2f}"]


def main(counts: tuple[int, ...] = (10, 100, 1000), rounds: int = 5) -> None:
    """Print what caution adds to tracing, to compilation, and to a step without jit.

    Args:
        counts: numbers of leaves.
        rounds: how often to trace and compile each optimizer.
    """
    rows = []
    eager_rounds = 10 * rounds
    total = len(PAIRS) * (len(counts) * rounds + eager_rounds)
    with tqdm(total=total, unit="round") as bar:
        for base_name, base, name, other in PAIRS:
            bar.set_description(name)
            for n in counts:
                times = []
                for _ in range(rounds):
                    times.append(
                        [first_step(make, leaves(n)) for make in (base, other)]
                    )
                    bar.update()
                trace, compile_ = (
                    Pair(*([s[i] for s in side] for side in zip(*times, strict=True)))
                    for i in range(2)
                )
                rows.append([name, base_name, str(n), *row(trace), *row(compile_)])
            steps = [EagerStep(make, leaves(10)) for make in (base, other)]
            eager: Any = Pair(*take_turns(steps, eager_rounds, bar))
            rows.append([name, base_name, "10, no jit", "", "", "", *row(eager)])
    print(
        f"Times in ms on {jax.devices()[0].device_kind}, jax {jax.__version__}; for "
        "'no jit', the compilation columns hold the time of a step.\n"
    )
    header = ("optimizer", "base", "leaves", "tracing: base", "cautious", "ratio")
    print(markdown_table(rows, (*header, "compilation: base", "cautious", "ratio")))


if __name__ == "__main__":
    tyro.cli(main)
