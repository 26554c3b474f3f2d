"""Attention kernels: XLA's, splash attention on TPUs, and cuDNN's on NVIDIA GPUs.

Shapes use B sequences, T tokens per sequence, N query heads, K key/value heads and H
features per head; ``N / K`` query heads share each key/value head.
"""

import math
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples.training.checks import require, require_choice
from examples.training.sharding import BATCH

Kernel = Literal["xla", "splash", "cudnn"]
AttentionName = Literal["auto", "xla", "splash", "cudnn"]

SAVED = "attention"
"""Name of the outputs, for rematerialization policies."""

_LANES = 128
"""Splash attention splits a sequence into blocks of a multiple of this."""

_FEATURES = 64
"""It is tested with heads of a multiple of this."""

_LARGEST_BLOCK = 1024


class DeviceKind(NamedTuple):
    """What decides which kernels a device has."""

    name: str
    """Such as ``"TPU v5 lite"`` or ``"NVIDIA H200"``."""
    capability: float
    """The compute capability of an NVIDIA GPU."""


@lru_cache
def choose_kernel(
    device: DeviceKind, dtype: jax.typing.DTypeLike, length: int, head_dim: int
) -> Kernel:
    """Choose a kernel that a device has for such arrays, and print the choice.

    Args:
        device: kind of the device.
        dtype: dtype of queries, keys and values.
        length: tokens per sequence.
        head_dim: features per head.
    """
    kernel: Kernel = "xla"
    if _has_splash(device) and _fits_splash(length, head_dim):
        kernel = "splash"
    if _has_cudnn(device) and _fits_cudnn(dtype, head_dim):
        kernel = "cudnn"
    # A CPU has only XLA's.
    if not device.name.startswith("cpu") and jax.process_index() == 0:
        tqdm.write(
            f"Attention over {length} tokens with {head_dim} features per head: the "
            f"{kernel} kernel."
        )
    return kernel


def require_kernel(
    name: AttentionName, dtype: jax.typing.DTypeLike, length: int, head_dim: int
) -> None:
    """Check that the chosen kernel supports the arrays.

    Raises:
        InputError: if it does not.
    """
    require_choice("attention", name, get_args(AttentionName))
    require(
        name != "splash" or _fits_splash(length, head_dim),
        f"attention: splash needs sequences of a multiple of {_LANES} tokens and heads "
        f"of a multiple of {_FEATURES} features, got {length} and {head_dim}; pass "
        "--attention auto.",
    )
    require(
        name != "cudnn" or _fits_cudnn(jnp.dtype(dtype), head_dim),
        "attention: cudnn needs --dtype bfloat16 and heads of a multiple of 8 and at "
        f"most 128 features, got {jnp.dtype(dtype)} and {head_dim}; pass --attention "
        "auto.",
    )


def _fits_splash(length: int, head_dim: int) -> bool:
    return length % _LANES == 0 and head_dim % _FEATURES == 0


def _fits_cudnn(dtype: jax.typing.DTypeLike, head_dim: int) -> bool:
    return dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128


def _has_splash(device: DeviceKind) -> bool:
    return device.name.startswith("TPU")


def _has_cudnn(device: DeviceKind) -> bool:
    return device.name.startswith("NVIDIA") and device.capability >= 8


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool,
    kernel: AttentionName,
    interpret: bool = False,
) -> jax.Array:
    """Compute ``softmax(q k^T / sqrt(H)) v`` for each head.

    Args:
        query: ``[B, T, N, H]``.
        key: ``[B, T, K, H]``.
        value: ``[B, T, K, H]``.
        causal: whether a token attends only to itself and to earlier tokens.
        kernel: the kernel; ``"auto"`` chooses one for the device.
        interpret: whether to interpret splash attention, on any device.

    Returns:
        The attended values, ``[B, T, N, H]``.
    """
    device = _device_kind()
    if kernel == "auto":
        _, length, _, head_dim = query.shape
        kernel = choose_kernel(device, query.dtype, length, head_dim)
    require(
        kernel != "splash" or interpret or _has_splash(device),
        f"attention: splash needs a TPU, not {device.name}; pass --attention auto.",
    )
    require(
        kernel != "cudnn" or _has_cudnn(device),
        "attention: cudnn needs an NVIDIA GPU of compute capability 8.0 or higher, not "
        f"{device.name}; pass --attention auto.",
    )
    if kernel == "splash":
        return _sharded_splash(query, key, value, causal, interpret)
    attended = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation=kernel
    )
    return checkpoint_name(attended, SAVED)


def _device_kind() -> DeviceKind:
    """Return the kind of the devices of the current mesh, which may not be attached."""
    attached: Any = jax.devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    abstract: Any = getattr(mesh, "abstract_device", None)
    kind = str((abstract or attached).device_kind)
    # Only an attached device has it.
    return DeviceKind(kind, float(getattr(attached, "compute_capability", None) or 0))


def _sharded_splash(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, interpret: bool
) -> jax.Array:
    """Run splash attention on each device's sequences and heads."""
    local = partial(_splash, causal=causal, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return local(query, key, value)
    spec = P(BATCH, None, "tensor", None)
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(
        query, key, value
    )


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, interpret: bool
) -> jax.Array:
    # A heavy import, which only TPUs need.
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, length, heads, head_dim = query.shape
    block = _block_size(length)
    shape = length, length
    mask = (
        splash_attention.CausalMask(shape)
        if causal
        else splash_attention.FullMask(shape)
    )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    # The kernel does not scale, and has the heads before the tokens.
    scaled = query * jnp.asarray(1 / math.sqrt(head_dim), query.dtype)
    query, key, value = (x.swapaxes(1, 2) for x in (scaled, key, value))
    return jax.vmap(kernel)(query, key, value).swapaxes(1, 2)


def _block_size(length: int) -> int:
    """Choose the largest block that divides the sequence."""
    return next(
        size
        for size in range(min(length, _LARGEST_BLOCK), 0, -_LANES)
        if length % size == 0
    )
