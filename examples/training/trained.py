"""Trained models: the settings of a run and the parameters of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import jax

from examples.training import log
from examples.training.checkpoint import (
    CHECKPOINTS_NAME,
    require_weights,
    restore_params,
    saved_steps,
)
from examples.training.checks import read_text, require, require_same_architecture
from examples.training.config import TrainConfig, from_json
from examples.training.run_dir import CONFIG_NAME
from examples.training.task import Params, Task

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Source:
    """The checkpoint to load."""

    run_dir: Path
    """Directory of the run."""
    step: int | None = None
    """Use the checkpoint of this step. Defaults to the newest."""
    best: bool = False
    """Use the checkpoint with the lowest validation loss."""


class Trained(NamedTuple, Generic[T]):
    """A trained model and its configuration."""

    config: TrainConfig[T]
    step: int
    params: Params
    """In host memory."""


def load_trained(source: Source, task: type[T], setting: str = "run_dir") -> Trained[T]:
    """Load the parameters of a run, without the optimizer state.

    Args:
        source: the checkpoint.
        task: the class of the run's task.
        setting: the setting that names the run, for error messages.

    Raises:
        InputError: if the run or the checkpoint does not exist.
    """
    path = source.run_dir / CONFIG_NAME
    require(
        path.exists(),
        f"{setting}: {source.run_dir} contains no run: {path} does not exist.",
    )
    config = from_json(read_text(setting, path), f"{setting}: {path}", task)
    step = choose_step(source, setting)
    like = jax.eval_shape(lambda: config.task.init(0))
    params = restore_params(setting, source.run_dir / CHECKPOINTS_NAME, step, like)
    return Trained(config, step, params)


def require_same_model(run_dir: Path, task: Task) -> None:
    """Check that a run has weights for the model of a task of the same class.

    Raises:
        InputError: if there is no checkpoint, or it contains another model.
    """
    require_weights(run_dir, jax.eval_shape(lambda: task.init(0)))
    path = run_dir / CONFIG_NAME
    found = from_json(read_text("from", path), f"from: {path}", type(task)).task
    require_same_architecture(run_dir, found.architecture, task.architecture)


def is_loadable(run_dir: Path) -> bool:
    """Return whether a run has any checkpoint left."""
    return bool(saved_steps(run_dir / CHECKPOINTS_NAME))


def require_checkpoint(setting: str, run_dir: Path) -> None:
    """Raise an ``InputError`` if a run has no checkpoint.

    Args:
        setting: the setting that names the run, for the error message.
        run_dir: the directory of the run.
    """
    require(
        is_loadable(run_dir),
        f"{setting}: there is no checkpoint in {run_dir / CHECKPOINTS_NAME}.",
    )


def choose_step(source: Source, setting: str = "run_dir") -> int:
    """Return the step of the requested checkpoint.

    Args:
        source: the checkpoint.
        setting: the setting that names the run, for error messages.

    Raises:
        InputError: if the checkpoint does not exist.
    """
    require(
        source.step is None or not source.best,
        "step and best: pass only one of them.",
    )
    require_checkpoint(setting, source.run_dir)
    directory = source.run_dir / CHECKPOINTS_NAME
    steps = saved_steps(directory)
    if source.step is not None:
        require(
            source.step in steps,
            f"step: there is no checkpoint of step {source.step} in {directory}; "
            f"choose one of {', '.join(map(str, steps))}.",
        )
        return source.step
    if not source.best:
        return steps[-1]
    losses = {
        record["step"]: record["validation_loss"]
        for record in log.read(source.run_dir)
        if record["step"] in steps and record.get("validation_loss") is not None
    }
    require(
        bool(losses),
        f"best: the log in {source.run_dir} has no validation loss for any checkpoint; "
        "choose a --step.",
    )
    return min(losses, key=losses.__getitem__)
