"""The command that compares the three methods in a table and a figure.

All three use the same learning rate. Momentum overshoots along the steep coordinate:
its loss oscillates while its Hamiltonian decreases. Cautious momentum freezes a
coordinate while its momentum and gradient disagree in sign, and at the default settings
neither its loss nor its Hamiltonian ever increases. The rescaling also makes it faster:
while the steep coordinate is frozen, the flat one takes steps of twice the size.

Both guarantees hold only for small steps. Near a zero of the gradient, a step of any
size can carry a coordinate past its minimum and increase the loss: the table counts
such steps, and they occur with `--learning-rate 0.002`. How long the steep coordinate
stays frozen depends on the signs of tiny numbers, so the row of cautious momentum
varies slightly between machines.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from examples.quadratic.dynamics import hamiltonian, loss, trajectory
from optax_cautious import cautious_sgd

TARGET = 1e-6  # target loss, as a fraction of the initial loss
# Color, line style and width of each method, in Okabe and Ito's colorblind-safe colors.
STYLES = {
    "gradient descent": ("#000000", ":", 1.8),
    "momentum": ("#0072B2", "-", 1.2),
    "cautious momentum": ("#D55E00", "-", 2.2),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Gradient descent, momentum and cautious momentum on an ill-conditioned quadratic.

    Minimize f(w) = (w_1^2 + condition * w_2^2) / 2, print a table, and plot the
    trajectories, the loss and the Hamiltonian.
    """

    condition: float = 50.0
    """Condition number: the curvature of the steep coordinate (1 for the flat one)."""
    learning_rate: float = 1e-3
    """Learning rate of all three methods."""
    momentum: float = 0.9
    """Momentum decay, beta in m' = beta m + g."""
    steps: int = 500
    """Number of steps."""
    start: tuple[float, float] = (1.0, 1.0)
    """Starting point (w_1, w_2)."""
    output: Path = Path("outputs/quadratic.png")
    """File to save the figure to."""

    def __post_init__(self) -> None:
        """Validate the settings."""
        if not 1 <= self.condition <= 1e12:
            raise ValueError(f"condition must be in [1, 1e12], got {self.condition}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate must be positive and finite, got {self.learning_rate}."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if not 1e-6 <= math.hypot(*self.start) <= 1e6:
            raise ValueError(
                "start must be at a distance of 1e-6 to 1e6 from the minimum (0, 0), "
                f"got {self.start}."
            )


class Run(NamedTuple):
    """Points, losses and Hamiltonians of one method, starting at the initial point."""

    points: np.ndarray
    losses: np.ndarray
    hamiltonians: np.ndarray


def run(config: Config) -> dict[str, Run]:
    """Run each method and return the runs by name."""
    rate = config.learning_rate
    optimizers = {
        "gradient descent": optax.sgd(rate),
        "momentum": optax.sgd(rate, config.momentum),
        "cautious momentum": cautious_sgd(rate, config.momentum),
    }
    runs = {}
    for name, optimizer in optimizers.items():
        start = jnp.array(config.start)
        path = trajectory(optimizer, start, config.condition, config.steps)
        runs[name] = Run(
            np.asarray(path.points),
            np.asarray(loss(path.points, config.condition)),
            np.asarray(hamiltonian(path, config.condition, rate)),
        )
    return runs


def rises(values: np.ndarray) -> int:
    """Count the steps that increased `values`, including steps to NaN."""
    return int(np.sum(~(values[1:] <= values[:-1])))


def table(runs: dict[str, Run]) -> str:
    """Format a table with one row per method."""
    reach = f"steps to {TARGET:g} f(w_0)"
    lines = [f"{'':17}  final loss  {reach}  loss rose  Hamiltonian rose"]
    for name, r in runs.items():
        reached = np.flatnonzero(r.losses <= TARGET * r.losses[0])
        first = str(reached[0]) if reached.size else "-"
        lines.append(
            f"{name:17}  {r.losses[-1]:10.2e}  {first:>{len(reach)}}"
            f"  {rises(r.losses):9}  {rises(r.hamiltonians):16}"
        )
    return "\n".join(lines)


def draw(runs: dict[str, Run], config: Config) -> Figure:
    """Plot the trajectories, the loss and the Hamiltonian."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    plane, losses, hamiltonians = figure.subplots(1, 3)
    hamiltonians.sharey(losses)
    for name, r in runs.items():
        color, line, width = STYLES[name]
        plane.plot(*r.points.T, line, color=color, linewidth=width, label=name)
        losses.semilogy(r.losses, line, color=color, linewidth=width)
        hamiltonians.semilogy(r.hamiltonians, line, color=color, linewidth=width)
    (left, right), (bottom, top) = plane.get_xlim(), plane.get_ylim()
    x, y = np.linspace(left, right, 200), np.linspace(bottom, top, 200)
    height = loss(jnp.stack(jnp.meshgrid(x, y), axis=-1), config.condition)
    levels = runs["momentum"].losses[0] * np.geomspace(1e-4, 1e2, 19)
    plane.contour(x, y, height, levels, colors="0.85", linewidths=0.8, zorder=0)
    plane.set(title="Trajectories", xlabel="$w_1$ (flat)", ylabel="$w_2$ (steep)")
    losses.set(title="Loss $f(w)$", xlabel="step")
    hamiltonians.set(title=r"Hamiltonian $f(w) + \eta\,\|m\|^2/2$", xlabel="step")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with `args`, or with the arguments of the process."""
    config = tyro.cli(Config, prog="python -m examples.quadratic", args=args)
    runs = run(config)
    print(table(runs))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, config).savefig(config.output, dpi=150)
    print(f"figure: {config.output}")


if __name__ == "__main__":
    main()
