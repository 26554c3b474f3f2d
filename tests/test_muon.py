"""Muon's choice of caution on the update or on the momentum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cautious import cautious_muon
from tests.named import NAMED

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}


def gradients(steps=8):
    rng = np.random.default_rng(0)
    for step in range(steps):
        mean = 1.0 if step < steps // 2 else -1.0
        yield {
            k: jnp.asarray(mean + rng.standard_normal(x.shape), jnp.float32)
            for k, x in PARAMS.items()
        }


def run(tx, state=None):
    state = tx.init(PARAMS) if state is None else state
    update, found = jax.jit(tx.update), []
    for grads in gradients():
        updates, state = update(grads, state, PARAMS)
        found.append((grads, updates))
    return found, state


@pytest.mark.parametrize(
    ("nesterov", "options"),
    [
        (True, {}),
        (False, {}),
        *((True, NAMED["muon"].configurations[i]) for i in (2, 3)),
        (False, NAMED["muon"].configurations[4]),
    ],
)
def test_with_opposed_weight_one_both_forms_are_muon(nesterov, options):
    base = optax.contrib.muon(1e-2, nesterov=nesterov, **options)
    expected, state = run(base)
    tx = cautious_muon(
        1e-2,
        nesterov=nesterov,
        caution_on="momentum",
        opposed_weight=1.0,
        **options,
    )
    actual, own = run(tx)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(own, state, rtol=1e-5, atol=1e-6)


def test_only_the_mask_on_the_update_is_strict():
    """With the mask on the update, no coordinate moves against the gradient."""
    opposed = {}
    for form in ("update", "momentum"):
        found, _ = run(cautious_muon(1e-2, caution_on=form))
        opposed[form] = sum(jnp.sum(u["w"] * g["w"] > 0) for g, u in found)
        assert all(jnp.all(u["b"] * g["b"] <= 0) for g, u in found)
    assert opposed["update"] == 0
    assert opposed["momentum"] > 0


@pytest.mark.parametrize("form", ["update", "momentum"])
def test_the_coefficients_are_read_from_the_state(form):
    other = cautious_muon(1e-2, (2.0, -1.5, 0.5), caution_on=form)
    tx = cautious_muon(1e-2, caution_on=form)
    expected, _ = run(other)
    actual, _ = run(tx, other.init(PARAMS))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["update", "momentum"])
def test_coefficients_for_each_step_under_inject_hyperparams(form):
    make = optax.inject_hyperparams(cautious_muon)
    actual, _ = run(make(1e-2, ns_coeffs="dion", caution_on=form))
    expected, _ = run(cautious_muon(1e-2, ns_coeffs="dion", caution_on=form))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_the_monitor_counts_the_momentum_of_matrices():
    tx = cautious_muon(1e-2, caution_on="momentum", monitor=True)
    state, m = tx.init(PARAMS), jnp.zeros((4, 3))
    update = jax.jit(tx.update)
    for grads in gradients():
        m = 0.95 * m + 0.05 * grads["w"]
        grads = {"w": grads["w"], "b": jnp.zeros(3)}
        _, state = update(grads, state, PARAMS)
        nesterov = 0.95 * m + 0.05 * grads["w"]
    agree = jnp.sum(nesterov * grads["w"] > 0)
    assert abs(float(optax.tree.get(state, "aligned_fraction") * 15 - agree)) <= 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_only_adaptive_muon_keeps_the_scale_of_the_momentum(adaptive):
    plain, scaled = (
        run(
            cautious_muon(
                1e-2, caution_on="momentum", adaptive=adaptive, renormalize=option
            )
        )[0][-1][1]["w"]
        for option in (None, "clamp")
    )
    ratio = np.linalg.norm(scaled) / np.linalg.norm(plain)
    assert ratio > 1.01 if adaptive else abs(ratio - 1) < 1e-3


def test_an_unknown_form_is_rejected():
    with pytest.raises(ValueError, match="caution_on must be one of 'update', 'mom"):
        cautious_muon(1e-2, caution_on="gradient")
