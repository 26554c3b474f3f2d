"""Means that XLA computes without a full-size temporary."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Up to this size, a temporary is cheaper than avoiding it.
SMALL = 2**16


def mean(x: jax.Array, axes: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Return jnp.mean(x, axes, dtype) over the last axes of bools or numbers."""
    plain = functools.partial(plain_mean, axes=axes, dtype=dtype)
    if x.dtype != jnp.bool_ or x.size <= SMALL:
        return plain(x)
    on_cpu = functools.partial(fraction_on_cpu, axes=axes, dtype=dtype)
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=plain)


def plain_mean(x: jax.Array, axes: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Sum and divide, which traces faster than jnp.mean."""
    total = jax.lax.reduce_sum(jax.lax.convert_element_type(x, dtype), axes)
    return total / _count(x, axes)


def fraction_on_cpu(
    mask: jax.Array, axes: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """Sum groups of fewer than 32 elements in int8, then sum the groups.

    XLA:CPU fuses such a short reduction with the computation of its input. It stores
    the input of a longer one first, here with four bytes per coordinate, and allocating
    memory is expensive on a CPU.
    """
    if not axes or jax.typeof(mask).sharding.spec[-1] is not None:
        # An axis that the type declares sharded cannot be reshaped into groups.
        return plain_mean(mask, axes, dtype)
    n = mask.shape[-1]
    group = next(k for k in range(31, 0, -1) if n % k == 0)
    groups = mask.reshape(*mask.shape[:-1], n // group, group)
    counts = jnp.sum(groups, axis=-1, dtype=jnp.int8)
    total = jnp.sum(counts, axes, dtype)
    return total / _count(mask, axes)


def _count(x: jax.Array, axes: tuple[int, ...]) -> float:
    # A Python integer would become an int32, which overflows at 2^31.
    return float(math.prod(x.shape[axis] for axis in axes))
