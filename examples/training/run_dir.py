"""The directory of a run: locking it, checking it, and starting or resuming the run.

It contains the configuration, the files of the data, a hash of the data, the log and
the checkpoints. A run that has not taken a step leaves nothing behind.
"""

import errno
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
from tqdm import tqdm

from examples.training import log
from examples.training.checkpoint import CHECKPOINTS_NAME, saved_steps
from examples.training.checks import (
    InputError,
    human_size,
    make_directory,
    read_text,
    reason,
    require,
)
from examples.training.config import TrainConfig, from_json, identity, to_json
from examples.training.optimizers import shared_steps
from examples.training.task import Data

CONFIG_NAME = "config.json"
DATA_NAME = "data.sha256"
LOCK_NAME = "run.lock"

VISIBLE_SECONDS = 60
"""How long a network file system may take to show a file to all processes."""


class Opened(NamedTuple):
    """The state of a run's directory when a run starts."""

    records: list[log.Record]
    """The log so far."""
    limit: int | None = None
    """The last step that the old and the new length share, if the length changes."""


@contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Lock a run's directory while it is in use.

    The operating system releases the lock when the program ends, even if it is killed.

    Raises:
        InputError: if another program is training there.
    """
    make_directory("run_dir", run_dir)
    lock = filelock.FileLock(run_dir / LOCK_NAME, thread_local=False)
    locks = jax.process_index() == 0
    if locks:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(
                f"run_dir: another program is training in {run_dir}; wait for it, or "
                "choose another --run-dir."
            ) from error
        except OSError as error:
            require(
                error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS),
                f"run_dir: cannot write to {run_dir} ({error.strerror}); choose "
                "another --run-dir.",
            )
            _warn_unlocked(run_dir, error)
        except NotImplementedError as error:
            _warn_unlocked(run_dir, error)
    before = set(run_dir.iterdir())
    try:
        yield
    finally:
        if locks:
            if not has_begun(run_dir):
                _remove(set(run_dir.iterdir()) - before)
            (run_dir / LOCK_NAME).unlink(missing_ok=True)
            lock.release()
        with suppress(OSError):  # If the directory is not empty.
            run_dir.rmdir()


def _warn_unlocked(run_dir: Path, error: Exception) -> None:
    print(
        f"Cannot lock {run_dir} ({reason(error)}). Make sure that no other program is "
        "training there."
    )


def has_begun(run_dir: Path) -> bool:
    """Return whether a run has taken a step."""
    return bool(log.read(run_dir)) or bool(saved_steps(run_dir / CHECKPOINTS_NAME))


def open_run(config: TrainConfig[Any], run_dir: Path) -> Opened:
    """Read the log of the run in a directory, if there is one.

    Raises:
        InputError: if the directory contains other files, or a run that cannot resume
            with these settings.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        strange = [
            file.name
            for file in run_dir.iterdir()
            if file.suffix != ".partial" and file.name != LOCK_NAME
        ]
        require(
            jax.process_index() != 0 or not strange,
            f"run_dir: {run_dir} is not empty and contains no run; choose another.",
        )
        return Opened([])
    # Parsed even if no step was taken: the file may not belong to a run.
    text = read_text("run_dir", path)
    try:
        before = from_json(text, str(path), type(config.task))
    except InputError as error:
        raise InputError(f"run_dir: {error} Choose another --run-dir.") from error
    if not has_begun(run_dir):
        return Opened([])
    there, here = identity(before), identity(config)
    different = sorted(name for name in here if here[name] != there.get(name))
    records = log.read(run_dir)
    if different == ["steps"]:
        return Opened(records, _shared_steps(config, before, records, run_dir))
    require(
        not different,
        f"run_dir: {run_dir} contains a run with different settings "
        f"({', '.join(different)}); choose another --run-dir.",
    )
    return Opened(records)


def _shared_steps(
    config: TrainConfig[Any],
    before: TrainConfig[Any],
    records: list[log.Record],
    run_dir: Path,
) -> int:
    """Return the last step that the old and the new length of a run have in common.

    Raises:
        InputError: if the run cannot change its length.
    """
    shared = shared_steps(config.optimizer, config.steps)
    there = shared_steps(before.optimizer, before.steps)
    if shared is None or there is None:
        raise InputError(
            f"steps: the learning-rate schedule ({before.optimizer.schedule}) of the "
            f"run in {run_dir} ends at {before.steps} steps. To train longer, start a "
            f"new run from its weights: --from {run_dir} --run-dir ANOTHER --steps "
            f"{config.steps}. Runs with --schedule constant or warmup-stable-decay can "
            "be extended."
        )
    require(
        config.steps > len(records),
        f"steps: the run in {run_dir} has already taken {len(records)} steps; pass "
        "more.",
    )
    limit = min(shared, there)
    steps = [s for s in saved_steps(run_dir / CHECKPOINTS_NAME) if s <= limit]
    require(
        bool(steps),
        f"steps: a run of {config.steps} steps shares only the first {limit} with the "
        f"run in {run_dir}, which has no checkpoint of those; choose another "
        "--run-dir.",
    )
    warmup = int(config.optimizer.warmup_fraction * config.steps)
    require(
        steps[-1] >= warmup,
        f"steps: with {config.steps} steps the warm-up would take {warmup}, but the "
        f"newest checkpoint that can be shared is that of step {steps[-1]}; pass fewer "
        "--steps.",
    )
    return limit


def _set_aside_after(limit: int, run_dir: Path) -> None:
    """Move checkpoints from the decay of the learning rate out of the way."""
    directory = run_dir / CHECKPOINTS_NAME
    for step in saved_steps(directory):
        if step > limit:
            target = run_dir / "decayed_checkpoints" / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(directory / str(step), target)
            tqdm.write(f"Moved the checkpoint of step {step} to {target}.")


def require_shared(run_dir: Path) -> None:
    """Check that this process sees the files written by process 0.

    A network file system may show them with a delay.
    """
    end = time.monotonic() + VISIBLE_SECONDS
    while not (run_dir / CONFIG_NAME).exists():
        require(
            time.monotonic() < end,
            f"run_dir: process {jax.process_index()} does not see the files that "
            f"process 0 wrote to {run_dir}; choose a directory that all processes "
            "share.",
        )
        time.sleep(1)


def require_same_files(from_run: Path, data: Data) -> None:
    """Check that a run started from another's weights shares the files that it must.

    With another tokenizer, the rows of the embedding would stand for other tokens.
    """
    if not (from_run / CHECKPOINTS_NAME).is_dir():
        return  # Not a run: ``Task.check_source`` has checked it.
    for name in sorted(data.shared):
        path = from_run / name
        require(
            not path.exists() or read_text("from", path) == data.files[name],
            f"from: the run in {from_run} used a different {name}; pass "
            f"--{path.stem} {path}.",
        )


def require_space(run_dir: Path, checkpoint: int, count: int) -> None:
    """Check that the disk has room for ``count`` checkpoints of the given size."""
    needed = count * checkpoint
    there = run_dir / CHECKPOINTS_NAME
    used = sum(f.stat().st_size for f in there.rglob("*") if f.is_file())
    free = shutil.disk_usage(run_dir).free
    require(
        needed <= free + used,
        f"run_dir: {count} checkpoints of {human_size(checkpoint)} do not fit on the "
        f"disk of {run_dir}, which has {human_size(free)} free; free some space, or "
        "choose another --run-dir or a smaller --keep.",
    )


def write_run(
    config: TrainConfig[Any], data: Data, run_dir: Path, opened: Opened
) -> None:
    """Write the configuration, the hash of the data and the files of the data.

    Checkpoints that a run of this length does not share are moved out of the way.

    Raises:
        InputError: if the earlier steps used different data.
    """
    texts = {DATA_NAME: data.fingerprint + "\n", **data.files}
    for name, text in texts.items():
        path = run_dir / name
        require(
            not opened.records or not path.exists() or path.read_text("utf-8") == text,
            f"run_dir: the data have changed since the run in {run_dir} started, which "
            f"has a different {name}; choose another --run-dir.",
        )
    if jax.process_index() == 0:
        # Before the new length is written, so that a run killed here repeats this.
        if opened.limit is not None:
            _set_aside_after(opened.limit, run_dir)
        for name, text in {CONFIG_NAME: to_json(config), **texts}.items():
            _write_whole(run_dir / name, text)


def is_saved(records: list[log.Record], run_dir: Path) -> bool:
    """Return whether the last step of a finished run is saved.

    It is not if the run was killed during its last save. A run that diverged, or whose
    checkpoints were all deleted, counts as saved.
    """
    last, there = records[-1], saved_steps(run_dir / CHECKPOINTS_NAME)
    return bool(last.get("diverged")) or not there or last["step"] in there


def _remove(paths: Iterable[Path]) -> None:
    """Remove files and directories, config.json last."""
    for path in sorted(paths, key=lambda path: path.name == CONFIG_NAME):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
