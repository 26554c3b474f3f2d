"""The directory of a run: locked, checked, and resumed or started.

It holds the configuration, what the data keep beside a run, a hash of the data, the log
and the checkpoints. Of a run that has not taken a step, nothing is left there.
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
"""How long a network's file system may take to show a file to all processes."""


class Opened(NamedTuple):
    """The state of a run's directory when a run starts."""

    records: list[log.Record]
    """The log so far."""
    limit: int | None = None
    """If the run's length changes, the last step that both lengths share."""


@contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Locks a run's directory while it is in use.

    The operating system releases the lock when the program ends, even if killed.

    Raises:
        InputError: where another program trains there.
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
                "choose another --run-dir"
            ) from error
        except OSError as error:
            require(
                error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS),
                f"run_dir: cannot write in {run_dir} ({error.strerror}); choose "
                "another --run-dir",
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
        with suppress(OSError):  # Of a directory with something in it.
            run_dir.rmdir()


def _warn_unlocked(run_dir: Path, error: Exception) -> None:
    print(
        f"Cannot lock {run_dir} ({reason(error)}). Make sure that no other program is "
        "training there."
    )


def has_begun(run_dir: Path) -> bool:
    """Returns whether a run has taken a step."""
    return bool(log.read(run_dir)) or bool(saved_steps(run_dir / CHECKPOINTS_NAME))


def open_run(config: TrainConfig[Any], run_dir: Path) -> Opened:
    """Reads the log of the run that is in a directory, if one is.

    Raises:
        InputError: for a directory with other files, or a run that cannot go on with
            these settings.
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
            f"run_dir: {run_dir} is not empty and holds no run; choose another",
        )
        return Opened([])
    # Read even if no step was taken: this file may not be a run's.
    text = read_text("run_dir", path)
    try:
        before = from_json(text, str(path), type(config.task))
    except InputError as error:
        raise InputError(f"run_dir: {error}; choose another --run-dir") from error
    if not has_begun(run_dir):
        return Opened([])
    there, here = identity(before), identity(config)
    different = sorted(name for name in here if here[name] != there.get(name))
    records = log.read(run_dir)
    if different == ["steps"]:
        return Opened(records, _shared_steps(config, before, records, run_dir))
    require(
        not different,
        f"run_dir: {run_dir} holds a run with other settings ({', '.join(different)}); "
        "choose another --run-dir",
    )
    return Opened(records)


def _shared_steps(
    config: TrainConfig[Any],
    before: TrainConfig[Any],
    records: list[log.Record],
    run_dir: Path,
) -> int:
    """Returns the last step that the old and the new length of a run have in common.

    Raises:
        InputError: where they share too little.
    """
    shared = shared_steps(config.optimizer, config.steps)
    there = shared_steps(before.optimizer, before.steps)
    if shared is None or there is None:
        raise InputError(
            f"steps: the run in {run_dir} was scheduled for {before.steps} steps, and "
            f"its learning rate ({before.optimizer.schedule}) ends there. To train on, "
            f"start a new run from its weights: --from {run_dir} --run-dir ANOTHER "
            f"--steps {config.steps}; or choose --schedule constant or "
            "warmup-stable-decay for runs that can be made longer"
        )
    require(
        config.steps > len(records),
        f"steps: the run in {run_dir} has taken {len(records)} steps already; give "
        "more",
    )
    limit = min(shared, there)
    steps = [s for s in saved_steps(run_dir / CHECKPOINTS_NAME) if s <= limit]
    require(
        bool(steps),
        f"steps: a run of {config.steps} steps shares the first {limit} with the one "
        f"in {run_dir}, and there is no checkpoint of those; choose another --run-dir",
    )
    warmup = int(config.optimizer.warmup_fraction * config.steps)
    require(
        steps[-1] >= warmup,
        f"steps: with {config.steps} steps the warm-up would take {warmup}, and the "
        f"newest checkpoint that can be shared is that of step {steps[-1]}; give fewer "
        "--steps",
    )
    return limit


def _set_aside_after(limit: int, run_dir: Path) -> None:
    """Moves checkpoints made during the decay of the learning rate out of the way."""
    directory = run_dir / CHECKPOINTS_NAME
    for step in saved_steps(directory):
        if step > limit:
            target = run_dir / "decayed_checkpoints" / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(directory / str(step), target)
            tqdm.write(f"The checkpoint of step {step} is moved to {target}.")


def require_shared(run_dir: Path) -> None:
    """Checks that this process sees what process 0 has written.

    A network's file system may show it a while later.
    """
    end = time.monotonic() + VISIBLE_SECONDS
    while not (run_dir / CONFIG_NAME).exists():
        require(
            time.monotonic() < end,
            f"run_dir: process {jax.process_index()} does not see in {run_dir} what "
            "process 0 has written there; choose a directory that all processes share",
        )
        time.sleep(1)


def require_same_files(from_run: Path, data: Data) -> None:
    """Checks that a run which begins with another's weights keeps the same files.

    With another tokenizer, the rows of an embedding would mean other tokens.
    """
    if not (from_run / CHECKPOINTS_NAME).is_dir():
        return  # No run: ``Task.check_source`` has checked it.
    for name, text in data.files.items():
        path = from_run / name
        require(
            not path.exists() or read_text("from", path) == text,
            f"from: the run in {from_run} used another {name} than this one would; "
            f"give --{path.stem} {path}",
        )


def require_space(run_dir: Path, checkpoint: int, count: int) -> None:
    """Checks that the disk has room for a number of checkpoints, in bytes each."""
    needed = count * checkpoint
    there = run_dir / CHECKPOINTS_NAME
    used = sum(f.stat().st_size for f in there.rglob("*") if f.is_file())
    free = shutil.disk_usage(run_dir).free
    require(
        needed <= free + used,
        f"run_dir: {count} checkpoints of {human_size(checkpoint)} do not fit on "
        f"the disk of {run_dir}, where {human_size(free)} are free; make room, or "
        "choose another --run-dir or a smaller --keep",
    )


def write_run(
    config: TrainConfig[Any], data: Data, run_dir: Path, opened: Opened
) -> None:
    """Writes the settings and what data the run is on.

    Checkpoints that a run of this length does not share are moved out of the way.

    Raises:
        InputError: where the steps so far were on other data.
    """
    texts = {DATA_NAME: data.fingerprint + "\n", **data.files}
    for name, text in texts.items():
        path = run_dir / name
        require(
            not opened.records or not path.exists() or path.read_text("utf-8") == text,
            f"run_dir: the data have changed since the run in {run_dir} began: it has "
            f"another {name}; choose another --run-dir",
        )
    if jax.process_index() == 0:
        # Before the new length is written, so that a run killed here is asked again.
        if opened.limit is not None:
            _set_aside_after(opened.limit, run_dir)
        for name, text in {CONFIG_NAME: to_json(config), **texts}.items():
            _write_whole(run_dir / name, text)


def is_saved(records: list[log.Record], run_dir: Path) -> bool:
    """Returns whether the last step of a run that is over is saved.

    Not if the run was killed during its last save. A run that diverged, or whose
    checkpoints were all deleted, counts as saved.
    """
    last, there = records[-1], saved_steps(run_dir / CHECKPOINTS_NAME)
    return bool(last.get("diverged")) or not there or last["step"] in there


def _remove(paths: Iterable[Path]) -> None:
    """Removes files and directories, config.json last."""
    for path in sorted(paths, key=lambda path: path.name == CONFIG_NAME):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
