"""The outcomes of a question: differences, ratios of steps, and times."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_ind

from benchmarks.study.questions import TUNING_SEED, Arm, Question
from benchmarks.study.run import (
    best_points,
    compared_runs,
    group_at,
    run_of,
    tuning_points,
    tuning_runs,
)
from examples.training.history import (
    Evaluation,
    Group,
    History,
    Interval,
    Point,
    Run,
    by_seed,
    mean_interval,
    speed_up,
)

NEAR = 0.05
"""A point counts as good if its loss is within this of the best."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of two arms, trained with the same seeds."""

    arm: Arm
    other: Arm
    own: Group
    """The runs of the arm."""
    others: Group
    """The runs of the other arm."""
    settings_of: Arm | None
    """The arm at whose best point both run. None: each runs at its own best point."""
    score: str
    """The compared score; empty for the validation loss."""

    @property
    def difference(self) -> Interval:
        """The mean of arm - other over the seeds; for losses, negative is better.

        It is NaN if a run diverged.
        """
        if self.diverged:
            return Interval(math.nan, math.nan, math.nan)
        return mean_interval(self.differences)

    @property
    def differences(self) -> list[float]:
        """Per seed, arm - other."""
        return [
            outcome(own, self.score) - outcome(other, self.score)
            for other, own in by_seed(self.others, self.own)
        ]

    @property
    def differences_by_step(self) -> dict[int, list[float]]:
        """Per evaluated step and per seed, arm - other in validation loss."""
        pairs = by_seed(self.others, self.own)
        return {
            evaluation.step: [
                own.evaluations[i].loss - other.evaluations[i].loss
                for other, own in pairs
            ]
            for i, evaluation in enumerate(self.own[0].evaluations)
        }

    @property
    def diverged(self) -> int:
        """The number of seeds with which a run of either arm diverged."""
        return sum(
            not all(np.isfinite(outcome(run, self.score)) for run in pair)
            for pair in by_seed(self.others, self.own)
        )

    @property
    def verdict(self) -> str:
        """The interpretation of the interval."""
        if self.diverged:
            return f"diverged with {self.diverged} of {len(self.own)} seeds"
        _, low, high = self.difference
        if low <= 0 <= high:
            return "no difference seen"
        return "better" if (low > 0) == bool(self.score) else "worse"

    @property
    def ratios(self) -> list[float | None]:
        """Per seed, the other's steps over the arm's to the other's final loss."""
        return [speed_up(other, own) for other, own in by_seed(self.others, self.own)]


def outcome(history: History, score: str) -> float:
    """Return a score of a run, or its final validation loss."""
    if not score:
        return history.final_loss
    return history.scores.get(score, float("nan"))


def is_answered(question: Question, histories: Sequence[History]) -> bool:
    """Return whether a question has all of its runs."""
    found = {history.run for history in histories}
    return (
        tuning_runs(question, histories).keys() <= found
        and compared_runs(question, histories).keys() <= found
    )


def unused_runs(question: Question, histories: Sequence[History]) -> set[Run]:
    """Return the runs with the seeds of the comparisons that no comparison uses."""
    found = {h.run for h in histories if h.run.seed in question.seeds}
    return found - compared_runs(question, histories).keys()


def compare_all(question: Question, histories: Sequence[History]) -> list[Comparison]:
    """Compare each arm with the arms that it names in ``against``.

    Args:
        question: the question.
        histories: the histories of all its runs.
    """
    arms = {arm.title: arm for arm in question.arms}
    best = best_points(question, histories)
    comparisons: list[Comparison] = []
    for arm in question.arms:
        for title in arm.against:
            if not {arm.title, title} <= best.keys():
                continue
            other = arms[title]
            both_at: list[Arm | None] = [None]
            if title == arm.against[0] and best[arm.title] != best[title]:
                both_at = [
                    *([other] if question.drop_in else []),
                    None,
                    *([arm] if question.drop_out else []),
                ]
            for settings_of in both_at:
                own, others = (
                    group_at(question, of, best[(settings_of or of).title], histories)
                    for of in (arm, other)
                )
                comparisons.append(
                    Comparison(arm, other, own, others, settings_of, question.score)
                )
    return comparisons


def difference_of_differences(first: Comparison, second: Comparison) -> Interval:
    """Compute the second difference minus the first, with Welch's 95% interval."""
    a, b = first.differences, second.differences
    low, high = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return Interval(statistics.fmean(b) - statistics.fmean(a), float(low), float(high))


class Robustness(NamedTuple):
    """How many points of an arm's grid are nearly as good as the best."""

    arm: Arm
    best: float
    """The lowest loss, with the tuning seed."""
    near_own: int
    """Points within ``NEAR`` of it."""
    near_all: int
    """Points within ``NEAR`` of the lowest loss of all arms."""
    points: int


def robustness(question: Question, histories: Sequence[History]) -> list[Robustness]:
    """Count the good points of each arm's grid, with the tuning seed."""
    losses = {history.run: history.final_loss for history in histories}
    of_arm = {
        arm.title: np.array(
            [
                losses[run_of(arm, point, TUNING_SEED)]
                for point in tuning_points(question, arm, histories)
            ]
        )
        for arm in question.arms
    }
    lowest = min(own.min() for own in of_arm.values())
    return [
        Robustness(
            arm,
            float(own.min()),
            int((own <= own.min() + NEAR).sum()),
            int((own <= lowest + NEAR).sum()),
            len(own),
        )
        for arm in question.arms
        for own in [of_arm[arm.title]]
        if np.isfinite(own.min())
    ]


def edges(question: Question, histories: Sequence[History]) -> list[str]:
    """Report the best points that lie on the edge of their grid.

    Runs beyond the edge may be in the histories without being in the grid.
    """
    losses = {history.run: history.final_loss for history in histories}
    lines = []
    for title, point in best_points(question, histories).items():
        arm = next(arm for arm in question.arms if arm.title == title)
        grid = {**question.grid, **arm.grid}
        for name, value in point:
            values = sorted(map(float, grid[name]))
            if len(values) > 1 and float(value) in (values[0], values[-1]):
                end = "smallest" if float(value) == values[0] else "largest"
                at_best = losses[run_of(arm, point, TUNING_SEED)]
                beyond = [
                    f" Outside the grid, {other} ended at {losses[run]:.4f} instead of "
                    f"{at_best:.4f} (seed {TUNING_SEED})."
                    for other in _values(name, histories)
                    if not values[0] <= float(other) <= values[-1]
                    for run in [run_of(arm, _at(point, name, other), TUNING_SEED)]
                    if np.isfinite(losses.get(run, math.inf))
                ]
                lines.append(
                    f"The best {name.replace('_', ' ')} for {title}, {value}, is the "
                    f"{end} in the grid." + "".join(beyond)
                )
    return lines


def _values(name: str, histories: Sequence[History]) -> list[str]:
    """List the values of a setting."""
    points = [dict(history.run.point) for history in histories]
    return list(dict.fromkeys(point[name] for point in points if name in point))


def _at(point: Point, name: str, value: str) -> Point:
    """Return a point with another value of a setting."""
    return tuple((n, value if n == name else v) for n, v in point)


def equal_arms(question: Question, histories: Sequence[History]) -> list[str]:
    """Report arms with the same losses as an arm that they are compared with."""
    found = {history.run: history.evaluations for history in histories}
    arms = {arm.title: arm for arm in question.arms}
    lines = []
    for arm in question.arms:
        for title in arm.against:
            pairs = [
                (found[run], found[other])
                for run in found
                for other in [_counterpart(run, arm, arms[title])]
                if other in found
            ]
            # A run that diverged at once has no evaluation.
            same = sum(
                bool(own) and _losses(own) == _losses(others) for own, others in pairs
            )
            if same:
                lines.append(
                    f"{arm.title} has the same loss as {title} at every evaluation in "
                    f"{same} of {len(pairs)} pairs of runs with the same grid point "
                    "and seed."
                )
    return lines


def _counterpart(run: Run, arm: Arm, other: Arm) -> Run | None:
    """Return the other arm's run at the grid point and seed of a run of an arm."""
    point = run.point[: len(run.point) - len(arm.settings)]
    if run != run_of(arm, point, run.seed):
        return None  # A run of another arm.
    return run_of(other, point, run.seed)


def _losses(evaluations: Sequence[Evaluation]) -> list[float]:
    return [evaluation.loss for evaluation in evaluations]


class TimeRatio(NamedTuple):
    """The step time of an arm relative to another arm's, measured in turns."""

    arm: Arm
    other: Arm
    seconds: tuple[float, float]
    """The median step times of the arm and of the other arm."""
    median: float
    low: float
    high: float
    """The quartiles."""
    pairs: int


def time_ratios(question: Question, histories: Sequence[History]) -> list[TimeRatio]:
    """Compare the step times of arms that took turns in one process.

    These are the tuning runs at the same point.
    """
    seconds = {h.run: h.seconds_per_step for h in histories if h.seconds}
    arms = {arm.title: arm for arm in question.arms}
    found = []
    for arm in question.arms:
        for title in arm.against[:1]:
            own_points = {*tuning_points(question, arm, histories)}
            times = [
                (seconds[own], seconds[other])
                for point in tuning_points(question, arms[title], histories)
                if point in own_points
                for own, other in [
                    (
                        run_of(arm, point, TUNING_SEED),
                        run_of(arms[title], point, TUNING_SEED),
                    )
                ]
                if own in seconds and other in seconds
            ]
            if len(times) > 1:
                ratios = [own / other for own, other in times]
                low, median, high = statistics.quantiles(ratios, method="inclusive")
                of_arm, of_other = map(statistics.median, zip(*times, strict=True))
                found.append(
                    TimeRatio(
                        arm,
                        arms[title],
                        (of_arm, of_other),
                        median,
                        low,
                        high,
                        len(times),
                    )
                )
    return found
