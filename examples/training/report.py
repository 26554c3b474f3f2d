"""The report of a comparison: its table, verdicts, curves and figures."""

import csv
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from examples.training import plots
from examples.training.config import TrainConfig
from examples.training.history import (
    Group,
    History,
    Point,
    Side,
    base_of,
    best,
    by_seed,
    first_step_at,
    group,
    mean_loss,
    paired_difference,
    pairs,
    short_paths,
    speed_up,
    write_point,
)
from examples.training.task import Task, count_parameters

TEXT_NAME = "report.md"

markdown_table = partial(tabulate, tablefmt="github", disable_numparse=True)
"""Format rows and a header as a Markdown table."""


def table(
    histories: Sequence[History], metrics: Mapping[str, Callable[[float], float]]
) -> str:
    """Format the results of each side at each point as a Markdown table."""
    groups = group(histories)
    names = list(dict.fromkeys(n for _, point in groups for n, _ in point))
    scores = score_names(histories)
    header = (
        *(name.replace("_", " ") for name in names),
        "optimizer",
        "validation loss",
        *metrics,
        *scores,
        "seconds per step",
        "aligned fraction",
        *["ratio of steps"] * _has_curves(histories),
    )
    rows: list[Sequence[str]] = []
    for (side, point), seeds in groups.items():
        diverged = [h for h in seeds if h.diverged_at is not None]
        if diverged:
            steps = ", ".join(f"{h.diverged_at}" for h in diverged)
            empty = [""] * (len(metrics) + len(scores) + 2)
            cells = [f"diverged at step {steps}", *empty]
        else:
            losses = [h.final_loss for h in seeds]
            cells = [
                spread(losses, ".4f"),
                *(spread([f(x) for x in losses], ".2f") for f in metrics.values()),
                *(
                    spread([h.scores[name] for h in seeds], ".4f")
                    if name in seeds[0].scores
                    else ""
                    for name in scores
                ),
                f"{statistics.fmean(h.seconds_per_step for h in seeds):.3f}",
                f"{statistics.fmean(h.aligned_fraction for h in seeds):.3f}",
            ]
        base = base_of(seeds, groups) if side.caution else None
        values = dict(point)
        settings = [values.get(name, "") for name in names]
        ratio = _ratio(base, seeds) if base else ""
        rows.append([*settings, side.title, *cells, ratio][: len(header)])
    return markdown_table(rows, header)


def score_names(histories: Sequence[History]) -> list[str]:
    """List the names of the scores reported besides the loss."""
    return list(dict.fromkeys(name for h in histories for name in h.scores))


def score_differences(histories: Sequence[History]) -> str:
    """Format the effect of caution, and of two-valued settings, on the scores.

    The Markdown table has the differences in scores between runs with and without
    caution, and between the values of each setting that was swept over exactly two.
    Differences are paired by seed, with all other settings equal. Return an empty
    string without scores or with a single seed.
    """
    rows = []
    for what, where, base, other in _score_pairs(group(histories)):
        for name in score_names(histories):
            both = [
                (b.scores[name], o.scores[name])
                for b, o in by_seed(base, other)
                if name in b.scores and name in o.scores  # Diverged runs have none.
            ]
            if len(both) > 1:
                rows.append((what, where, name, *_score_interval(both)))
    header = "difference", "at", "score", "mean", "95% interval", "seeds"
    return markdown_table(rows, header) if rows else ""


def _score_pairs(
    groups: Mapping[tuple[Side, Point], Group],
) -> Iterator[tuple[str, str, Group, Group]]:
    """Yield groups that differ in caution or one setting.

    Yields:
        The name of the difference, the settings in common, and the two groups.
    """
    for (side, point), seeds in groups.items():
        base = base_of(seeds, groups) if side.caution else None
        if base is not None:
            what = f"{side.title} - {base[0].run.side.title}"
            yield what, write_point(point), base, seeds
    values: dict[str, dict[str, None]] = {}
    for _, point in groups:
        for name, value in point:
            values.setdefault(name, {})[value] = None
    for name, found in values.items():
        if len(found) != 2:
            continue
        first, second = found
        for (side, point), seeds in groups.items():
            changed = tuple((n, second if n == name else value) for n, value in point)
            if dict(point).get(name) == first and (side, changed) in groups:
                where = [side.title, write_point(_without(point, name))]
                what = f"{name.replace('_', ' ')} {second} - {first}"
                yield what, ", ".join(where), seeds, groups[side, changed]


def _without(point: Point, name: str) -> Point:
    return tuple((n, value) for n, value in point if n != name)


def _score_interval(both: Sequence[tuple[float, float]]) -> tuple[str, str, str]:
    base, other = zip(*both, strict=True)
    mean, low, high = paired_difference(base, other)
    unseen = " (no difference seen)" * (low <= 0 <= high)
    return f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}{unseen}", str(len(both))


def verdicts(histories: Sequence[History]) -> list[str]:
    """Return sentences about the effect of caution at each optimizer's best point."""
    lines = []
    groups = group(histories)
    for base, cautious in pairs(histories):
        base_best, cautious_best = best(histories, base), best(histories, cautious)
        if base_best is None or cautious_best is None:
            diverged = base if base_best is None else cautious
            lines.append(
                f"{cautious.title} against {base.title}: no comparison, because at "
                f"every point {diverged.title} diverged with at least one seed."
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
            if sum(side == base for side, _ in groups) > 1:
                where += f", the best for {base.title}"
            lines.append(f"At {where}: {_sentence(base_best, same)}")
        if same is None or same[0].run != cautious_best[0].run:
            lines.append(
                f"Each at its best on these seeds, "
                f"{write_point(base_best[0].run.point)} (best of "
                f"{_points(groups, base)}) and "
                f"{write_point(cautious_best[0].run.point)} (best of "
                f"{_points(groups, cautious)}): "
                f"{_sentence(base_best, cautious_best)}"
            )
    return lines


def _points(groups: Mapping[tuple[Side, Point], Group], side: Side) -> str:
    """Format the number of points at which a side was trained."""
    count = sum(of_side == side for of_side, _ in groups)
    return f"{count} point{'s' * (count > 1)}"


def _sentence(base: Group, cautious: Group) -> str:
    names = base[0].run.side.title, cautious[0].run.side.title
    both = by_seed(base, cautious)
    diverged = sum(h.diverged_at is not None for h in cautious)
    if diverged:
        return f"{names[1]} diverged with {diverged} of {len(cautious)} seeds."
    if not all(history.has_curve for history in cautious):
        text = (
            f"{names[0]} ended at a validation loss of {mean_loss(base):.4f}, "
            f"{names[1]} at {mean_loss(cautious):.4f}."
        )
        return f"{text} {_difference(both)}".strip()
    reached = [first_step_at(c.evaluations, b.final_loss) for b, c in both]
    steps = base[0].evaluations[-1].step
    found = [step for step in reached if step is not None]
    if len(found) < len(reached):
        text = (
            f"{names[1]} did not reach {names[0]}'s final validation loss of "
            f"{mean_loss(base):.4f} within {steps} steps with "
            f"{len(reached) - len(found)} of {len(reached)} seeds."
        )
    else:
        text = (
            f"{names[1]} reached {names[0]}'s final validation loss of "
            f"{mean_loss(base):.4f} at step {spread(found, '.0f')} of {steps}: a "
            f"ratio of {spread([steps / step for step in found], '.2f')}."
        )
    return f"{text} {_difference(both)}".strip()


def _difference(both: Sequence[tuple[History, History]]) -> str:
    """Describe the difference of the final losses and its confidence interval."""
    if len(both) < 2:
        return ""
    base, other = ([h.final_loss for h in side] for side in zip(*both, strict=True))
    mean, low, high = paired_difference(base, other)
    nothing = " No difference seen." * (low <= 0 <= high)
    return (
        f"The final losses differ by {mean:+.4f} (95% confidence interval of the "
        f"paired difference {low:+.4f} to {high:+.4f}, {len(both)} seeds).{nothing}"
    )


def _ratio(base: Group, cautious: Group) -> str:
    if any(h.diverged_at is not None for h in base):
        return ""
    if not all(h.has_curve for h in cautious):
        return ""
    ratios = [speed_up(b, c) for b, c in by_seed(base, cautious)]
    found = [ratio for ratio in ratios if ratio is not None]
    return spread(found, ".2f") if len(found) == len(ratios) else "not reached"


def spread(values: Sequence[float], form: str) -> str:
    """Format the mean, followed by the range if there are several values."""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def text(histories: Sequence[History], configs: Sequence[TrainConfig[Any]]) -> str:
    """Format the setting, the table and the verdicts as Markdown."""
    task = configs[0].task
    parameters = _any_of(f"{count_parameters(task):,}" for task in _tasks(configs))
    steps = _any_of(config.steps for config in configs)
    batches = _any_of(task.describe() for task in _tasks(configs))
    seeds = sorted({history.run.seed for history in histories})
    differences = score_differences(histories)
    ratio = (
        " Ratio of steps: the steps of the run divided by those that the cautious "
        "optimizer needs to reach the final validation loss of its base, with the same "
        "settings and seed."
    )
    of_seeds = f"seed {seeds[0]}"
    if len(seeds) > 1:
        of_seeds = f"seeds {', '.join(map(str, seeds))} (mean and range over the seeds)"
    return "\n".join(
        [
            f"{parameters} parameters, {steps} steps of {batches}, {of_seeds}."
            + ratio * _has_curves(histories),
            "",
            table(histories, task.metrics),
            "",
            *[f"- {verdict}" for verdict in verdicts(histories)],
            "",
            *[differences, ""] * bool(differences),
        ]
    )


def _has_curves(histories: Sequence[History]) -> bool:
    return any(history.has_curve for history in histories)


def _tasks(configs: Sequence[TrainConfig[Any]]) -> list[Task]:
    """List the distinct tasks."""
    tasks: list[Task] = []
    for config in configs:
        if config.task not in tasks:
            tasks.append(config.task)
    return tasks


def _any_of(values: Iterable[object]) -> str:
    """Join the distinct values, as in "300 or 600"."""
    return " or ".join(dict.fromkeys(map(str, values)))


def write_csv(histories: Sequence[History], path: Path) -> None:
    """Write a row per step of every run; evaluations share the row of their step."""
    names = list(dict.fromkeys(n for h in histories for n, _ in h.run.point))
    header = ("optimizer", "caution", *names, "seed", "step", "loss")
    with path.open("w", encoding="utf-8", newline="") as file:
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


def write(
    histories: Sequence[History],
    configs: Sequence[TrainConfig[Any]],
    directory: Path,
) -> list[Path]:
    """Write the report, the curves as CSV, and the figures.

    Args:
        histories: the results of the runs.
        configs: the configurations of the runs.
        directory: the output directory.

    Returns:
        The files, the report first.
    """
    files = [directory / TEXT_NAME, directory / "report.csv"]
    write_csv(histories, files[1])
    histories = short_paths(histories)
    files[0].write_text(text(histories, configs), "utf-8")
    for name, plot in (
        ("report.png", plots.plot),
        ("aligned.png", plots.plot_aligned),
    ):
        path = directory / name
        path.unlink(missing_ok=True)
        plot(histories, path)
        if path.exists():  # Nothing to plot, no file.
            files.append(path)
    return files
