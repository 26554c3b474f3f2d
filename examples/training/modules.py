"""What transformers share: projections, attention's kernel, and what remat keeps."""

from functools import partial
from typing import Any, Literal

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx

from examples.training.sharding import gather

Axes = tuple[str | None, str | None]
"""The axes of the mesh over which a kernel is split where it is used."""

INTO: Axes = (None, "tensor")
"""A projection whose outputs are split: to heads, inner features or a vocabulary."""

BACK: Axes = ("tensor", None)
"""A projection back to the residual stream, whose inputs are split."""


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
    """Makes a projection from ``[B, T, inputs]`` to ``[B, T, outputs]``.

    Args:
        inputs: features that come in.
        outputs: features that go out.
        dtype: the type computed in; parameters are float32.
        kernel_init: draws the kernel, ``[inputs, outputs]``.
        rngs: where it is drawn from.
        axes: the axes of the mesh that the kernel is split over once it is gathered
            over fsdp; None for one that is whole on every device.
        use_bias: adds a bias, which is zero at first.
        output_dtype: the type of the output; not given, the one computed in.
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
    """Multiplies ``[B, T, D]`` by a matrix as if it were ``[B T, D]``.

    The gradient of the kernel then contracts one axis and not two, for which XLA on a
    CPU first transposes both operands. Elsewhere the reshape costs nothing.

    The kernel, by now in the type computed in, is gathered over fsdp here. Left to
    itself, XLA may split the features of the activations in place of the sequences.
    """
    del dimension_numbers  # The last axis of x with the first of the kernel.
    if axes is not None:
        kernel = gather(kernel, axes)
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)


def attention_implementation(query: jax.Array) -> Literal["cudnn"] | None:
    """Chooses cuDNN's flash attention where it has one, and XLA's elsewhere.

    Args:
        query: ``[B, T, N, H]``, as ``jax.nn.dot_product_attention`` gets it.
    """
    # A GPU may be one of AMD's; cuDNN has no kernel for other dtypes and heads.
    on_cuda = "cuda" in jax.extend.backend.get_backend().platform_version
    head_dim = query.shape[-1]
    fits = query.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if on_cuda and fits else None


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything for the backward pass except cast and gathered kernels.

    A policy for ``jax.checkpoint``. If they were saved, the kernels of all layers would
    be on every device at once.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")
