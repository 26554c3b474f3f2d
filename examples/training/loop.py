"""The training loop.

An interrupted run resumes from its last checkpoint and continues its log.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from examples.training import log
from examples.training.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoints,
    saved_steps,
    size,
)
from examples.training.checks import require
from examples.training.config import TrainConfig, identity
from examples.training.engine import Engine, Programs, make_engine
from examples.training.optimizers import make_schedule, shared_steps
from examples.training.processes import require_same, together
from examples.training.run_dir import (
    is_saved,
    occupied,
    open_run,
    require_same_files,
    require_shared,
    require_space,
    write_run,
)
from examples.training.step import Aligned, TrainState
from examples.training.task import Batch, Data, Task


def training(
    config: TrainConfig[Any],
    run_dir: Path,
    data: Data | None = None,
    stop: Callable[[int], bool] = lambda step: False,
    profile: int = 0,
) -> Generator[list[log.Record]]:
    """Trains a model in a directory, from where an earlier run in it has come.

    Args:
        config: the run.
        run_dir: where the configuration, the log and the checkpoints are, or will be.
        data: what to train on, as ``load_run_data`` makes it of the configuration.
        stop: asked after each step, which it is given, whether to save and end.
        profile: how many steps to trace, after the first; 0 for none.

    Yields:
        The records of the steps before, where some were made in an earlier run, and
        then those of each writing of the log. A run whose loss is no longer finite
        ends.

    Raises:
        InputError: for settings with which it cannot run, before anything is computed.
    """
    engine = make_engine(config)
    require_same("settings", str(config.mesh), str(sorted(identity(config).items())))
    with ExitStack() as stack:
        with together():
            stack.enter_context(occupied(run_dir))
        with together():
            opened = open_run(config, run_dir)
        records = opened.records
        if is_over(records, config.steps) and is_saved(records, run_dir):
            yield records
            return
        with together():
            shared = shared_steps(config.optimizer, config.steps)
            # The newest, the best, the one being written, and the one always kept,
            # unless that is the last.
            count = config.keep + 2 + (shared not in (None, config.steps))
            require_space(run_dir, size(engine.state_like), count)
            directory = run_dir / CHECKPOINTS_NAME
            begins = not saved_steps(directory)
            if config.from_run is not None and begins:
                config.task.check_source(config.from_run)
            if data is None:
                data = load_run_data(config, config.from_run if begins else run_dir)
            params = None
            if config.from_run is not None and begins:
                params = config.task.start_from(config.from_run, config.seed)
                require_same_files(config.from_run, data)
        require_same("data", data.fingerprint, *data.files.values())
        with together():
            write_run(config, data, run_dir, opened)
        with together():
            require_shared(run_dir)

        batches = iter(data.train)
        losses = {
            record["step"]: record["validation_loss"]
            for record in records
            if np.isfinite(record.get("validation_loss", np.nan))
        }
        checkpoints = stack.enter_context(
            closing(Checkpoints(directory, config.keep, losses, shared))
        )
        restored = checkpoints.restore(engine.state_like, batches)
        step, state = restored or (0, engine.make_state(params))
        with together():
            history = stack.enter_context(closing(log.Log(run_dir, step)))
        if step:
            yield log.read(run_dir)
        batch = engine.put_batch(next(batches))
        validation = engine.put_validation(data.validation)
        programs = engine.compile(batch, validation)
        trace = stack.enter_context(_tracing(run_dir, step, profile))
        steps = _steps(
            engine, programs, state, step, batch, batches, validation, stop, trace
        )
        for records, reached, saving in steps:
            history.write(records)
            if saving:
                last = records[-1]
                checkpoints.save(
                    last["step"], reached, batches, last.get("validation_loss")
                )
            yield records


def _steps(
    engine: Engine,
    programs: Programs,
    state: TrainState,
    step: int,
    batch: Batch,
    batches: Iterator[Batch],
    validation: Batch,
    stop: Callable[[int], bool],
    trace: Callable[[int, Any], None],
) -> Iterator[tuple[list[log.Record], TrainState, bool]]:
    """Takes the steps that are left.

    Args:
        engine: the run's.
        programs: what it computes.
        state: the state after ``step`` steps.
        step: how many have been taken.
        batch: the next batch.
        batches: those after it.
        validation: what to evaluate on.
        stop: called after each step; returns whether to end.
        trace: called after each step, with what the step measured.

    Yields:
        The records since the last time, the state, and whether to save it. The state
        is used up by the next step.
    """
    config, task = engine.config, engine.config.task
    schedule = make_schedule(config.optimizer, config.learning_rate, config.steps)
    shared = shared_steps(config.optimizer, config.steps)
    speed = _Speed(engine)
    speed.start(step)
    pending: list[tuple[int, Any]] = []
    while step < config.steps:
        if pending:  # One step ahead at most, so that a signal waits for no more.
            jax.block_until_ready(pending[-1])
        state, measured = programs.train_step(state, batch)
        step += 1
        pending.append((step, measured))
        trace(step, measured)
        stopping = stop(step)
        last = step == config.steps
        saving = (
            stopping or last or step == shared or step % config.checkpoint_every == 0
        )
        evaluating = last or step % config.eval_every == 0
        if not (saving or evaluating or step % config.log_every == 0):
            batch = engine.put_batch(next(batches))
            continue

        records = [_record(n, m, task, schedule) for n, m in jax.device_get(pending)]
        pending.clear()
        records[-1].update(speed.measure(step))
        finite = all(np.isfinite(record["loss"]) for record in records)
        if finite and evaluating:
            evaluated = jax.device_get(programs.evaluate(state.params, validation))
            validation_loss = float(evaluated.loss)
            finite = bool(np.isfinite(validation_loss))
            first = jax.tree.map(lambda x: x[0], validation)
            records[-1].update(
                validation_loss=validation_loss,
                **{
                    f"validation_{name}": metric(validation_loss)
                    for name, metric in task.metrics.items()
                },
                **_aligned(programs.aligned_fraction(state, first)),
            )
            if finite and (scores := task.scores(evaluated.outputs)):
                records[-1]["scores"] = scores
        if not finite:
            yield _until_not_finite(records), state, False
            return
        yield records, state, saving
        if stopping or last:
            return
        # After the save, which keeps the position in the data.
        batch = engine.put_batch(next(batches))
        speed.start(step)


def is_over(records: list[log.Record], steps: int) -> bool:
    """Returns whether a run has taken all its steps, or has diverged."""
    return bool(records) and (
        records[-1]["step"] == steps or bool(records[-1].get("diverged"))
    )


def load_run_data(config: TrainConfig[Any], source: Path | None = None) -> Data:
    """Loads what this process trains on.

    Args:
        config: the run.
        source: what the data depend on: what the run starts from, or itself.

    Raises:
        InputError: for data that cannot be had or do not fit.
    """
    count = jax.process_count()
    require(
        config.task.data.batch_size % count == 0,
        f"batch_size ({config.task.data.batch_size}) does not divide among {count} "
        "processes: choose a multiple of their number",
    )
    return config.task.load(
        config.seed, jax.process_index(), count, source or config.from_run
    )


def _record(
    step: int, measured: Any, task: Task, schedule: optax.Schedule
) -> log.Record:
    loss = float(measured.loss)
    return {
        "step": step,
        "loss": loss,
        **{name: metric(loss) for name, metric in task.metrics.items()},
        "grad_norm": float(measured.grad_norm),
        "learning_rate": float(schedule(step - 1)),
    }


def _aligned(aligned: Aligned) -> log.Record:
    whole, parts = jax.device_get(aligned)
    return {
        "aligned_fraction": float(whole),
        "aligned_fractions": {name: x.tolist() for name, x in parts.items()},
    }


def _until_not_finite(records: list[log.Record]) -> list[log.Record]:
    """Truncates records after the first loss that is not finite, if there is one."""
    for i, record in enumerate(records):
        if not np.isfinite(record["loss"]):
            records = records[: i + 1]
            break
    records[-1]["diverged"] = True
    return records


@contextmanager
def _tracing(
    run_dir: Path, step: int, count: int
) -> Iterator[Callable[[int, Any], None]]:
    """Writes a trace of some steps for TensorBoard and Perfetto.

    Begins after the first step, which is slower than others.

    Args:
        run_dir: the traces go into its ``tensorboard``.
        step: how many steps have been taken before.
        count: how many to trace.

    Yields:
        A function to call after each step, with what the step measured.
    """
    tracing = False

    def trace(at: int, measured: Any) -> None:
        nonlocal tracing
        if at not in (step + 1, step + 1 + count) or not count:
            return
        # A step is dispatched before it runs.
        jax.block_until_ready(measured)
        if tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(str(run_dir / "tensorboard"))
        tracing = not tracing

    try:
        yield trace
    finally:
        if tracing:
            jax.profiler.stop_trace()


class _Speed:
    """Measures the steps between two writings of the log."""

    def __init__(self, engine: Engine):
        self._task = engine.config.task
        self._flops = self._task.flops()
        self._devices = engine.mesh.size

    def start(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def measure(self, step: int) -> log.Record:
        seconds = (time.perf_counter() - self._time) / (step - self._step)
        speed = {
            "seconds_per_step": seconds,
            f"{self._task.unit}_per_second": self._task.units / seconds,
        }
        mfu = log.utilization(self._flops / seconds, self._devices)
        return speed if mfu is None else {**speed, "mfu": mfu}
