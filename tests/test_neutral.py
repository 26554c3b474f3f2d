"""Coordinates where the update or the gradient is exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cautious import cautious, cautious_adamw, with_caution
from tests import reference

FACTORS = {"hold": 100, "follow": 1, "ignore": 1}


def first_step(tx, grads):
    params = jax.tree.map(jnp.ones_like, grads)
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("neutral", FACTORS)
def test_an_embedding_with_one_row_in_a_hundred_in_the_batch(neutral):
    grads = jnp.zeros((1000, 4)).at[::100].set(jnp.arange(1.0, 5.0))
    base = first_step(optax.adamw(1e-3, weight_decay=0.0), grads)
    tx = cautious_adamw(1e-3, weight_decay=0.0, neutral=neutral)
    expected = base * FACTORS[neutral]
    np.testing.assert_allclose(first_step(tx, grads), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("neutral", "factor"), [("hold", 8), ("follow", 1), ("ignore", 1)]
)
def test_a_stack_of_eight_experts_with_one_active(neutral, factor):
    grads = jnp.zeros((8, 3, 4)).at[5].set(1.0)
    base = first_step(optax.adam(1e-3), grads)
    tx = with_caution(optax.adam(1e-3), neutral=neutral)
    np.testing.assert_allclose(first_step(tx, grads), base * factor, rtol=1e-6)
    # If each expert counts as a leaf, none is scaled up for the others.
    tx = with_caution(optax.adam(1e-3), neutral=neutral, stacked=1)
    np.testing.assert_allclose(first_step(tx, grads), base, rtol=1e-6)


@pytest.mark.parametrize("neutral", FACTORS)
@pytest.mark.parametrize("renormalize", ["clamp", "plus_one", None])
@pytest.mark.parametrize("opposed_weight", [0.0, 0.5, 1.0, -1.0])
def test_the_weights_match_the_reference(opposed_weight, renormalize, neutral):
    rng = np.random.default_rng(0)
    u, g = (rng.integers(-1, 2, 30) * rng.uniform(1, 2, 30) for _ in range(2))
    settings = {
        "opposed_weight": opposed_weight,
        "renormalize": renormalize,
        "neutral": neutral,
    }
    tx = cautious(**settings)
    actual, _ = tx.update(np.float32(u), tx.init(u), grad=np.float32(g))
    expected = reference.element(
        u, g, direction="descent", min_fraction=1e-3, **settings
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("renormalize", ["clamp", "plus_one"])
@pytest.mark.parametrize("opposed_weight", [0.0, 0.5])
def test_nothing_is_rescaled_if_all_are_ignored(opposed_weight, renormalize):
    tx = cautious(
        neutral="ignore", opposed_weight=opposed_weight, renormalize=renormalize
    )
    u, g = jnp.ones(4), jnp.zeros(4)
    with jax.debug_nans(True):
        out, _ = tx.update(u, tx.init(u), grad=g)
    np.testing.assert_array_equal(out, opposed_weight * u)


def test_follow_keeps_a_nan_in_the_update():
    tx = cautious(neutral="follow")
    out, _ = tx.update(jnp.array([jnp.nan, -1.0]), tx.init(None), grad=jnp.ones(2))
    np.testing.assert_array_equal(out, [jnp.nan, -1.0])
