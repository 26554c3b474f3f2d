"""The figures of the study."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from cycler import cycler
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.study.outcomes import Comparison


def plot_differences(compared: Sequence[Comparison], path: Path, what: str) -> None:
    """Plot the difference of each comparison at the arms' own best points.

    Each difference has its interval, and each arm that others are compared with has a
    panel. Where a run diverged, the difference is NaN and nothing is drawn.

    Args:
        compared: the comparisons, at least one.
        path: the file to write.
        what: the compared quantity, for the axis label.
    """
    others = list(dict.fromkeys(c.other.title for c in compared))
    arms = list(dict.fromkeys(c.arm.title for c in compared))
    size = 3 + 4 * len(others), 1.2 + 0.4 * len(arms)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    for panel, other in zip(panels, others, strict=True):
        for comparison in compared:
            if comparison.other.title != other or comparison.settings_of:
                continue
            mean, low, high = comparison.difference
            panel.errorbar(
                mean,
                arms.index(comparison.arm.title),
                xerr=[[mean - low], [high - mean]],
                fmt="o",
                color=_color(comparison),
                capsize=3,
            )
        panel.axvline(0, color="black", linewidth=1)
        panel.set_title(f"against {other}", fontsize="medium")
        panel.set_xlabel(f"difference in {what}")
        panel.locator_params(axis="x", nbins=6)
        panel.grid(alpha=0.25, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)  # The first arm on top.
    figure.savefig(path, dpi=150)


def _color(comparison: Comparison) -> str:
    """Return grey if no difference was seen, else blue."""
    return "C7" if comparison.verdict == "no difference seen" else "C0"


def plot_differences_by_step(
    compared: Sequence[tuple[str, Comparison]], path: Path
) -> None:
    """Plot the difference in validation loss during training.

    Args:
        compared: pairs of what was trained and a comparison whose runs were
            evaluated at the same steps and did not diverge.
        path: the file to write.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panel = figure.subplots()
    # Once the colors are used up, they come again as dashed lines.
    panel.set_prop_cycle(cycler(linestyle=["-", "--"]) * rcParams["axes.prop_cycle"])
    late: list[float] = []
    for model, comparison in compared:
        by_step = comparison.differences_by_step
        shares = [step / max(by_step) for step in by_step]
        means = [statistics.fmean(values) for values in by_step.values()]
        late += means[len(means) // 6 :]
        panel.plot(shares, means, label=f"{comparison.arm.title} ({model})")
    panel.axhline(0, color="black", linewidth=1)
    # The steep start would flatten the rest.
    panel.set_ylim(min(late) - 0.02, max(0.0, *late) + 0.02)
    panel.set_xlim(0, 1)
    panel.xaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_xlabel("steps")
    panel.set_ylabel("difference in validation loss")
    figure.legend(frameon=False, loc="outside right center")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_sizes(compared: Sequence[tuple[int, Comparison]], path: Path) -> None:
    """Plot the gain from caution against model size.

    Args:
        compared: pairs of a parameter count and the comparison at that size.
        path: the file to write.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for count, comparison in compared:
        mean, low, high = comparison.difference
        left.errorbar(
            count,
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt="o",
            color=_color(comparison),
            capsize=3,
        )
        ratios = [] if comparison.diverged else comparison.ratios
        for i, ratio in enumerate(ratios):
            place = count * 1.05 ** (i - (len(ratios) - 1) / 2)  # Side by side.
            if ratio is None:
                right.plot(place, 1, "v", color="C3", fillstyle="none", clip_on=False)
            else:
                right.plot(place, ratio, "o", color="C0", alpha=0.6)
    left.axhline(0, color="black", linewidth=1)
    left.set_ylabel("difference in validation loss")
    right.axhline(1, color="black", linewidth=1)
    right.set_ylabel("ratio of steps, each seed")
    for panel in (left, right):
        panel.set_xscale("log")
        counts = [count for count, _ in compared]
        panel.set_xticks(counts, [f"{count / 1e6:.2g}" for count in counts])
        panel.minorticks_off()
        panel.set_xlabel("million parameters")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
