"""A decoder-only transformer of the Llama family, in Flax NNX.

Shapes use B sequences, T tokens per sequence, D features, N query heads, K key/value
heads, H features per head, F feed-forward features, L layers, a vocabulary of V tokens
and a cache of S tokens.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import ModelConfig
from examples.training.attention import attend
from examples.training.modules import (
    BACK,
    INTO,
    Axes,
    linear,
)
from examples.training.remat import rematerialize
from examples.training.sharding import BATCH, constrain

_INIT = nnx.initializers.normal(0.02)

LAYOUT: Mapping[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),  # [V, D]
    "query": ("fsdp", "tensor"),  # [D, N H]
    "key": ("fsdp", "tensor"),  # [D, K H]
    "value": ("fsdp", "tensor"),  # [D, K H]
    "output": ("tensor", "fsdp"),  # [N H, D]
    "gate": ("fsdp", "tensor"),  # [D, F]
    "up": ("fsdp", "tensor"),  # [D, F]
    "down": ("tensor", "fsdp"),  # [F, D]
}
"""Mesh axes over which the parameters of ``Body`` are sharded. The tensor axis shards
heads, feed-forward features and the vocabulary."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    A cache of all layers has a leading axis L in every array.
    """

    keys: jax.Array
    """``[B, S, K, H]``, of which the first ``length`` positions are filled."""
    values: jax.Array
    """The same shape as ``keys``."""
    length: jax.Array
    """Number of tokens seen so far, a scalar."""


def make_cache(config: ModelConfig, batch: int, size: int) -> Cache:
    """Build an empty cache of all layers for ``batch`` sequences of ``size`` tokens."""
    shape = config.num_layers, batch, size, config.num_kv_heads, config.head_dim
    empty = jnp.zeros(shape, config.dtype)
    return Cache(empty, empty, jnp.zeros(config.num_layers, jnp.int32))


def rotary_embedding(
    x: jax.Array, theta: float, start: jax.typing.ArrayLike = 0
) -> jax.Array:
    """Rotate the features of each head by angles proportional to the position.

    Features ``i`` and ``i + H/2`` form a plane, which is rotated at position ``t`` by
    ``t * theta ** (-2 i / H)``. The dot product of a rotated query and a rotated key
    then depends only on the difference of their positions.

    Args:
        x: queries or keys, ``[B, T, heads, H]``.
        theta: base of the geometric series of frequencies.
        start: position of the first token.

    Returns:
        The rotated array, of the same shape and dtype.
    """
    _, length, _, head_dim = x.shape
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    # In float32: bfloat16 cannot represent positions in the thousands exactly.
    positions = jnp.arange(length, dtype=jnp.float32) + start
    angles = positions[:, None] * frequencies  # [T, H/2]
    cos, sin = (jnp.tile(f(angles), 2)[:, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; ``N / K`` query heads share each key/value head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Build the four projections, without biases."""
        query_features = config.num_heads * config.head_dim
        kv_features = config.num_kv_heads * config.head_dim
        self.query = _linear(config.hidden_size, query_features, config, rngs)
        self.key = _linear(config.hidden_size, kv_features, config, rngs)
        self.value = _linear(config.hidden_size, kv_features, config, rngs)
        self.output = _linear_back(query_features, config.hidden_size, config, rngs)
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.kernel = config.attention

    def __call__(
        self, x: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Map ``[B, T, D]`` to ``[B, T, D]``.

        With a cache, the tokens of ``x`` follow the cached ones and are added to them.
        """
        batch, length, _ = x.shape
        start = jnp.int32(0) if cache is None else cache.length

        def heads(projection: nnx.Linear) -> jax.Array:
            y = projection(x).reshape(batch, length, -1, self.head_dim)
            return constrain(y, BATCH, None, "tensor", None)

        query = rotary_embedding(heads(self.query), self.rope_theta, start)
        key = rotary_embedding(heads(self.key), self.rope_theta, start)
        value = heads(self.value)
        if cache is None:
            attended = attend(query, key, value, causal=True, kernel=self.kernel)
        else:
            where = (0, start, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache.keys, key, where)
            values = jax.lax.dynamic_update_slice(cache.values, value, where)
            cache = Cache(keys, values, start + length)
            seen = jnp.arange(keys.shape[1]) <= start + jnp.arange(length)[:, None]
            attended = jax.nn.dot_product_attention(
                query, keys, values, mask=seen[None, None]
            )
        return self.output(attended.reshape(batch, length, -1)), cache


class FeedForward(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Build the three projections, without biases."""
        inner = config.intermediate_size
        self.gate = _linear(config.hidden_size, inner, config, rngs)
        self.up = _linear(config.hidden_size, inner, config, rngs)
        self.down = _linear_back(inner, config.hidden_size, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, T, D]`` to ``[B, T, D]`` through ``[B, T, F]``."""
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(inner, BATCH, None, "tensor"))


class Block(nnx.Module):
    """A pre-norm transformer block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Build the two sublayers and their norms."""
        self.attention_norm = _rms_norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = _rms_norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(
        self, x: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Map ``[B, T, D]`` to ``[B, T, D]`` and extend the cache, if given."""
        attended, cache = self.attention(self.attention_norm(x), cache)
        x = constrain(x + attended, BATCH, None, None)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, BATCH, None, None), cache


class Body(nnx.Module):
    """The layers shared by language model and classifier: embedding, blocks, norm.

    The parameters of all blocks are stacked along a leading axis and scanned over, so
    that the block is compiled only once.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Draw the weights from ``rngs``, with a standard deviation of 0.02."""
        self.embedding = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=_INIT, rngs=rngs
        )
        make_blocks = nnx.vmap(partial(Block, config), axis_size=config.num_layers)
        self.blocks = make_blocks(rngs.split(config.num_layers))
        self.norm = _rms_norm(config, rngs)
        self.dtype = jnp.dtype(config.dtype)
        self.remat = config.remat
        self.unroll = config.unroll

    def features(
        self, tokens: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Map tokens, ``[B, T]``, to normalized features, ``[B, T, D]``.

        With a cache, the tokens follow the cached ones and are added to them.
        """
        graphdef, blocks = nnx.split(self.blocks)

        def run_block(x: jax.Array, layer: Any) -> tuple[jax.Array, Cache | None]:
            params, layer_cache = layer
            return nnx.merge(graphdef, params)(x, layer_cache)

        run_block = rematerialize(run_block, self.remat)
        # In float32: the gradient of a frequent token is a sum of many terms.
        table = jnp.asarray(self.embedding.embedding[...])
        table = constrain(table, "tensor", None)
        x = constrain(table[tokens], BATCH, None, None).astype(self.dtype)
        x, cache = jax.lax.scan(run_block, x, (blocks, cache), unroll=self.unroll)
        return self.norm(x), cache


class Llama(Body):
    """The language model: the body and an untied output layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Draw the weights from ``rngs``, with a standard deviation of 0.02."""
        super().__init__(config, rngs)
        self.logits = _linear(
            config.hidden_size, config.vocab_size, config, rngs, jnp.float32
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Compute the logits of the next token at every position.

        Args:
            tokens: integers, ``[B, T]``.

        Returns:
            Logits in float32, ``[B, T, V]``; position ``t`` sees tokens up to ``t``.
        """
        logits, _ = self._run(tokens, None)
        return logits

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Compute the logits of the next token, with a cache of the previous ones.

        Args:
            tokens: integers, ``[B, T]``, which follow the cached tokens.
            cache: the cache of all layers, with room for ``T`` more tokens.

        Returns:
            Logits in float32, ``[B, T, V]``, and the cache including ``tokens``.
        """
        logits, filled = self._run(tokens, cache)
        assert filled is not None
        return logits, filled

    def _run(
        self, tokens: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        features, cache = self.features(tokens, cache)
        return constrain(self.logits(features), BATCH, None, "tensor"), cache


def make_graphdef(config: ModelConfig) -> nnx.GraphDef[Llama]:
    """Build the graph definition of the model, without parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))


def divided_sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Return the sizes that each mesh axis must divide, by setting."""
    names = "num_heads", "num_kv_heads", "intermediate_size", "vocab_size"
    return {
        "fsdp": {"hidden_size": config.hidden_size},
        "tensor": {name: getattr(config, name) for name in names},
    }


def flops_per_token(
    config: ModelConfig, parameters: int, sequence_length: int
) -> float:
    """Compute the training FLOPs per token, as in PaLM.

    They are six per parameter, without the embedding, which multiplies nothing, plus
    ``12 L T D`` for attention, without a discount for the causal mask.

    Args:
        config: the model.
        parameters: number of parameters.
        sequence_length: tokens per sequence, T.

    Reference: Chowdhery et al., arXiv:2204.02311, appendix B.
    """
    multiplied = parameters - config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.hidden_size * sequence_length
    return 6.0 * multiplied + attention


def _linear(
    inputs: int,
    outputs: int,
    config: ModelConfig,
    rngs: nnx.Rngs,
    output_dtype: jax.typing.DTypeLike | None = None,
    axes: Axes = INTO,
) -> nnx.Linear:
    """Build a projection without bias from ``[.., inputs]`` to ``[.., outputs]``."""
    return linear(
        inputs,
        outputs,
        dtype=config.dtype,
        kernel_init=_INIT,
        rngs=rngs,
        axes=axes,
        output_dtype=output_dtype,
    )


# A projection back to the residual stream, with sharded inputs.
_linear_back = partial(_linear, axes=BACK)


def _rms_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Build an RMS norm over the features."""
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_epsilon,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
