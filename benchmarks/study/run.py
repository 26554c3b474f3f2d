"""The runs of a question: those that choose the settings, then those compared."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import records
from benchmarks.study.questions import TUNING_SEED, Question, Sweep
from examples.training import compare
from examples.training.config import TrainConfig
from examples.training.history import (
    History,
    Run,
    Side,
    read_history,
)

Runs = dict[Run, TrainConfig[Any]]


def tuning_runs(question: Question) -> Runs:
    """Lists the runs of all grids, with the tuning seed."""
    runs: Runs = {}
    for sweep in question.sweeps:
        runs |= _plan(question, sweep, (TUNING_SEED,))
    return runs


def compared_runs(question: Question, histories: Sequence[History]) -> Runs:
    """Lists the runs to compare: each side at its best, and with caution at the base's.

    Args:
        question: the question.
        histories: those of all tuning runs.
    """
    runs: Runs = {}
    for sweep in question.sweeps:
        chosen = best_points(question, sweep, histories)
        for side, point in chosen.items():
            runs |= runs_at(question, side, point)
            runs |= runs_at(question, side._replace(caution=True), point)
    return runs


def runs_at(question: Question, side: Side, point: Sweep) -> Runs:
    """Lists the runs of a side at a point, with all seeds to compare."""
    planned = _plan(question, point, question.seeds)
    return {run: config for run, config in planned.items() if run.side == side}


def best_points(
    question: Question, sweep: Sweep, histories: Sequence[History]
) -> dict[Side, Sweep]:
    """Finds the point of a grid with the lowest loss, for each side.

    Args:
        question: the question.
        sweep: one of its grids.
        histories: those of all tuning runs.

    Returns:
        For each side that did not diverge everywhere, the settings as a grid of one
        point. Caution's own settings are among the base's, too, where they have no
        effect.
    """
    found = {history.run: history for history in histories}
    chosen: dict[Side, Sweep] = {}
    lowest: dict[Side, float] = {}
    for point in _points(sweep):
        for run in _plan(question, point, (TUNING_SEED,)):
            loss = found[run].final_loss
            if loss < lowest.get(run.side, np.inf):
                lowest[run.side], chosen[run.side] = loss, point
    return chosen


def answer(question: Question, path: Path, work_dir: Path) -> bool:
    """Trains what is missing in the file, which grows with each run.

    Args:
        question: the question.
        path: the CSV.
        work_dir: where the runs are, as long as they are trained.

    Returns:
        Whether all have been trained; not so where a signal has come.
    """
    tuning = tuning_runs(question)
    if not _train(tuning, tuning, path, work_dir):
        return False
    compared = compared_runs(question, records.read(path))
    return _train(compared, tuning | compared, path, work_dir)


def _train(runs: Runs, order: Runs, path: Path, work_dir: Path) -> bool:
    missing = {*runs} - {h.run for h in records.read(path)}
    turns: dict[tuple[Any, ...], Runs] = {}
    for run, config in runs.items():
        if run in missing:
            turns.setdefault((run.point, run.seed), {})[run] = config
    done = len(runs) - len(missing)
    for together in turns.values():
        print(f"{path.stem}: {done} of {len(runs)} runs", flush=True)
        if not compare.run_all(together, (), work_dir, together=True):
            return False
        found = {h.run: h for h in records.read(path)}
        for run in together:
            found[run] = read_history(run, work_dir / run.name)
        records.write(_in_order(found, order), path)
        for run in together:
            shutil.rmtree(work_dir / run.name)
        done += len(together)
    return True


def _in_order(found: Mapping[Run, History], order: Runs) -> list[History]:
    """Sorts the runs as they are planned; those of an earlier plan stay, at the end."""
    places = {run: place for place, run in enumerate(order)}
    return sorted(
        found.values(), key=lambda history: places.get(history.run, len(places))
    )


def _plan(question: Question, sweep: Sweep, seeds: Sequence[int]) -> Runs:
    return compare.plan(question.optimizers, sweep, seeds, question.config)


def _points(sweep: Sweep) -> Iterator[Sweep]:
    if not sweep:
        yield {}
        return
    *others, (name, values) = sweep.items()
    for point in _points(dict(others)):
        for value in values:
            yield {**point, name: (value,)}
