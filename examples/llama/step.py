"""The computations of training, as pure functions: loss, step, evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_cautious
from examples.llama.config import ModelConfig
from examples.llama.model import Llama
from examples.llama.sharding import constrain_as_params

GraphDef = nnx.GraphDef[Llama]
Params = dict[str, Any]
"""Arrays by the names of the modules that hold them."""


class TrainState(NamedTuple):
    """All that a training step changes."""

    params: Params
    opt_state: optax.OptState


class Measured(NamedTuple):
    """What a training step measures, before it changes the parameters."""

    loss: jax.Array
    """Mean cross-entropy of the batch, in nats."""
    grad_norm: jax.Array
    """Global norm of the gradient, before it is clipped."""


def loss_fn(graphdef: GraphDef, params: Params, tokens: jax.Array) -> jax.Array:
    """Computes the mean cross-entropy of the next token.

    Args:
        graphdef: the model without its parameters.
        params: its parameters.
        tokens: windows, ``[B, T + 1]``.

    Returns:
        A float32 scalar, in nats.
    """
    tokens = tokens.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])  # [B, T, V]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:]
    )
    return losses.mean()


def make_graphdef(config: ModelConfig) -> GraphDef:
    """Makes the model without its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))


def init_state(
    config: ModelConfig, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """Draws the initial weights and makes the optimizer's state for them."""
    params = nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(seed)), nnx.Param))
    return TrainState(params, tx.init(params))


def cut(tokens: jax.Array, parts: int) -> jax.Array:
    """Cuts ``[B, ...]`` into ``[parts, B / parts, ...]``.

    Each part takes every ``parts``-th sequence, some from each device, so that no
    sequence moves.
    """
    return tokens.reshape(-1, parts, *tokens.shape[1:]).swapaxes(0, 1)


def mean_gradient(
    graphdef: GraphDef, params: Params, tokens: jax.Array, parts: int
) -> tuple[jax.Array, Params]:
    """Computes the loss and its gradient, of one part of the batch after the other.

    Args:
        graphdef: the model without its parameters.
        params: its parameters.
        tokens: windows, ``[B, T + 1]``.
        parts: how many there are; the mean over them is that of the whole batch.
    """

    def gradient(part: jax.Array) -> tuple[jax.Array, Params]:
        loss, grads = jax.value_and_grad(partial(loss_fn, graphdef))(params, part)
        return loss, constrain_as_params(grads)

    if parts == 1:
        return gradient(tokens)

    def add(sums: Any, part: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(part)), None

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    sums, _ = jax.lax.scan(add, zeros, cut(tokens, parts))
    return jax.tree.map(lambda leaf: leaf / parts, sums)


def make_train_step(
    graphdef: GraphDef, tx: optax.GradientTransformation, parts: int = 1
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Measured]]:
    """Makes the pure function from state and batch to the next state."""

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Measured]:
        loss, grads = mean_gradient(graphdef, state.params, tokens, parts)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), Measured(loss, optax.tree.norm(grads))

    return train_step


def make_evaluate(
    graphdef: GraphDef, parts: int = 1
) -> Callable[[Params, jax.Array], jax.Array]:
    """Makes the function that computes the mean loss over ``[batches, B, T + 1]``."""

    def evaluate(params: Params, batches: jax.Array) -> jax.Array:
        def loss_of_batch(tokens: jax.Array) -> jax.Array:
            losses = jax.lax.map(partial(loss_fn, graphdef, params), cut(tokens, parts))
            return losses.mean()

        return jax.lax.map(loss_of_batch, batches).mean()

    return evaluate


def make_aligned_fraction(
    graphdef: GraphDef, tx: optax.GradientTransformation, parts: int = 1
) -> Callable[[TrainState, jax.Array], jax.Array]:
    """Makes the function that measures how far the next update follows the gradient.

    It returns the fraction of all parameters whose update and gradient have opposite
    signs, that is, which the step moves downhill. Caution zeroes the others, so that
    with and without it the same is counted.
    """

    def aligned_fraction(state: TrainState, tokens: jax.Array) -> jax.Array:
        _, grads = mean_gradient(graphdef, state.params, tokens, parts)
        updates, _ = tx.update(grads, state.opt_state, state.params)
        fractions = optax_cautious.aligned_fraction(updates, grads)
        counts = jax.tree.map(
            lambda fraction, leaf: fraction * float(leaf.size), fractions, grads
        )
        # A float, as the parameters of large models are more than an int32 can count.
        return optax.tree.sum(counts) / float(optax.tree.size(grads))

    return aligned_fraction
