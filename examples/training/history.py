"""The runs of a comparison: settings, results and statistics."""

import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from scipy.special import stdtrit

from examples.training import log
from examples.training.optimizers import title

Point = tuple[tuple[str, str], ...]
"""Names and values of the settings in which the runs differ."""


class Side(NamedTuple):
    """An optimizer, with or without caution."""

    optimizer: str
    caution: bool

    @property
    def title(self) -> str:
        """The name in tables and figures."""
        return title(self.optimizer, self.caution)


class Run(NamedTuple):
    """The optimizer, settings and seed that identify a run in a comparison."""

    side: Side
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        caution = "cautious-" * self.side.caution
        # Quoted, because a value may be a path.
        settings = "".join(f"-{name}={quote(value, ' ')}" for name, value in self.point)
        return f"{caution}{self.side.optimizer}{settings}-seed{self.seed}"


class Evaluation(NamedTuple):
    """A point on a validation curve."""

    step: int
    loss: float
    aligned_fraction: float


@dataclass(frozen=True)
class History:
    """The record of one run."""

    run: Run
    losses: tuple[float, ...]
    """Training loss at every step."""
    evaluations: tuple[Evaluation, ...]
    seconds: tuple[float, ...]
    """Mean time per step, between consecutive log writes."""
    diverged_at: int | None = None
    """The step at which the loss was not finite, if any."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores of the last evaluation, by name; empty if the run diverged."""
    aligned_fractions: Mapping[str, np.ndarray] | None = None
    """Aligned fractions by parameter, ``[evaluations]`` or ``[evaluations, L]``."""

    @property
    def final_loss(self) -> float:
        """The last validation loss; infinite if the run diverged."""
        return self.evaluations[-1].loss if self.diverged_at is None else float("inf")

    @property
    def has_curve(self) -> bool:
        """Whether the run did not diverge and was evaluated more than once."""
        return self.diverged_at is None and len(self.evaluations) > 1

    @property
    def seconds_per_step(self) -> float:
        """Median time per step, excluding the interval before the first log write."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def aligned_fraction(self) -> float:
        """Mean aligned fraction over the evaluations."""
        return statistics.fmean(e.aligned_fraction for e in self.evaluations)


Group = tuple[History, ...]
"""The runs of one side at one point, over all seeds."""


def read_history(run: Run, directory: Path) -> History:
    """Read the log of a finished run."""
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
        scores={} if records[-1].get("diverged") else evaluated[-1].get("scores", {}),
        aligned_fractions={
            name: np.array([r["aligned_fractions"][name] for r in evaluated])
            for name in names
        },
    )


def first_step_at(evaluations: Sequence[Evaluation], loss: float) -> float | None:
    """Find the step at which a loss curve first reaches a value.

    Args:
        evaluations: points on the curve, which is interpolated linearly.
        loss: the value to reach.

    Returns:
        The fractional step, or None if the curve stays above the value.
    """
    if evaluations and evaluations[0].loss <= loss:
        return evaluations[0].step
    for before, after in itertools.pairwise(evaluations):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return before.step + share * (after.step - before.step)
    return None


def speed_up(base: History, cautious: History) -> float | None:
    """Compute the ratio of the base's steps to those needed to reach its final loss.

    Return None if the cautious run never reaches it, if it was evaluated only once, so
    that the step is unknown, or if one of them diverged.
    """
    if base.diverged_at is not None or not cautious.has_curve:
        return None
    reached = first_step_at(cautious.evaluations, base.final_loss)
    return None if reached is None else base.evaluations[-1].step / reached


def group(histories: Sequence[History]) -> dict[tuple[Side, Point], Group]:
    """Group the runs by side and point, over all seeds."""
    groups: dict[tuple[Side, Point], Group] = {}
    for history in histories:
        key = history.run.side, history.run.point
        groups[key] = (*groups.get(key, ()), history)
    return groups


def mean_loss(histories: Group) -> float:
    """Compute the mean final loss; infinite if a run diverged."""
    return statistics.fmean(history.final_loss for history in histories)


def best(histories: Sequence[History], side: Side) -> Group | None:
    """Return a side's runs at its point of lowest mean final loss, if finite."""
    of_side = [seeds for (own, _), seeds in group(histories).items() if own == side]
    chosen = min(of_side, key=mean_loss, default=())
    return chosen if chosen and np.isfinite(mean_loss(chosen)) else None


def pairs(histories: Sequence[History]) -> list[tuple[Side, Side]]:
    """List the optimizers that were trained both without and with caution."""
    sides = list(dict.fromkeys(history.run.side for history in histories))
    return [
        (Side(side.optimizer, False), side)
        for side in sides
        if side.caution and Side(side.optimizer, False) in sides
    ]


def base_of(group_: Group, groups: Mapping[tuple[Side, Point], Group]) -> Group | None:
    """Find the runs without caution at the same point.

    Their point lacks the settings that only caution has.
    """
    run = group_[0].run
    for (side, point), seeds in groups.items():
        if side == Side(run.side.optimizer, False) and set(point) <= set(run.point):
            return seeds
    return None


def by_seed(base: Group, other: Group) -> list[tuple[History, History]]:
    """Pair the runs of two groups by seed."""
    of_other = {history.run.seed: history for history in other}
    return [(b, of_other[b.run.seed]) for b in base if b.run.seed in of_other]


def short_paths(histories: Sequence[History]) -> list[History]:
    """Make ``from_run`` paths relative to their common directory."""
    name = "from_run"
    found = {dict(h.run.point)[name] for h in histories if name in dict(h.run.point)}
    paths = {value: Path(value) for value in found}
    try:
        shared = os.path.commonpath([path.parent for path in paths.values()])
    except ValueError:  # Mixed absolute and relative paths, or none.
        return list(histories)
    short = {v: os.path.relpath(path, shared) for v, path in paths.items()}
    if len({*short.values()}) < len(short):
        return list(histories)
    return [
        replace(
            h,
            run=h.run._replace(
                point=tuple((n, short.get(v, v)) for n, v in h.run.point)
            ),
        )
        for h in histories
    ]


def write_point(point: Point) -> str:
    """Format a point, as in "learning rate 0.001, b1 0.9"."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point)


class Interval(NamedTuple):
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Compute the mean of at least two values, with Student's t interval."""
    count = len(values)
    mean = statistics.fmean(values)
    standard_error = statistics.stdev(values) / math.sqrt(count)
    half = float(stdtrit(count - 1, 0.975)) * standard_error
    return Interval(mean, mean - half, mean + half)


def paired_difference(base: Sequence[float], other: Sequence[float]) -> Interval:
    """Compute the mean of other - base over pairs, with Student's t interval.

    Args:
        base: one value per seed, for at least two seeds.
        other: the values for the same seeds.
    """
    return mean_interval([o - b for o, b in zip(other, base, strict=True)])
