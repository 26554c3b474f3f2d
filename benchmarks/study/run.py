"""The runs of a question: first the tuning runs, then the compared runs."""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import records
from benchmarks.study.questions import PRETRAINED, TUNING_SEED, Arm, Question
from examples.training import compare
from examples.training.config import TrainConfig, with_settings
from examples.training.history import Group, History, Point, Run, read_history

Runs = dict[Run, TrainConfig[Any]]
Others = Sequence[tuple[Question, Path]]


def run_of(arm: Arm, point: Point, seed: int) -> Run:
    """Return the run of an arm at a point of the grid."""
    settings = [(name, text.format(seed=seed)) for name, text in arm.settings.items()]
    return Run(arm.side, (*point, *settings), seed)


def tuning_points(
    question: Question, arm: Arm, histories: Iterable[History]
) -> list[Point]:
    """List the points at which an arm is tuned.

    For a question that is tuned one setting at a time, the list ends with the points
    of the first setting whose runs are not all in the histories, or when the best point
    did not change.
    """
    grid = {**question.grid, **arm.grid}
    if not question.one_at_a_time:
        products = itertools.product(*grid.values())
        return [tuple(zip(grid, values, strict=True)) for values in products]
    losses = {history.run: history.final_loss for history in histories}
    best = {name: values[0] for name, values in grid.items()}
    tried: dict[Point, None] = {}
    while True:
        before = best
        for name, values in grid.items():
            line: list[Point] = [
                tuple({**best, name: value}.items()) for value in values
            ]
            tried |= dict.fromkeys(line)
            runs = {point: run_of(arm, point, TUNING_SEED) for point in line}
            if not losses.keys() >= {*runs.values()}:
                return list(tried)
            lowest = min(runs, key=lambda point: losses[runs[point]])
            best = dict(lowest)
        if best == before:
            return list(tried)


def tuning_runs(question: Question, histories: Iterable[History] = ()) -> Runs:
    """List the runs that tune the arms, as far as the histories determine them."""
    histories = list(histories)
    return _planned(
        question,
        [
            run_of(arm, point, TUNING_SEED)
            for arm in question.arms
            for point in tuning_points(question, arm, histories)
        ],
    )


def compared_runs(question: Question, histories: Iterable[History]) -> Runs:
    """List the runs to compare: each arm at its best, and some at another's best.

    Args:
        question: the question.
        histories: the histories of all tuning runs, at least.
    """
    best = best_points(question, histories)
    return _planned(
        question,
        [
            run_of(arm, point, seed)
            for arm in question.arms
            for point in _compared_at(question, arm, best)
            for seed in question.seeds
        ],
    )


def best_points(question: Question, histories: Iterable[History]) -> dict[str, Point]:
    """Find the point with the lowest validation loss for each arm, by its title.

    Args:
        question: the question.
        histories: the histories of all tuning runs, at least.
    """
    histories = list(histories)
    losses = {history.run: history.final_loss for history in histories}
    best: dict[str, Point] = {}
    for arm in question.arms:
        of_point = {
            point: losses[run_of(arm, point, TUNING_SEED)]
            for point in tuning_points(question, arm, histories)
        }
        point = min(of_point, key=of_point.__getitem__)
        if np.isfinite(of_point[point]):  # Skip an arm that always diverged.
            best[arm.title] = point
    return best


def group_at(
    question: Question, arm: Arm, point: Point, histories: Iterable[History]
) -> Group:
    """Return the compared runs of an arm at a point, in the order of the seeds."""
    found = {history.run: history for history in histories}
    return tuple(found[run_of(arm, point, seed)] for seed in question.seeds)


def answer(question: Question, path: Path, work_dir: Path, others: Others = ()) -> bool:
    """Train the runs missing from the CSV file, and add each to it.

    Args:
        question: the question.
        path: the CSV file.
        work_dir: directory for the runs while they are trained.
        others: other questions and their CSV files. If one has a run with the same
            configuration, that run is copied instead of trained.

    Returns:
        Whether all have been trained; False if a signal stopped the training.
    """
    tuning = tuning_runs(question, records.read(path))
    while not _has_all(path, tuning):
        _copy(tuning, tuning, path, others)
        if not _train(question, tuning, tuning, path, work_dir):
            return False
        tuning = tuning_runs(question, records.read(path))
    compared = compared_runs(question, records.read(path))
    _copy(compared, tuning | compared, path, others)
    return _train(question, compared, tuning | compared, path, work_dir)


def _has_all(path: Path, runs: Runs) -> bool:
    return runs.keys() <= {history.run for history in records.read(path)}


def _compared_at(
    question: Question, arm: Arm, best: Mapping[str, Point]
) -> Iterator[Point]:
    """Yield the best point of an arm, and those of others at which it is compared."""
    titles = [arm.title]
    if question.drop_in:
        titles += arm.against[:1]
    if question.drop_out:
        titles += [
            other.title for other in question.arms if other.against[:1] == (arm.title,)
        ]
    yield from dict.fromkeys(best[title] for title in titles if title in best)


def _planned(question: Question, runs: Sequence[Run]) -> Runs:
    planned: Runs = {}
    for run in runs:
        config = question.config
        optimizer = replace(
            config.optimizer,
            optimizer=run.side.optimizer,
            caution=run.side.caution,
        )
        config = replace(config, optimizer=optimizer, seed=run.seed)
        planned[run] = with_settings(config, dict(run.point))
    return planned


def _copy(runs: Runs, order: Iterable[Run], path: Path, others: Others) -> None:
    """Copy missing runs from other questions.

    Their step times are left out, because they did not take turns with this question's
    runs.
    """
    elsewhere: dict[str, History] = {}
    for question, other_path in others:
        histories = {h.run: h for h in records.read(other_path)}
        planned = tuning_runs(question, histories.values())
        if planned.keys() <= histories.keys():
            planned |= compared_runs(question, histories.values())
        for run in planned.keys() & histories.keys():
            elsewhere[str(planned[run])] = histories[run]
    found = {h.run: h for h in records.read(path)}
    copied = {
        run: replace(elsewhere[str(config)], run=run, seconds=())
        for run, config in runs.items()
        if run not in found and str(config) in elsewhere
    }
    if copied:
        records.write(_in_order(found | copied, order), path)


def _train(
    question: Question, runs: Runs, order: Iterable[Run], path: Path, work_dir: Path
) -> bool:
    """Train the missing runs; arms with the same point and seed take turns.

    The step times of runs that take turns with only some of these are left out.
    """
    missing = {*runs} - {h.run for h in records.read(path)}
    if missing and not _pretrain(question):
        return False
    turns: dict[Any, Runs] = {}
    for run, config in runs.items():
        point = tuple((n, v) for n, v in run.point if n in question.grid)
        turns.setdefault((point, run.seed), {})[run] = config
    done = len(runs) - len(missing)
    for planned in turns.values():
        together = {run: planned[run] for run in planned if run in missing}
        if not together:
            continue
        print(f"{path.stem}: {done} of {len(runs)} runs", flush=True)
        compare.require_trainable(together, work_dir)
        if not compare.run_all(together, (), work_dir, together=True):
            return False
        found = {h.run: h for h in records.read(path)}
        for run in together:
            found[run] = read_history(run, work_dir / run.name)
            if len(together) < len(planned):
                found[run] = replace(found[run], seconds=())
        records.write(_in_order(found, order), path)
        for run in together:
            shutil.rmtree(work_dir / run.name)
        done += len(together)
    return True


def _pretrain(question: Question) -> bool:
    """Train the missing models from which a question's runs start.

    Returns:
        Whether all have been trained; False if a signal stopped the training.
    """
    if question.pretraining is None:
        return True
    seeds = TUNING_SEED, *question.seeds
    runs = compare.plan(("adamw",), {}, seeds, question.pretraining)
    PRETRAINED.mkdir(parents=True, exist_ok=True)
    compare.require_trainable(runs, PRETRAINED)
    return compare.run_all(runs, (), PRETRAINED, together=True)


def _in_order(found: Mapping[Run, History], order: Iterable[Run]) -> list[History]:
    """Sort the runs as planned; those of an earlier plan come last."""
    places = {run: place for place, run in enumerate(order)}
    return sorted(
        found.values(), key=lambda history: places.get(history.run, len(places))
    )
