"""Checkpoints: the newest and the best, and going on from one."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers
from tqdm import tqdm

from examples.training.checks import InputError, reason, require
from examples.training.processes import together
from examples.training.step import TrainState, by_name
from examples.training.task import Params

CHECKPOINTS_NAME = "checkpoints"
"""Of their directory in that of a run."""


class Restored(NamedTuple):
    """What a checkpoint holds beside the position in the data."""

    step: int
    state: TrainState


@dataclass(frozen=True)
class _NewestAndBest(checkpoint_managers.PreservationPolicy):  # type: ignore[misc]
    """Keeps the newest checkpoints, the best one, and optionally a given step."""

    newest: int
    losses: Mapping[int, float]
    always: int | None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self.newest :])
        known = [step for step in steps if step in self.losses]
        if known:
            kept.add(min(known, key=self.losses.__getitem__))
        return [step in kept or step == self.always for step in steps]


class Checkpoints:
    """The checkpoints of a run, written while the training goes on."""

    def __init__(
        self,
        directory: Path,
        keep: int,
        losses: Mapping[int, float] | None = None,
        always: int | None = None,
    ):
        """Opens a directory.

        Args:
            directory: where they are, or will be.
            keep: how many of the newest are kept, beside the best.
            losses: validation losses of the steps of those that are there.
            always: a step whose checkpoint is kept in any case.
        """
        self._damaged = directory.parent / "damaged_checkpoints"
        self._losses = dict(losses or {})
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(keep, self._losses, always),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        batches: grain.DatasetIterator[Any],
        validation_loss: float | None,
    ) -> None:
        """Begins to write a checkpoint; the state may be changed when this returns.

        An error of the one before is raised here.
        """
        if validation_loss is not None:
            self._losses[step] = validation_loss
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(batches),
                checksum=ocp.args.JsonSave({"state": int(checksum(state))}),
            ),
        )

    def restore(
        self, like: TrainState, batches: grain.DatasetIterator[Any]
    ) -> Restored | None:
        """Restores the newest checkpoint that is whole.

        Newer ones are damaged: they are reported and moved aside.

        Args:
            like: shapes, dtypes and shardings of the state.
            batches: the data; its position is set to the checkpoint's.

        Returns:
            The step and the state, or None where there is no checkpoint.

        Raises:
            InputError: if there are checkpoints and none is whole, if they are of
                another number of processes, or if the data cannot be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._require_same_processes(step)
            state, why = self._read(step, like, batches)
            if state is not None:
                for other, of_other in damaged.items():
                    self._set_aside(other, of_other)
                for later in [s for s in self._losses if s > step]:
                    del self._losses[later]  # It is taken again.
                return Restored(step, state)
            damaged[step] = why
        reasons = "; ".join(f"of step {step}: {why}" for step, why in damaged.items())
        require(
            not damaged,
            f"run_dir: none of the checkpoints in {self._manager.directory} is whole: "
            f"{reasons}; choose another --run-dir",
        )
        return None

    def _read(
        self, step: int, like: TrainState, batches: grain.DatasetIterator[Any]
    ) -> tuple[TrainState | None, str]:
        """Reads a checkpoint; if any process cannot, returns why."""
        state, why, saved = None, "another process cannot read it", 0
        of_data: InputError | None = None
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),
                    data=grain.checkpoint.CheckpointRestore(batches),
                    checksum=ocp.args.JsonRestore(),
                ),
            )
            state, saved = restored["state"], restored["checksum"]["state"]
        except InputError as error:
            of_data = error  # The data cannot be read again from there.
        except Exception as error:
            # Whatever is wrong with files, tensorstore and JSON raise all sorts.
            why = reason(error)
        with together():
            if of_data is not None:
                raise of_data
        # Together, as the checksum is computed by all.
        if not _in_all(state is not None):
            return None, why
        if int(checksum(state)) != saved:
            return None, "its checksum is not that of its contents"
        return state, ""

    def close(self) -> None:
        """Waits until the last checkpoint is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _require_same_processes(self, step: int) -> None:
        """Checks that a checkpoint has a position in the data for each process."""
        directory = Path(self._manager.directory) / str(step) / "data"
        there = {file.stem.rpartition("-")[2] for file in directory.glob("process_*")}
        require(
            not there or str(jax.process_count()) in there,
            "run_dir: the positions in the data are those of "
            f"{'/'.join(sorted(there))} processes, and there are "
            f"{jax.process_count()}; start as many, or choose another --run-dir",
        )

    def _set_aside(self, step: int, why: str) -> None:
        tqdm.write(
            f"The checkpoint of step {step} is damaged and is moved to "
            f"{self._damaged}: {why}"
        )
        if jax.process_index() == 0:
            self._damaged.mkdir(exist_ok=True)
            target = self._damaged / str(step)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(Path(self._manager.directory) / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._manager.reload()


def _in_all(holds: bool) -> bool:
    """Says whether something holds in all processes."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds)).all())


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """Adds up the bits of all arrays, as unsigned integers of 32 bits.

    Whole numbers add up to the same in any order, so on any mesh.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        total += jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def size(like: Any) -> int:
    """Counts the bytes of a checkpoint."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))


def saved_steps(directory: Path) -> list[int]:
    """Lists the steps of the checkpoints in a directory, which need not be there."""
    if not directory.is_dir():
        return []
    names = ocp.path.step.standard_name_format()
    return sorted(found.step for found in names.find_all(directory.absolute()))


def require_weights(run_dir: Path, like: Params) -> int:
    """Checks that a run has weights to begin with, and returns their step.

    Args:
        run_dir: its directory.
        like: names and shapes of the parameters.

    Raises:
        InputError: where there is no checkpoint, or it is of another model.
    """
    directory = run_dir / CHECKPOINTS_NAME
    steps = saved_steps(directory)
    require(bool(steps), f"from: there is no checkpoint in {directory}")
    here, there = by_name(like), _saved_params(directory, steps[-1])
    for name in sorted({*here, *there}):
        size, other = (
            tree[name].shape if name in tree else "missing" for tree in (here, there)
        )
        require(
            size == other,
            f"from: the run in {run_dir} is of another model: its {name} is {other}, "
            f"and here it is {size}",
        )
    return steps[-1]


def load_params(run_dir: Path, like: Params) -> Params:
    """Reads the weights of another run to begin with.

    Args:
        run_dir: its directory.
        like: names and shapes of the parameters.

    Returns:
        The parameters of its newest checkpoint, in the host's memory.

    Raises:
        InputError: where there is no checkpoint, or it is of another model.
    """
    step = require_weights(run_dir, like)
    try:
        return restore_params(run_dir / CHECKPOINTS_NAME, step, like)
    except InputError as error:
        why = str(error).removeprefix("step: ")
        raise InputError(f"from: {why}") from error


def _saved_params(directory: Path, step: int) -> dict[str, Any]:
    """Returns the metadata of a checkpoint's parameters, by name."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(directory.absolute() / str(step) / "state")
        return by_name(saved.item_metadata.tree["params"])
    except Exception as error:
        # As above, whatever is wrong with files raises all sorts.
        raise InputError(
            f"from: the checkpoint of step {step} in {directory} is damaged "
            f"({reason(error)})"
        ) from error


def restore_params(directory: Path, step: int, like: Params) -> Params:
    """Reads the parameters of a checkpoint, and not the optimizer's state.

    Args:
        directory: where the checkpoints of a run are.
        step: which of them.
        like: the names of the parameters.

    Returns:
        The parameters in the host's memory, whatever mesh they were saved from.

    Raises:
        InputError: for a checkpoint that cannot be read.
    """
    item = {"params": like}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    path = directory.absolute() / str(step) / "state"
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item, restore_args=on_host, partial_restore=True
                ),
            )
    except Exception as error:
        # As above, whatever is wrong with files raises all sorts.
        raise InputError(
            f"step: the checkpoint of step {step} in {directory} is damaged "
            f"({reason(error)})"
        ) from error
    params: Params = restored["params"]
    return params
