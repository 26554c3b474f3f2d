"""The page of results, and its figures, from the CSVs alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import records
from benchmarks.study.questions import QUESTIONS, TUNING_SEED, Question, Sweep
from benchmarks.study.run import best_points, compared_runs, runs_at, tuning_runs
from examples.training import plots
from examples.training.history import (
    Group,
    History,
    Interval,
    Side,
    by_seed,
    paired_difference,
    speed_up,
    write_point,
)
from examples.training.report import markdown_table, spread
from examples.training.task import count_parameters

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"

_NEAR = 0.05
"""How near to the best loss a point of a grid has to be to count as good."""


@dataclass(frozen=True)
class Comparison:
    """What came of one grid and one optimizer: each side at its own best."""

    variant: str
    """The settings that distinguish this grid from the others of the question."""
    base: Group
    cautious: Group
    drop_in: Group
    """With caution, at the base's best."""

    def difference(self, cautious: Group) -> Interval:
        """Computes the difference of the final losses over the seeds."""
        pairs = by_seed(self.base, cautious)
        return paired_difference(
            [base.final_loss for base, _ in pairs],
            [other.final_loss for _, other in pairs],
        )


def verdict(interval: Interval) -> str:
    """Says in words what an interval of a difference of losses shows."""
    if interval.high < 0:
        return "better"
    return "worse" if interval.low > 0 else "no difference seen"


def comparisons(
    question: Question, histories: Sequence[History]
) -> Iterator[Comparison]:
    """Yields what came of each grid and optimizer of a question."""
    found = {history.run: history for history in histories}

    def at(side: Side, point: Sweep) -> Group:
        return tuple(found[run] for run in runs_at(question, side, point))

    for sweep in question.sweeps:
        chosen = best_points(question, sweep, histories)
        for optimizer in question.optimizers:
            base, cautious = (Side(optimizer, caution) for caution in (False, True))
            if base in chosen and cautious in chosen:
                fixed = {n: v for n, v in sweep.items() if len(v) == 1}
                yield Comparison(
                    ", ".join(f"{name} {value}" for name, (value,) in fixed.items()),
                    at(base, chosen[base]),
                    at(cautious, chosen[cautious]),
                    at(cautious, chosen[base]),
                )


def is_answered(question: Question, histories: Sequence[History]) -> bool:
    """Returns whether all runs of a question are there."""
    found = {history.run for history in histories}
    tuning = tuning_runs(question).keys()
    return tuning <= found and compared_runs(question, histories).keys() <= found


def table(compared: Iterable[Comparison]) -> str:
    """Writes a line for each side of each comparison, in Markdown."""
    header = (
        "optimizer",
        "settings",
        "validation loss (range)",
        "difference (95 % interval)",
        "",
        "ratio of steps",
    )
    rows: dict[tuple[str, ...], None] = {}
    for comparison in compared:
        base, cautious = comparison.base, comparison.cautious
        rows[_row(base)] = None
        if comparison.drop_in[0].run.point != cautious[0].run.point:
            rows[_row(comparison.drop_in, comparison)] = None
        rows[_row(cautious, comparison)] = None
    return markdown_table(list(rows), header)


def _row(seeds: Group, comparison: Comparison | None = None) -> tuple[str, ...]:
    losses = [history.final_loss for history in seeds]
    loss = spread(losses, ".4f")
    side, point, _ = seeds[0].run
    if comparison is None:
        return side.title, write_point(point), loss, "", "", ""
    found = comparison.difference(seeds)
    interval = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
    ratios = [speed_up(base, own) for base, own in by_seed(comparison.base, seeds)]
    reached = [ratio for ratio in ratios if ratio is not None]
    ratio = (
        spread(reached, ".2f")
        if len(reached) == len(ratios)
        else f"not reached with {len(ratios) - len(reached)} of {len(ratios)} seeds"
    )
    return side.title, write_point(point), loss, interval, verdict(found), ratio


def edges(question: Question, histories: Sequence[History]) -> list[str]:
    """Says which best points lie at the edge of what was tried."""
    lines = []
    for sweep in question.sweeps:
        for side, point in best_points(question, sweep, histories).items():
            for name, values in sweep.items():
                ordered = _numbers(values)
                if len(ordered) < 3:
                    continue
                value = float(point[name][0])
                if value in (ordered[0], ordered[-1]):
                    end = "smallest" if value == ordered[0] else "largest"
                    lines.append(
                        f"The best {name.replace('_', ' ')} for {side.title}, "
                        f"{value:g}, is the {end} that was tried."
                    )
    return list(dict.fromkeys(lines))


def _numbers(values: Sequence[str]) -> list[float]:
    try:
        return sorted(map(float, values))
    except ValueError:
        return []


def robustness(histories: Sequence[History]) -> list[str]:
    """Says what share of a grid is nearly as good as its best point, for each side."""
    lines = []
    tuning = [h for h in histories if h.run.seed == TUNING_SEED]
    for side in dict.fromkeys(h.run.side for h in tuning):
        losses = np.array([h.final_loss for h in tuning if h.run.side == side])
        near = int((losses < losses.min() + _NEAR).sum())
        lines.append(
            f"{side.title}: {near} of {len(losses)} points are within {_NEAR:g} of its "
            f"best, {losses.min():.4f} (one seed)."
        )
    return lines


def section(name: str, question: Question, histories: Sequence[History]) -> list[str]:
    """Writes the section of a question, and draws its figure."""
    config = question.config
    seeds = ", ".join(map(str, question.seeds))
    lines = [
        f"## {question.title}",
        "",
        f"{count_parameters(config.task):,} parameters, {config.steps} steps of "
        f"{config.task.describe()}; tuned with seed {TUNING_SEED}, compared with seeds "
        f"{seeds}. `python -m benchmarks.study run {name}`, "
        f"[{name}.csv](results/{name}.csv).",
        "",
        table(comparisons(question, histories)),
        "",
        *[f"- {line}" for line in edges(question, histories)],
        "",
    ]
    if len(question.sweeps) == 1:
        lines += [f"- {line}" for line in robustness(histories)]
        tuning = [h for h in histories if h.run.seed == TUNING_SEED]
        plots.plot(tuning, RESULTS / f"{name}.png")
    else:
        _draw_differences(
            list(comparisons(question, histories)), RESULTS / f"{name}.png"
        )
    return [*lines, "", f"![{question.title}](results/{name}.png)", ""]


def _draw_differences(compared: Sequence[Comparison], path: Path) -> None:
    """Draws the difference of each comparison, with its interval."""
    figure = Figure(figsize=(7, 1 + 0.4 * len(compared)), layout="constrained")
    axes = figure.subplots()
    for place, comparison in enumerate(compared):
        mean, low, high = comparison.difference(comparison.cautious)
        axes.errorbar(
            mean,
            place,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color="C0",
            capsize=3,
        )
    axes.axvline(0, color="black", linewidth=1)
    names = [comparison.variant or "the published rule" for comparison in compared]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss, less that without caution; each at its best")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


_HEAD = """# Results

Does caution help, by how much, and where not? Every table and figure below is made by
`make results` from the files in [results](results), which `make study` fills; no number
is typed by hand. Each side is tuned on the same grid with one seed, and compared with
other seeds (of the weights and of the order of the data), because the best of many runs
is partly luck. A difference is that of the final validation losses, paired by seed,
with Student's 95 % interval; where it includes zero, the text says "no difference
seen". The ratio of steps is the steps of the run without caution over those that the
cautious one needs to reach its final loss.
"""


def draw(results_dir: Path = RESULTS, page: Path = DOCS / "results.md") -> None:
    """Write the page and its figures.

    Args:
        results_dir: where the CSVs are.
        page: the file to write.
    """
    lines, missing = [_HEAD], []
    for name, question in QUESTIONS.items():
        histories = records.read(results_dir / f"{name}.csv")
        if histories and is_answered(question, histories):
            lines += section(name, question, histories)
        else:
            missing.append(f"`{name}`")
    if missing:
        lines += ["## Not answered yet", "", f"{', '.join(missing)}.", ""]
    page.write_text("\n".join(lines))
    print(f"Written: {page}")
