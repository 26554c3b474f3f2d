"""Checkpoints: saving, keeping the newest and the best, and restoring."""

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
"""Name of the directory of checkpoints in the directory of a run."""


class Restored(NamedTuple):
    """The contents of a checkpoint, except for the position in the data."""

    step: int
    state: TrainState


@dataclass(frozen=True)
class _NewestAndBest(checkpoint_managers.PreservationPolicy):  # type: ignore[misc]
    """A policy that keeps the newest, the best, and optionally one given checkpoint."""

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
    """The checkpoints of a run, written asynchronously during training."""

    def __init__(
        self,
        directory: Path,
        keep: int,
        losses: Mapping[int, float] | None = None,
        always: int | None = None,
    ):
        """Open a directory of checkpoints.

        Args:
            directory: the directory; created if missing.
            keep: number of newest checkpoints to keep, besides the best.
            losses: validation losses of existing checkpoints, by step.
            always: a step whose checkpoint is always kept.
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
        """Start writing a checkpoint; the state may be changed once this returns.

        An error in writing the previous checkpoint is raised here.
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
        """Restore the newest intact checkpoint.

        Damaged newer checkpoints are reported and moved aside.

        Args:
            like: shapes, dtypes and shardings of the state.
            batches: the data iterator; set to the position of the checkpoint.

        Returns:
            The step and the state, or None if there is no checkpoint.

        Raises:
            InputError: if all checkpoints are damaged, if they were saved by a
                different number of processes, or if the data cannot be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._require_same_processes(step)
            state, why = self._read(step, like, batches)
            if state is not None:
                for other, of_other in damaged.items():
                    self._set_aside(other, of_other)
                for later in [s for s in self._losses if s > step]:
                    del self._losses[later]  # The step is taken again.
                return Restored(step, state)
            damaged[step] = why
        reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        require(
            not damaged,
            f"run_dir: all checkpoints in {self._manager.directory} are damaged "
            f"({reasons}); choose another --run-dir.",
        )
        return None

    def _read(
        self, step: int, like: TrainState, batches: grain.DatasetIterator[Any]
    ) -> tuple[TrainState | None, str]:
        """Read a checkpoint, or return the reason why some process cannot."""
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
            of_data = error  # The data cannot be read from that position.
        except Exception as error:
            # Damaged files raise errors of any type from tensorstore and JSON.
            why = reason(error)
        with together():
            if of_data is not None:
                raise of_data
        # All processes must agree, because they compute the checksum together.
        if not _in_all(state is not None):
            return None, why
        if int(checksum(state)) != saved:
            return None, "its checksum does not match its contents"
        return state, ""

    def close(self) -> None:
        """Wait until the last checkpoint is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _require_same_processes(self, step: int) -> None:
        """Check that a checkpoint has a position in the data for each process."""
        directory = Path(self._manager.directory) / str(step) / "data"
        there = {file.stem.rpartition("-")[2] for file in directory.glob("process_*")}
        require(
            not there or str(jax.process_count()) in there,
            f"run_dir: the checkpoint was saved by {'/'.join(sorted(there))} "
            f"processes, but there are {jax.process_count()}; start the same number, "
            "or choose another --run-dir.",
        )

    def _set_aside(self, step: int, why: str) -> None:
        tqdm.write(
            f"The checkpoint of step {step} is damaged ({why}); moving it to "
            f"{self._damaged}."
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
    """Return whether something holds in all processes."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds)).all())


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """Sum the bits of all arrays as 32-bit unsigned integers.

    Integer sums do not depend on the order, so the checksum is the same on any mesh.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        total += jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def size(like: Any) -> int:
    """Compute the size of a checkpoint in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))


def saved_steps(directory: Path) -> list[int]:
    """List the steps of the checkpoints in a directory, which need not exist."""
    if not directory.is_dir():
        return []
    names = ocp.path.step.standard_name_format()
    return sorted(found.step for found in names.find_all(directory.absolute()))


def require_weights(run_dir: Path, like: Params) -> int:
    """Check that a run has weights to start from, and return their step.

    Args:
        run_dir: the directory of the run.
        like: names and shapes of the parameters.

    Raises:
        InputError: if there is no checkpoint, or it contains another model.
    """
    directory = run_dir / CHECKPOINTS_NAME
    steps = saved_steps(directory)
    require(bool(steps), f"from: there is no checkpoint in {directory}.")
    here, there = by_name(like), _saved_params(directory, steps[-1])
    for name in sorted({*here, *there}):
        size, other = (
            tree[name].shape if name in tree else "missing" for tree in (here, there)
        )
        require(
            size == other,
            f"from: the run in {run_dir} has a different model, in which {name} is "
            f"{other}; here it is {size}.",
        )
    return steps[-1]


def load_params(run_dir: Path, like: Params) -> Params:
    """Load the weights of another run to start from.

    Args:
        run_dir: the directory of the run.
        like: names and shapes of the parameters.

    Returns:
        The parameters of the newest checkpoint, in host memory.

    Raises:
        InputError: if there is no checkpoint, or it contains another model.
    """
    step = require_weights(run_dir, like)
    return restore_params("from", run_dir / CHECKPOINTS_NAME, step, like)


def _saved_params(directory: Path, step: int) -> dict[str, Any]:
    """Return the metadata of a checkpoint's parameters, by name."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(directory.absolute() / str(step) / "state")
        return by_name(saved.item_metadata.tree["params"])
    except Exception as error:
        # As above, damaged files raise errors of any type.
        raise InputError(
            f"from: the checkpoint of step {step} in {directory} is damaged "
            f"({reason(error)})."
        ) from error


def restore_params(setting: str, directory: Path, step: int, like: Params) -> Params:
    """Load the parameters of a checkpoint, without the optimizer state.

    Args:
        setting: the setting that names the run, for error messages.
        directory: the directory of a run's checkpoints.
        step: the step of the checkpoint.
        like: the names of the parameters.

    Returns:
        The parameters in host memory, whatever mesh they were saved from.

    Raises:
        InputError: if the checkpoint cannot be read.
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
        # As above, damaged files raise errors of any type.
        raise InputError(
            f"{setting}: the checkpoint of step {step} in {directory} is damaged "
            f"({reason(error)})."
        ) from error
    params: Params = restored["params"]
    return params
