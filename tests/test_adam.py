"""cautious_adamw, which counts by the first moment, matches the chain, which cannot.

The fixture `branch` selects a branch of platform_dependent: the default one, which is
for backends other than the CPU, runs on a CPU as well.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_cautious import _mean, cautious_adamw, with_caution
from optax_cautious._optimizers import scale_by_adam

SHAPES = {"matrix": (48, 31), "vector": (129,), "scalar": (), "empty": (0, 3)}
CAUTION = {
    "default": {},
    "soft": {"opposed_weight": 0.25},
    "grams": {"opposed_weight": -1.0, "renormalize": None},
    "plus_one": {"renormalize": "plus_one"},
    # Without a monitor, Adam's moment is not used for inner products.
    "tree": {"alignment": "tree", "monitor": True},
    "masked": {"mask": {"matrix": False, "vector": True, "scalar": True, "empty": 1}},
    "follow": {"neutral": "follow"},
    "ignore": {"neutral": "ignore", "opposed_weight": 0.5},
    "stacked": {"stacked": {"matrix": 1, "vector": 0, "scalar": 0, "empty": 1}},
    "monitor": {"monitor": True},
}
ADAM = {
    "default": {},
    "mu_dtype": {"mu_dtype": jnp.bfloat16},
    "nesterov": {"nesterov": True},
    "nesterov_mu_dtype": {"nesterov": True, "mu_dtype": jnp.bfloat16},
    "eps_root": {"eps_root": 1e-3, "eps": 0.0, "b1": 0.5, "b2": 0.9},
    "no_momentum": {"b1": 0.0},
}
CASES = [(a, "default") for a in ADAM] + [("default", c) for c in CAUTION]
CASES += [("nesterov", c) for c in ("soft", "monitor")]
# Complex code compiles slowly, and bfloat16 has no complex counterpart.
COMPLEX_CASES = [("default", "grams"), ("nesterov", "soft")]
DTYPED_CASES = [
    *((*case, jnp.float32) for case in CASES),
    *((a, "default", jnp.bfloat16) for a in ("default", "nesterov_mu_dtype")),
    *((*case, jnp.complex64) for case in COMPLEX_CASES),
]
# The branches differ in how the mean is computed, and not in what is done with it.
BRANCHED_CASES = [
    *(("cpu", *case) for case in DTYPED_CASES),
    *(("default", adam, "default", jnp.float32) for adam in ADAM),
    ("default", "default", "monitor", jnp.float32),
    ("default", "nesterov", "monitor", jnp.float32),
    ("default", "default", "default", jnp.bfloat16),
    ("default", "default", "grams", jnp.complex64),
]


@pytest.fixture(scope="module", params=["cpu", "default"])
def branch(request):
    def chosen(*args, default, **branches):
        return branches.get(request.param, default)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", chosen)
        patch.setattr(_mean, "SMALL", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


def gradients(step: int, dtype=jnp.float32):
    """Draw normal numbers of many magnitudes, a tenth of them exactly zero."""
    rng = np.random.default_rng(step)

    def leaf(shape):
        magnitude = 10.0 ** rng.uniform(-12, 3, shape)
        g = magnitude * rng.standard_normal(shape) * (rng.random(shape) > 0.1)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            g = g + 1j * magnitude * rng.standard_normal(shape)
        return jnp.asarray(g, dtype)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


def both(adam, caution):
    """Build the fused form and the chain, without decay, which would hide the mask."""
    renamed = {("caution_mask" if k == "mask" else k): v for k, v in caution.items()}
    fused = cautious_adamw(1.0, weight_decay=0.0, **adam, **renamed)
    chain = optax.chain(
        with_caution(optax.scale_by_adam(**adam), direction="ascent", **caution),
        optax.add_decayed_weights(0.0),
        optax.scale_by_learning_rate(1.0),
    )
    return fused, chain


def assert_equal_updates(actual, expected):
    """Check that masks are equal, and values within 2 ulp of the update's scale."""
    for name, e in expected.items():
        a, e = np.asarray(actual[name]), np.asarray(e)
        np.testing.assert_array_equal(a == 0, e == 0)
        ulp = jnp.finfo(e.dtype).eps * np.abs(e).max(initial=0).astype(np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=2 * ulp)


@pytest.mark.parametrize(
    ("branch", "adam", "caution", "dtype"),
    BRANCHED_CASES,
    indirect=["branch"],
    scope="module",
)
def test_the_fused_form_matches_the_chain(branch, adam, caution, dtype):
    fused, chain = both(ADAM[adam], CAUTION[caution])
    params = jax.tree.map(jnp.ones_like, gradients(0, dtype))
    state, expected_state = fused.init(params), chain.init(params)
    chex.assert_trees_all_equal_structs(state, expected_state)
    update, expected_update = jax.jit(fused.update), jax.jit(chain.update)
    for step in range(10):
        grads = gradients(step, dtype)
        updates, state = update(grads, state, params)
        expected, expected_state = expected_update(grads, expected_state, params)
        assert_equal_updates(updates, expected)
        chex.assert_trees_all_close(state, expected_state, rtol=1e-6)
    # Some coordinates, but not all, are opposed at the last step.
    if caution == "default" and adam != "no_momentum":
        assert 0.2 < np.mean(np.asarray(updates["matrix"]) == 0) < 0.8


def test_the_state_matches_optax_adamw():
    params = gradients(0)
    for adam in ADAM.values():
        ours = cautious_adamw(1.0, **adam).init(params)
        chex.assert_trees_all_equal(ours, optax.adamw(1.0, **adam).init(params))


@pytest.mark.usefixtures("branch")
def test_a_nan_does_not_spread():
    fused, chain = both({}, {})
    grads = gradients(0)
    grads["matrix"] = grads["matrix"].at[3, 5].set(jnp.nan)
    for tx in (fused, chain):
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
        assert np.isnan(updates["matrix"][3, 5])
        assert np.isnan(updates["matrix"]).sum() == 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_moment_has_the_sign_of_the_update(nesterov):
    adam = optax.scale_by_adam(nesterov=nesterov)

    @jax.jit
    def signs(grads, state):
        updates, new = adam.update(grads, state)
        m_hat = functools.partial(
            scale_by_adam._m_hat,
            count=state.count,
            momentum=scale_by_adam._Momentum(0.9, nesterov),
        )
        moments = jax.tree.map(m_hat, grads, state.mu)
        return jax.tree.map(jnp.sign, (moments, updates)), new

    state = adam.init(gradients(0))
    for step in range(10):
        (of_moments, of_updates), state = signs(gradients(step), state)
        chex.assert_trees_all_equal(of_moments, of_updates)


def test_an_update_that_underflows_is_counted_by_its_moment():
    # The one difference, as documented: 1e-30 / sqrt(1e20) underflows to zero.
    adam = optax.scale_by_adam()
    grads = jnp.array([1e-30, 1.0])
    state = adam.init(grads)._replace(nu=jnp.array([1e20, 1e-3]))
    fused, chain = both({}, {})
    for tx, factor in ((fused, 1.0), (chain, 2.0)):
        old = (state, *tx.init(grads)[1:])
        updates, _ = tx.update(grads, old, grads)
        (_, plain), _ = adam.update(grads, state)
        chex.assert_trees_all_close(updates, jnp.array([0.0, -factor * plain]))


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield jnp.dtype(request.param)
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(
    "shape", [(), (1,), (31,), (37,), (64,), (3, 50257), (5, 4, 9)]
)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_fraction_on_a_cpu_is_the_mean(share, shape, dtype):
    mask = np.random.default_rng(0).random(shape) < share
    axes = tuple(range(len(shape)))
    actual = jax.jit(_mean.fraction_on_cpu, static_argnums=(1, 2))(
        jnp.asarray(mask), axes, dtype
    )
    assert actual.dtype == dtype
    expected = np.mean(mask, dtype=dtype)
    np.testing.assert_allclose(actual, expected, rtol=jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("branch", "spec", "columns", "axis_type"),
    [
        ("cpu", P("x", None), 24, AxisType.Auto),
        ("cpu", P(None, "x"), 24, AxisType.Auto),
        ("cpu", P("x", "y"), 1376, AxisType.Auto),
        ("cpu", P("x", None), 1376, AxisType.Explicit),
        ("cpu", P(None, "x"), 1376, AxisType.Explicit),
        ("cpu", P("x", "y"), 24, AxisType.Explicit),
        ("cpu", P(), 24, AxisType.Explicit),
        ("default", P("x", "y"), 24, AxisType.Auto),
        ("default", P("x", "y"), 1376, AxisType.Explicit),
    ],
    indirect=["branch"],
    scope="module",
)
def test_sharded_leaves_with_every_axis_type(branch, spec, columns, axis_type):
    # An axis that the type declares sharded can only be split at its shards.
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    grads = [jax.random.normal(jax.random.key(i), (16, columns)) for i in range(3)]
    tx = cautious_adamw(1.0, weight_decay=0.0)

    def train(grads):
        state = tx.init(grads[0])
        for g in grads:
            updates, state = tx.update(g, state, g)
        return updates

    expected = jax.jit(train)(grads)
    actual = jax.jit(train)(jax.device_put(grads, NamedSharding(mesh, spec)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
