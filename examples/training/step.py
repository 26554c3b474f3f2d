"""Training as pure functions: gradient, step and evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_cautious
from examples.training.sharding import constrain_as_params
from examples.training.task import Batch, Params, Task


class TrainState(NamedTuple):
    """The state that a training step updates."""

    params: Params
    opt_state: optax.OptState


class Measured(NamedTuple):
    """Measurements of a training step, taken before the update."""

    loss: jax.Array
    """Mean loss of the batch."""
    grad_norm: jax.Array
    """Global norm of the gradient, before clipping."""


def init_state(task: Task, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Initialize the parameters and the optimizer state."""
    params = task.init(seed)
    return TrainState(params, tx.init(params))


def cut(batch: Batch, parts: int) -> Batch:
    """Split ``[B, ...]`` into ``[parts, B / parts, ...]``.

    Each part takes every ``parts``-th example, some from each device, so that no
    example moves between devices.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )


def mean_gradient(
    task: Task, params: Params, batch: Batch, parts: int
) -> tuple[jax.Array, Params]:
    """Compute the loss and its gradient, accumulated over parts of the batch.

    Args:
        task: the task that defines the loss.
        params: the parameters.
        batch: a tree of arrays, ``[B, ...]``.
        parts: number of parts; the mean over them equals the mean over the batch.
    """

    def gradient(part: Batch) -> tuple[jax.Array, Params]:
        loss, grads = jax.value_and_grad(task.loss)(params, part)
        return loss, constrain_as_params(grads, task)

    if parts == 1:
        return gradient(batch)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(part)), None

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    sums, _ = jax.lax.scan(add, zeros, cut(batch, parts))
    return jax.tree.map(lambda leaf: leaf / parts, sums)


def make_train_step(
    task: Task, tx: optax.GradientTransformation, parts: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Measured]]:
    """Build the pure function from state and batch to the next state."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Measured]:
        loss, grads = mean_gradient(task, state.params, batch, parts)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), Measured(loss, optax.tree.norm(grads))

    return train_step


class Evaluated(NamedTuple):
    """Measurements on the validation batches."""

    loss: jax.Array
    """Mean over all batches."""
    outputs: Any
    """The input of ``Task.scores``: a tree of arrays, ``[batches * B, ...]``."""


def make_evaluate(task: Task, parts: int = 1) -> Callable[[Params, Batch], Evaluated]:
    """Build the function that evaluates batches ``[batches, B, ...]``."""

    def evaluate(params: Params, batches: Batch) -> Evaluated:
        def evaluate_batch(batch: Batch) -> tuple[jax.Array, Any]:
            losses, outputs = jax.lax.map(
                lambda part: task.evaluate(params, part), cut(batch, parts)
            )
            return losses.mean(), outputs

        losses, outputs = jax.lax.map(evaluate_batch, batches)
        # [batches, parts, B / parts, ...]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), outputs)
        return Evaluated(losses.mean(), flat)

    return evaluate


class Aligned(NamedTuple):
    """Fractions of coordinates in which the next update agrees with the gradient."""

    whole: jax.Array
    """Fraction over all parameters."""
    parts: dict[str, jax.Array]
    """Fraction per parameter, by name: a scalar, or ``[L]`` if stacked over layers."""


def make_aligned_fraction(
    task: Task, tx: optax.GradientTransformation, parts: int = 1
) -> Callable[[TrainState, Batch], Aligned]:
    """Build the function that computes the aligned fraction of the next update.

    That is the fraction of coordinates in which update and gradient have opposite
    signs, so that the step moves downhill.

    Args:
        task: the task to train.
        tx: the optimizer without caution, so that its update is measured before caution
            is applied.
        parts: as in ``mean_gradient``.
    """

    def aligned_fraction(state: TrainState, batch: Batch) -> Aligned:
        _, grads = mean_gradient(task, state.params, batch, parts)
        updates, _ = tx.update(grads, state.opt_state, state.params)
        stacked = {name: int(name in task.layers) for name in grads}
        fractions = optax_cautious.aligned_fraction(updates, grads, stacked=stacked)
        # Floats, because the parameter count of large models overflows an int32.
        counts = jax.tree.map(
            lambda fraction, leaf: fraction.mean() * float(leaf.size), fractions, grads
        )
        whole = optax.tree.sum(counts) / float(optax.tree.size(grads))
        return Aligned(whole, by_name(fractions))

    return aligned_fraction


def by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, joined with dots."""
    return {
        ".".join(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
