"""Cases from public training code: custom nodes, odd leaves and wrong calls."""

import functools

import chex
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cautious import (
    add_cautious_decayed_weights,
    aligned_fraction,
    cautious,
    cautious_adam,
    cautious_adamw,
    cautious_sgd,
    provide_gradient,
    with_caution,
)
from tests.named import NAMED, make


@flax.struct.dataclass
class Checking:
    """A node that accepts only arrays."""

    a: jax.Array
    b: jax.Array

    def __post_init__(self):
        """Check the children."""
        for x in (self.a, self.b):
            if not hasattr(x, "shape"):
                raise TypeError(f"not an array: {x!r}")


ARRAYS = {"a": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.array([1.0, -2.0])}
NODES = {
    "haiku": hk.data_structures.to_immutable_dict(ARRAYS),
    "dataclass": Checking(**ARRAYS),
}
# Optax's Muon builds the user's nodes around labels, its Adafactor around tuples.
NAMES = sorted(NAMED.keys() - {"muon"})
FORMS = {
    "link": lambda **kw: provide_gradient(optax.chain(optax.adam(0.1), cautious(**kw))),
    "with_caution": lambda **kw: with_caution(optax.adam(0.1), **kw),
    **{
        name: lambda name=name, mask=None, **kw: make(
            name, 0.1, caution_mask=mask, **kw
        )
        for name in NAMES
    },
}


def two_steps(tx, params):
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    turned = jax.tree.map(lambda p: -0.1 * p, params)
    return tx.update(turned, state, params)


@pytest.mark.parametrize(
    ("node", "form"),
    [(n, f) for n in NODES for f in FORMS if (n, f) != ("dataclass", "adafactor")],
)
def test_nodes_that_check_their_children(node, form):
    params = NODES[node]
    expected, _ = two_steps(FORMS[form](), ARRAYS)
    actual, _ = two_steps(FORMS[form](), params)
    assert jax.tree.structure(actual) == jax.tree.structure(params)
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (actual, expected)))


@pytest.mark.parametrize("form", FORMS)
def test_nodes_that_check_their_children_behind_a_mask(form):
    """Only the user's mask builds nodes of bools; caution builds none."""
    params = NODES["haiku"]

    def mask(updates):
        return jax.tree.map(lambda x: x.ndim == 2, updates)

    options = {"mask": mask, "stacked": 1, "monitor": True}
    expected, state = two_steps(FORMS[form](**options), ARRAYS)
    actual, same = two_steps(FORMS[form](**options), params)
    chex.assert_trees_all_equal(
        *map(jax.tree.leaves, ((actual, same), (expected, state)))
    )


@pytest.mark.parametrize("node", NODES)
def test_decay_and_fractions_of_nodes_that_check_their_children(node):
    params = NODES[node]
    decay = add_cautious_decayed_weights(0.1)
    updates, _ = decay.update(params, decay.init(params), params)
    fractions = aligned_fraction(updates, params, direction="ascent")
    for tree in (updates, fractions):
        assert jax.tree.structure(tree) == jax.tree.structure(params)


def test_an_embedding_of_integers_beside_the_model():
    """A counter or a table of integers, whose gradient is zero."""
    params = {"w": jnp.ones(3), "steps": jnp.arange(3)}
    grads = {"w": jnp.ones(3), "steps": jnp.zeros(3, int)}
    for name in NAMES:
        base, ours = NAMED[name].base(0.1), NAMED[name].ours(0.1)
        expected, _ = base.update(grads, base.init(params), params)
        actual, _ = ours.update(grads, ours.init(params), params)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


# Functions and numbers in place of a tree of bools.


def matrices(updates):
    return jax.tree.map(lambda x: x.ndim > 1, updates)


@pytest.mark.parametrize("wrap", [lambda update: update, jax.jit])
def test_a_mask_function_that_optax_took_for_a_schedule(wrap):
    make_injected = optax.inject_hyperparams(cautious_sgd)
    tx = make_injected(learning_rate=1.0, momentum=0.9, caution_mask=matrices)
    state = tx.init(ARRAYS)
    with pytest.raises(ValueError, match="static_args"):
        wrap(tx.update)(ARRAYS, state, ARRAYS)


@pytest.mark.parametrize("mask", [True, False, 1, np.bool_(True), jnp.array(True)])
@pytest.mark.parametrize("tree", [ARRAYS, {"w": jnp.ones((2, 2))}])
def test_one_bool_for_a_tree(tree, mask):
    with pytest.raises(ValueError, match=r"a single bool for a tree.*static_args"):
        cautious(mask=mask).update(tree, optax.EmptyState(), grad=tree)


@pytest.mark.parametrize("mask", [True, False])
def test_one_bool_for_one_array(mask):
    u = jnp.ones(2)
    out, _ = cautious(mask=mask).update(u, optax.EmptyState(), grad=u)
    np.testing.assert_array_equal(out, 0 * u if mask else u)


# Wrong calls.


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (
            lambda: cautious(optax.adamw(3e-4)),
            ["with_caution(optax", "provide_g"],
        ),
        (lambda: with_caution(), ["with_caution(optax.adamw(3e-4))", "cautious()"]),
        (
            lambda: with_caution(alignment="leaf"),
            ["with_caution(optax.adamw(3e-4))", "cautious()"],
        ),
        (
            lambda: provide_gradient(3e-4),
            ["provide_gradient(optax", "got 0.0003"],
        ),
        (lambda: with_caution(3e-4), ["with_caution(optax", "got 0.0003"]),
        (lambda: with_caution(optax.adam), ["Call it first: with_caution(adam(...))"]),
        (lambda: provide_gradient(optax.adam), ["provide_gradient(adam(...))"]),
        (
            lambda: provide_gradient(optax.MultiSteps(optax.adam(0.1), 2)),
            ["MultiSteps(provide_gradient(optimizer)"],
        ),
    ],
)
def test_the_message_shows_the_right_call(call, shown):
    with pytest.raises(TypeError) as error:
        call()
    for part in shown:
        assert part in str(error.value)


def test_the_wrapped_functions_keep_their_signatures():
    """optax.inject_hyperparams binds arguments by signature."""
    tx = optax.inject_hyperparams(cautious)(opposed_weight=0.5)
    assert tx.init(ARRAYS).hyperparams["opposed_weight"] == 0.5
    around = functools.partial(with_caution, optimizer=optax.adam(0.1))
    around().init(ARRAYS)


def test_a_state_without_a_monitor():
    tx = with_caution(optax.adam(0.1), monitor=True)
    named = optax.named_chain(("adam", optax.adam(0.1)))
    for other in (optax.adam(0.1), optax.identity(), named):
        with pytest.raises(ValueError, match=r"monitor=True, but .* docs/usage.md"):
            tx.update(ARRAYS, other.init(ARRAYS), ARRAYS)
    with pytest.raises(ValueError, match=r"monitor=True, but .* docs/usage.md"):
        tx.update(ARRAYS, jnp.zeros(()), ARRAYS)


@pytest.mark.parametrize(
    "optimizer",
    [
        with_caution(optax.adam(0.1), monitor=True),
        provide_gradient(optax.chain(optax.sgd(0.1), cautious(monitor=True))),
    ],
)
def test_the_monitor_of_the_optimizer_itself(optimizer):
    tx = with_caution(optimizer)
    _, state = tx.update(ARRAYS, tx.init(ARRAYS), ARRAYS)
    assert optax.tree.get(state, "aligned_fraction") == 1


def test_a_wrapper_between_the_gradient_and_caution():
    chain = optax.chain(optax.sgd(0.1), cautious())
    reshaping = provide_gradient(optax.flatten(chain))
    with pytest.raises(ValueError, match=r"wrapper\(provide_gradient\(\.\.\.\)\)"):
        reshaping.update(ARRAYS, reshaping.init(ARRAYS), ARRAYS)
    tx = provide_gradient(optax.contrib.split_real_and_imaginary(chain))
    with pytest.raises(ValueError, match=r"wrapper\(provide_gradient\(\.\.\.\)\)"):
        tx.update(ARRAYS, tx.init(ARRAYS), ARRAYS)
    outside = optax.flatten(provide_gradient(chain))
    outside.update(ARRAYS, outside.init(ARRAYS), ARRAYS)


@pytest.mark.parametrize("make_tx", [cautious_adam, cautious_sgd])
@pytest.mark.parametrize("monitor", [False, True])
def test_more_coordinates_than_an_int32_can_count(make_tx, monitor):
    params = {
        "one": jax.ShapeDtypeStruct((50_000, 60_000), jnp.float32),
        "many": jax.ShapeDtypeStruct((2, 40_000, 40_000), jnp.float32),
    }
    for neutral in ("hold", "ignore"):
        stacked = {"one": 0, "many": 1}
        tx = make_tx(0.1, neutral=neutral, stacked=stacked, monitor=monitor)
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)
    jax.eval_shape(aligned_fraction, params, params)


# Tracing and compilation.


def primitives(jaxpr) -> set[str]:
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(value, "jaxpr"):
                found |= primitives(value.jaxpr)
    return found


@pytest.mark.parametrize("tx", [cautious_adamw(0.1), with_caution(optax.adam(0.1))])
def test_small_leaves_have_no_cond_in_the_jaxpr(tx):
    state = tx.init(ARRAYS)
    closed = jax.make_jaxpr(tx.update)(ARRAYS, state, ARRAYS)
    assert "cond" not in primitives(closed.jaxpr)
    large = jax.ShapeDtypeStruct((300, 300), jnp.float32)  # by platform
    state = jax.eval_shape(tx.init, large)
    assert "cond" in primitives(jax.make_jaxpr(tx.update)(large, state, large).jaxpr)


def test_leaves_of_one_shape_are_traced_once(monkeypatch):
    from optax_cautious import _rule

    traced = []
    original = _rule._scale
    monkeypatch.setattr(
        _rule, "_scale", lambda *args: traced.append(None) or original(*args)
    )
    jax.clear_caches()
    params = [jnp.ones((3, 4))] * 20 + [jnp.ones(5)]
    for tx in (cautious_adam(0.1), with_caution(optax.adam(0.1))):
        jax.jit(tx.update).trace(params, tx.init(params), params)
    assert len(traced) == 2 * 2  # shapes and directions


def test_a_scheduled_number_compiles_once():
    make_injected = optax.inject_hyperparams(cautious_adam)
    tx = make_injected(0.1, opposed_weight=optax.linear_schedule(1.0, 0.0, 10))
    from optax_cautious import _rule

    jax.clear_caches()
    state = tx.init(ARRAYS)
    for _ in range(4):  # without jit, so the number is concrete at each step
        _, state = tx.update(ARRAYS, state, ARRAYS)
    assert _rule._by_element._cache_size() == len(ARRAYS)
