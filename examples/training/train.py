"""The command that trains a model."""

import hashlib
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from examples.training import log
from examples.training.checks import InputError, require
from examples.training.config import TrainConfig, identity
from examples.training.loop import is_finished, is_over, training
from examples.training.optimizers import OPTIMIZERS
from examples.training.processes import Processes, preemption
from examples.training.task import Task, count_parameters


def default_run_dir(config: TrainConfig[Any]) -> Path:
    """Return a directory named after the optimizer and a hash of the settings."""
    text = repr(sorted(identity(config).items()))
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    caution = "cautious-" * config.optimizer.caution
    return (
        Path("outputs")
        / config.task.name
        / (f"{caution}{config.optimizer.optimizer}-{key}")
    )


def train(
    run_dir: Path | None = None,
    profile: int = 0,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    *,
    config: TrainConfig[Any],
) -> None:
    """Train a model, or resume an interrupted run.

    Args:
        run_dir: directory of the configuration, the log and the checkpoints. Defaults
            to a directory in outputs/ named after the settings.
        profile: number of steps to trace, after the first, for TensorBoard and
            Perfetto. Traces are written to the run's directory.
        processes: the processes of a distributed run.
        config: the configuration of the run.
    """
    rate, task = config.learning_rate, config.task
    require(profile >= 0, f"profile must be at least 0, got {profile}.")
    processes.join()
    run_dir = run_dir or default_run_dir(config)
    is_main = jax.process_index() == 0
    if is_main:
        print(
            f"{count_parameters(task):,} parameters, {config.steps} steps of "
            f"{task.describe()} with {config.optimizer.title} at {rate:g}, in "
            f"{run_dir}",
            flush=True,
        )
        warn_of_a_high_rate(config)
    was_finished = is_finished(run_dir, config.steps)
    last: log.Record = {}
    bar = tqdm(total=config.steps, desc="Compiling", unit="step", disable=not is_main)
    with bar, preemption() as stop:
        for records in training(config, run_dir, stop=stop, profile=profile):
            last = records[-1]
            validated = [r for r in records if "aligned_fraction" in r]
            if validated and is_main:
                tqdm.write(summary(validated[-1], task))
            bar.set_description("Training", refresh=False)
            bar.set_postfix(progress(last, task), refresh=False)
            bar.update(last["step"] - bar.n)
    if not is_main:
        return
    if last.get("diverged"):
        raise InputError(
            f"the loss is not finite at step {last['step']}; a lower --learning-rate "
            "may help."
        )
    if is_over([last], config.steps):
        over = "was already finished" if was_finished else "is finished"
        print(f"The run {over}: {summary(last, task)}, in {run_dir}")
    else:
        print(f"Stopped: step {last['step']} is saved. Run the same command to resume.")


def warn_of_a_high_rate(config: TrainConfig[Any]) -> None:
    """Warn about a learning rate larger than typical weights."""
    row, rate = OPTIMIZERS[config.optimizer.optimizer], config.learning_rate
    if row.unit_steps and rate > 0.3:
        print(
            f"A learning rate of {rate:g} is high: a step of {row.title} moves each "
            "weight by about that much. Typical rates are 1e-4 to 1e-2."
        )


def summary(record: log.Record, task: Task) -> str:
    """Format an evaluation as a line."""
    loss = record["validation_loss"]
    metrics = "".join(f"   {k} {f(loss):8.2f}" for k, f in task.metrics.items())
    scores = record.get("scores", {})
    metrics += "".join(f"   {name} {x:.4f}" for name, x in scores.items())
    return (
        f"step {record['step']:6d}   validation loss {loss:.4f}{metrics}   "
        f"aligned fraction {record['aligned_fraction']:.3f}"
    )


def progress(record: log.Record, task: Task) -> dict[str, str]:
    """Return the values shown next to the progress bar."""
    shown = {"loss": f"{record['loss']:.3f}"}
    speed = record.get(f"{task.unit}_per_second")
    if speed is not None:
        shown[f"{task.unit}/s"] = f"{speed:,.0f}"
    if "mfu" in record:
        shown["MFU"] = f"{record['mfu']:.1%}"
    return shown
