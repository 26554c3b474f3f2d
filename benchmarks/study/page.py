"""The results page and its figures, generated from the files in docs/results."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study import records
from benchmarks.study.figures import (
    plot_differences,
    plot_differences_by_step,
    plot_sizes,
)
from benchmarks.study.outcomes import (
    NEAR,
    Comparison,
    compare_all,
    difference_of_differences,
    edges,
    equal_arms,
    is_answered,
    outcome,
    robustness,
    time_ratios,
    unused_runs,
)
from benchmarks.study.questions import (
    PUBLISHED,
    QUESTIONS,
    RULES,
    SIZES,
    TUNING_SEED,
    Arm,
    Question,
)
from benchmarks.study.run import best_points, group_at, tuning_points
from examples.training import plots
from examples.training.history import (
    Group,
    History,
    Interval,
    mean_interval,
    write_point,
)
from examples.training.report import markdown_table, spread
from examples.training.task import count_parameters

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the steps after which the differences are in a table."""

Answers = Mapping[str, Sequence[History]]
"""The histories of each question that has all of its runs."""

_HEAD = """# Results

Does caution help, how much, and when does it not help? `make results` generates every
table and figure on this page from the CSV files linked below, which `make study` fills;
no result is typed by hand. [The last section](#what-others-found) quotes others.

A question compares several ways to train, its arms, such as AdamW with and without
caution. The Llamas are trained for less than one epoch on the source code of Python's
standard library, as in [the demo](llama.md); the masked autoencoder is that of
[its demo](mae.md).

Each section lists the settings that were tuned and the values that were tried. Together
they are the grid; one combination of values is a point. The arms of a question have the
same grid, except where the section says so. They are tuned with seed {tuning}. All
points are tried, except where a section says "one setting at a time": there, the
learning rate is tuned with the other setting at the first value listed, then the other
setting at the best rate, and so on in turn until nothing improves, and the section says
how many points that took. The best point is that of the lowest validation loss. The
grids are coarse, so a better one may lie between two of their points.

Each arm is trained again at its best point with other seeds for the weights and the
data order, because the best of many runs is partly luck. Losses and ratios are means
over these seeds, with their range in parentheses. Where a row says "at the settings of"
the other arm, only caution differs.

A difference is the final validation loss (or the named score) of the arm minus that of
the arm it is compared with, so that a negative difference of losses is better. It is
the mean over the seeds, paired, with Student's 95% interval; if this includes zero, the
table says "no difference seen", and figures with intervals show it in grey. The
interval reflects the randomness of the initial weights and of the data order. It does
not reflect that the settings were chosen with one seed, nor that all runs share the
validation text, which is also used for tuning.

The ratio of steps is the number of steps of the other arm divided by the number that
this arm needs to reach the other's final loss, interpolated between evaluations. It has
no interval and cannot be below 1: an arm that ends higher does not reach that loss. The
learning rate of both arms follows the schedule of the whole run, so the ratio does not
promise that a shorter run, with its own schedule, ends at this loss.
"""

_OTHERS = """## What others found

[Wen et al., 2025](https://arxiv.org/abs/2509.02046) tuned ten optimizers for language
models of 0.1 to 1.2 billion parameters. [Their tables](https://github.com/marin-community/marin/tree/main/experiments/optimizer_sweep/Analysis/PhaseI/tex)
have AdamW and cautious AdamW with 130 million parameters, b1 among the tuned settings,
and one seed. Trained on 1, 2 and 8 times the number of tokens that is optimal according
to Chinchilla, AdamW ended at a loss of 3.529, 3.409 and 3.262, and cautious AdamW at
3.535, 3.403 and 3.253. [Chang and Yuan, 2025](https://arxiv.org/abs/2606.17526) report
that cautious AdamW falls behind AdamW in a masked autoencoder on CIFAR-10.
"""


def draw(results_dir: Path = RESULTS, page: Path = DOCS / "results.md") -> None:
    """Write the page and its figures.

    Args:
        results_dir: directory of the CSV files and of the figures.
        page: the file to write.
    """
    answers, missing = {}, []
    for name, question in QUESTIONS.items():
        histories = records.read(results_dir / f"{name}.csv")
        if is_answered(question, histories):
            answers[name] = histories
        else:
            missing.append(f"- {question.title} (`{name}`)")
    lines = [_HEAD.format(tuning=TUNING_SEED), *_machine(results_dir)]
    lines += _summary(answers)
    for name, histories in answers.items():
        lines += _section(name, QUESTIONS[name], histories, results_dir)
    lines += [
        *_sizes(answers, results_dir),
        *_by_step(answers, results_dir),
        *_times(answers),
    ]
    if missing:
        lines += ["## Not answered yet", "", *missing, ""]
    lines.append(_OTHERS)
    page.write_text("\n".join(lines), "utf-8")
    print(f"Wrote {page}")


def _machine(results_dir: Path) -> list[str]:
    """Quote what a file says about where the runs were trained, if there is one."""
    file = results_dir / "machine.txt"
    return [file.read_text("utf-8")] if file.exists() else []


def table(question: Question, histories: Sequence[History]) -> str:
    """Format a Markdown table of all comparisons, and of arms without one."""
    what = question.score or "validation loss"
    header = (
        "arm",
        "settings",
        f"{what} (range)",
        "compared with",
        "difference (95% interval)",
        "",
        *(
            ["difference in validation loss", ""]
            if question.score
            else ["ratio of steps (range)"]
        ),
    )
    compared = compare_all(question, histories)
    best = best_points(question, histories)
    rows: list[Sequence[str]] = []
    for arm in question.arms:
        own = [c for c in compared if c.arm == arm]
        if arm.title not in best:
            rows.append([arm.title, "diverged at every point", *[""] * 6])
        elif not own:
            group = group_at(question, arm, best[arm.title], histories)
            rows.append([*_arm_cells(arm.title, group, question.score), *[""] * 5])
        rows += [
            [
                *_arm_cells(
                    _title(comparison, comparison.arm), comparison.own, question.score
                ),
                _title(comparison, comparison.other),
                *_difference_cells(comparison),
                *(
                    _difference_cells(replace(comparison, score=""))
                    if question.score
                    else [_ratio(comparison)]
                ),
            ]
            for comparison in own
        ]
    return markdown_table([row[: len(header)] for row in rows], header)


def _title(comparison: Comparison, arm: Arm) -> str:
    of = comparison.settings_of
    if of is None or of == arm:
        return arm.title
    return f"{arm.title}, at the settings of {of.title}"


def _arm_cells(title: str, group: Group, score: str) -> list[str]:
    point = tuple(
        (name, value) for name, value in group[0].run.point if name != "from_run"
    )
    values = [outcome(history, score) for history in group]
    diverged = sum(not math.isfinite(value) for value in values)
    if diverged:
        text = f"diverged with {diverged} of {len(values)} seeds"
    else:
        text = spread(values, ".4f")
    return [title, write_point(point), text]


def _difference_cells(comparison: Comparison) -> list[str]:
    difference = "" if comparison.diverged else _interval(comparison.difference)
    return [difference, comparison.verdict]


def _interval(interval: Interval) -> str:
    mean, low, high = interval
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def _ratio(comparison: Comparison) -> str:
    """Describe the ratios of steps; empty for a score, or if a run diverged."""
    if comparison.score or comparison.diverged:
        return ""
    reached = [ratio for ratio in comparison.ratios if ratio is not None]
    if len(reached) == len(comparison.ratios):
        return spread(reached, ".2f")
    missed = len(comparison.ratios) - len(reached)
    return f"not reached with {missed} of {len(comparison.ratios)} seeds"


def _at_best(answers: Answers) -> list[tuple[str, Comparison]]:
    """Compare the best point of each arm with that of the first arm it is against.

    Runs that answer several questions are compared once, for the first of them.
    """
    found: dict[Any, tuple[str, Comparison]] = {}
    for name, histories in answers.items():
        for comparison in compare_all(QUESTIONS[name], histories):
            first = comparison.other.title == comparison.arm.against[0]
            if first and comparison.settings_of is None:
                runs = [h.evaluations for h in (*comparison.own, *comparison.others)]
                titles = comparison.arm.title, comparison.other.title
                found.setdefault((*titles, comparison.score, *runs), (name, comparison))
    return list(found.values())


def _summary(answers: Answers) -> list[str]:
    """Write the section that lists all comparisons."""
    rows = [
        [
            _link(name),
            comparison.arm.title,
            comparison.other.title,
            comparison.score or "validation loss",
            *_difference_cells(comparison),
            _ratio(comparison),
        ]
        for name, comparison in _at_best(answers)
    ]
    if not rows:
        return []
    header = (
        "question",
        "arm",
        "compared with",
        "measured",
        "difference (95% interval)",
        "",
        "ratio of steps (range)",
    )
    table = markdown_table(rows, header)
    better, variants = _better_variants(answers)
    return [
        "## In short",
        "",
        *(variants if better else []),
        *_verdicts(answers),
        "Each arm is at the best point of its question's grid. The sections below have "
        "the settings, and further comparisons; [what to set](usage.md#what-to-set) "
        "follows from them. The intervals are not corrected for their number: in "
        f"{len(rows)} comparisons without any effect, about {0.05 * len(rows):.1f} "
        "would exclude zero.",
        "",
        table,
        "",
        *([] if better else variants),
    ]


def _verdicts(answers: Answers) -> list[str]:
    """List the verdicts on caution: first with b1 tuned, then with b1 0.9."""
    models: dict[bool, dict[tuple[str, str], list[str]]] = {True: {}, False: {}}
    for name, comparison in _effects_of_caution(answers):
        key = comparison.arm.title, comparison.verdict
        links = models["b1" in QUESTIONS[name].grid].setdefault(key, [])
        links.append(_link(name, QUESTIONS[name].model))
    lines = []
    for tuned, start in (
        (True, "With learning rate and b1 tuned on both sides:"),
        (False, "With b1 0.9 on both sides, and the learning rate tuned:"),
    ):
        if models[tuned]:
            verdicts = [
                f"- {title}, {verdict}: {'; '.join(links)}"
                for (title, verdict), links in models[tuned].items()
            ]
            lines += [start, "", *verdicts, ""]
    return lines


def _effects_of_caution(answers: Answers) -> list[tuple[str, Comparison]]:
    """Select the comparisons of an optimizer with caution and the one without."""
    return [
        (name, c)
        for name, c in _at_best(answers)
        if (c.arm.side.caution, c.other.side.caution) == (True, False)
    ]


def _better_variants(answers: Answers) -> tuple[list[str], list[str]]:
    """List the variants that are better than the published rule at all sizes.

    Returns:
        Their titles, and the lines about them.
    """
    if not answers.keys() >= {*RULES}:
        return [], []
    verdicts: list[dict[str, str]] = [
        {
            c.arm.title: c.verdict
            for c in compare_all(QUESTIONS[name], answers[name])
            if c.other.title == PUBLISHED and c.settings_of is None
        }
        for name in RULES
    ]
    tried = [title for title in verdicts[0] if all(title in v for v in verdicts)]
    better = [title for title in tried if all(v[title] == "better" for v in verdicts)]
    counts = [f"{count_parameters(QUESTIONS[name].config.task):,}" for name in RULES]
    sizes = " and ".join(counts)
    once = [
        f"{title} ({size})"
        for title in tried
        for size, verdict in zip(counts, verdicts, strict=True)
        if title not in better and verdict[title] == "better"
    ]
    return better, [
        f"**Variants that end lower than the published rule at both {sizes} "
        f"parameters, with intervals that exclude zero: {', '.join(better) or 'none'}."
        f"** Tried at both: {', '.join(tried)}."
        + f" These end lower at one of them: {', '.join(once)}."
        * bool(once),
        "",
    ]


def _files(names: Iterable[str]) -> str:
    """Link the files of questions."""
    return ", ".join(f"[{name}.csv](results/{name}.csv)" for name in names)


def _link(name: str, text: str = "") -> str:
    """Link the section of a question, by default with its title as text."""
    title = QUESTIONS[name].title
    return f"[{text or title}](#{_anchor(title)})"


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _section(
    name: str, question: Question, histories: Sequence[History], results_dir: Path
) -> list[str]:
    """Write the section of a question, and draw its figure."""
    config = question.config
    figure = results_dir / f"{name}.png"
    tried = "; ".join(
        f"{setting.replace('_', ' ')} {', '.join(values)}"
        for setting, values in question.grid.items()
    )
    exceptions = [
        f"{arm.title}: {setting.replace('_', ' ')} {', '.join(values)}."
        for arm in question.arms
        for setting, values in arm.grid.items()
    ]
    lines = [
        f"## {question.title}",
        "",
        f"{count_parameters(config.task):,} parameters, {config.steps} steps of "
        f"{config.task.describe()}, {_fixed(question)}. Tried"
        + ", one setting at a time" * question.one_at_a_time
        + f": {tried}. "
        + "".join(f"{exception} " for exception in exceptions)
        + f"Final comparison on seeds {', '.join(map(str, question.seeds))}."
        + f" {question.note}" * bool(question.note),
        "",
        table(question, histories),
        "",
    ]
    remarks = [*edges(question, histories), *equal_arms(question, histories)]
    if question.one_at_a_time:
        points = [
            f"{arm.title} {len(tuning_points(question, arm, histories))}"
            for arm in question.arms
        ]
        remarks.append(f"Number of points in the tuning: {'; '.join(points)}.")
    compared = compare_all(question, histories)
    has_maps = len(question.arms) == 2 and len(question.grid) == 2
    if has_maps and not question.one_at_a_time:
        remarks += [
            f"{found.arm.title}: of {found.points} points, {found.near_own} are "
            f"within {NEAR:g} of its best, {found.best:.4f}, and {found.near_all} "
            f"within {NEAR:g} of the best of both arms (seed {TUNING_SEED})."
            for found in robustness(question, histories)
        ]
    if has_maps:
        tuning = [h for h in histories if h.run.seed == TUNING_SEED]
        tuned = [c for c in compared if c.settings_of is None]
        curves = [run for c in tuned[-1:] for run in (*c.others, *c.own)]
        plots.plot(tuning, figure, curves=curves)
    elif compared:
        plot_differences(compared, figure, question.score or "validation loss")
    if remarks:
        lines += [*[f"- {remark}" for remark in remarks], ""]
    lines += [
        f"`.venv/bin/python -m benchmarks.study run {name}`, "
        f"[{name}.csv](results/{name}.csv)",
        "",
    ]
    if compared or has_maps:
        lines += [f"![{question.title}](results/{name}.png)", ""]
    return lines


def _fixed(question: Question) -> str:
    """Describe the settings of the optimizer that are not tuned."""
    optimizer = question.config.optimizer
    values = {name: getattr(optimizer, name) for name in ("b1", "b2", "weight_decay")}
    described = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in values.items()
        if value is not None and name not in question.grid
    ]
    if optimizer.max_grad_norm is not None:
        described.append(f"gradients clipped at norm {optimizer.max_grad_norm:g}")
    return ", ".join(
        [
            *described,
            f"{optimizer.schedule} schedule to {optimizer.final_fraction:.0%} of the "
            f"peak after a warm-up over {optimizer.warmup_fraction:.0%} of the steps",
        ]
    )


def _sizes(answers: Answers, results_dir: Path) -> list[str]:
    """Write the section that compares the sizes, and draw its figure."""
    compared = []
    for name in SIZES:
        if name in answers:
            question = QUESTIONS[name]
            count = count_parameters(question.config.task)
            found = compare_all(question, answers[name])
            compared += [(count, c) for c in found if c.settings_of is None]
    if len(compared) < 2:
        return []
    plot_sizes(compared, results_dir / "sizes.png")
    rows = [
        [
            f"{count:,}",
            write_point(comparison.others[0].run.point),
            write_point(comparison.own[0].run.point),
            *_difference_cells(comparison),
            _ratio(comparison),
            str(len(comparison.own)),
        ]
        for count, comparison in compared
    ]
    header = (
        "parameters",
        "AdamW at",
        "cautious AdamW at",
        "difference (95% interval)",
        "",
        "ratio of steps (range)",
        "seeds",
    )
    return [
        "## Does the effect grow or shrink with model size?",
        "",
        "All sizes see the same text, tokens and steps, so larger models see fewer "
        "tokens per parameter, which by itself may change the difference. None is "
        "trained for as long as is usual for its size, and most language models in use "
        "are at least a hundred times larger: these runs cannot tell whether the "
        "difference persists there. In the figure, each triangle marks a seed with "
        "which cautious AdamW did not reach AdamW's final loss. The grids of the sizes "
        "differ; the sections above list them and the seeds. The files are "
        f"{_files(name for name in SIZES if name in answers)}.",
        "",
        markdown_table(rows, header),
        "",
        "How the difference changes from one size to the next, and from the smallest "
        "to the largest, with Welch's 95% intervals (these treat the runs of two sizes "
        "as independent, although they share seeds):",
        "",
        _changes_with_size(compared),
        "",
        "![Gain from caution against model size](results/sizes.png)",
        "",
    ]


def _changes_with_size(compared: Sequence[tuple[int, Comparison]]) -> str:
    """Format a table of how the difference changes with size."""
    pairs = [*itertools.pairwise(compared)]
    if len(compared) > 2:
        pairs.append((compared[0], compared[-1]))
    rows = []
    for (small, at_small), (large, at_large) in pairs:
        if not (at_small.diverged or at_large.diverged):
            found = difference_of_differences(at_small, at_large)
            if found.low <= 0 <= found.high:
                verdict = "no change seen"
            else:
                verdict = "larger gain" if found.mean < 0 else "smaller gain"
            rows.append([f"{small:,}", f"{large:,}", _interval(found), verdict])
    header = "from", "to", "change of the difference (95% interval)", ""
    return markdown_table(rows, header)


def _by_step(answers: Answers, results_dir: Path) -> list[str]:
    """Write the section about differences during training, and draw its figure."""
    compared = [
        (name, c)
        for name, c in _effects_of_caution(answers)
        if not (c.diverged or c.score)
    ]
    if not compared:
        return []
    named = [(QUESTIONS[name].model, c) for name, c in compared]
    plot_differences_by_step(named, results_dir / "during.png")
    rows = [
        [
            _link(name),
            comparison.arm.title,
            comparison.other.title,
            *map(_interval, _at_shares(comparison)),
        ]
        for name, comparison in compared
    ]
    header = (
        "question",
        "arm",
        "compared with",
        *(f"after {share:.0%}" for share in _SHARES),
    )
    return [
        "## Does the difference last?",
        "",
        "The difference in validation loss during training. All runs follow one "
        "schedule to their end. A run of half the length would have its own schedule, "
        "so its difference may be another. The figure leaves out the intervals and the "
        "steep start. The sections of the questions list the seeds and the files.",
        "",
        markdown_table(rows, header),
        "",
        "![Difference in validation loss during training](results/during.png)",
        "",
    ]


def _at_shares(comparison: Comparison) -> list[Interval]:
    by_step = comparison.differences_by_step
    last = max(by_step)
    return [mean_interval(by_step[round(share * last)]) for share in _SHARES]


def _times(answers: Answers) -> list[str]:
    """Write the section that compares ratios of steps with ratios of times."""
    rows, medians = [], []
    for name, histories in answers.items():
        compared = compare_all(QUESTIONS[name], histories)
        for found in time_ratios(QUESTIONS[name], histories):
            ratios = [
                ratio
                for c in compared
                if (c.arm, c.other, c.settings_of) == (found.arm, found.other, None)
                for ratio in c.ratios
            ]
            reached = [ratio for ratio in ratios if ratio is not None]
            mean = sum(reached) / len(reached) if reached else 0.0
            medians.append(found.median)
            all_reached = 0 < len(reached) == len(ratios) and not QUESTIONS[name].score
            rows.append(
                [
                    _link(name),
                    found.arm.title,
                    found.other.title,
                    *(f"{seconds:.3f}" for seconds in found.seconds),
                    f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})",
                    str(found.pairs),
                    *(
                        [f"{mean:.2f}", f"{mean / found.median:.2f}"]
                        if all_reached
                        else ["", ""]
                    ),
                ]
            )
    if not rows:
        return []
    largest = max(medians)
    header = (
        "question",
        "arm",
        "compared with",
        "seconds per step",
        "seconds per step, other arm",
        "ratio (quartiles)",
        "pairs of runs",
        "ratio of steps",
        "ratio of times",
    )
    return [
        "## Does caution save time as well as steps?",
        "",
        "Both runs of a pair took turns in one process, at most 50 steps at a time. "
        "Seconds per step: the median over the pairs of the runs' median step times. "
        "Ratio: computed for each pair; the median is given, so it may differ from the "
        "ratio of the two columns. Ratio of times: the ratio of steps divided by this "
        "ratio, for arms that reached the other's loss with all seeds. Rows were "
        "measured at different times and not all on one machine, so compare seconds "
        "only within a row. Questions whose arms did not take turns are missing; "
        "[performance](performance.md#in-a-whole-training-step) has the step times of "
        "all sizes.",
        "",
        f"The largest ratio of step times is {largest:.2f}, so no ratio of times is "
        f"more than {1 - 1 / largest:.0%} below that of steps.",
        "",
        _runs_and_hours(answers),
        "",
        markdown_table(rows, header),
        "",
    ]


def _runs_and_hours(answers: Answers) -> str:
    """Describe how many runs the files have, and how long they took."""
    runs = [h for histories in answers.values() for h in histories]
    unused = sum(
        len(unused_runs(QUESTIONS[name], histories))
        for name, histories in answers.items()
    )
    timed = [h for h in runs if h.seconds]
    seconds = sum(
        h.seconds_per_step * max((e.step for e in h.evaluations), default=0)
        for h in timed
    )
    untimed = [
        f"{count} of {len(histories)} in {name}.csv"
        for name, histories in answers.items()
        for count in [sum(not h.seconds for h in histories)]
        if count
    ]
    text = f"The files have {len(runs):,} runs; some are in several files."
    if unused:
        text += (
            f" {unused} of them, with the seeds of the comparisons, are in no table: "
            "their points were the best until more values were tried."
        )
    text += (
        f" The {len(timed):,} runs whose step time was measured took "
        f"{seconds / 3600:.0f} hours. This includes neither compilation and "
        "evaluation, nor the models that fine-tuning starts from"
    )
    if untimed:
        text += f", nor runs without a measured time: {'; '.join(untimed)}"
    return f"{text}."
