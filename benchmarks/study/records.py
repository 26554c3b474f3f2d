"""The results of runs as CSV, one row per evaluation of each run.

The last row of a run also has its scores.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

from examples.training.history import Evaluation, History, Run, Side

_FIRST = ("optimizer", "caution")
_LAST = (
    "seed",
    "step",
    "validation_loss",
    "aligned_fraction",
    "seconds_per_step",
)
_SCORE = "score_"


def write(histories: Iterable[History], path: Path) -> None:
    """Write the runs to a file, replacing its contents.

    A diverged run has a last row without a loss, at the step where it diverged.
    """
    histories = list(histories)
    names = list(dict.fromkeys(n for h in histories for n, _ in h.run.point))
    scores = list(dict.fromkeys(n for h in histories for n in h.scores))
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*_FIRST, *names, *_LAST, *(_SCORE + n for n in scores)))
        for history in histories:
            side, point, seed = history.run
            values = dict(point)
            run = (*side, *(values.get(name, "") for name in names), seed)
            seconds = f"{history.seconds_per_step:.4g}" if history.seconds else ""
            lines = [
                [*run, step, f"{loss:.6f}", f"{aligned:.4f}", seconds]
                for step, loss, aligned in history.evaluations
            ]
            if history.diverged_at is not None:
                lines.append([*run, history.diverged_at, "", "", seconds])
            lines[-1] += [_number(history.scores.get(name)) for name in scores]
            padding = [""] * len(scores)
            writer.writerows([*(line + padding for line in lines[:-1]), lines[-1]])
    partial.replace(path)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def read(path: Path) -> list[History]:
    """Read the runs from a file; return an empty list if it does not exist."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs: dict[Run, list[dict[str, str]]] = {}
    for row in rows:
        side = Side(row["optimizer"], row["caution"] == "True")
        point = tuple(
            (name, value)
            for name, value in row.items()
            if name not in (*_FIRST, *_LAST) and not name.startswith(_SCORE) and value
        )
        runs.setdefault(Run(side, point, int(row["seed"])), []).append(row)
    return [_history(run, of_run) for run, of_run in runs.items()]


def _history(run: Run, rows: list[dict[str, str]]) -> History:
    evaluations = [
        Evaluation(
            int(row["step"]),
            float(row["validation_loss"]),
            float(row["aligned_fraction"]),
        )
        for row in rows
        if row["validation_loss"]
    ]
    diverged = [int(row["step"]) for row in rows if not row["validation_loss"]]
    seconds = rows[-1]["seconds_per_step"]
    return History(
        run=run,
        losses=(),
        evaluations=tuple(evaluations),
        seconds=(float(seconds),) if seconds else (),
        diverged_at=diverged[0] if diverged else None,
        scores={
            name.removeprefix(_SCORE): float(value)
            for name, value in rows[-1].items()
            if name.startswith(_SCORE) and value
        },
    )
