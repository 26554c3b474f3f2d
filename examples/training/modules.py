"""The projections of transformers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.training.sharding import gather

Axes = tuple[str | None, str | None]
"""Mesh axes over which a kernel is split where it is used."""

INTO: Axes = (None, "tensor")
"""A projection with split outputs: to heads, inner features or a vocabulary."""

BACK: Axes = ("tensor", None)
"""A projection back to the residual stream, with split inputs."""


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype: jax.typing.DTypeLike,
    kernel_init: nnx.Initializer,
    rngs: nnx.Rngs,
    axes: Axes | None = INTO,
    use_bias: bool = False,
    output_dtype: jax.typing.DTypeLike | None = None,
) -> nnx.Linear:
    """Build a projection from ``[B, T, inputs]`` to ``[B, T, outputs]``.

    Args:
        inputs: number of input features.
        outputs: number of output features.
        dtype: compute dtype; parameters are float32.
        kernel_init: initializer of the kernel, ``[inputs, outputs]``.
        rngs: random number generators.
        axes: the mesh axes over which the kernel is split once it is gathered over
            fsdp; None for a replicated kernel.
        use_bias: whether to add a bias, initialized to zero.
        output_dtype: dtype of the output; defaults to the compute dtype.
    """
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        kernel_init=kernel_init,
        dot_general=partial(_dot_flat, axes),
        preferred_element_type=output_dtype,
        rngs=rngs,
    )


def _dot_flat(
    axes: Axes | None,
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    **options: Any,
) -> jax.Array:
    """Multiply ``[B, T, D]`` by a matrix as if it were ``[B T, D]``.

    The gradient of the kernel then contracts one axis instead of two, for which XLA on
    a CPU would first transpose both operands. Elsewhere the reshape is free.

    The kernel, already cast to the compute dtype, is gathered over fsdp here.
    Otherwise, XLA may split the features of the activations instead of the sequences.
    """
    del dimension_numbers  # Always the last axis of x and the first of the kernel.
    if axes is not None:
        kernel = gather(kernel, axes)
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)
