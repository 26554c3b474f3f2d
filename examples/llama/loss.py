"""The next-token loss, computed without holding the logits of all tokens at once.

Shapes use B sequences, T tokens per sequence, D features and a vocabulary of V tokens.
"""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples.training.modules import INTO
from examples.training.sharding import BATCH, constrain, gather

LARGEST_LOGITS = 2**25
"""Logits that a device computes at once, 128 MiB in float32."""


def mean_cross_entropy(
    features: jax.Array, output: nnx.Linear, targets: jax.Array
) -> jax.Array:
    """Compute the mean cross-entropy of ``softmax(features @ kernel)``, in nats.

    Where the logits are large, they are computed in blocks of the sequence, and again
    in the backward pass.

    Args:
        features: normalized features, ``[B, T, D]``.
        output: the output layer, with a kernel ``[D, V]``.
        targets: the next tokens, ``[B, T]``.

    Returns:
        A float32 scalar.
    """
    assert output.bias is None
    batch, length = targets.shape
    blocks = number_of_blocks(batch, length, output.out_features)
    if blocks == 1:
        logits = constrain(output(features), BATCH, None, "tensor")
        return _losses(logits, targets).mean()
    kernel = gather(output.kernel[...].astype(output.dtype), INTO)
    # In float32, so that the kernel's gradient is summed over the blocks in float32.
    total = _on_each_device(features, kernel.astype(jnp.float32), targets, blocks)
    return total / targets.size


def number_of_blocks(batch: int, length: int, vocabulary: int) -> int:
    """Choose the number of blocks of the sequence, which divides its length."""
    shape = jax.sharding.get_abstract_mesh().shape
    batch_parts = math.prod(shape.get(axis, 1) for axis in BATCH)
    logits = batch * length * vocabulary / (batch_parts * shape.get("tensor", 1))
    return next(
        blocks
        for blocks in range(1, length + 1)
        if length % blocks == 0
        and (logits <= blocks * LARGEST_LOGITS or blocks == length)
    )


def _on_each_device(
    features: jax.Array, kernel: jax.Array, targets: jax.Array, blocks: int
) -> jax.Array:
    """Sum the losses; devices add up the kernel's gradients only once, at the end."""
    if jax.sharding.get_abstract_mesh().empty:
        return _sum_of_blocks(features, kernel, targets, blocks)

    def local(features: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        return _sum_of_blocks(features, kernel, targets, blocks)[None]

    sums = jax.shard_map(
        local,
        in_specs=(P(BATCH), P(), P(BATCH)),
        out_specs=P(BATCH),
        axis_names={*BATCH},
        check_vma=False,  # Otherwise the gradients are summed in each block.
    )(features, kernel, targets)
    return sums.sum()


def _sum_of_blocks(
    features: jax.Array, kernel: jax.Array, targets: jax.Array, blocks: int
) -> jax.Array:
    def split(x: jax.Array) -> jax.Array:
        """Split ``[B, T, ...]`` into ``[blocks, B, T / blocks, ...]``."""
        batch, length, *rest = x.shape
        return x.reshape(batch, blocks, length // blocks, *rest).swapaxes(0, 1)

    @jax.checkpoint
    def loss_of_block(x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return _losses(logits, y).sum()

    both = split(features), split(targets)
    return jax.lax.map(lambda xy: loss_of_block(*xy), both).sum()


def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
