"""The comparison of optimizers with and without caution, over any settings.

All runs train the same model on the same data; runs with the same seed start from the
same weights and see the data in the same order. To resume an interrupted comparison,
run the same command again.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.training import history, log, report
from examples.training.checks import InputError, make_directory, require
from examples.training.config import TrainConfig, settings, with_settings
from examples.training.engine import make_engine
from examples.training.history import History, Run, Side, write_point
from examples.training.loop import is_finished, is_over, load_run_data, training
from examples.training.optimizers import OF_CAUTION, OptimizerName
from examples.training.processes import preemption
from examples.training.run_dir import open_run
from examples.training.task import Data, Model
from examples.training.trained import Source, is_loadable, load_trained

_OWN_OPTIONS = {"optimizer": "--optimizers", "caution": None, "seed": "--seeds"}


def parse_sweep(sweep: Sequence[str]) -> dict[str, list[str]]:
    """Parse the settings to sweep, as in ``learning_rate=1e-3,2e-3``.

    Raises:
        InputError: if the sweep cannot be parsed.
    """
    values: dict[str, list[str]] = {}
    for text in sweep:
        name, equals, listed = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        name = {"from": "from_run"}.get(name, name)
        found = [value.strip() for value in listed.split(",")]
        if not equals or not all(found):
            raise InputError(
                f"sweep: cannot parse {text!r}; pass a setting and its values, as in "
                "learning_rate=1e-3,2e-3."
            )
        require(name not in values, f"sweep: {name} is given twice.")
        require(len(set(found)) == len(found), f"sweep: {name} repeats a value.")
        if name in _OWN_OPTIONS:
            raise InputError(
                f"sweep: {name} cannot be swept; "
                + (
                    f"use {_OWN_OPTIONS[name]}."
                    if _OWN_OPTIONS[name]
                    else "each optimizer is trained with and without it."
                )
            )
        values[name] = found
    return values


def plan(
    optimizers: Sequence[str],
    sweep: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    config: TrainConfig[Any],
) -> dict[Run, TrainConfig[Any]]:
    """List the runs of a comparison: each optimizer with and without caution.

    Args:
        optimizers: names of the optimizers.
        sweep: values to sweep, as text, by setting. Settings of caution are swept in
            the cautious runs only.
        seeds: the seeds to train each combination with.
        config: all other settings.

    Raises:
        InputError: if a name, a value or a seed is invalid.
    """
    for name, values in (("optimizers", optimizers), ("seeds", seeds)):
        require(bool(values), f"{name}: pass at least one.")
        require(len(set(values)) == len(values), f"{name}: pass each value only once.")
    runs: dict[Run, TrainConfig[Any]] = {}
    for seed in seeds:
        for chosen in itertools.product(*sweep.values()):
            point = dict(zip(sweep, chosen, strict=True))
            for name, caution in itertools.product(optimizers, (False, True)):
                optimizer = replace(config.optimizer, optimizer=name, caution=True)
                run_config = replace(config, optimizer=optimizer, seed=seed)
                run_config = with_settings(run_config, point)
                if not caution:
                    alone = run_config.optimizer.without_caution()
                    run_config = replace(run_config, optimizer=alone)
                own = {"learning_rate": f"{run_config.learning_rate:g}"}
                own |= {
                    setting: value
                    for setting, value in point.items()
                    if setting != "learning_rate"
                    and (caution or setting not in OF_CAUTION)
                }
                run = Run(Side(name, caution), tuple(own.items()), seed)
                runs.setdefault(run, run_config)
    return runs


def require_trainable(runs: Mapping[Run, TrainConfig[Any]], output_dir: Path) -> None:
    """Check the settings and directories of all runs before the first one starts.

    Raises:
        InputError: if settings are invalid, or a directory contains another run.
    """
    for run, config in runs.items():
        make_engine(config)
        directory = output_dir / run.name
        if directory.is_dir():
            open_run(config, directory)
        begins = not (is_loadable(directory) or is_finished(directory, config.steps))
        if config.from_run is not None and begins:
            config.task.check_source(config.from_run)


def run_all(
    runs: dict[Run, TrainConfig[Any]],
    swept: Sequence[str],
    output_dir: Path,
    together: bool,
) -> bool:
    """Train all runs that are not finished.

    Args:
        runs: the runs and their configurations.
        swept: the settings in which they differ.
        output_dir: the parent of the runs' directories.
        together: whether the optimizers of one seed and point take turns, switching at
            each log write, so that other load on the machine slows them all equally.
            Their models are in memory at the same time.

    Returns:
        Whether all runs are finished; False if a signal stopped them.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run, config in runs.items():
        values = settings(config)
        point = [values[name] for name in swept if name not in OF_CAUTION]
        key = (run.seed, *map(str, point)) if together else (run,)
        groups.setdefault(key, []).append(run)
    total = sum(config.steps for config in runs.values())
    bar: tqdm[Any] = tqdm(total=total, desc="Compiling", unit="step")
    load_data = _Loader()
    with bar, preemption() as stop:
        done = 0
        for group in groups.values():
            ends = _take_turns(group, runs, output_dir, load_data, stop, bar, done)
            if not all(
                run in ends and is_over([ends[run]], runs[run].steps) for run in group
            ):
                return False
            done += sum(runs[run].steps for run in group)
    return True


class _Loader:
    """A data loader that returns the previous data if the settings match."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._data: Data | None = None

    def __call__(self, config: TrainConfig[Any], directory: Path) -> Data:
        key = config.task, config.seed, config.from_run
        if self._data is None or key != self._key:
            # A run that resumes does not need the one from which it started.
            source = directory if is_loadable(directory) else config.from_run
            self._key, self._data = key, load_run_data(config, source)
        return self._data


def _take_turns(
    group: Sequence[Run],
    runs: dict[Run, TrainConfig[Any]],
    output_dir: Path,
    load_data: Callable[[TrainConfig[Any], Path], Data],
    stop: Callable[[int], bool],
    bar: "tqdm[Any]",
    done: int,
) -> dict[Run, log.Record]:
    """Train runs in turn, and return the last record of each that was started."""
    trainings: dict[Run, Generator[list[log.Record]]] = {}
    for run in group:
        directory, data = output_dir / run.name, None
        if not is_finished(directory, runs[run].steps):
            data = load_data(runs[run], directory)
        trainings[run] = training(runs[run], directory, data, stop)
    ends: dict[Run, log.Record] = {}
    with ExitStack() as stack:
        for iterator in trainings.values():
            stack.callback(iterator.close)
        while trainings:
            for run, iterator in list(trainings.items()):
                # Start no further run after a signal.
                records = None if run not in ends and stop(0) else next(iterator, None)
                if records is None:
                    del trainings[run]
                    continue
                ends[run] = records[-1]
                losses = [f"{r.side.title} {e['loss']:.3f}" for r, e in ends.items()]
                where = f"{write_point(run.point)}, seed {run.seed}"
                bar.set_description(where, refresh=False)
                bar.set_postfix_str("loss: " + ", ".join(losses), refresh=False)
                bar.update(done + sum(e["step"] for e in ends.values()) - bar.n)
    for run, end in ends.items():
        if end.get("diverged"):
            tqdm.write(
                f"{run.side.title} diverged at {write_point(run.point)}, seed "
                f"{run.seed}: its loss is not finite at step {end['step']}."
            )
    return ends


def compare(
    optimizers: tuple[OptimizerName, ...] | None = None,
    sweep: tuple[str, ...] = (),
    seeds: tuple[int, ...] | None = None,
    output_dir: Path | None = None,
    together: bool = True,
    *,
    config: TrainConfig[Any],
) -> None:
    """Train optimizers with and without caution, and compare them.

    Args:
        optimizers: optimizers to compare. Defaults to the one given by --optimizer.
        sweep: settings and their values, as in learning_rate=1e-3,2e-3 b1=0.9,0.98; all
            combinations are trained. Settings of caution are swept in the cautious runs
            only.
        seeds: seeds of the weights and the data order; each combination is trained with
            each seed. Defaults to the one given by --seed.
        output_dir: directory for report.md, report.csv, report.png, aligned.png and one
            subdirectory per run. Defaults to a directory in outputs/.
        together: let the optimizers of one point and seed take turns, so that their
            times are comparable. All their models are in memory at once.
        config: all other settings.
    """
    optimizers = optimizers or (config.optimizer.optimizer,)
    output_dir = output_dir or Path("outputs") / config.task.name / "comparison"
    swept = parse_sweep(sweep)
    if not config.optimizer.caution:
        print("Each optimizer is trained with and without caution.")
    runs = plan(optimizers, swept, (config.seed,) if seeds is None else seeds, config)
    make_directory("output_dir", output_dir)
    with run_dirs_are_in("--output-dir"):
        require_trainable(runs, output_dir)
    if "learning_rate" not in swept:
        rates = {f"{c.learning_rate:g} for {run.side.title}" for run, c in runs.items()}
        print(f"Learning rates: {', '.join(sorted(rates))}.")
    with run_dirs_are_in("--output-dir"):
        finished = run_all(runs, list(swept), output_dir, together)
    if not finished:
        print("Stopped. Run the same command to resume.")
        return
    histories = [history.read_history(run, output_dir / run.name) for run in runs]
    files = report.write(histories, list(runs.values()), output_dir)
    print(f"\n{(output_dir / report.TEXT_NAME).read_text('utf-8')}")
    files += show_best(histories, runs, output_dir)
    print(f"Wrote {', '.join(file.name for file in files)} to {output_dir}.")


@contextmanager
def run_dirs_are_in(option: str) -> Iterator[None]:
    """Name this option instead of --run-dir in errors about the directory of a run."""
    try:
        yield
    except InputError as error:
        message = str(error).replace("--run-dir", option)
        raise InputError(message) from error


def show_best(
    histories: Sequence[History], runs: dict[Run, TrainConfig[Any]], output_dir: Path
) -> list[Path]:
    """Call the task's ``show`` with the best run of each side, at its first seed.

    Skip runs whose checkpoints have been deleted.
    """
    best = [
        seeds[0].run
        for side in dict.fromkeys(h.run.side for h in histories)
        if (seeds := history.best(histories, side)) is not None
    ]
    best = [run for run in best if is_loadable(output_dir / run.name)]
    if not best:
        return []
    config = runs[best[0]]

    def load_models() -> dict[str, Model]:
        models = {}
        for run in best:
            source = Source(output_dir / run.name)
            trained = load_trained(source, type(config.task))
            models[run.side.title] = Model(trained.config.task, trained.params)
        return models

    return config.task.show(load_models, partial(load_run_data, config), output_dir)
