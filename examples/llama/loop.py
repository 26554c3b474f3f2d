"""The loop around the training step, in the directory of a run.

The directory holds the configuration, the tokenizer, the log and the checkpoints. A run
that was interrupted goes on from its last checkpoint, and its log does too.
"""

import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama import log
from examples.llama.checkpoint import Checkpoints, saved_steps, size
from examples.llama.checks import InputError, make_directory, require
from examples.llama.config import TrainConfig, from_json, to_json
from examples.llama.data import Data, load_data
from examples.llama.optimizer import make_optimizer, make_schedule
from examples.llama.sharding import BATCH, make_mesh, shardings
from examples.llama.step import (
    TrainState,
    init_state,
    make_aligned_fraction,
    make_evaluate,
    make_graphdef,
    make_train_step,
)

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
CORPUS_NAME = "corpus.sha256"
CHECKPOINTS_NAME = "checkpoints"

_VISIBLE_SECONDS = 60


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
        records = _open_run(config, run_dir)
    with together():
        _require_shared(run_dir)
    if is_over(records, config.steps) and _is_saved(records, run_dir):
        yield records
        return
    like = state_like(config, tx, mesh)
    with together():
        _require_space(run_dir, size(like), config.keep)
        if data is None:
            data = load_run_data(config)
    _require_same_data(data)
    with together():
        _keep_data(data, run_dir, records)

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
    programs: "Programs",
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


class Programs(NamedTuple):
    """What runs on the devices, lowered or compiled."""

    train_step: Any
    evaluate: Any
    aligned_fraction: Any


def state_like(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Makes the shapes, dtypes and shardings of a run's state."""
    like = jax.eval_shape(lambda: init_state(config.model, tx, config.seed))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        like,
        shardings(like, mesh),
    )


def make_state(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Makes the state that a run begins with, each part of it on its device."""

    def init() -> TrainState:
        return init_state(config.model, tx, config.seed)

    layout = shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=layout)()


def lower_train_step(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh, batch: Any
) -> jax.stages.Lowered:
    """Lowers the training step for a mesh, whose devices need not be here.

    Args:
        config: the run.
        tx: its optimizer.
        mesh: its mesh.
        batch: tokens, or their shape, dtype and sharding.
    """
    like = state_like(config, tx, mesh)
    graphdef = make_graphdef(config.model)
    layout = jax.tree.map(lambda leaf: leaf.sharding, like)
    with jax.set_mesh(mesh):
        return jax.jit(
            make_train_step(graphdef, tx, config.accumulate),
            donate_argnums=0,
            out_shardings=(layout, NamedSharding(mesh, P())),
        ).lower(like, batch)


def lower_programs(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch: Any,
    validation: Any,
) -> Programs:
    """Lowers all that a run computes.

    Args:
        config: the run.
        tx: its optimizer.
        mesh: its mesh.
        batch: tokens, or their shape, dtype and sharding.
        validation: likewise, all batches to evaluate on.
    """
    like = state_like(config, tx, mesh)
    graphdef = make_graphdef(config.model)
    evaluate = make_evaluate(graphdef, config.accumulate)
    aligned_fraction = make_aligned_fraction(
        graphdef, _undecayed(config), config.accumulate
    )
    with jax.set_mesh(mesh):
        return Programs(
            train_step=lower_train_step(config, tx, mesh, batch),
            evaluate=jax.jit(evaluate).lower(like.params, validation),
            aligned_fraction=jax.jit(aligned_fraction).lower(like, batch),
        )


def compile_programs(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch: jax.Array,
    validation: jax.Array,
) -> Programs:
    """Compiles all, ahead of the loop and off its clock."""
    lowered = lower_programs(config, tx, mesh, batch, validation)
    return Programs(*[program.compile() for program in lowered])


def is_over(records: list[log.Record], steps: int) -> bool:
    """Says whether a run has taken all its steps, or has diverged."""
    return bool(records) and (
        records[-1]["step"] == steps or bool(records[-1].get("diverged"))
    )


def _is_saved(records: list[log.Record], run_dir: Path) -> bool:
    """Says whether a run that is over needs no step to be made again.

    So it does where it was killed in its last save. Not so where it diverged, and
    where somebody has deleted all of its checkpoints.
    """
    last, there = records[-1], saved_steps(run_dir / CHECKPOINTS_NAME)
    return bool(last.get("diverged")) or not there or last["step"] in there


def load_run_data(config: TrainConfig) -> Data:
    """Loads what this process trains on."""
    return load_data(
        config.data,
        config.model.vocab_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )


@contextmanager
def together() -> Iterator[None]:
    """Ends all processes where an ``InputError`` ends one.

    One that ended alone would leave the others waiting for it.
    """
    error = None
    try:
        yield
    except InputError as raised:
        error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is None and failed.any():
            error = InputError(
                f"process {int(np.argmax(failed))} cannot start; its message says why"
            )
    if error is not None:
        raise error


def _require_same_data(data: Data) -> None:
    """Checks that all processes have the same text and the same tokenizer."""
    if jax.process_count() == 1:
        return
    text = data.fingerprint + data.tokenizer.to_str()
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    different = (digests != digests[0]).any(axis=1)
    require(
        not different.any(),
        f"data: process {int(np.argmax(different))} has other text, or another "
        "tokenizer, than process 0; give the same to all",
    )


def _keep_data(data: Data, run_dir: Path, records: list[log.Record]) -> None:
    """Writes what data the run is on, or checks that it is that of the steps before."""
    corpus, tokenizer = run_dir / CORPUS_NAME, run_dir / TOKENIZER_NAME
    texts = {
        corpus: data.fingerprint + "\n",
        tokenizer: data.tokenizer.to_str(pretty=True),
    }
    for path, what in (
        (corpus, "was trained on other text"),
        (tokenizer, "has another tokenizer"),
    ):
        require(
            not records or not path.exists() or path.read_text("utf-8") == texts[path],
            f"run_dir: the run in {run_dir} {what}: the data have changed since; "
            "choose another --run-dir",
        )
    if jax.process_index() == 0:
        for path, text in texts.items():
            _write_whole(path, text)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def _open_run(config: TrainConfig, run_dir: Path) -> list[log.Record]:
    """Makes a run's directory, or reads the log of the run that is there."""
    make_directory("run_dir", run_dir)
    path = run_dir / CONFIG_NAME
    if path.exists():
        there = identity(from_json(path.read_text("utf-8"), str(path)))
        here = identity(config)
        different = sorted(name for name in here if here[name] != there.get(name))
        require(
            not different,
            f"run_dir: {run_dir} holds a run with other settings "
            f"({', '.join(different)}); choose another --run-dir",
        )
    elif jax.process_index() == 0:
        require(
            all(file.suffix == ".partial" for file in run_dir.iterdir()),
            f"run_dir: {run_dir} is not empty and holds no run; choose another",
        )
        _write_whole(path, to_json(config))
    return log.read(run_dir)


def _require_shared(run_dir: Path) -> None:
    """Checks that this process sees what process 0 has written.

    A network's file system may show it a while later.
    """
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (run_dir / CONFIG_NAME).exists():
        require(
            time.monotonic() < end,
            f"run_dir: process {jax.process_index()} does not see in {run_dir} what "
            "process 0 has written there; choose a directory that all processes share",
        )
        time.sleep(1)


def identity(config: TrainConfig) -> dict[str, Any]:
    """Lists the settings that have to be equal for a run to go on."""
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        values.update(vars(value) if hasattr(value, "__dict__") else {name: value})
    for free in ("mesh", "keep", "checkpoint_every", "cache_dir", "unroll"):
        del values[free]
    return values


def _undecayed(config: TrainConfig) -> optax.GradientTransformation:
    """Makes the optimizer, with the same state, for the signs of its update.

    Decay does not come from the gradient, and a learning rate of zero leaves no sign.
    """
    return make_optimizer(
        replace(
            config.optimizer, weight_decay=0.0, warmup_fraction=0.0, final_fraction=1.0
        ),
        config.steps,
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


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Gives the function that says, after a step, whether SIGTERM has come.

    With several processes it says so to all of them after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_space(run_dir: Path, checkpoint: int, keep: int) -> None:
    """Checks that the disk holds the checkpoints that are to be there at a time."""
    # The newest, the best, and the one that is being written.
    needed = (keep + 2) * checkpoint
    there = run_dir / CHECKPOINTS_NAME
    used = sum(f.stat().st_size for f in there.rglob("*") if f.is_file())
    free = shutil.disk_usage(run_dir).free
    require(
        needed <= free + used,
        f"run_dir: {keep + 2} checkpoints of {checkpoint / 1e9:.1f} GB do not fit on "
        f"the disk of {run_dir}, where {free / 1e9:.1f} GB are free; make room, or "
        "choose another --run-dir or a smaller --keep",
    )
