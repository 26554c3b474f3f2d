"""The public functions with and without jit, on one device and under pmap."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import optax_cautious
from tests.named import NAMED, make


def tree(seed: int) -> dict:
    """Draw with NumPy: with JAX, every worker would compile the generator on import."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((3, 4), np.float32)),
        "b": jnp.asarray(rng.standard_normal(5, np.float32).astype(jnp.bfloat16)),
    }


UPDATES, GRADS = tree(0), tree(1)
TRANSFORMATIONS = {
    **{
        f"cautious_{alignment}_{renormalize}": optax_cautious.provide_gradient(
            optax.chain(
                optax.trace(0.9),
                optax_cautious.cautious(
                    direction="ascent",
                    alignment=alignment,
                    renormalize=renormalize,
                    opposed_weight=-0.5,
                    monitor=True,
                ),
            )
        )
        for alignment, renormalize in (
            ("element", "clamp"),
            ("element", "plus_one"),
            ("element", None),
            ("leaf", None),
            ("tree", None),
        )
    },
    "stacked": optax_cautious.with_caution(
        optax.adam(1e-2), stacked={"w": 1, "b": 0}, neutral="ignore"
    ),
    "cautious_decay": optax_cautious.cautious_adamw(1e-2, cautious_decay=True),
    "momentum": optax_cautious.cautious_muon(1e-2, caution_on="momentum"),
    **{  # adamw with a monitor covers adam
        name: make(name, 1e-2, monitor=name == "adamw")
        for name in NAMED
        if name != "adam"
    },
}


def two_steps(tx: optax.GradientTransformation) -> Callable:
    """Build a function of two steps, the second against the momentum."""

    def run(grads, params):
        state = tx.init(params)
        _, state = tx.update(grads, state, params)
        turned = jax.tree.map(lambda g: jnp.roll(g, 1) * 1e-2, grads)
        return tx.update(turned, state, params)

    return run


@functools.cache
def without_jit(name: str):
    return two_steps(TRANSFORMATIONS[name])(GRADS, UPDATES)


class VariantsTest(chex.TestCase):
    def check(self, name):
        expected_updates, expected_state = without_jit(name)
        run = self.variant(two_steps(TRANSFORMATIONS[name]))
        updates, state = run(GRADS, UPDATES)
        # bfloat16 leaves differ where XLA fuses a rounding away, and in the variant
        # without a device through NumPy's promotion.
        tolerance = {"rtol": 2e-2, "atol": 1e-5}
        chex.assert_trees_all_close(updates, expected_updates, **tolerance)
        chex.assert_trees_all_close(state, expected_state, **tolerance)
        chex.assert_trees_all_close(
            updates["w"], expected_updates["w"], rtol=1e-5, atol=1e-7
        )

    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(*TRANSFORMATIONS)
    def test_every_variant_takes_the_same_step(self, name):
        self.check(name)

    # For the other optimizers, see test_sharding.py.
    @chex.variants(with_pmap=True)
    @parameterized.parameters("stacked", "cautious_decay", "momentum", "muon")
    def test_pmap_takes_the_same_step(self, name):
        self.check(name)

    @chex.all_variants(with_pmap=True)
    def test_aligned_fraction(self):
        actual = self.variant(optax_cautious.aligned_fraction)(UPDATES, GRADS)
        expected = optax_cautious.aligned_fraction(UPDATES, GRADS)
        chex.assert_trees_all_close(actual, expected)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_vmap_matches_a_loop(name):
    """Each member of an ensemble has its own fraction."""
    tx = TRANSFORMATIONS[name]
    members = [tree(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    one = jax.jit(two_steps(tx))
    updates, _ = jax.vmap(one)(stacked, stacked)
    for i, member in enumerate(members):
        expected, _ = one(member, member)
        actual = jax.tree.map(lambda x, i=i: x[i], updates)
        chex.assert_trees_all_close(actual, expected, rtol=2e-2, atol=1e-4)
        chex.assert_trees_all_close(actual["w"], expected["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_scan_keeps_the_states_type_and_compiles_once(name):
    """To trace a scan, JAX requires that a step returns the types that it takes."""
    tx = TRANSFORMATIONS[name]

    def train(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(GRADS, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=5)[0]

    jaxpr = jax.make_jaxpr(train)(UPDATES, tx.init(UPDATES))
    assert jaxpr.in_avals == jaxpr.out_avals


# The four left out run the same code of the library as the others.
@pytest.mark.parametrize(
    "name", sorted(TRANSFORMATIONS.keys() - {"lion", "sgd", "adafactor", "muon"})
)
def test_the_update_is_differentiable(name):
    """Meta-gradients through a step are finite: no NaN from an untaken branch."""
    tx = TRANSFORMATIONS[name]

    def after_a_step(grads):
        updates, _ = two_steps(tx)(grads, UPDATES)
        return sum(jnp.sum(u.astype(jnp.float32)) for u in jax.tree.leaves(updates))

    chex.assert_tree_all_finite(jax.jit(jax.grad(after_a_step))(GRADS))


@pytest.mark.parametrize("neutral", ["hold", "follow", "ignore"])
@pytest.mark.parametrize("renormalize", ["clamp", "plus_one"])
@pytest.mark.parametrize("setting", ["opposed_weight", "min_fraction"])
def test_derivatives_by_the_settings_are_finite(setting, renormalize, neutral):
    """A leaf without a gradient has no coordinate to average over."""
    u = {"idle": jnp.ones(3), "used": jnp.array([1.0, -2.0, 3.0])}
    g = {"idle": jnp.zeros(3), "used": jnp.array([-1.0, -1.0, -1.0])}

    def loss(value):
        options = {setting: value, "renormalize": renormalize, "neutral": neutral}
        out, _ = optax_cautious.cautious(**options).update(
            u, optax.EmptyState(), grad=g
        )
        return optax.tree.norm(out, squared=True)

    assert jnp.isfinite(jax.grad(loss)(0.5))


@pytest.mark.parametrize("setting", ["opposed_weight", "min_fraction"])
def test_a_traced_setting_is_a_scalar(setting):
    def update(value):
        u = jnp.ones(3)
        tx = optax_cautious.cautious(**{setting: value})
        return tx.update(u, optax.EmptyState(), grad=-u)

    with pytest.raises(ValueError, match=f"{setting} must be a number"):
        jax.jit(update)(jnp.full(3, 0.5))
    jax.jit(jax.vmap(update))(jnp.full(3, 0.5))


def test_numeric_settings_may_be_traced():
    @jax.jit
    def update(opposed_weight, min_fraction):
        tx = optax_cautious.cautious(
            opposed_weight=opposed_weight, min_fraction=min_fraction
        )
        return tx.update(UPDATES, tx.init(UPDATES), grad=GRADS)[0]

    for weight, fraction in ((0.0, 1e-3), (-1.0, 0.9)):
        tx = optax_cautious.cautious(opposed_weight=weight, min_fraction=fraction)
        expected, _ = tx.update(UPDATES, tx.init(UPDATES), grad=GRADS)
        chex.assert_trees_all_close(update(weight, fraction), expected, rtol=1e-6)
    assert update._cache_size() == 1
