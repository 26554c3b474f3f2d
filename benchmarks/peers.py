"""The cost of a step compared with other libraries, on this machine's CPU.

``python -m benchmarks.peers`` times the AdamW of torch, timm and Optax and the cautious
AdamW of timm and of this library, in turns in one process. It prints a table and plots
it. It needs the ``peers`` extra (``pip install -e '.[peers]'``).
"""

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from timm.optim.adamw import AdamWLegacy
from tqdm import tqdm

from benchmarks.steps import (
    LEARNING_RATE,
    LLAMAS,
    OPTIMIZERS,
    WEIGHT_DECAY,
    Shape,
    count,
    markdown_table,
    optimizer_step,
)
from benchmarks.timing import Pair, Stepper, normal_like, take_turns

# By default, torch and timm loop over the leaves on a CPU.
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch AdamW": torch.optim.AdamW,
    "torch AdamW(foreach=True)": partial(torch.optim.AdamW, foreach=True),
    "torch AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
    "timm AdamWLegacy": AdamWLegacy,
    "timm AdamWLegacy(caution=True)": partial(AdamWLegacy, caution=True),
}

GROUPS = [
    ["torch AdamW", "torch AdamW(foreach=True)", "torch AdamW(fused=True)"],
    ["timm AdamWLegacy", "timm AdamWLegacy(caution=True)"],
    ["optax.adamw", "cautious_adamw", "chain(optax.adamw, cautious)"],
]

BASES = {
    "timm AdamWLegacy(caution=True)": "timm AdamWLegacy",
    "cautious_adamw": "optax.adamw",
    "chain(optax.adamw, cautious)": "optax.adamw",
}
"""The cautious optimizers, each with its base."""

# Like cautious_adamw, timm decays outside the mask and divides by max(fraction, 1e-3).
# The chain masks the decay too, so it computes the same only without decay.
SAME: list[tuple[float, list[str]]] = [
    (WEIGHT_DECAY, [*GROUPS[0], "timm AdamWLegacy", "optax.adamw"]),
    (WEIGHT_DECAY, ["timm AdamWLegacy(caution=True)", "cautious_adamw"]),
    (0.0, ["timm AdamWLegacy(caution=True)", "chain(optax.adamw, cautious)"]),
]
"""Groups of optimizers that compute the same updates at a weight decay."""


class TorchStepper:
    """A PyTorch optimizer with its parameters and fixed gradients."""

    def __init__(
        self, name: str, shapes: Sequence[Shape], weight_decay: float = WEIGHT_DECAY
    ) -> None:
        """Create the tensors; the optimizer creates its state at the first step."""
        self.params = to_torch(normal_like(shapes, seed=0))
        self.set_grads(normal_like(shapes, seed=1))
        settings = {"lr": LEARNING_RATE, "weight_decay": weight_decay}
        self.optimizer = TORCH[name](self.params, **settings)

    def set_grads(self, grads: Sequence[jax.Array]) -> None:
        """Set the gradients for the following steps."""
        for p, g in zip(self.params, to_torch(grads), strict=True):
            p.grad = g

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.step()


def to_torch(arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
    """Copy arrays into PyTorch tensors."""
    return [torch.tensor(np.asarray(x)) for x in arrays]


def check_same() -> None:
    """Raise a RuntimeError if optimizers in SAME differ by more than rounding."""
    for weight_decay, (first, *others) in SAME:
        expected = three_moves(first, weight_decay)
        for name in others:
            got = three_moves(name, weight_decay)
            # Optax computes 1 - b2^t in float32, with a relative error of up to 3e-5.
            if not np.allclose(got, expected, rtol=1e-4, atol=1e-4 * LEARNING_RATE):
                raise RuntimeError(
                    f"{name} and {first} must agree at weight decay {weight_decay}, "
                    "but after three steps they differ by "
                    f"{np.abs(got - expected).max():.1e}."
                )


def three_moves(name: str, weight_decay: float) -> np.ndarray:
    """Compute how far three steps move each coordinate of a few small leaves.

    One step would mask nothing, as the first moment is a multiple of the gradient then.
    """
    shapes: list[Shape] = [(64, 32), (32,), (2048,)]
    start = normal_like(shapes, seed=0)
    steps = [normal_like(shapes, seed=seed) for seed in (1, 2, 3)]
    # The last leaf has 1 nonzero gradient in 2048, so its fraction is below 1e-3.
    steps = [[*dense, sparse.at[1:].set(0)] for *dense, sparse in steps]
    if name in TORCH:
        stepper = TorchStepper(name, shapes, weight_decay)
        for grads in steps:
            stepper.set_grads(grads)
            stepper()
        end = [jnp.asarray(p.numpy()) for p in stepper.params]
    else:
        tx = OPTIMIZERS[name](LEARNING_RATE, weight_decay=weight_decay)
        step = jax.jit(optimizer_step(tx))
        end, state = start, tx.init(start)
        for grads in steps:
            end, state = step(end, state, grads)
    pairs = zip(start, end, strict=True)
    return np.concatenate([np.ravel(b - a) for a, b in pairs])


def measure(shapes: Sequence[Shape], rounds: int) -> dict[str, list[float]]:
    """Return the seconds per step of each optimizer, one per round."""
    steppers: dict[str, Callable[[], None]] = {
        name: (TorchStepper if name in TORCH else Stepper)(name, shapes)
        for group in GROUPS
        for name in group
    }
    with tqdm(total=rounds, unit="round") as bar:
        seconds = take_turns(list(steppers.values()), rounds, bar)
    return dict(zip(steppers, seconds, strict=True))


def table(seconds: dict[str, list[float]], parameters: int) -> str:
    """Format a Markdown table with a row per optimizer."""
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = "", ""
        if name in BASES:
            pair = Pair(seconds[BASES[name]], times)
            low, high = pair.quartiles
            ratio = f"{pair.ratio:.2f} ({low:.2f} to {high:.2f})", BASES[name]
        rows.append(
            (name, f"{1e3 * median:.1f}", f"{1e9 * median / parameters:.2f}", *ratio)
        )
    header = (
        "optimizer",
        "ms per step",
        "ns per parameter",
        "ratio (quartiles)",
        "base",
    )
    return markdown_table(rows, header)


def draw(seconds: dict[str, list[float]], title: str) -> Figure:
    """Plot a bar per optimizer, grouped by library."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    ticks: dict[str, float] = {}
    bars = {}
    for i, group in enumerate(GROUPS):
        for name in group:
            ticks[name] = len(ticks) + 0.7 * i
            ms = 1e3 * statistics.median(seconds[name])
            label, color = f"{ms:.0f}", "tab:gray"
            if name in BASES:
                ratio = Pair(seconds[BASES[name]], seconds[name]).ratio
                label, color = f"{ms:.0f} ({ratio:.2f}x)", "tab:blue"
            bars[name in BASES] = axes.barh(ticks[name], ms, color=color)
            axes.bar_label(bars[name in BASES], [label], padding=3)
    axes.legend(list(bars.values()), ["without caution", "with caution"], frameon=False)
    axes.set_yticks(list(ticks.values()), list(ticks))
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(title=title, xlabel="ms per step")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(
    model: Literal["1M", "10M", "58M", "200M"] = "58M",
    rounds: int = 20,
    picture: Path = Path("outputs/peers.png"),
) -> None:
    """Compare the optimizers of several libraries on this machine's CPU.

    Args:
        model: the Llama whose parameter shapes to use, in float32.
        rounds: number of timed steps per optimizer.
        picture: file for the bar chart.
    """
    jax.config.update("jax_platforms", "cpu")
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    check_same()
    shapes = LLAMAS[model]
    seconds = measure(shapes, rounds)
    versions = [f"{name} {version(name)}" for name in ("jax", "optax", "torch", "timm")]
    size = f"{count(shapes) / 1e6:.1f} million float32 parameters"
    print(table(seconds, count(shapes)))
    print(
        f"\nMedians of {rounds} rounds; {size}; {', '.join(versions)}, Python "
        f"{platform.python_version()}; {cores} cores, used by both torch and JAX."
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(seconds, f"AdamW on a CPU with {cores} cores, {size}")
    figure.savefig(picture, dpi=150)
    print(f"Wrote {picture}")


if __name__ == "__main__":
    tyro.cli(main)
