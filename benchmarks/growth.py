"""How the cost of a step scales with model size, on this machine's CPU.

``python -m benchmarks.growth`` times optax.adamw, cautious_adamw and the chain on the
parameter shapes of four Llamas, and plots the time and temporary memory of a step.
"""

import statistics
from pathlib import Path

import jax
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.steps import LLAMAS, count, markdown_table
from benchmarks.timing import compare

BASE = "optax.adamw"
OTHERS = ("cautious_adamw", "chain(optax.adamw, cautious)")
COLORS = {BASE: "tab:gray", OTHERS[0]: "tab:blue", OTHERS[1]: "tab:orange"}


def draw(
    sizes: list[int], times: dict[str, list[float]], memory: dict[str, list[int]]
) -> Figure:
    """Plot times in ms and temporaries in bytes against the number of parameters."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in COLORS.items():
        left.loglog(sizes, times[name], "o-", color=color, label=name)
        # The few bytes that a base needs would stretch the log axis.
        if max(memory[name]) > 1e3:
            megabytes = [b / 1e6 for b in memory[name]]
            right.loglog(sizes, megabytes, "o-", color=color, label=name)
    parameters = [4e-6 * size for size in sizes]
    right.loglog(sizes, parameters, ":", color="black", label="parameters")
    left.set(xlabel="parameters", ylabel="ms per step")
    right.set(xlabel="parameters", ylabel="temporaries, MB")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(rounds: int = 20, picture: Path = Path("outputs/growth.png")) -> None:
    """Print and plot how the cost of a step scales with model size.

    Args:
        rounds: number of timed steps per optimizer.
        picture: file for the plot.
    """
    sizes, rows = [], []
    times: dict[str, list[float]] = {name: [] for name in COLORS}
    memory: dict[str, list[int]] = {name: [] for name in COLORS}
    with tqdm(total=len(LLAMAS) * len(OTHERS) * rounds, unit="round") as bar:
        for shapes in LLAMAS.values():
            sizes.append(count(shapes))
            row = [f"{count(shapes) / 1e6:.1f} million"]
            for name in OTHERS:
                pair, base_bytes, other_bytes = compare(BASE, name, shapes, rounds, bar)
                if name == OTHERS[0]:
                    times[BASE].append(1e3 * statistics.median(pair.base))
                    memory[BASE].append(base_bytes)
                    row.append(f"{times[BASE][-1]:.1f}")
                times[name].append(1e3 * statistics.median(pair.other))
                memory[name].append(other_bytes)
                row.append(f"{times[name][-1]:.1f} ({pair.ratio:.2f})")
                row.append(f"{memory[name][-1] / 1e6:.1f} MB")
            rows.append(row)
    print(f"float32, jax {jax.__version__}; ms per step (ratio) and temporaries.\n")
    header = ["parameters", BASE]
    for name in OTHERS:
        header += [name, "temporaries"]
    print(markdown_table(rows, header))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(sizes, times, memory).savefig(picture, dpi=150)
    print(f"Wrote {picture}")


if __name__ == "__main__":
    tyro.cli(main)
