"""The comparison: an optimizer against its cautious version.

Both train the same model from the same seed on the same data in the same order, at
one or several learning rates. ``python -m examples.llama.compare --help`` lists the
options.
"""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.llama.config import (
    DEFAULT_LEARNING_RATES,
    TITLES,
    OptimizerName,
    TrainConfig,
    make_directory,
    require_choice,
    require_positive,
    run_command,
)
from examples.llama.data import load_corpus
from examples.llama.model import count_parameters
from examples.llama.train import Evaluation, History, train

_PAIRS: dict[str, tuple[OptimizerName, OptimizerName]] = {
    "adamw": ("adamw", "cautious_adamw"),
    "lion": ("lion", "cautious_lion"),
}
_CSV_HEADER = (
    "learning_rate",
    "optimizer",
    "step",
    "train_loss",
    "validation_loss",
    "aligned_fraction",
)
_COLORS = ("tab:gray", "tab:blue")  # Base, cautious.


@dataclass(frozen=True)
class Pair:
    """Two runs that differ in caution only, or the best run with and without it."""

    base: History
    cautious: History

    @property
    def reached_at(self) -> float | None:
        """Step at which the cautious run has the base's final loss, if it ever has."""
        if self.base.diverged_at is not None:
            return None
        return first_step_at(self.cautious.evaluations, self.base.evaluations[-1].loss)

    @property
    def ratio(self) -> float | None:
        """The base's steps over the steps in which the cautious run gets as far."""
        if self.reached_at is None:
            return None
        return self.base.evaluations[-1].step / self.reached_at


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


def best(histories: Sequence[History]) -> History | None:
    """Returns the run with the lowest final validation loss, of those that ended."""
    finished = [history for history in histories if history.diverged_at is None]
    return min(finished, key=lambda h: h.evaluations[-1].loss, default=None)


def table(pairs: Sequence[Pair]) -> str:
    """Writes the results of all runs as a Markdown table."""
    header = (
        "learning rate",
        "optimizer",
        "validation loss",
        "perplexity",
        f"step at {TITLES[pairs[0].base.name]}'s final loss",
        "ratio of steps",
        "seconds a step",
        "aligned fraction",
    )
    rows: list[tuple[str, ...]] = [header]
    for pair in pairs:
        rows.append(_row(pair.base, "", ""))
        if pair.base.diverged_at is not None:
            rows.append(_row(pair.cautious, "", ""))
        elif pair.reached_at is None:
            rows.append(_row(pair.cautious, "not reached", ""))
        else:
            ratio = f"{pair.ratio:.2f}"
            rows.append(_row(pair.cautious, f"{pair.reached_at:.0f}", ratio))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _row(history: History, reached: str, ratio: str) -> tuple[str, ...]:
    start = f"{history.learning_rate:g}", TITLES[history.name]
    if history.diverged_at is not None:
        return (*start, f"diverged at step {history.diverged_at}", *[""] * 5)
    final = history.evaluations[-1]
    return (
        *start,
        f"{final.loss:.4f}",
        f"{final.perplexity:.2f}",
        reached,
        ratio,
        f"{history.seconds_per_step:.3f}",
        f"{history.aligned_fraction:.3f}",
    )


def verdict(pair: Pair) -> str:
    """Says in a sentence which of the two learned faster, or that none can tell."""
    base, cautious = TITLES[pair.base.name], TITLES[pair.cautious.name]
    rates = f"{pair.base.learning_rate:g}"
    if pair.cautious.learning_rate != pair.base.learning_rate:
        rates = f"{rates} and {pair.cautious.learning_rate:g}"
    for history in (pair.base, pair.cautious):
        if history.diverged_at is not None:
            return f"At {rates}: no comparison, {TITLES[history.name]} diverged."
    steps = pair.base.evaluations[-1].step
    final = pair.base.evaluations[-1].loss
    if pair.reached_at is None:
        return (
            f"At {rates}: {cautious} did not reach {base}'s final validation loss of "
            f"{final:.4f} in {steps} steps; {base} is ahead."
        )
    return (
        f"At {rates}: {cautious} reached {base}'s final validation loss of "
        f"{final:.4f} at step {pair.reached_at:.0f} of {steps}: a ratio of "
        f"{pair.ratio:.2f}."
    )


def summary(pairs: Sequence[Pair], config: TrainConfig) -> str:
    """Writes the setting, the table and what follows from it, in Markdown."""
    tokens = config.data.batch_size * config.data.sequence_length
    lines = [
        f"{count_parameters(config.model):,} parameters, {config.steps} steps of "
        f"{tokens} tokens, seed {config.seed}, evaluated every {config.eval_every} "
        "steps. The two runs of a pair took turns.",
        "",
        table(pairs),
        "",
    ]
    lines += [f"- {verdict(pair)}" for pair in pairs]
    base, cautious = best([p.base for p in pairs]), best([p.cautious for p in pairs])
    if len(pairs) > 1 and base is not None and cautious is not None:
        lines.append(f"- Best against best. {verdict(Pair(base, cautious))}")
    return "\n".join(lines) + "\n"


def write_csv(pairs: Sequence[Pair], path: Path) -> None:
    """Writes a line for every step of every run; evaluations stand at their step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_HEADER)
        for history in (history for p in pairs for history in (p.base, p.cautious)):
            evaluations = {e.step: e[1:] for e in history.evaluations}
            for step, loss in enumerate(history.losses, start=1):
                run = history.learning_rate, history.name
                writer.writerow((*run, step, loss, *evaluations.get(step, ("", ""))))


def plot(pairs: Sequence[Pair], path: Path) -> None:
    """Draws the validation curves, and with several learning rates the final losses.

    The curves are those at the learning rate that is best for the base.
    """
    base = best([pair.base for pair in pairs])
    shown = next((pair for pair in pairs if pair.base is base), pairs[0])
    figure = Figure(figsize=(7 if len(pairs) == 1 else 12, 4.5), layout="constrained")
    axes = figure.subplots(1, 1 if len(pairs) == 1 else 2, squeeze=False)[0]
    _plot_curves(axes[0], shown)
    if len(pairs) > 1:
        _plot_sweep(axes[1], pairs)
    figure.savefig(path, dpi=150)


def _plot_curves(axes: Axes, pair: Pair) -> None:
    late: list[float] = []
    for history, color in zip((pair.base, pair.cautious), _COLORS, strict=True):
        steps = [e.step for e in history.evaluations]
        losses = [e.loss for e in history.evaluations]
        late += losses[len(losses) // 6 :]
        axes.plot(steps, losses, color=color, linewidth=2, label=TITLES[history.name])
    if pair.reached_at is not None:
        end = pair.base.evaluations[-1]
        arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            "", (pair.reached_at, end.loss), (end.step, end.loss), arrowprops=arrow
        )
        axes.text(
            0.97,
            0.7,
            f"{TITLES[pair.base.name]}'s final loss reached\nat step "
            f"{pair.reached_at:.0f} of {end.step}: ratio {pair.ratio:.2f}",
            transform=axes.transAxes,
            horizontalalignment="right",
        )
    if late:  # The steep beginning would flatten all the rest.
        axes.set_ylim(top=max(late))
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_title(f"Training, at a learning rate of {pair.base.learning_rate:g}")
    _finish(axes)


def _plot_sweep(axes: Axes, pairs: Sequence[Pair]) -> None:
    for side, color in zip(("base", "cautious"), _COLORS, strict=True):
        histories = [getattr(pair, side) for pair in pairs]
        finished = [h for h in histories if h.diverged_at is None]
        axes.plot(
            [h.learning_rate for h in finished],
            [h.evaluations[-1].loss for h in finished],
            color=color,
            marker="o",
            linewidth=2,
            label=TITLES[histories[0].name],
        )
    axes.set_xscale("log")
    rates = [pair.base.learning_rate for pair in pairs]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.set_title("Final loss")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write(pairs: Sequence[Pair], config: TrainConfig, directory: Path) -> None:
    """Writes the summary, the curves as numbers, and the curves as a picture."""
    (directory / "comparison.md").write_text(summary(pairs, config))
    write_csv(pairs, directory / "comparison.csv")
    plot(pairs, directory / "comparison.png")


def compare(
    optimizer: Literal["adamw", "lion"] = "adamw",
    learning_rates: tuple[float, ...] = (),
    output_dir: Path = Path("outputs/llama"),
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> list[Pair]:
    """Train a small Llama with an optimizer and with its cautious version, and compare.

    Args:
        optimizer: the base of the pair.
        learning_rates: train both sides at each of these. Unless given, at one: the
            best of a sweep for the base, on the default corpus and model.
        output_dir: where comparison.md, comparison.csv and comparison.png are written.
        config: all the rest.

    Returns:
        A pair of records for each learning rate.
    """
    require_choice("optimizer", optimizer, tuple(_PAIRS))
    rates = sorted(set(learning_rates)) or [DEFAULT_LEARNING_RATES[optimizer]]
    for rate in rates:
        require_positive("learning_rates", rate)
    if not learning_rates:
        print(
            f"Learning rate {rates[0]:g}, the best for {TITLES[optimizer]} in a sweep "
            "with the default settings."
        )
    corpus = load_corpus(config.data, config.model.vocab_size)
    make_directory("output_dir", output_dir)
    pairs: list[Pair] = []
    for rate in rates:
        pairs.append(Pair(*train(_PAIRS[optimizer], rate, config, corpus)))
        write(pairs, config, output_dir)  # Each time, lest an interruption cost all.
    print(f"\n{summary(pairs, config)}")
    print(f"Written to {output_dir}: comparison.md, comparison.csv, comparison.png")
    return pairs


if __name__ == "__main__":
    run_command(compare)
