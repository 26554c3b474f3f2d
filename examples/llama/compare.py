"""The comparison: optimizers against their cautious versions.

All train the same model on the same data; with the same seed, from the same weights and
in the same order. ``python -m examples.llama.compare --help`` lists the options. A
comparison that was interrupted goes on when the same command is given again.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.llama import log, report
from examples.llama.checks import make_directory, require
from examples.llama.command_line import Start, run_training_command
from examples.llama.config import (
    OptimizerName,
    TrainConfig,
    require_learning_rate,
    title,
)
from examples.llama.loop import is_over, load_run_data, training
from examples.llama.processes import preemption
from examples.llama.report import Run


def plan(
    optimizers: Sequence[OptimizerName],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    config: TrainConfig,
) -> dict[Run, TrainConfig]:
    """Lists the runs of a comparison.

    Args:
        optimizers: names.
        learning_rates: those to train each optimizer at; none for that of the
            configuration, or else its default.
        seeds: those to train each optimizer with.
        config: all the rest.

    Raises:
        InputError: for a name, a learning rate or a seed that no run can have.
    """
    for name, values in (
        ("optimizers", optimizers),
        ("learning_rates", learning_rates),
        ("seeds", seeds),
    ):
        require(len(set(values)) == len(values), f"{name}: one of them is there twice")
    require(bool(optimizers), "optimizers: give at least one")
    require(bool(seeds), "seeds: give at least one")
    runs = {}
    for seed in seeds:
        for rate in learning_rates or (config.optimizer.learning_rate,):
            for name in optimizers:
                optimizer = config.optimizer.named(name, rate)
                run = Run(name, optimizer.peak, seed)
                runs[run] = replace(config, optimizer=optimizer, seed=seed)
                require_learning_rate(runs[run])
    return runs


def run_all(runs: dict[Run, TrainConfig], output_dir: Path, together: bool) -> bool:
    """Trains all that are not trained yet.

    Args:
        runs: what to train.
        output_dir: where each run has its directory.
        together: the optimizers of one seed and learning rate take turns, from one
            writing of the log to the next, so that whatever else the machine does slows
            all of them alike. Their models are in memory at the same time.

    Returns:
        Whether all have come to their ends; not so where SIGTERM has come.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        key = (run.seed, run.learning_rate) if together else (run,)
        groups.setdefault(key, []).append(run)
    total = sum(config.steps for config in runs.values())
    bar: tqdm[Any] = tqdm(total=total, desc="Compiling", unit="step")
    with bar, preemption() as stop:
        done = 0
        for group in groups.values():
            ends = _take_turns(group, runs, output_dir, stop, bar, done)
            if not all(is_over([end], runs[run].steps) for run, end in ends.items()):
                return False
            done += sum(runs[run].steps for run in group)
    return True


def _take_turns(
    group: Sequence[Run],
    runs: dict[Run, TrainConfig],
    output_dir: Path,
    stop: Callable[[int], bool],
    bar: "tqdm[Any]",
    done: int,
) -> dict[Run, log.Record]:
    """Trains some runs, and returns the last record of each."""
    data = None
    trainings: dict[Run, Generator[list[log.Record]]] = {}
    for run in group:
        directory = output_dir / run.name
        if data is None and not is_over(log.read(directory), runs[run].steps):
            data = load_run_data(runs[run])
        trainings[run] = training(runs[run], directory, data, stop)
    ends: dict[Run, log.Record] = {}
    with ExitStack() as stack:
        for iterator in trainings.values():
            stack.callback(iterator.close)
        while trainings:
            for run, iterator in list(trainings.items()):
                records = next(iterator, None)
                if records is None:
                    del trainings[run]
                    continue
                ends[run] = records[-1]
                losses = [
                    f"{title(r.optimizer)} {e['loss']:.3f}" for r, e in ends.items()
                ]
                bar.set_description(f"{run.learning_rate:g}, seed {run.seed}", False)
                bar.set_postfix_str("loss: " + ", ".join(losses), refresh=False)
                bar.update(done + sum(e["step"] for e in ends.values()) - bar.n)
    for run, end in ends.items():
        if end.get("diverged"):
            tqdm.write(
                f"{title(run.optimizer)} diverged at a learning rate of "
                f"{run.learning_rate:g}, seed {run.seed}: its loss is not finite at "
                f"step {end['step']}."
            )
    return ends


def compare(
    optimizers: tuple[OptimizerName, ...] = ("adamw", "cautious_adamw"),
    learning_rates: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (0,),
    output_dir: Path = Path("outputs/llama/comparison"),
    together: bool = True,
    start: Start = Start(),  # noqa: B008 (frozen)
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> None:
    """Train a Llama with several optimizers, and compare them.

    Args:
        optimizers: those to train with. One and its cautious version are compared.
        learning_rates: train each at each of these. Not given: at --learning-rate,
            which may be of the --config-file, and without that at its default.
        seeds: train each with each of these, of weights and data.
        output_dir: where each run has its directory, and report.md, report.csv and
            report.png are written.
        together: the optimizers of one learning rate and seed take turns, so that their
            times can be compared; all are in memory at once.
        start: where the settings start from.
        config: all the rest.
    """
    del start  # It has become the defaults of the configuration.
    runs = plan(optimizers, sorted(learning_rates), seeds, config)
    make_directory("output_dir", output_dir)
    if not learning_rates:
        rates = {f"{run.learning_rate:g} for {title(run.optimizer)}" for run in runs}
        print(f"Learning rates: {', '.join(sorted(rates))}.")
    if not run_all(runs, output_dir, together):
        print("Stopped: the same command goes on.")
        return
    histories = [report.read_history(run, output_dir / run.name) for run in runs]
    text = report.write(histories, config, output_dir)
    print(f"\n{text}")
    print(f"Written to {output_dir}: report.md, report.csv, report.png")


if __name__ == "__main__":
    run_training_command(compare)
