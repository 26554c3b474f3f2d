"""Cautious weight decay, as a link and in the named optimizers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cautious import add_cautious_decayed_weights
from tests.named import BIASES, DECAYING, NAMED, make

PARAMS = {"w": jnp.array([[1.0, -2.0, 3.0, 0.0]]), "b": jnp.array([2.0, -1.0])}
UPDATES = {"w": jnp.array([[1.0, 1.0, 0.0, 1.0]]), "b": jnp.array([-1.0, -1.0])}
#: 1 where the decay does not oppose the update, for updates that point up the loss.
DECAYED = {"w": jnp.array([[1.0, 0.0, 1.0, 1.0]]), "b": jnp.array([0.0, 1.0])}


def expected(strength, sign=1.0):
    return jax.tree.map(
        lambda u, p, d: sign * (u + strength * d * p), UPDATES, PARAMS, DECAYED
    )


def apply(tx, updates=UPDATES):
    return tx.update(updates, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("strength", [0.1, jnp.float32(0.1), lambda count: 0.1])
def test_it_decays_where_it_does_not_oppose_the_update(strength):
    tx = add_cautious_decayed_weights(strength)
    out, state = apply(tx)
    chex.assert_trees_all_close(out, expected(0.1))
    plain = optax.add_decayed_weights(strength)
    chex.assert_trees_all_equal(state, apply(plain)[1])
    jitted, _ = jax.jit(tx.update)(UPDATES, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(jitted, out)


def test_a_traced_decay():
    traced = jax.jit(lambda s: apply(add_cautious_decayed_weights(s))[0])
    chex.assert_trees_all_close(traced(0.1), expected(0.1))


def test_direction_descent():
    tx = add_cautious_decayed_weights(0.1, direction="descent")
    out, _ = apply(tx, jax.tree.map(jnp.negative, UPDATES))
    chex.assert_trees_all_close(out, expected(0.1, sign=-1.0))


def test_a_schedule_is_evaluated_at_each_step():
    tx = add_cautious_decayed_weights(optax.linear_schedule(0.0, 1.0, 10))
    state = tx.init(PARAMS)
    for step in range(3):
        out, state = tx.update(UPDATES, state, PARAMS)
        chex.assert_trees_all_close(out, expected(step / 10))


@pytest.mark.parametrize("mask", [BIASES, lambda params: BIASES])
def test_mask(mask):
    tx = add_cautious_decayed_weights(0.1, mask)
    out, state = apply(tx)
    chex.assert_trees_all_close(out, {**expected(0.1), "b": UPDATES["b"]})
    plain = optax.add_decayed_weights(0.1, mask)
    assert jax.tree.structure(state) == jax.tree.structure(apply(plain)[1])


@pytest.mark.parametrize(
    "other",
    [np.zeros((), jax.dtypes.float0), jnp.array(True), jax.random.key(0)],
)
def test_leaves_outside_the_mask_may_be_of_any_kind(other):
    """The gradient of an integer, for example, has the dtype float0."""
    params, updates = ({**tree, "other": other} for tree in (PARAMS, UPDATES))
    mask = {**jax.tree.map(lambda _: True, PARAMS), "other": False}
    tx = add_cautious_decayed_weights(0.1, mask)
    out, _ = tx.update(updates, tx.init(params), params)
    assert out.pop("other") is other
    chex.assert_trees_all_close(out, expected(0.1))


def test_a_product_that_underflows_still_has_a_sign():
    params, u = jnp.array([1e-30, -1e-30]), jnp.array([1e-30, 1e-30])
    tx = add_cautious_decayed_weights(1.0)
    out, _ = tx.update(u, tx.init(params), params)
    np.testing.assert_array_equal(out, u + jnp.array([1e-30, 0.0]))


def test_dtypes_none_and_nan():
    updates = {
        "h": jnp.ones(2, jnp.bfloat16),
        "n": None,
        "x": jnp.array([jnp.nan, 1.0]),
    }
    params = {"h": jnp.ones(2, jnp.bfloat16), "n": None, "x": jnp.ones(2)}
    tx, plain = add_cautious_decayed_weights(0.5), optax.add_decayed_weights(0.5)
    out, _ = tx.update(updates, tx.init(params), params)
    like, _ = plain.update(updates, plain.init(params), params)
    chex.assert_trees_all_equal(out, like)
    assert out["h"].dtype == jnp.bfloat16


def test_errors():
    for number in (-0.1, np.float32(-0.1), jnp.float32(-0.1), jnp.array(-0.1 + 0j)):
        with pytest.raises(ValueError, match="weight_decay must not be negative"):
            add_cautious_decayed_weights(number)
    with pytest.raises(ValueError, match="direction must be one of"):
        add_cautious_decayed_weights(0.1, direction="up")
    tx = add_cautious_decayed_weights(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(UPDATES, tx.init(PARAMS))


# In the named optimizers.


@pytest.mark.parametrize("name", DECAYING)
def test_a_named_optimizer_decays_only_along_its_update(name):
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4), "b": jnp.array([-1.0, 2.0])}
    grads = {"w": jnp.eye(4) - 0.5, "b": jnp.array([1.0, 1.0])}
    found = {}
    states = []
    for key, options in {
        "none": {},
        "plain": NAMED[name].decayed,
        "cautious": {**NAMED[name].decayed, "cautious_decay": True},
    }.items():
        tx = make(name, 1e-2, **options)
        found[key], state = jax.jit(tx.update)(grads, tx.init(params), params)
        states.append(jax.tree.structure(state))
    assert states[2] == states[1]
    for k, p in params.items():
        update, plain = found["none"][k], found["plain"][k]
        # The update is added, so it shrinks a parameter of the opposite sign.
        along = update * p <= 0
        assert jnp.any(along)
        assert not jnp.all(along)
        np.testing.assert_allclose(
            found["cautious"][k], jnp.where(along, plain, update), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(plain - update, -3e-3 * p, rtol=1e-3)


@pytest.mark.parametrize("name", DECAYING)
def test_a_traced_or_scheduled_decay_is_a_float(name):
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4), "b": jnp.array([-1.0, 2.0])}
    grads = {"w": jnp.eye(4) - 0.5, "b": jnp.array([1.0, 1.0])}

    def step(strength):
        decay = dict.fromkeys(NAMED[name].decayed, strength)
        tx = make(name, 1e-2, cautious_decay=True, **decay)
        return tx.update(grads, tx.init(params), params)[0]

    number = step(0.1)
    chex.assert_trees_all_close(jax.jit(step)(0.1), number, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(step(lambda count: 0.1), number, rtol=1e-5, atol=1e-7)
