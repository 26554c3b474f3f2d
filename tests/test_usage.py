"""Tests of docs/usage.md, one for each row of its first table."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from optax_cautious import (
    CautiousState,
    aligned_fraction,
    cautious_adam,
    cautious_adamw,
    cautious_sgd,
    provide_gradient,
    with_caution,
)

DOCS = Path(__file__).parent.parent / "docs" / "usage.md"
TABLE = DOCS.read_text().partition("| wrapper | write | why |")[2].partition("\n\n")[0]
ROWS = {
    line.split("|")[1].strip().strip("`")
    for line in re.findall(r"^\| .*", TABLE, re.MULTILINE)
} - {"---"}

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.array([1.0, -2.0])}
W_ALONE = {"w": True, "b": False}


def gradient(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "w": jax.random.normal(keys[0], (3, 4)),
        "b": jax.random.normal(keys[1], (2,)),
    }


def sgd():
    return optax.sgd(0.1, momentum=0.9)


def updates_of(tx, steps: int = 4) -> list:
    state, found = tx.init(PARAMS), []
    for seed in range(steps):
        updates, state = tx.update(gradient(seed), state, PARAMS)
        found.append(updates)
    return found


def loss(params) -> jax.Array:
    return sum(jnp.sum((x - 1.0) ** 2) for x in jax.tree.leaves(params))


def matrix_loss(x) -> jax.Array:
    return jnp.sum((x - jnp.array([[3.0, -2.0], [1.0, 4.0]])) ** 2)


def descend(
    tx,
    steps: int = 2000,
    needs=(),
    evaluate=lambda state, params: params,
    loss=loss,
    params=PARAMS,
):
    """Return the loss after training."""

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grad, "value_fn": loss}
        updates, state = tx.update(grad, state, params, **{k: extra[k] for k in needs})
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(start)
    return loss(evaluate(state, params))


def multi_steps():
    inside = optax.MultiSteps(with_caution(sgd()), 2)
    reference = with_caution(sgd())
    state, expected_state = inside.init(PARAMS), reference.init(PARAMS)
    for seed in range(0, 8, 2):
        pair = gradient(seed), gradient(seed + 1)
        for g in pair:
            updates, state = inside.update(g, state, PARAMS)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        expected, expected_state = reference.update(mean, expected_state, PARAMS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    around = optax.MultiSteps(sgd(), 2)
    for tx in (around, around.gradient_transformation()):
        with pytest.raises(TypeError, match=r"MultiSteps\(with_caution\(optimizer\)"):
            with_caution(tx)
    chain = optax.chain(optax.clip_by_global_norm(1.0), around)
    for wrap in (with_caution, provide_gradient):
        with pytest.raises(TypeError, match=r"Put it inside:\s+optax.MultiSteps"):
            wrap(chain).init(PARAMS)
    parts = optax.partition({"w": inside, "b": sgd()}, {"w": "w", "b": "b"})
    provide_gradient(parts).init(PARAMS)


def apply_if_finite():
    bad = {**gradient(0), "b": jnp.array([jnp.nan, 1.0])}
    for tx in (
        with_caution(optax.apply_if_finite(sgd(), 5)),
        optax.apply_if_finite(with_caution(sgd()), 5),
    ):
        updates, state = tx.update(bad, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        updates, _ = tx.update(gradient(1), state, PARAMS)
        assert jnp.any(updates["b"] != 0)


def masked():
    inside = optax.masked(with_caution(sgd()), W_ALONE)
    around = with_caution(optax.masked(sgd(), W_ALONE))
    for updates, wrong, seed in zip(updates_of(inside), updates_of(around), range(4)):
        np.testing.assert_array_equal(updates["b"], gradient(seed)["b"])
        np.testing.assert_array_equal(wrong["b"], 0)


def partition():
    labels = {"w": "a", "b": "b"}
    inside = optax.partition({k: with_caution(sgd()) for k in "ab"}, labels)
    around = with_caution(optax.partition({k: sgd() for k in "ab"}, labels))
    chex.assert_trees_all_close(updates_of(inside), updates_of(around), rtol=1e-6)


def inject_hyperparams():
    make = optax.inject_hyperparams(
        cautious_sgd, static_args=("caution_mask", "stacked")
    )
    tx = make(0.1, 0.9, caution_mask=lambda u: W_ALONE, stacked={"w": 1, "b": 0})
    plain = cautious_sgd(0.1, 0.9, caution_mask=W_ALONE, stacked={"w": 1, "b": 0})
    chex.assert_trees_all_close(updates_of(tx), updates_of(plain), rtol=1e-6)


def flatten():
    around, inside = (
        updates_of(tx)
        for tx in (
            with_caution(optax.flatten(sgd())),
            optax.flatten(with_caution(sgd())),
        )
    )
    chex.assert_trees_all_close(around, updates_of(with_caution(sgd())), rtol=1e-6)
    # Flattened, both leaves share one scale.
    base = updates_of(sgd())[-1]
    scales = {
        (u / b)[u != 0].round(4).tolist()[0]
        for u, b in zip(*(jax.tree.leaves(t) for t in (inside[-1], base)))
    }
    assert len(scales) == 1


def lookahead():
    tx = optax.lookahead(with_caution(sgd()), sync_period=5, slow_step_size=0.5)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = optax.LookaheadParams.init_synced(PARAMS)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=400)
    assert loss(params.slow) < 1e-4
    outside = with_caution(optax.lookahead(sgd(), 5, 0.5))
    params = optax.LookaheadParams.init_synced(PARAMS)
    with pytest.raises(ValueError, match="does not match"):
        outside.update(gradient(0), outside.init(params), params)


def sam():
    ascent = optax.chain(contrib.normalize(), optax.sgd(0.01))
    inside = contrib.sam(with_caution(sgd()), ascent, sync_period=2)
    assert descend(inside, 400) < 1e-2
    # Its first step climbs, and caution around it masks that as opposed.
    around = with_caution(contrib.sam(sgd(), ascent, sync_period=2))
    first = updates_of(around, 1)[0]
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, PARAMS))


def schedule_free():
    tx = contrib.schedule_free(with_caution(optax.sgd(0.1)), learning_rate=0.1)
    assert descend(tx, evaluate=contrib.schedule_free_eval_params) < 1e-3
    # Without momentum, the update has the signs of the gradient.
    base, ours = (
        updates_of(make(0.1, b1=0.0, weight_decay=0.0))
        for make in (optax.adamw, cautious_adamw)
    )
    chex.assert_trees_all_close(ours, base, rtol=1e-6)


def mechanize():
    inside = contrib.mechanize(with_caution(optax.adam(1.0)), weight_decay=0.0)
    assert descend(inside) < 1e-2


def differentially_private_aggregate():
    aggregate = contrib.differentially_private_aggregate(10.0, 1e-5, key=0)
    examples = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), gradient(0))
    tx = optax.chain(aggregate, with_caution(sgd()))
    updates, _ = tx.update(examples, tx.init(PARAMS), PARAMS)
    assert updates["w"].shape == (3, 4)
    dpsgd = with_caution(optax.chain(aggregate, optax.sgd(0.1)))
    with pytest.raises(
        ValueError, match="apply caution after the link that aggregates them"
    ):
        dpsgd.update(examples, dpsgd.init(PARAMS), PARAMS)


def reduce_on_plateau():
    plateau = contrib.reduce_on_plateau(patience=1, cooldown=0, factor=0.5)
    inside = optax.chain(with_caution(sgd()), plateau)
    around = with_caution(optax.chain(sgd(), plateau))
    states = [inside.init(PARAMS), around.init(PARAMS)]
    for seed in range(6):
        found = []
        for i, tx in enumerate((inside, around)):
            u, states[i] = tx.update(gradient(seed), states[i], PARAMS, value=1.0)
            found.append(u)
        chex.assert_trees_all_close(*found, rtol=1e-6)
    assert optax.tree.get(states[0], "scale") < 1


def line_search():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    tx = optax.chain(with_caution(sgd()), search)
    assert descend(tx, 100, needs=("value", "grad", "value_fn")) < 1e-3


def parameter_free(make, needs=(), **caution):
    def check():
        assert descend(with_caution(make(), **caution), 10_000, needs) < 1e-2

    return check


def only_unscaled(make):
    """Check that rescaling makes it diverge; without, see test_optimizers.py."""

    def check():
        parabola = {"loss": matrix_loss, "params": jnp.zeros((2, 2)), "steps": 30_000}
        assert not descend(with_caution(make()), **parabola) < 1e2

    return check


CHECKS = {
    "optax.MultiSteps": multi_steps,
    "optax.apply_if_finite": apply_if_finite,
    "optax.masked": masked,
    "optax.partition": partition,
    "optax.inject_hyperparams": inject_hyperparams,
    "optax.flatten": flatten,
    "optax.lookahead": lookahead,
    "optax.contrib.sam": sam,
    "optax.contrib.schedule_free": schedule_free,
    "optax.contrib.mechanize": mechanize,
    "optax.contrib.differentially_private_aggregate": differentially_private_aggregate,
    "optax.contrib.reduce_on_plateau": reduce_on_plateau,
    "a line search": line_search,
    "optax.contrib.dowg": only_unscaled(contrib.dowg),
    "optax.contrib.cocob": only_unscaled(contrib.cocob),
    "optax.contrib.dog": parameter_free(contrib.dog),
    "optax.contrib.dadapt_adamw": parameter_free(contrib.dadapt_adamw),
    "optax.contrib.prodigy": parameter_free(contrib.prodigy),
    "optax.contrib.momo": parameter_free(contrib.momo, ("value",)),
    "optax.contrib.momo_adam": parameter_free(contrib.momo_adam, ("value",)),
}


def test_every_row_is_tested():
    assert CHECKS.keys() == ROWS


@pytest.mark.parametrize("row", CHECKS)
def test_row(row):
    CHECKS[row]()


# The rest of the page.


@pytest.mark.parametrize("tx", [optax.scale_by_adam(), optax.adam(-1e-3)])
def test_the_direction_of_links_and_of_maximization(tx):
    g = gradient(0)
    updates, _ = with_caution(tx, direction="ascent").update(g, tx.init(PARAMS))
    assert all(jnp.all(u * g[k] > 0) for k, u in updates.items())
    # With the wrong direction, nothing agrees at the first step, and nothing moves.
    wrong = with_caution(tx, monitor=True)
    updates, state = wrong.update(g, wrong.init(PARAMS))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, g))
    assert optax.tree.get(state, "aligned_fraction") == 0


def test_consecutive_zero_steps_far_from_the_minimum():
    tx = cautious_adam(0.1)
    params, state = jnp.array([1.0]), tx.init(jnp.array([1.0]))
    grads = [1.0, 1.0, 1.0, -0.1, -0.1, -0.1]
    moved = []
    for g in grads:
        updates, state = tx.update(jnp.array([g]), state, params)
        moved.append(bool(updates[0] != 0))
    assert moved == [True, True, True, False, False, False]


def test_two_monitors_report_two_values():
    tx = optax.partition(
        {k: cautious_adamw(1e-3, monitor=True) for k in "ab"}, {"w": "a", "b": "b"}
    )
    state = tx.init(PARAMS)
    with pytest.raises(KeyError, match="Found multiple values"):
        optax.tree.get(state, "aligned_fraction")
    assert len(optax.tree.get_all_with_path(state, "aligned_fraction")) == 2


def test_hyperparams_are_nested_under_a_monitor_around_them():
    injected = optax.inject_hyperparams(optax.adamw)(1e-3)
    state = with_caution(injected, monitor=True).init(PARAMS)
    assert state[0].hyperparams["learning_rate"] == jnp.float32(1e-3)
    assert isinstance(state[1], CautiousState)
    own = optax.inject_hyperparams(cautious_adamw)(1e-3, monitor=True).init(PARAMS)
    assert own.hyperparams["learning_rate"] == jnp.float32(1e-3)


def test_the_fraction_at_the_first_step_is_one():
    updates, _ = cautious_adam(0.1).update(gradient(0), cautious_adam(0.1).init(PARAMS))
    chex.assert_trees_all_equal(
        aligned_fraction(updates, gradient(0)), {"w": jnp.ones(()), "b": jnp.ones(())}
    )
