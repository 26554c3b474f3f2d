"""A decoder-only transformer of the Llama family, in Flax NNX.

Shapes are written with B sequences of T tokens, D features, N query heads,
K key/value heads, H features a head, F features in the feed-forward layer and
a vocabulary of V tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import ModelConfig

_INIT = nnx.initializers.normal(0.02)
_RMS_EPSILON = 1e-6


def rotary_embedding(x: jax.Array, theta: float) -> jax.Array:
    """Rotates the features of each head by angles that grow with the position.

    Feature ``i`` and feature ``i + H/2`` form a plane, turned at position ``t``
    by ``t * theta ** (-2 i / H)``. The product of a rotated query and a rotated
    key then depends on the two positions through their difference only.

    Args:
        x: queries or keys, ``[B, T, heads, H]``.
        theta: base of the geometric series of frequencies.

    Returns:
        The rotated array, of the same shape and dtype.
    """
    _, length, _, head_dim = x.shape
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    # Positions of thousands times a frequency near one need float32.
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies  # [T, H/2]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention in which ``N / K`` query heads share a key/value head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Makes the four projections; none has a bias."""
        query_features = config.num_heads * config.head_dim
        kv_features = config.num_kv_heads * config.head_dim
        self.query = _linear(config.hidden_size, query_features, config, rngs)
        self.key = _linear(config.hidden_size, kv_features, config, rngs)
        self.value = _linear(config.hidden_size, kv_features, config, rngs)
        self.output = _linear(query_features, config.hidden_size, config, rngs)
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, T, D]`` to ``[B, T, D]``."""
        batch, length, _ = x.shape
        query = self.query(x).reshape(batch, length, -1, self.head_dim)  # [B, T, N, H]
        key = self.key(x).reshape(batch, length, -1, self.head_dim)  # [B, T, K, H]
        value = self.value(x).reshape(batch, length, -1, self.head_dim)  # [B, T, K, H]
        query = rotary_embedding(query, self.rope_theta)
        key = rotary_embedding(key, self.rope_theta)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.reshape(batch, length, -1))


class FeedForward(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Makes the three projections; none has a bias."""
        self.gate = _linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.up = _linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.down = _linear(config.intermediate_size, config.hidden_size, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, T, D]`` to ``[B, T, D]`` through ``[B, T, F]``."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each on a normalized residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Makes the two sublayers and the norm in front of each."""
        self.attention_norm = _rms_norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = _rms_norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, T, D]`` to ``[B, T, D]``."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nnx.Module):
    """The language model: embedding, blocks, norm, and an output layer of its own."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Draws every weight from ``rngs``, with a standard deviation of 0.02."""
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            embedding_init=_INIT,
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.norm = _rms_norm(config, rngs)
        self.logits = _linear(
            config.hidden_size, config.vocab_size, config, rngs, jnp.float32
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Scores every possible next token at every position.

        Args:
            tokens: integers, ``[B, T]``.

        Returns:
            Logits in float32, ``[B, T, V]``; row ``t`` sees tokens up to ``t``.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def count_parameters(config: ModelConfig) -> int:
    """Counts the parameters of a model without making it."""
    shapes = nnx.eval_shape(lambda: nnx.state(Llama(config, nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _linear(
    inputs: int,
    outputs: int,
    config: ModelConfig,
    rngs: nnx.Rngs,
    output_dtype: jax.typing.DTypeLike | None = None,
) -> nnx.Linear:
    """A projection without bias, from ``[B, T, inputs]`` to ``[B, T, outputs]``."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=_INIT,
        dot_general=_dot_flat,
        preferred_element_type=output_dtype,
        rngs=rngs,
    )


def _dot_flat(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """Multiplies ``[B, T, D]`` by a matrix as if it were ``[B T, D]``.

    The gradient of the kernel then contracts one axis and not two, for which XLA on a
    CPU first transposes both operands. Elsewhere the reshape costs nothing.
    """
    del dimension_numbers  # The last axis of x with the first of the kernel.
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)


def _rms_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square norm over the features."""
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=_RMS_EPSILON,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
