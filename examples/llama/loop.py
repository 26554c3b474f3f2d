"""The loop around the training step.

A run that was interrupted goes on from its last checkpoint, and its log does too.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama import log
from examples.llama.checkpoint import Checkpoints, size
from examples.llama.config import TrainConfig
from examples.llama.data import Data, load_data
from examples.llama.optimizer import make_optimizer, make_schedule
from examples.llama.processes import require_same_data, together
from examples.llama.programs import Programs, compile_programs, make_state, state_like
from examples.llama.run_dir import (
    CHECKPOINTS_NAME,
    is_saved,
    keep_data,
    open_run,
    require_shared,
    require_space,
)
from examples.llama.sharding import BATCH, make_mesh
from examples.llama.step import TrainState


def training(
    config: TrainConfig,
    run_dir: Path,
    data: Data | None = None,
    stop: Callable[[int], bool] = lambda step: False,
) -> Generator[list[log.Record]]:
    """Trains a model in a directory, from where an earlier run in it has come.

    Args:
        config: the run.
        run_dir: where the configuration, the tokenizer, the log and the checkpoints
            are, or will be.
        data: what to train on, as ``load_run_data`` makes it of the configuration.
        stop: asked after each step, which it is given, whether to save and end.

    Yields:
        The records of the steps before, where some were made in an earlier run, and
        then those of each writing of the log. A run whose loss is no longer finite
        ends.

    Raises:
        InputError: for settings with which it cannot run, before anything is computed.
    """
    mesh = make_mesh(config)
    tx = make_optimizer(config.optimizer, config.steps)
    with together():
        records = open_run(config, run_dir)
    with together():
        require_shared(run_dir)
    if is_over(records, config.steps) and is_saved(records, run_dir):
        yield records
        return
    like = state_like(config, tx, mesh)
    with together():
        require_space(run_dir, size(like), config.keep)
        if data is None:
            data = load_run_data(config)
    require_same_data(data)
    with together():
        keep_data(data, run_dir, records)

    batches = iter(data.train)
    losses = {
        record["step"]: record["validation_loss"]
        for record in records
        if np.isfinite(record.get("validation_loss", np.nan))
    }
    directory = run_dir / CHECKPOINTS_NAME
    with closing(Checkpoints(directory, config.keep, losses)) as checkpoints:
        restored = checkpoints.restore(like, batches)
        if restored is None:
            step, state = 0, make_state(config, tx, mesh)
        else:
            step, state = restored
        with together():
            history = log.Log(run_dir, step)
        with closing(history):
            if step:
                yield log.read(run_dir)
            batch = _to_devices(next(batches), mesh, P(BATCH))
            validation = _to_devices(data.validation, mesh, P(None, BATCH))
            programs = compile_programs(config, tx, mesh, batch, validation)
            for records, reached, saving in _steps(
                config, programs, state, step, batch, batches, validation, mesh, stop
            ):
                history.write(records)
                if saving:
                    last = records[-1]
                    checkpoints.save(
                        last["step"], reached, batches, last.get("validation_loss")
                    )
                yield records


def _steps(
    config: TrainConfig,
    programs: Programs,
    state: TrainState,
    step: int,
    batch: jax.Array,
    batches: Iterator[np.ndarray],
    validation: jax.Array,
    mesh: Mesh,
    stop: Callable[[int], bool],
) -> Iterator[tuple[list[log.Record], TrainState, bool]]:
    """Takes the steps that are left.

    Args:
        config: the run.
        programs: what it computes.
        state: the state after ``step`` steps.
        step: how many have been taken.
        batch: the next batch.
        batches: those after it.
        validation: what to evaluate on.
        mesh: where the batches go.
        stop: says after a step whether to end.

    Yields:
        The records since the last time, the state, and whether to save it. The state
        is used up by the next step.
    """
    schedule = make_schedule(config.optimizer, config.steps)
    speed = _Speed(config, mesh.size)
    speed.start(step)
    pending: list[tuple[int, Any]] = []
    while step < config.steps:
        if pending:  # One step ahead at most, so that a signal waits for no more.
            jax.block_until_ready(pending[-1])
        state, measured = programs.train_step(state, batch)
        step += 1
        pending.append((step, measured))
        stopping = stop(step)
        last = step == config.steps
        saving = stopping or last or step % config.checkpoint_every == 0
        evaluating = last or step % config.eval_every == 0
        if not (saving or evaluating or step % config.log_every == 0):
            batch = _to_devices(next(batches), mesh, P(BATCH))
            continue

        records = [_record(n, m, schedule) for n, m in jax.device_get(pending)]
        pending.clear()
        records[-1].update(speed.measure(step))
        finite = all(np.isfinite(record["loss"]) for record in records)
        if finite and evaluating:
            validation_loss = float(programs.evaluate(state.params, validation))
            finite = bool(np.isfinite(validation_loss))
            aligned = programs.aligned_fraction(state, validation[0])
            records[-1].update(
                validation_loss=validation_loss,
                validation_perplexity=log.perplexity(validation_loss),
                aligned_fraction=float(aligned),
            )
        if not finite:
            yield _until_not_finite(records), state, False
            return
        yield records, state, saving
        if stopping or last:
            return
        # After the save, which keeps the position in the data.
        batch = _to_devices(next(batches), mesh, P(BATCH))
        speed.start(step)


def is_over(records: list[log.Record], steps: int) -> bool:
    """Says whether a run has taken all its steps, or has diverged."""
    return bool(records) and (
        records[-1]["step"] == steps or bool(records[-1].get("diverged"))
    )


def load_run_data(config: TrainConfig) -> Data:
    """Loads what this process trains on."""
    return load_data(
        config.data,
        config.model.vocab_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )


def _to_devices(rows: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Makes one array, split over the mesh, of the rows that each process has."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows)


def _record(step: int, measured: Any, schedule: optax.Schedule) -> log.Record:
    loss = float(measured.loss)
    return {
        "step": step,
        "loss": loss,
        "perplexity": log.perplexity(loss),
        "grad_norm": float(measured.grad_norm),
        "learning_rate": float(schedule(step - 1)),
    }


def _until_not_finite(records: list[log.Record]) -> list[log.Record]:
    """Ends records at the first loss that is not finite, or else at the last."""
    for i, record in enumerate(records):
        if not np.isfinite(record["loss"]):
            records = records[: i + 1]
            break
    records[-1]["diverged"] = True
    return records


class _Speed:
    """Measures the steps between two writings of the log."""

    def __init__(self, config: TrainConfig, devices: int):
        length = config.data.sequence_length
        self._tokens = config.data.batch_size * length
        self._flops = log.flops_per_token(config.model, length)
        self._devices = devices

    def start(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def measure(self, step: int) -> log.Record:
        seconds = (time.perf_counter() - self._time) / (step - self._step)
        tokens = self._tokens / seconds
        speed = {"seconds_per_step": seconds, "tokens_per_second": tokens}
        mfu = log.utilization(self._flops * tokens, self._devices)
        return speed if mfu is None else {**speed, "mfu": mfu}
