"""The figures of a comparison: curves, final losses and aligned fractions."""

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.training.history import (
    Evaluation,
    Group,
    History,
    Side,
    best,
    by_seed,
    first_step_at,
    group,
    mean_loss,
    pairs,
    speed_up,
    write_point,
)


def plot(
    histories: Sequence[History],
    path: Path,
    curves: Sequence[History] | None = None,
) -> None:
    """Plot the validation curves, and the final losses over the swept settings.

    Each curve is the mean over the seeds at a side's best point, shaded over their
    range. Next to the curves are the final losses over one swept setting, or, over two,
    a heat map per side on a common color scale. If the runs of a sweep were evaluated
    only at their end, there are no curves.

    Args:
        histories: the runs.
        path: the file to write.
        curves: the runs whose curves to plot, if they differ from ``histories``.
    """
    swept = _swept(histories)
    sides = list(_colors(histories)) if len(swept) > 1 else []
    curves = histories if curves is None else curves
    has_curves = not swept or any(len(history.evaluations) > 1 for history in curves)
    panels = has_curves + (1 if len(swept) == 1 else len(sides))
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if has_curves:
        _plot_curves(axes[0], curves)
        if swept:
            axes[0].set_title("Each optimizer at its best")
    if len(swept) == 1:
        _plot_final_losses(axes[-1], histories, *swept[0])
    elif swept:
        _plot_maps(axes[has_curves:], histories, sides, swept[:2])
    figure.savefig(path, dpi=150)


def _swept(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """List the settings with several values on one side, most values first."""
    values: dict[str, dict[str, None]] = {}
    of_side: dict[tuple[Side, str], set[str]] = {}
    for history in histories:
        for name, value in history.run.point:
            values.setdefault(name, {})[value] = None
            of_side.setdefault((history.run.side, name), set()).add(value)
    # Optimizers with different default learning rates are not a sweep.
    swept = {name for (_, name), found in of_side.items() if len(found) > 1}
    return sorted(
        ((name, _in_order(found)) for name, found in values.items() if name in swept),
        key=lambda setting: -len(setting[1]),
    )


def _in_order(values: Iterable[str]) -> list[str]:
    """Sort values if they are numbers, and otherwise keep their order."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return list(values)


def _colors(histories: Sequence[History]) -> dict[Side, tuple[str, str]]:
    """Choose a color and a line style for each side, dashed without caution."""
    sides = list(dict.fromkeys(history.run.side for history in histories))
    optimizers = list(dict.fromkeys(side.optimizer for side in sides))
    return {
        side: (f"C{optimizers.index(side.optimizer)}", "-" if side.caution else "--")
        for side in sides
    }


def _plot_curves(axes: Axes, histories: Sequence[History]) -> None:
    late: list[float] = []
    for side, (color, line) in _colors(histories).items():
        seeds = best(histories, side)
        if seeds is None:
            continue
        steps = [e.step for e in seeds[0].evaluations]
        losses = np.array([[e.loss for e in h.evaluations] for h in seeds])
        late += losses[:, losses.shape[1] // 6 :].max(0).tolist()
        label = textwrap.fill(f"{side.title}, {write_point(seeds[0].run.point)}", 48)
        axes.plot(steps, losses.mean(0), line, color=color, linewidth=2, label=label)
        if len(seeds) > 1:
            axes.fill_between(
                steps, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0
            )
    for base, cautious in pairs(histories):
        _plot_arrow(axes, best(histories, base), best(histories, cautious))
    if late:  # The steep start would flatten the remaining curve.
        axes.set_ylim(top=max(late))
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_title("Validation loss")
    _finish(axes, legend="upper right")  # Falling curves leave it free.


def _plot_arrow(axes: Axes, base: Group | None, cautious: Group | None) -> None:
    """Draw an arrow from the base's last step to the step with the same loss.

    It is labelled with the mean ratio of steps over the seeds, if all have one.
    """
    if base is None or cautious is None:
        return
    ratios = [speed_up(b, c) for b, c in by_seed(base, cautious)]
    found = [ratio for ratio in ratios if ratio is not None]
    loss = mean_loss(base)
    curve = [
        Evaluation(points[0].step, statistics.fmean(p.loss for p in points), 0.0)
        for points in zip(*[h.evaluations for h in cautious], strict=True)
    ]
    reached = first_step_at(curve, loss)
    if reached is None or not found or len(found) < len(ratios):
        return
    end = base[0].evaluations[-1].step
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (reached, loss), (end, loss), arrowprops=arrow)
    axes.annotate(
        f"ratio of steps: {statistics.fmean(found):.2f}",
        (reached, loss),
        textcoords="offset points",
        xytext=(-6, -4),  # Decreasing curves leave this corner free.
        horizontalalignment="right",
        verticalalignment="top",
    )


def _plot_final_losses(
    axes: Axes, histories: Sequence[History], name: str, values: Sequence[str]
) -> None:
    sides = _colors(histories)
    for number, (side, (color, line)) in enumerate(sides.items()):
        at: dict[int, list[float]] = {}
        for (own, point), seeds in group(histories).items():
            value = dict(point).get(name)
            if own == side and value is not None and np.isfinite(mean_loss(seeds)):
                at[values.index(value)] = [h.final_loss for h in seeds]
        if not at:
            continue
        places = sorted(at)
        # Side by side, so that the bars of different sides do not overlap.
        shift = 0.03 * (number - (len(sides) - 1) / 2)
        means = np.array([statistics.fmean(at[i]) for i in places])
        ends = [[f(at[i]) for i in places] for f in (min, max)]
        axes.errorbar(
            [place + shift for place in places],
            means,
            yerr=np.abs(np.array(ends) - means),
            fmt=f"o{line}",
            color=color,
            linewidth=2,
            capsize=3,
            label=side.title,
        )
    labels = [textwrap.fill(value, 24, break_long_words=False) for value in values]
    axes.set_xticks(range(len(values)), labels)
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel("validation loss")
    axes.set_title("Final loss")
    _finish(axes)


def _plot_maps(
    axes: Sequence[Axes],
    histories: Sequence[History],
    sides: Sequence[Side],
    swept: Sequence[tuple[str, list[str]]],
) -> None:
    """Plot the final losses over two settings, at the best value of any others."""
    (x_name, x_values), (y_name, y_values) = swept
    # NaN where there is no run, infinite where a run diverged.
    maps = np.full((len(sides), len(y_values), len(x_values)), np.nan)
    for (side, point), seeds in group(histories).items():
        own = dict(point)
        # A setting that a side lacks, such as one of caution, does not affect it.
        xs = [x_values.index(own[x_name])] if x_name in own else range(len(x_values))
        ys = [y_values.index(own[y_name])] if y_name in own else range(len(y_values))
        for i, j in itertools.product(ys, xs):
            cell = sides.index(side), i, j
            maps[cell] = np.fmin(maps[cell], mean_loss(seeds))
    finite = maps[np.isfinite(maps)]
    # Clip the color scale: differences between high losses do not matter.
    low = finite.min() if finite.size else 0.0
    high = max(np.quantile(finite, 0.8), low + 1e-6) if finite.size else 1.0
    for panel, side, losses in zip(axes, sides, maps, strict=True):
        image = panel.imshow(
            losses, vmin=low, vmax=high, cmap="viridis_r", aspect="auto"
        )
        for (i, j), loss in np.ndenumerate(losses):
            if np.isnan(loss):
                continue
            shown = f"{loss:.3f}" if np.isfinite(loss) else "diverged"
            # An infinite loss has no color: its cell is white.
            on_light = not np.isfinite(loss) or loss < (low + high) / 2
            panel.text(
                j, i, shown, ha="center", va="center", color="k" if on_light else "w"
            )
        panel.set_xticks(range(len(x_values)), x_values)
        panel.set_yticks(range(len(y_values)), y_values)
        panel.set_xlabel(x_name.replace("_", " "))
        panel.set_ylabel(y_name.replace("_", " "))
        panel.set_title(f"{side.title}: final loss")
    axes[-1].figure.colorbar(image, ax=list(axes), extend="max")


def plot_aligned(histories: Sequence[History], path: Path) -> None:
    """Plot the aligned fraction of each parameter, per layer, over the steps.

    Each side is represented by the first seed at its best point. Without aligned
    fractions, no file is written.
    """
    shown = [
        seeds[0]
        for side in _colors(histories)
        if (seeds := best(histories, side)) is not None and seeds[0].aligned_fractions
    ]
    if not shown:
        return
    fractions = [_rows(history.aligned_fractions or {}) for history in shown]
    height = min(2 + 0.16 * max(map(len, fractions)), 40)
    figure = Figure(figsize=(1.5 + 4.5 * len(shown), height), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, history, rows in zip(panels, shown, fractions, strict=True):
        steps = [e.step for e in history.evaluations]
        image = panel.imshow(
            list(rows.values()),
            vmin=0,
            vmax=1,
            cmap="RdBu",
            aspect="auto",
            interpolation="nearest",
            extent=(0, steps[-1], len(rows) - 0.5, -0.5),
        )
        panel.set_yticks(range(len(rows)), list(rows), fontsize=7)
        panel.set_xlabel("step")
        panel.set_title(history.run.side.title)
    figure.colorbar(image, ax=list(panels), label="aligned fraction")
    figure.savefig(path, dpi=150)


def _rows(fractions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the fractions over the evaluations, one row per parameter and layer."""
    rows = {}
    for name, values in fractions.items():
        short = name.removesuffix(".kernel").removesuffix(".scale")
        if values.ndim == 1:
            rows[short] = values
        else:
            rows |= {f"{short} {i}": column for i, column in enumerate(values.T)}
    return rows


def _finish(axes: Axes, legend: Literal["best", "upper right"] = "best") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, frameon=False, handlelength=3)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
