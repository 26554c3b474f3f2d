"""The next-token loss: in blocks it equals the loss of all logits at once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

for _module in ("grain", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.llama import loss
from examples.training.modules import linear

BATCH, LENGTH, FEATURES, VOCABULARY = 8, 12, 16, 40

pytestmark = pytest.mark.usefixtures("little_optimization")


def make_output(dtype):
    return linear(
        FEATURES,
        VOCABULARY,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(0.5),
        rngs=nnx.Rngs(0),
        output_dtype=jnp.float32,
    )


def make_inputs(dtype):
    keys = jax.random.split(jax.random.key(1))
    features = jax.random.normal(keys[0], (BATCH, LENGTH, FEATURES), dtype)
    return features, jax.random.randint(keys[1], (BATCH, LENGTH), 0, VOCABULARY)


def loss_and_gradients(dtype):
    """Return the loss and its gradients for the kernel and the features."""
    features, targets = make_inputs(dtype)
    graphdef, state = nnx.split(make_output(dtype))

    def of(state, features):
        return loss.mean_cross_entropy(features, nnx.merge(graphdef, state), targets)

    # The factor shows whether the gradients are scaled.
    return jax.jit(jax.value_and_grad(lambda *x: 3.0 * of(*x), argnums=(0, 1)))(
        state, features
    )


def in_blocks(monkeypatch, blocks):
    monkeypatch.setattr(loss, "LARGEST_LOGITS", BATCH * LENGTH * VOCABULARY // blocks)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), (1, 8, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)]
)
def test_blocks_change_nothing(mesh, dtype, tolerance, monkeypatch):
    expected = loss_and_gradients(dtype)
    features, targets = make_inputs(dtype)
    logits = make_output(dtype)(features)
    by_optax = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(expected[0], 3.0 * by_optax.mean(), rtol=1e-6)
    in_blocks(monkeypatch, 4)
    if mesh is None:
        found = loss_and_gradients(dtype)
    else:
        in_blocks(monkeypatch, 4 * mesh[0] * mesh[1])
        axes = (jax.sharding.AxisType.Auto,) * 3
        names = ("data", "fsdp", "tensor")
        with jax.set_mesh(jax.make_mesh(mesh, names, axis_types=axes)):
            assert loss.number_of_blocks(BATCH, LENGTH, VOCABULARY) > 1
            found = loss_and_gradients(dtype)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < tolerance


@pytest.mark.parametrize(
    ("largest", "blocks"),
    [(3840, 1), (3839, 2), (1000, 4), (999, 4), (900, 6), (1, 12)],
)
def test_the_sequence_is_split_evenly_into_as_few_blocks_as_possible(
    largest, blocks, monkeypatch
):
    assert BATCH * LENGTH * VOCABULARY == 3840
    monkeypatch.setattr(loss, "LARGEST_LOGITS", largest)
    assert loss.number_of_blocks(BATCH, LENGTH, VOCABULARY) == blocks


def test_blocks_are_used_by_default_where_the_vocabulary_is_large():
    """One block for the demo, four for four sequences of the paper's Llamas."""
    assert loss.number_of_blocks(16, 128, 2048) == 1
    assert loss.number_of_blocks(4, 1024, 32_000) == 4


def test_the_logits_of_all_tokens_are_never_held(monkeypatch):
    """Neither forward nor backward; kernel and features are smaller than they."""

    def largest_array():
        features, targets = make_inputs(jnp.float32)
        graphdef, state = nnx.split(make_output(jnp.float32))
        gradient = jax.grad(
            lambda state, features: loss.mean_cross_entropy(
                features, nnx.merge(graphdef, state), targets
            ),
            argnums=(0, 1),
        )
        return max(sizes(jax.make_jaxpr(gradient)(state, features).jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            values = itertools.chain.from_iterable(
                value if isinstance(value, tuple) else (value,)
                for value in equation.params.values()
            )
            for value in values:
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    logits = BATCH * LENGTH * VOCABULARY
    assert largest_array() == logits
    in_blocks(monkeypatch, 2)
    assert largest_array() == logits // 2
