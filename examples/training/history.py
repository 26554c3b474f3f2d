"""The runs of a comparison: their settings, their results, and statistics."""

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
"""Names and values of the settings in which runs differ."""


class Side(NamedTuple):
    """An optimizer, with or without caution."""

    optimizer: str
    caution: bool

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
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
        # A value may be a path.
        settings = "".join(f"-{name}={quote(value, ' ')}" for name, value in self.point)
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
    """Mean time of a step, between each log write and the next."""
    diverged_at: int | None = None
    """The step at which the loss was not finite."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What else was measured in the last evaluation, by name; none of a run that
    diverged."""
    aligned_fractions: Mapping[str, np.ndarray] | None = None
    """Of each parameter at each evaluation, ``[evaluations]`` or ``[evaluations,
    L]``."""

    @property
    def final_loss(self) -> float:
        """The last validation loss; infinite for a run that diverged."""
        return self.evaluations[-1].loss if self.diverged_at is None else float("inf")

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step, without the interval before the first log write."""
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
        scores={} if records[-1].get("diverged") else evaluated[-1].get("scores", {}),
        aligned_fractions={
            name: np.array([r["aligned_fractions"][name] for r in evaluated])
            for name in names
        },
    )


def first_step_at(evaluations: Sequence[Evaluation], loss: float) -> float | None:
    """Finds where a loss curve first reaches a value.

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
    """Returns the base's steps over those that the other needs to reach its loss.

    None if it never does, or if the base diverged.
    """
    if base.diverged_at is not None:
        return None
    reached = first_step_at(cautious.evaluations, base.final_loss)
    return None if reached is None else base.evaluations[-1].step / reached


def group(histories: Sequence[History]) -> dict[tuple[Side, Point], Group]:
    """Groups the runs by side and point; a group has all seeds."""
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
    """Lists the optimizers that were trained both without and with caution."""
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


def by_seed(base: Group, other: Group) -> list[tuple[History, History]]:
    """Pairs the runs of two groups that have the same seed."""
    of_other = {history.run.seed: history for history in other}
    return [(b, of_other[b.run.seed]) for b in base if b.run.seed in of_other]


def short_paths(histories: Sequence[History]) -> list[History]:
    """Shortens the paths of the runs started from by their common directory."""
    name = "from_run"
    found = {dict(h.run.point)[name] for h in histories if name in dict(h.run.point)}
    paths = {value: Path(value) for value in found}
    try:
        shared = os.path.commonpath([path.parent for path in paths.values()])
    except ValueError:  # Absolute and relative ones, or none at all.
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
    differences = [o - b for o, b in zip(other, base, strict=True)]
    count = len(differences)
    mean = statistics.fmean(differences)
    standard_error = statistics.stdev(differences) / math.sqrt(count)
    half = float(stdtrit(count - 1, 0.975)) * standard_error
    return Interval(mean, mean - half, mean + half)
