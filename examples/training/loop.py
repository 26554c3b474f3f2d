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
    """Train a model in a directory, resuming an earlier run there.

    Args:
        config: the configuration of the run.
        run_dir: the directory of the configuration, the log and the checkpoints.
        data: the data, as returned by ``load_run_data``; loaded if not given.
        stop: called with the step after each step; returns whether to save and stop.
        profile: number of steps to trace, after the first; 0 for none.

    Yields:
        The records of earlier steps, if the run resumes, and then those of each log
        write. The run ends once its loss is not finite.

    Raises:
        InputError: if the run cannot start, before anything is computed.
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
            # The newest ones, the best, the one being written, and the one that is
            # always kept, unless it is the last.
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
    """Run the remaining steps.

    Args:
        engine: the engine of the run.
        programs: its compiled programs.
        state: the state after ``step`` steps.
        step: number of steps taken.
        batch: the next batch.
        batches: the batches after it.
        validation: the validation batches.
        stop: called with the step after each step; returns whether to stop.
        trace: called after each step, with the step and its measurements.

    Yields:
        The new records, the state, and whether to save it. The state is donated to the
        next step.
    """
    config, task = engine.config, engine.config.task
    schedule = make_schedule(config.optimizer, config.learning_rate, config.steps)
    shared = shared_steps(config.optimizer, config.steps)
    speed = _Speed(engine)
    speed.start(step)
    pending: list[tuple[int, Any]] = []
    while step < config.steps:
        if pending:  # At most one step ahead, so that a signal takes effect soon.
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
        speed.start(step)
        # After the save, which stores the position in the data.
        batch = engine.put_batch(next(batches))


def is_over(records: list[log.Record], steps: int) -> bool:
    """Return whether a run has taken all its steps or has diverged."""
    return bool(records) and (
        records[-1]["step"] == steps or bool(records[-1].get("diverged"))
    )


def is_finished(run_dir: Path, steps: int) -> bool:
    """Return whether a run is over and its last step is saved."""
    records = log.read(run_dir)
    return is_over(records, steps) and is_saved(records, run_dir)


def load_run_data(config: TrainConfig[Any], source: Path | None = None) -> Data:
    """Load the data of this process.

    Args:
        config: the configuration of the run.
        source: where to find files that the data depend on: the source of the initial
            weights, which is the default, or the run itself when it resumes.

    Raises:
        InputError: if the data cannot be loaded or do not fit the settings.
    """
    count = jax.process_count()
    require(
        config.task.data.batch_size % count == 0,
        f"batch_size ({config.task.data.batch_size}) must be a multiple of the number "
        f"of processes ({count}).",
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
    """Drop records after the first non-finite loss, and mark the last as diverged."""
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
    """Trace some steps for TensorBoard and Perfetto.

    The trace starts after the first step, which is slower than the others.

    Args:
        run_dir: the directory of the run; traces are written to ``tensorboard`` in it.
        step: number of steps taken before.
        count: number of steps to trace.

    Yields:
        A function to call after each step, with the step and its measurements.
    """
    tracing = False

    def trace(at: int, measured: Any) -> None:
        nonlocal tracing
        if at not in (step + 1, step + 1 + count) or not count:
            return
        # Steps are dispatched asynchronously.
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
    """The speed between log writes."""

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
