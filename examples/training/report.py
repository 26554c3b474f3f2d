"""The report of a comparison, from the logs of its runs."""

import csv
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from examples.training import log
from examples.training.config import TrainConfig
from examples.training.optimizers import title
from examples.training.task import count_parameters

markdown_table = partial(tabulate, tablefmt="github", disable_numparse=True)
"""Formats rows under a header, in Markdown."""

Point = tuple[tuple[str, str], ...]
"""Names and values of the settings in which runs differ."""


class Side(NamedTuple):
    """An optimizer, with or without caution."""

    optimizer: str
    caution: bool

    @property
    def title(self) -> str:
        """How a table or a picture writes it."""
        return title(self.optimizer, self.caution)


class Run(NamedTuple):
    """What the runs of a comparison differ in."""

    side: Side
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Name of the directory."""
        caution = "cautious-" * self.side.caution
        settings = "".join(f"-{name}={value}" for name, value in self.point)
        return f"{caution}{self.side.optimizer}{settings}-seed{self.seed}"


class Evaluation(NamedTuple):
    """A point of a validation curve."""

    step: int
    loss: float
    aligned_fraction: float


@dataclass(frozen=True)
class History:
    """The record of one run."""

    run: Run
    losses: tuple[float, ...]
    """Training loss of every step."""
    evaluations: tuple[Evaluation, ...]
    seconds: tuple[float, ...]
    """Time a step took on average, between each writing of the log and the next."""
    diverged_at: int | None = None
    """The step at which the loss was not finite."""
    aligned_fractions: Mapping[str, np.ndarray] | None = None
    """Of each parameter at each evaluation, ``[evaluations]`` or ``[evaluations,
    L]``."""

    @property
    def final_loss(self) -> float:
        """The last validation loss; infinite for a run that diverged."""
        return self.evaluations[-1].loss if self.diverged_at is None else float("inf")

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step, without what came before the first writing."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def aligned_fraction(self) -> float:
        """Mean over the evaluations."""
        return statistics.fmean(e.aligned_fraction for e in self.evaluations)


Group = tuple[History, ...]
"""The runs of one side at one point, of all seeds."""


def read_history(run: Run, directory: Path) -> History:
    """Reads the log of a run that is over."""
    records = log.read(directory)
    evaluated = [r for r in records if np.isfinite(r.get("validation_loss", np.nan))]
    names = evaluated[0].get("aligned_fractions", {}) if evaluated else {}
    return History(
        run=run,
        losses=tuple(r["loss"] for r in records),
        evaluations=tuple(
            Evaluation(r["step"], r["validation_loss"], r["aligned_fraction"])
            for r in evaluated
        ),
        seconds=tuple(
            r["seconds_per_step"] for r in records if "seconds_per_step" in r
        ),
        diverged_at=records[-1]["step"] if records[-1].get("diverged") else None,
        aligned_fractions={
            name: np.array([r["aligned_fractions"][name] for r in evaluated])
            for name in names
        },
    )


def first_step_at(evaluations: Sequence[Evaluation], loss: float) -> float | None:
    """Finds where a loss curve first comes down to a value.

    Args:
        evaluations: points of the curve, joined by straight lines.
        loss: the value.

    Returns:
        The step, with a fraction, or None if the curve stays above.
    """
    if evaluations and evaluations[0].loss <= loss:
        return evaluations[0].step
    for before, after in itertools.pairwise(evaluations):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return before.step + share * (after.step - before.step)
    return None


def speed_up(base: History, cautious: History) -> float | None:
    """Returns the base's steps over those in which the other gets as far.

    None if it never does. For a base that diverged there is nothing to reach.
    """
    if base.diverged_at is not None:
        return None
    reached = first_step_at(cautious.evaluations, base.final_loss)
    return None if reached is None else base.evaluations[-1].step / reached


def group(histories: Sequence[History]) -> dict[tuple[Side, Point], Group]:
    """Puts the seeds of each side and point together."""
    groups: dict[tuple[Side, Point], Group] = {}
    for history in histories:
        key = history.run.side, history.run.point
        groups[key] = (*groups.get(key, ()), history)
    return groups


def mean_loss(histories: Group) -> float:
    """Returns the mean final loss; infinite if a run diverged."""
    return statistics.fmean(history.final_loss for history in histories)


def best(histories: Sequence[History], side: Side) -> Group | None:
    """Returns the runs at the point with the lowest mean final loss."""
    of_side = [seeds for (own, _), seeds in group(histories).items() if own == side]
    chosen = min(of_side, key=mean_loss, default=())
    return chosen if chosen and np.isfinite(mean_loss(chosen)) else None


def pairs(histories: Sequence[History]) -> list[tuple[Side, Side]]:
    """Lists each optimizer that is there with and without caution."""
    sides = list(dict.fromkeys(history.run.side for history in histories))
    return [
        (Side(side.optimizer, False), side)
        for side in sides
        if side.caution and Side(side.optimizer, False) in sides
    ]


def base_of(group_: Group, groups: Mapping[tuple[Side, Point], Group]) -> Group | None:
    """Finds the runs without caution at the same point.

    They have none of caution's own settings.
    """
    run = group_[0].run
    for (side, point), seeds in groups.items():
        if side == Side(run.side.optimizer, False) and set(point) <= set(run.point):
            return seeds
    return None


def table(
    histories: Sequence[History], metrics: Mapping[str, Callable[[float], float]]
) -> str:
    """Writes the results of each side at each point, in Markdown."""
    groups = group(histories)
    names = list(dict.fromkeys(n for _, point in groups for n, _ in point))
    header = (
        *(name.replace("_", " ") for name in names),
        "optimizer",
        "validation loss",
        *metrics,
        "seconds a step",
        "aligned fraction",
        "ratio of steps",
    )
    rows: list[Sequence[str]] = []
    for (side, point), seeds in groups.items():
        diverged = [h for h in seeds if h.diverged_at is not None]
        if diverged:
            steps = ", ".join(f"{h.diverged_at}" for h in diverged)
            cells = [f"diverged at step {steps}", *[""] * (len(metrics) + 2)]
        else:
            losses = [h.final_loss for h in seeds]
            cells = [
                _spread(losses, ".4f"),
                *(_spread([f(x) for x in losses], ".2f") for f in metrics.values()),
                f"{statistics.fmean(h.seconds_per_step for h in seeds):.3f}",
                f"{statistics.fmean(h.aligned_fraction for h in seeds):.3f}",
            ]
        base = base_of(seeds, groups) if side.caution else None
        values = dict(point)
        settings = [values.get(name, "") for name in names]
        rows.append(
            [*settings, side.title, *cells, _ratio(base, seeds) if base else ""]
        )
    return markdown_table(rows, header)


def verdicts(histories: Sequence[History]) -> list[str]:
    """Says, for each pair, what caution does where each side is best."""
    lines = []
    groups = group(histories)
    for base, cautious in pairs(histories):
        base_best, cautious_best = best(histories, base), best(histories, cautious)
        if base_best is None or cautious_best is None:
            diverged = base if base_best is None else cautious
            lines.append(
                f"{cautious.title} to {base.title}: no comparison, as {diverged.title} "
                "diverged everywhere."
            )
            continue
        there = [
            seeds
            for (side, _), seeds in groups.items()
            if side == cautious
            and (own := base_of(seeds, groups)) is not None
            and own[0].run == base_best[0].run
        ]
        same = min(there, key=mean_loss, default=None)
        if same is not None:
            where = write_point(same[0].run.point)
            lines.append(
                f"At {where}, the best for {base.title}: {_sentence(base_best, same)}"
            )
        if same is None or same[0].run != cautious_best[0].run:
            lines.append(
                f"Each at its best, {write_point(base_best[0].run.point)} and "
                f"{write_point(cautious_best[0].run.point)}: "
                f"{_sentence(base_best, cautious_best)}"
            )
    return lines


def write_point(point: Point) -> str:
    """Writes a point of the grid as text."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point)


class Interval(NamedTuple):
    """A mean, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(base: Sequence[float], other: Sequence[float]) -> Interval:
    """Returns the mean of other - base over pairs, by Student's t of the differences.

    Args:
        base: a value for each seed, of two seeds at least.
        other: those of the same seeds.
    """
    found = scipy.stats.ttest_rel(other, base)
    low, high = found.confidence_interval(0.95)
    mean = statistics.fmean(o - b for o, b in zip(other, base, strict=True))
    return Interval(mean, float(low), float(high))


def _sentence(base: Group, cautious: Group) -> str:
    names = base[0].run.side.title, cautious[0].run.side.title
    both = _by_seed(base, cautious)
    reached = [first_step_at(c.evaluations, b.final_loss) for b, c in both]
    steps = base[0].evaluations[-1].step
    found = [step for step in reached if step is not None]
    if len(found) < len(reached):
        text = (
            f"{names[1]} did not reach {names[0]}'s final validation loss of "
            f"{mean_loss(base):.4f} in {steps} steps with "
            f"{len(reached) - len(found)} of {len(reached)} seeds."
        )
    else:
        text = (
            f"{names[1]} reached {names[0]}'s final validation loss of "
            f"{mean_loss(base):.4f} at step {_spread(found, '.0f')} of {steps}: a "
            f"ratio of {_spread([steps / step for step in found], '.2f')}."
        )
    return f"{text} {_difference(both)}".strip()


def _difference(both: Sequence[tuple[History, History]]) -> str:
    """Says how the final losses differ, with an interval over the seeds."""
    if len(both) < 2 or any(
        not np.isfinite(h.final_loss) for pair in both for h in pair
    ):
        return ""
    base, other = ([h.final_loss for h in side] for side in zip(*both, strict=True))
    mean, low, high = paired_difference(base, other)
    nothing = " No difference is seen." if low <= 0 <= high else ""
    return (
        f"The final losses differ by {mean:+.4f} (95 % confidence interval of the "
        f"paired difference {low:+.4f} to {high:+.4f}, {len(both)} seeds).{nothing}"
    )


def _by_seed(base: Group, cautious: Group) -> list[tuple[History, History]]:
    by_seed = {history.run.seed: history for history in cautious}
    return [(b, by_seed[b.run.seed]) for b in base if b.run.seed in by_seed]


def _ratio(base: Group, cautious: Group) -> str:
    ratios = [speed_up(b, c) for b, c in _by_seed(base, cautious)]
    if any(history.diverged_at is not None for history in (*base, *cautious)):
        return ""
    found = [ratio for ratio in ratios if ratio is not None]
    return _spread(found, ".2f") if len(found) == len(ratios) else "not reached"


def _spread(values: Sequence[float], form: str) -> str:
    """Writes the mean, and the smallest and largest where there are several."""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def text(histories: Sequence[History], config: TrainConfig[Any]) -> str:
    """Writes the setting, the table and what follows from it, in Markdown."""
    task = config.task
    seeds = sorted({history.run.seed for history in histories})
    several = "" if len(seeds) == 1 else "; of several seeds, the mean and the range"
    return "\n".join(
        [
            f"{count_parameters(task):,} parameters, {config.steps} steps of "
            f"{task.describe()}, seed {', '.join(map(str, seeds))}{several}. The ratio "
            "of steps is that of all steps to those in which the cautious optimizer "
            "comes to the final validation loss of its base with the same settings "
            "and seed.",
            "",
            table(histories, task.metrics),
            "",
            *[f"- {verdict}" for verdict in verdicts(histories)],
            "",
        ]
    )


def write_csv(histories: Sequence[History], path: Path) -> None:
    """Writes a line for every step of every run; evaluations stand at their step."""
    names = list(dict.fromkeys(n for h in histories for n, _ in h.run.point))
    header = ("optimizer", "caution", *names, "seed", "step", "loss")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*header, "validation_loss", "aligned_fraction"))
        for history in histories:
            side, point, seed = history.run
            values = dict(point)
            run = (*side, *(values.get(name, "") for name in names), seed)
            evaluations = {e.step: e[1:] for e in history.evaluations}
            for step, loss in enumerate(history.losses, start=1):
                evaluation = evaluations.get(step, ("", ""))
                writer.writerow((*run, step, loss, *evaluation))


def plot(histories: Sequence[History], path: Path) -> None:
    """Draws the validation curves, and the final losses over what was swept.

    Each curve is that of a side's best point, the mean of all seeds in the range that
    they span. Beside it are the final losses over one swept setting, or over two as a
    map of colours for each side, on one scale.
    """
    swept = _swept(histories)
    sides = list(_colors(histories)) if len(swept) > 1 else []
    panels = 1 + (1 if len(swept) == 1 else len(sides))
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_curves(axes[0], histories)
    if len(swept) == 1:
        _plot_final_losses(axes[1], histories, *swept[0])
    elif swept:
        _plot_maps(axes[1:], histories, sides, swept[:2])
    figure.savefig(path, dpi=150)


def _swept(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Lists the settings that have several values, and these, most values first."""
    values: dict[str, dict[str, None]] = {}
    for history in histories:
        for name, value in history.run.point:
            values.setdefault(name, {})[value] = None
    # A learning rate that is each optimizer's default is not swept.
    sides = {h.run.side for h in histories}
    several = [(n, list(v)) for n, v in values.items() if len(v) > 1]
    if len(several) == 1 and len(group(histories)) == len(sides):
        return []
    return several


def _colors(histories: Sequence[History]) -> dict[Side, tuple[str, str]]:
    """Chooses a color and a line for each side: dashed without caution."""
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
        label = f"{side.title}, {write_point(seeds[0].run.point)}"
        axes.plot(steps, losses.mean(0), line, color=color, linewidth=2, label=label)
        if len(seeds) > 1:
            axes.fill_between(
                steps, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0
            )
    for base, cautious in pairs(histories):
        _plot_arrow(axes, best(histories, base), best(histories, cautious))
    if late:  # The steep beginning would flatten all the rest.
        axes.set_ylim(top=max(late))
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_title("Each optimizer at its best")
    _finish(axes)


def _plot_arrow(axes: Axes, base: Group | None, cautious: Group | None) -> None:
    """Draws the way from the base's last step to the one with the same loss."""
    if base is None or cautious is None:
        return
    loss = mean_loss(base)
    curve = [
        Evaluation(points[0].step, statistics.fmean(p.loss for p in points), 0.0)
        for points in zip(*[h.evaluations for h in cautious], strict=True)
    ]
    reached = first_step_at(curve, loss)
    if reached is None:
        return
    end = base[0].evaluations[-1].step
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (reached, loss), (end, loss), arrowprops=arrow)
    axes.annotate(
        f"ratio of steps: {end / reached:.2f}",
        ((reached + end) / 2, loss),
        textcoords="offset points",
        xytext=(0, 24),
        horizontalalignment="center",
    )


def _plot_final_losses(
    axes: Axes, histories: Sequence[History], name: str, values: Sequence[str]
) -> None:
    for side, (color, line) in _colors(histories).items():
        at: dict[int, list[float]] = {}
        for (own, point), seeds in group(histories).items():
            value = dict(point).get(name)
            if own == side and value is not None and np.isfinite(mean_loss(seeds)):
                at[values.index(value)] = [h.final_loss for h in seeds]
        if not at:
            continue
        places = sorted(at)
        means = np.array([statistics.fmean(at[i]) for i in places])
        ends = [[f(at[i]) for i in places] for f in (min, max)]
        axes.errorbar(
            places,
            means,
            yerr=np.abs(np.array(ends) - means),
            fmt=f"o{line}",
            color=color,
            linewidth=2,
            capsize=3,
            label=side.title,
        )
    axes.set_xticks(range(len(values)), values)
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
    """Draws the final losses over two settings; of a third, its best value is taken."""
    (x_name, x_values), (y_name, y_values) = swept
    maps = np.full((len(sides), len(y_values), len(x_values)), np.inf)
    for (side, point), seeds in group(histories).items():
        own = dict(point)
        # What a side has not, like an option of caution, makes no difference to it.
        xs = [x_values.index(own[x_name])] if x_name in own else range(len(x_values))
        ys = [y_values.index(own[y_name])] if y_name in own else range(len(y_values))
        for i, j in itertools.product(ys, xs):
            cell = sides.index(side), i, j
            maps[cell] = min(maps[cell], mean_loss(seeds))
    finite = maps[np.isfinite(maps)]
    # Far from the best, one loss is as bad as another.
    low = finite.min() if finite.size else 0.0
    high = max(np.quantile(finite, 0.8), low + 1e-6) if finite.size else 1.0
    for panel, side, losses in zip(axes, sides, maps, strict=True):
        image = panel.imshow(
            losses, vmin=low, vmax=high, cmap="viridis_r", aspect="auto"
        )
        for (i, j), loss in np.ndenumerate(losses):
            shown = f"{loss:.3f}" if np.isfinite(loss) else "diverged"
            dark = np.isfinite(loss) and loss < (low + high) / 2
            panel.text(
                j, i, shown, ha="center", va="center", color="w" if not dark else "k"
            )
        panel.set_xticks(range(len(x_values)), x_values)
        panel.set_yticks(range(len(y_values)), y_values)
        panel.set_xlabel(x_name.replace("_", " "))
        panel.set_ylabel(y_name.replace("_", " "))
        panel.set_title(f"{side.title}: final loss")
    axes[-1].figure.colorbar(image, ax=list(axes), extend="max")


def plot_aligned(histories: Sequence[History], path: Path) -> None:
    """Draws the aligned fraction of each parameter, by layers, over the steps.

    Of each side, the run at its best point with the first seed.
    """
    shown = [
        seeds[0]
        for side in _colors(histories)
        if (seeds := best(histories, side)) is not None and seeds[0].aligned_fractions
    ]
    if not shown:
        return
    fractions = [_rows(history.aligned_fractions or {}) for history in shown]
    height = min(2 + 0.16 * len(fractions[0]), 40)
    figure = Figure(figsize=(1.5 + 4.5 * len(shown), height), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
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
    """Lists the fractions of each parameter over the evaluations, layer by layer."""
    rows = {}
    for name, values in fractions.items():
        short = name.removesuffix(".kernel").removesuffix(".scale")
        if values.ndim == 1:
            rows[short] = values
        else:
            rows |= {f"{short} {i}": column for i, column in enumerate(values.T)}
    return rows


def _finish(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write(
    histories: Sequence[History], config: TrainConfig[Any], directory: Path
) -> str:
    """Writes the report, the curves as numbers, and the pictures.

    Returns:
        The report.
    """
    written = text(histories, config)
    (directory / "report.md").write_text(written)
    write_csv(histories, directory / "report.csv")
    plot(histories, directory / "report.png")
    plot_aligned(histories, directory / "aligned.png")
    return written
