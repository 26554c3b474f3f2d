"""The report of a comparison, from the logs of its runs."""

import csv
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from examples.llama import log
from examples.llama.config import TrainConfig, base_name, title
from examples.llama.model import count_parameters

markdown_table = partial(tabulate, tablefmt="github", disable_numparse=True)
"""Formats rows under a header, in Markdown."""


class Run(NamedTuple):
    """What the runs of a comparison differ in."""

    optimizer: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the directory."""
        return f"{self.optimizer}-lr{self.learning_rate:g}-seed{self.seed}"


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
"""The runs of one optimizer at one learning rate, of all seeds."""


def read_history(run: Run, directory: Path) -> History:
    """Reads the log of a run that is over."""
    records = log.read(directory)
    return History(
        run=run,
        losses=tuple(r["loss"] for r in records),
        evaluations=tuple(
            Evaluation(r["step"], r["validation_loss"], r["aligned_fraction"])
            for r in records
            if np.isfinite(r.get("validation_loss", np.nan))
        ),
        seconds=tuple(
            r["seconds_per_step"] for r in records if "seconds_per_step" in r
        ),
        diverged_at=records[-1]["step"] if records[-1].get("diverged") else None,
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


def group(histories: Sequence[History]) -> dict[tuple[str, float], Group]:
    """Puts the seeds of each optimizer and learning rate together."""
    groups: dict[tuple[str, float], Group] = {}
    for history in histories:
        key = history.run.optimizer, history.run.learning_rate
        groups[key] = (*groups.get(key, ()), history)
    return groups


def mean_loss(histories: Group) -> float:
    """Returns the mean final loss; infinite if a run diverged."""
    return statistics.fmean(history.final_loss for history in histories)


def best(histories: Sequence[History], optimizer: str) -> Group | None:
    """Returns the runs at the learning rate with the lowest mean final loss."""
    of_optimizer = [
        seeds for (name, _), seeds in group(histories).items() if name == optimizer
    ]
    chosen = min(of_optimizer, key=mean_loss)
    return chosen if np.isfinite(mean_loss(chosen)) else None


def pairs(histories: Sequence[History]) -> list[tuple[str, str]]:
    """Lists each optimizer that is there with and without caution."""
    names = list(dict.fromkeys(history.run.optimizer for history in histories))
    return [
        (base_name(name), name)
        for name in names
        if base_name(name) != name and base_name(name) in names
    ]


def table(histories: Sequence[History]) -> str:
    """Writes the results of each optimizer at each learning rate, in Markdown."""
    header = (
        "learning rate",
        "optimizer",
        "validation loss",
        "perplexity",
        "seconds a step",
        "aligned fraction",
        "ratio of steps",
    )
    groups = group(histories)
    rows: list[Sequence[str]] = []
    for (name, rate), seeds in sorted(groups.items(), key=lambda item: item[0][1]):
        diverged = [h for h in seeds if h.diverged_at is not None]
        if diverged:
            steps = ", ".join(f"{h.diverged_at}" for h in diverged)
            cells = [f"diverged at step {steps}", "", "", ""]
        else:
            cells = [
                _spread([h.final_loss for h in seeds], ".4f"),
                _spread([log.perplexity(h.final_loss) for h in seeds], ".2f"),
                f"{statistics.fmean(h.seconds_per_step for h in seeds):.3f}",
                f"{statistics.fmean(h.aligned_fraction for h in seeds):.3f}",
            ]
        base = groups.get((base_name(name), rate))
        ratio = _ratio(base, seeds) if base and name != base_name(name) else ""
        rows.append([f"{rate:g}", title(name), *cells, ratio])
    return markdown_table(rows, header)


def verdicts(histories: Sequence[History]) -> list[str]:
    """Says, for each pair, the speed-up at the learning rates that are best."""
    lines = []
    for base, cautious in pairs(histories):
        base_best, cautious_best = best(histories, base), best(histories, cautious)
        if base_best is None or cautious_best is None:
            diverged = base if base_best is None else cautious
            lines.append(
                f"{title(cautious)} to {title(base)}: no comparison, as "
                f"{title(diverged)} diverged at every learning rate."
            )
            continue
        rate = base_best[0].run.learning_rate
        same = group(histories).get((cautious, rate))
        if same is not None:
            lines.append(
                f"At {rate:g}, the best for {title(base)}: {_sentence(base_best, same)}"
            )
        own = cautious_best[0].run.learning_rate
        if own != rate:
            lines.append(
                f"Each at its best, {rate:g} and {own:g}: "
                f"{_sentence(base_best, cautious_best)}"
            )
    return lines


def _sentence(base: Group, cautious: Group) -> str:
    names = title(base[0].run.optimizer), title(cautious[0].run.optimizer)
    reached = [
        first_step_at(c.evaluations, b.final_loss) for b, c in _by_seed(base, cautious)
    ]
    steps = base[0].evaluations[-1].step
    found = [step for step in reached if step is not None]
    if len(found) < len(reached):
        return (
            f"{names[1]} did not reach {names[0]}'s final validation loss in {steps} "
            f"steps with {len(reached) - len(found)} of {len(reached)} seeds."
        )
    return (
        f"{names[1]} reached {names[0]}'s final validation loss of "
        f"{mean_loss(base):.4f} at step {_spread(found, '.0f')} of {steps}: a ratio of "
        f"{_spread([steps / step for step in found], '.2f')}."
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


def text(histories: Sequence[History], config: TrainConfig) -> str:
    """Writes the setting, the table and what follows from it, in Markdown."""
    tokens = config.data.batch_size * config.data.sequence_length
    seeds = sorted({history.run.seed for history in histories})
    several = "" if len(seeds) == 1 else "; of several seeds, the mean and the range"
    return "\n".join(
        [
            f"{count_parameters(config.model):,} parameters, {config.steps} steps of "
            f"{tokens} tokens, seed {', '.join(map(str, seeds))}{several}. The ratio "
            "of steps is that of all steps to those in which the cautious optimizer "
            "comes to the final validation loss of its base at the same learning rate "
            "and seed.",
            "",
            table(histories),
            "",
            *[f"- {verdict}" for verdict in verdicts(histories)],
            "",
        ]
    )


def write_csv(histories: Sequence[History], path: Path) -> None:
    """Writes a line for every step of every run; evaluations stand at their step."""
    header = (*Run._fields, "step", "loss", "validation_loss", "aligned_fraction")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for history in histories:
            evaluations = {e.step: e[1:] for e in history.evaluations}
            for step, loss in enumerate(history.losses, start=1):
                evaluation = evaluations.get(step, ("", ""))
                writer.writerow((*history.run, step, loss, *evaluation))


def plot(histories: Sequence[History], path: Path) -> None:
    """Draws the validation curves, and with several learning rates the final losses.

    Each curve is that of an optimizer's best learning rate, the mean of all seeds in
    the range that they span.
    """
    rates = sorted({history.run.learning_rate for history in histories})
    panels = 1 if len(rates) == 1 else 2
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_curves(axes[0], histories)
    if panels == 2:
        _plot_final_losses(axes[1], histories, rates)
    figure.savefig(path, dpi=150)


def _colors(histories: Sequence[History]) -> dict[str, tuple[str, str]]:
    """Chooses a color and a line for each optimizer: dashed without caution."""
    names = list(dict.fromkeys(history.run.optimizer for history in histories))
    bases = list(dict.fromkeys(map(base_name, names)))
    return {
        name: (f"C{bases.index(base_name(name))}", "--" if name in bases else "-")
        for name in names
    }


def _plot_curves(axes: Axes, histories: Sequence[History]) -> None:
    late: list[float] = []
    for name, (color, line) in _colors(histories).items():
        seeds = best(histories, name)
        if seeds is None:
            continue
        steps = [e.step for e in seeds[0].evaluations]
        losses = np.array([[e.loss for e in h.evaluations] for h in seeds])
        late += losses[:, losses.shape[1] // 6 :].max(0).tolist()
        label = f"{title(name)}, {seeds[0].run.learning_rate:g}"
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
    axes.set_title("Each optimizer at its best learning rate")
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
    axes: Axes, histories: Sequence[History], rates: Sequence[float]
) -> None:
    groups = group(histories)
    for name, (color, line) in _colors(histories).items():
        shown = [
            (rate, groups[name, rate])
            for rate in rates
            if (name, rate) in groups and np.isfinite(mean_loss(groups[name, rate]))
        ]
        if not shown:
            continue
        means = [mean_loss(seeds) for _, seeds in shown]
        reach: list[Callable[[Sequence[float]], float]] = [min, max]
        ends = [[f([h.final_loss for h in seeds]) for _, seeds in shown] for f in reach]
        axes.errorbar(
            [rate for rate, _ in shown],
            means,
            yerr=np.abs(np.array(ends) - means),
            fmt=f"o{line}",
            color=color,
            linewidth=2,
            capsize=3,
            label=title(name),
        )
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.set_title("Final loss")
    _finish(axes)


def _finish(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write(histories: Sequence[History], config: TrainConfig, directory: Path) -> str:
    """Writes the report, the curves as numbers and the curves as a picture.

    Returns:
        The report.
    """
    written = text(histories, config)
    (directory / "report.md").write_text(written)
    write_csv(histories, directory / "report.csv")
    plot(histories, directory / "report.png")
    return written
