"""Leaves that stack what another model keeps in separate leaves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_cautious import aligned_fraction, cautious, cautious_adam, with_caution

LAYERS, EXPERTS = 3, 4
# A model with scanned layers, each with a mixture of experts.
STACKED = {"layers": {"kernel": 1, "scale": 1, "experts": 2}, "head": 0}
SETTINGS = [
    {},
    {"opposed_weight": 0.5, "neutral": "ignore"},
    {"renormalize": "plus_one", "neutral": "follow"},
    {"alignment": "leaf"},
    {"alignment": "tree"},
]


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        # The agreeing fraction differs between layers.
        shift = np.linspace(-1.0, 1.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(rng.standard_normal(shape) + shift, jnp.float32)

    return {
        "layers": {
            "kernel": leaf(LAYERS, 8, 16),
            "scale": leaf(LAYERS, 8),
            "experts": leaf(LAYERS, EXPERTS, 8, 2),
        },
        "head": leaf(8, 5),
    }


def unstack(tree: dict) -> dict:
    """Split the stacked leaves into separate leaves."""
    layers = [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(LAYERS)]
    for layer in layers:
        layer["experts"] = list(layer["experts"])
    return {"layers": layers, "head": tree["head"]}


def step(tx, u, g):
    out, state = tx.update(u, tx.init(u), grad=g)
    return out, optax.tree.get(state, "aligned_fraction")


@pytest.mark.parametrize("rule", SETTINGS, ids=str)
def test_it_matches_the_unstacked_model(rule):
    u, g = draw(0), draw(1)
    actual, fraction = step(cautious(stacked=STACKED, monitor=True, **rule), u, g)
    expected, whole = step(cautious(monitor=True, **rule), unstack(u), unstack(g))
    chex.assert_trees_all_close(unstack(actual), expected, rtol=1e-6)
    np.testing.assert_allclose(fraction, whole, rtol=1e-6)
    if rule.get("alignment") != "tree":
        merged, _ = step(cautious(monitor=True, **rule), u, g)
        assert not np.allclose(merged["layers"]["kernel"], actual["layers"]["kernel"])


@pytest.mark.parametrize(
    "stacked",
    [
        lambda updates: STACKED,
        {"layers": {"kernel": np.int64(1), "scale": 1, "experts": 2}, "head": 0},
    ],
)
def test_a_function_or_a_tree(stacked):
    u, g = draw(0), draw(1)
    actual = step(cautious(stacked=stacked, monitor=True), u, g)
    chex.assert_trees_all_equal(
        actual, step(cautious(stacked=STACKED, monitor=True), u, g)
    )


def test_an_int_or_a_prefix_of_the_tree():
    u, g = draw(0)["layers"], draw(1)["layers"]
    one, _ = step(cautious(stacked=1, monitor=True), u, g)
    prefix, _ = step(
        cautious(stacked={"layers": 1}, monitor=True), {"layers": u}, {"layers": g}
    )
    chex.assert_trees_all_equal(one, prefix["layers"])
    for i in range(LAYERS):
        layer = jax.tree.map(lambda x, i=i: x[i], (u, g, one))
        expected, _ = step(cautious(monitor=True), *layer[:2])
        chex.assert_trees_all_close(layer[2], expected, rtol=1e-6)


def test_none_means_zero():
    u, g = draw(0), draw(1)
    zeros = jax.tree.map(lambda _: 0, u)
    chex.assert_trees_all_equal(
        step(cautious(stacked=zeros, monitor=True), u, g),
        step(cautious(monitor=True), u, g),
    )


def test_a_named_optimizer_counts_per_layer_by_the_moment():
    tx, merged = (cautious_adam(0.1, stacked=s) for s in (STACKED, None))
    params = draw(0)
    states = [tx.init(params), merged.init(unstack(params))]
    for seed in range(1, 5):
        g = draw(seed)
        actual, states[0] = tx.update(g, states[0])
        expected, states[1] = merged.update(unstack(g), states[1])
    chex.assert_trees_all_close(unstack(actual), expected, rtol=1e-5, atol=1e-7)


def test_aligned_fraction_has_a_value_per_slice():
    u, g = draw(0), draw(1)
    fractions = aligned_fraction(u, g, stacked=STACKED)
    assert fractions["layers"]["experts"].shape == (LAYERS, EXPERTS)
    chex.assert_trees_all_close(
        unstack(fractions), aligned_fraction(unstack(u), unstack(g))
    )


def test_a_leaf_of_scalars():
    """In a stack of scalars, each scalar is a slice that agrees or does not."""
    tx = cautious(stacked=1)
    u, g = -jnp.ones(3), jnp.array([1.0, -1.0, 0.0])
    out, _ = tx.update(u, tx.init(u), grad=g)
    np.testing.assert_array_equal(out, [-1.0, 0.0, 0.0])
    np.testing.assert_array_equal(aligned_fraction(u, g, stacked=1), [1.0, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3, 0, 2)])
def test_empty_leaves(shape):
    u = jnp.zeros(shape)
    tx = cautious(stacked=1, monitor=True)
    with jax.debug_nans(True):
        out, state = tx.update(u, tx.init(u), grad=u)
    assert out.shape == shape
    assert state.aligned_fraction == 0


def test_vmap_matches_a_loop():
    tx = cautious(stacked=STACKED, monitor=True)
    members = [(draw(2 * i), draw(2 * i + 1)) for i in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    actual = jax.vmap(functools.partial(step, tx))(*stacked)
    for i, member in enumerate(members):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], actual), step(tx, *member), rtol=1e-6
        )


SPECS = {
    "layers": {
        "kernel": P(None, None, "x"),
        "scale": P(None, "x"),
        "experts": P(None, None, "x"),
    },
    "head": P("x"),
}


@pytest.mark.parametrize("rule", SETTINGS, ids=str)
def test_sharded_leaves_match_one_device(rule):
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    u, g = draw(0), draw(1)
    tx = cautious(stacked=STACKED, monitor=True, **rule)
    expected = step(tx, u, g)
    put = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    jitted = jax.jit(functools.partial(step, tx))(*jax.device_put((u, g), (put, put)))
    chex.assert_trees_all_close(jitted, expected, rtol=1e-5)

    mapped = cautious(stacked=STACKED, monitor=True, axis_name="x", **rule)
    sharded = jax.jit(
        jax.shard_map(
            functools.partial(step, mapped),
            mesh=mesh,
            in_specs=(SPECS, SPECS),
            out_specs=(SPECS, P()),
        )
    )(u, g)
    chex.assert_trees_all_close(sharded, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("stacked", "message"),
    [
        (2, r"stacked is 2 at \['head'\].*Pass a tree of numbers"),
        ({"layers": 1}, "stacked must be a number of leading axes, or a tree"),
        (0, "None if nothing is stacked.*ame stacked in static_args"),
        ({"layers": 0, "head": -1}, "got the leaf -1.*static_args"),
        (True, "got the leaf True"),
        (1.0, "got the leaf 1.0"),
        ("layers", "got the leaf 'layers'"),
        (jnp.array(1), "name stacked in static_args"),
    ],
)
def test_invalid_values_are_rejected(stacked, message):
    u = {"layers": jnp.ones((2, 3)), "head": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        step(cautious(stacked=stacked), u, u)


def test_a_function_that_optax_took_for_a_schedule():
    make = optax.inject_hyperparams(cautious_adam)
    for function in (lambda u: 0, lambda u: u.ndim - 2):
        tx = make(0.1, stacked=lambda u, f=function: jax.tree.map(f, u))
        state = tx.init(draw(0))
        with pytest.raises(ValueError, match="name stacked in static_args"):
            tx.update(draw(0), state, draw(0))


def test_a_tree_for_all_parts_of_a_partition():
    """Each part sees only its own leaves, so a function of the updates is needed."""

    def stacked(updates):
        known = {"layers": 1, "head": 0}
        return {k: jax.tree.map(lambda _, n=n: n, updates[k]) for k, n in known.items()}

    u = {"layers": {"k": jnp.ones((2, 3))}, "head": jnp.ones(3)}
    labels = {"layers": "a", "head": "b"}
    full = {"layers": {"k": 1}, "head": 0}
    for given, fits in ((stacked, True), (full, False)):
        tx = optax.partition(
            {k: with_caution(optax.sgd(0.1), stacked=given) for k in "ab"}, labels
        )
        if fits:
            tx.update(u, tx.init(u), u)
        else:
            with pytest.raises(ValueError, match="pass a function of the updates"):
                tx.update(u, tx.init(u), u)


def test_inject_hyperparams_takes_it_as_a_static_argument():
    u = jnp.ones((2, 3))
    for static_args in ("stacked", ()):
        make = optax.inject_hyperparams(with_caution, static_args=static_args)
        tx = make(optax.adam(0.1), stacked=1)
        state = tx.init(u)
        if static_args:
            tx.update(u, state, u)
        else:
            with pytest.raises(ValueError, match="name stacked in static_args"):
                tx.update(u, state, u)
