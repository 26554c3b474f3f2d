"""The cost of an optimizer step on this machine's CPU, with and without caution.

``python -m benchmarks.cpu`` times each cautious optimizer and its base in turns, and
prints the median times and the temporary memory of a step.
"""

import statistics
from typing import Literal

import jax
import tyro
from tqdm import tqdm

from benchmarks.steps import LLAMAS, count, markdown_table
from benchmarks.timing import compare

PAIRS = [
    ("optax.adamw", "cautious_adamw"),
    ("optax.adamw", "chain(optax.adamw, cautious)"),
    ("optax.adamw", "with_caution(optax.adamw)"),
    ("optax.lion", "cautious_lion"),
    ("optax.sgd", "cautious_sgd"),
]


def main(model: Literal["1M", "10M", "58M", "200M"] = "58M", rounds: int = 30) -> None:
    """Print the cost of caution on this machine's CPU.

    Args:
        model: the Llama whose parameter shapes to use, in float32.
        rounds: number of timed steps per optimizer.
    """
    shapes = LLAMAS[model]
    array = 4 * count(shapes)
    rows = []
    with tqdm(total=len(PAIRS) * rounds, unit="round") as bar:
        for base_name, name in PAIRS:
            pair, base_bytes, other_bytes = compare(
                base_name, name, shapes, rounds, bar
            )
            low, high = pair.quartiles
            rows.append(
                (
                    name,
                    base_name,
                    f"{1e3 * statistics.median(pair.other):.0f}",
                    f"{1e3 * statistics.median(pair.base):.0f}",
                    f"{pair.ratio:.2f} ({low:.2f} to {high:.2f})",
                    f"{other_bytes / array:.2f}",
                    f"{base_bytes / array:.2f}",
                )
            )
    print(
        f"{count(shapes) / 1e6:.1f} million float32 parameters, jax {jax.__version__} "
        f"on {jax.devices()[0].device_kind}; times in ms per step, temporaries in "
        "multiples of the parameters' size.\n"
    )
    header = ("optimizer", "base", "time", "base time", "ratio (quartiles)")
    print(markdown_table(rows, (*header, "temporaries", "base temporaries")))


if __name__ == "__main__":
    tyro.cli(main)
