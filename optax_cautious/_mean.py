"""Means that XLA computes without a full-size temporary."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Up to this many coordinates a temporary costs less than what avoids it.
SMALL = 2**16


def mean(x: jax.Array, axes: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns jnp.mean(x, axes, dtype) over the last axes of bools or numbers."""
    plain = functools.partial(plain_mean, axes=axes, dtype=dtype)
    if x.dtype != jnp.bool_ or x.size <= SMALL:
        return plain(x)
    on_cpu = functools.partial(fraction_on_cpu, axes=axes, dtype=dtype)
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=plain)


def plain_mean(x: jax.Array, axes: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Adds up and divides; jnp.mean takes longer to trace."""
    total = jax.lax.reduce_sum(jax.lax.convert_element_type(x, dtype), axes)
    return total / _count(x, axes)


def fraction_on_cpu(
    mask: jax.Array, axes: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """Counts groups of fewer than 32 in int8, then the groups.

    XLA:CPU computes what so short a reduction reads as it goes. What a longer one reads
    it stores first, here as four bytes a coordinate, and fresh memory is dear there.
    """
    if not axes or jax.typeof(mask).sharding.spec[-1] is not None:
        # An axis that is sharded in the type cannot be split into any groups.
        return plain_mean(mask, axes, dtype)
    n = mask.shape[-1]
    group = next(k for k in range(31, 0, -1) if n % k == 0)
    groups = mask.reshape(*mask.shape[:-1], n // group, group)
    counts = jnp.sum(groups, axis=-1, dtype=jnp.int8)
    total = jnp.sum(counts, axes, dtype)
    return total / _count(mask, axes)


def _count(x: jax.Array, axes: tuple[int, ...]) -> float:
    # As an integer JAX would take it for an int32, which ends at 2^31.
    return float(math.prod(x.shape[axis] for axis in axes))
