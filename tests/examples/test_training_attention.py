"""Attention kernels: the choice, and splash attention interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for _module in ("flax", "grain", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.training.attention import (
    DeviceKind,
    attend,
    choose_kernel,
    require_kernel,
)
from examples.training.checks import InputError
from examples.training.remat import rematerialize
from examples.training.roofline import matrix_flops

pytestmark = pytest.mark.usefixtures("little_optimization")


@pytest.mark.parametrize(
    ("device", "dtype", "length", "head_dim", "chosen"),
    [
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 100, 128, "cudnn"),
        ("NVIDIA T4", jnp.bfloat16, 100, 128, "xla"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 100, 136, "xla"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 100, 100, "xla"),
        ("NVIDIA H100 80GB HBM3", jnp.float32, 100, 128, "xla"),
        ("AMD Instinct MI300X", jnp.bfloat16, 128, 128, "xla"),
        ("TPU v5 lite", jnp.bfloat16, 1024, 64, "splash"),
        ("TPU v6 lite", jnp.float32, 384, 128, "splash"),
        ("TPU v5 lite", jnp.bfloat16, 1000, 64, "xla"),
        ("TPU v5 lite", jnp.bfloat16, 1024, 32, "xla"),
        ("cpu", jnp.bfloat16, 1024, 64, "xla"),
    ],
)
def test_the_kernel_is_chosen_by_device_and_shape(
    device, dtype, length, head_dim, chosen, capsys
):
    choose_kernel.cache_clear()
    for _ in range(2):
        kind = DeviceKind(device, 7.5 if device == "NVIDIA T4" else 9.0)
        assert choose_kernel(kind, jnp.dtype(dtype), length, head_dim) == chosen
    printed = capsys.readouterr().out
    # Once; a CPU has no choice.
    assert printed.count(f"the {chosen} kernel") == (device != "cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "length", "head_dim", "message"),
    [
        ("splash", "bfloat16", 100, 64, "splash needs .* got 100 and 64; pass --att"),
        ("splash", "bfloat16", 128, 32, "multiple of 64 features, got 128 and 32"),
        ("cudnn", "float32", 128, 64, "needs --dtype bfloat16 .* got float32 and 64"),
        ("cudnn", "bfloat16", 128, 136, "at most 128 features, got bfloat16 and 136"),
        ("flash", "bfloat16", 128, 64, "must be one of auto, xla, splash, cudnn"),
    ],
)
def test_unsupported_shapes_are_refused(name, dtype, length, head_dim, message):
    with pytest.raises(InputError, match=f"attention.* {message}"):
        require_kernel(name, dtype, length, head_dim)
    for other in ("auto", "xla"):
        require_kernel(other, dtype, length, head_dim)


def test_supported_kernels_are_accepted():
    require_kernel("splash", "float32", 128, 64)
    require_kernel("cudnn", "bfloat16", 100, 40)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_of_other_devices_are_refused(kernel):
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    with pytest.raises(InputError, match=f"attention: {kernel} needs .* not cpu; pass"):
        attend(x, x, x, causal=True, kernel=kernel)


@functools.partial(jax.jit, static_argnums=(0, 2))
def outputs(kernel, arrays, causal):
    """Compute the output, and the gradients with a random cotangent."""
    query, key, value, cotangent = arrays

    def attended(*inputs):
        return attend(*inputs, causal=causal, kernel=kernel, interpret=True)

    output, vjp = jax.vjp(attended, query, key, value)
    return output, *vjp(cotangent)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim", "causal", "dtype", "tolerance"),
    [
        (4, 2, 128, 64, True, jnp.float32, 1e-5),
        (2, 2, 256, 64, False, jnp.float32, 1e-5),
        (2, 1, 128, 128, True, jnp.float32, 1e-5),
        (4, 2, 128, 64, True, jnp.bfloat16, 2e-2),
    ],
)
def test_splash_attention_equals_that_of_xla(
    heads, kv_heads, length, head_dim, causal, dtype, tolerance
):
    """Forward and backward, with grouped queries."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, (2, length, count, head_dim), dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads))
    ]
    found = outputs("splash", arrays, causal)
    for ours, theirs in zip(found, outputs("xla", arrays, causal)):
        assert ours.dtype == dtype
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < tolerance


@pytest.mark.parametrize(("remat", "products"), [("none", 7), ("dots", 7), ("full", 9)])
def test_only_full_rematerialization_computes_the_attention_again(remat, products):
    """Two products forward and five backward, and two if it is computed again."""
    x = jnp.ones((1, 128, 2, 64))

    def loss(x):
        def block(x, _):
            inputs = (jnp.sin(x),) * 3
            return attend(*inputs, causal=True, kernel="splash", interpret=True), None

        return jax.lax.scan(rematerialize(block, remat), x, length=3)[0].sum()

    flops = matrix_flops(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)
    assert flops / (3 * 2 * 2 * 128 * 128 * 64) == pytest.approx(products, abs=0.01)


def test_splash_attention_on_a_mesh():
    """Sequences and heads are split; each device runs the kernel on its own."""
    mesh = jax.make_mesh(
        (2, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, (4, 128, count, 64))
        for key, count in zip(keys, (4, 2, 2, 4))
    ]
    expected = outputs("xla", arrays, True)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *xs: outputs("splash", xs, True))(*arrays)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
