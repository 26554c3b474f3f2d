"""The named optimizers: drop-in for Optax's, with decay outside the mask."""

import functools
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_cautious
from tests.named import (
    BIASES,
    CAUTION,
    CONFIGURATIONS,
    DECAYING,
    LEARNING_RATE,
    NAMED,
    make,
    make_base,
)


def params_for(kwargs: dict) -> dict:
    shape = (2, 3, 4) if "muon_weight_dimension_numbers" in kwargs else (3, 4)
    return {"w": jax.random.normal(jax.random.key(0), shape), "b": jnp.ones(5)}


def gradients(params: dict, steps: int) -> list[dict]:
    """Draw normal numbers, except for a zero in each leaf."""
    keys = jax.random.split(jax.random.key(1), steps)
    return [
        {
            k: jax.random.normal(key, x.shape).at[(0,) * x.ndim].set(0)
            for k, x in params.items()
        }
        for key in keys
    ]


def trajectory(tx: optax.GradientTransformation, params: dict, steps: int, state=None):
    """Return the parameters and the state after each step."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    found = []
    for grads in gradients(params, steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


def run(tx: optax.GradientTransformation, params: dict, steps: int = 6, state=None):
    return trajectory(tx, params, steps, state)[-1]


def test_every_named_optimizer_is_in_the_table():
    named = {x for x in optax_cautious.__all__ if x.startswith("cautious_")}
    assert named == {f"cautious_{name}" for name in NAMED}


@pytest.mark.parametrize("name", NAMED)
def test_signature_is_optaxs_then_the_caution_keywords(name):
    base = list(inspect.signature(NAMED[name].base).parameters.values())
    ours = list(inspect.signature(NAMED[name].ours).parameters.values())
    shared, added = ours[: len(base)], ours[len(base) :]
    for mine, theirs in zip(shared, base, strict=True):
        assert mine.name == theirs.name
        assert mine.kind == theirs.kind
        assert mine.default == theirs.default
    own = ["cautious_decay"] * (name in DECAYING) + ["caution_on"] * (name == "muon")
    assert [p.name for p in added] == [*own, *CAUTION]
    for p in added[len(own) :]:
        assert p.kind is inspect.Parameter.KEYWORD_ONLY
        assert p.default == CAUTION[p.name].default
        assert p.annotation == CAUTION[p.name].annotation


@pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
def test_with_opposed_weight_one_it_is_the_base_optimizer(name, kwargs):
    """With other weights the steps differ, but the structure of the state does not."""
    params = params_for(kwargs)
    expected = trajectory(NAMED[name].base(LEARNING_RATE, **kwargs), params, 30)
    uncautious = NAMED[name].ours(LEARNING_RATE, **kwargs, opposed_weight=1.0)
    # Muon's iterations amplify the rounding of the decay, added elsewhere in the chain.
    chex.assert_trees_all_close(
        trajectory(uncautious, params, 6), expected[:6], rtol=1e-5, atol=1e-6
    )
    cautious = NAMED[name].ours(LEARNING_RATE, **kwargs)
    actual = trajectory(cautious, params, 30)
    (expected, base_state), (actual, state) = expected[-1], actual[-1]
    for mine in (cautious.init(params), state):
        assert jax.tree.structure(mine) == jax.tree.structure(base_state)
        chex.assert_trees_all_equal_shapes_and_dtypes(mine, base_state)
    has_momentum = "momentum" in kwargs or "momentum" not in NAMED[name].momentum
    if has_momentum:
        assert not jnp.array_equal(actual["w"], expected["w"])


@pytest.mark.parametrize("name", NAMED)
def test_checkpoints_restore_both_ways(name, tmp_path):
    params = params_for({})
    base, ours = make_base(name, LEARNING_RATE), make(name, LEARNING_RATE)
    checkpointer = ocp.StandardCheckpointer()
    for writer, reader in ((base, ours), (ours, base)):
        _, written = run(writer, params)
        path = tmp_path / ("base" if writer is base else "ours")
        checkpointer.save(path, written)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, reader.init(params))
        chex.assert_trees_all_equal(restored, written)
        run(reader, params, state=restored)


@pytest.mark.parametrize("name", DECAYING)
def test_decay_is_outside_the_mask(name):
    """If the gradient opposes the momentum everywhere, only decay moves weights."""
    params = {"w": jnp.ones((3, 4)) + jnp.eye(3, 4), "b": jnp.arange(1.0, 6.0)}
    tx = make(name, 1e-2, **NAMED[name].decayed)
    state = tx.init(params)
    first = {"w": jnp.eye(3, 4) + 1, "b": jnp.ones(5)}
    _, state = tx.update(first, state, params)
    opposed = jax.tree.map(lambda g: -1e-6 * g, first)
    updates, _ = tx.update(opposed, state, params)
    if name == "muon":  # orthogonalized momentum may agree in places
        agree = jax.tree.map(lambda u, p: u != -3e-3 * p, updates, params)
        moved = jax.tree.map(lambda u, p: u + 3e-3 * p, updates, params)
        chex.assert_trees_all_close(updates["b"], -3e-3 * params["b"], rtol=1e-6)
        assert not jnp.all(agree["w"])
        assert jnp.all(moved["w"] * opposed["w"] <= 0)
    else:
        chex.assert_trees_all_close(
            updates, jax.tree.map(lambda p: -3e-3 * p, params), rtol=1e-6
        )


@functools.cache
def by_default(name: str):
    return run(make(name, 1e-2), params_for({}))[0]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(
    "caution",
    [
        {"opposed_weight": -0.3, "renormalize": "plus_one", "mask": BIASES},
        {"min_fraction": 0.9, "neutral": "follow"},
        {"stacked": {"w": 1, "b": 0}, "neutral": "ignore", "opposed_weight": 0.1},
        {"alignment": "tree", "opposed_weight": 0.1},
    ],
    ids=str,
)
def test_the_caution_keywords_are_forwarded(name, caution):
    """Compare with `with_caution` around Optax's optimizer, without decay."""
    params = params_for({})
    wrapped = optax_cautious.with_caution(make_base(name, 1e-2), **caution)
    expected, _ = run(wrapped, params)
    renamed = {k.replace("mask", "caution_mask"): v for k, v in caution.items()}
    actual, _ = run(make(name, 1e-2, **renamed), params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not jnp.allclose(by_default(name)["w"], actual["w"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_monitor_reports_the_tree_wide_fraction(name):
    params = params_for({})
    tx = make(name, 1e-2, **(NAMED[name].decayed or {}), monitor=True)
    state = tx.init(params)
    assert optax.tree.get(state, "aligned_fraction") == 0.0
    for grads in gradients(params, 3):
        _, state = jax.jit(tx.update)(grads, state, params)
    fraction = optax.tree.get(state, "aligned_fraction")
    # The decay, which is outside the mask, must not affect the signs.
    plain = make(name, 1e-2, opposed_weight=1.0)
    state = plain.init(params)
    for grads in gradients(params, 3):
        updates, state = jax.jit(plain.update)(grads, state, params)
    agree = jax.tree.map(lambda u, g: jnp.sum(u * g < 0), updates, grads)
    np.testing.assert_allclose(fraction, sum(jax.tree.leaves(agree)) / 17, rtol=1e-6)
    assert 0 < fraction < 1


@pytest.mark.parametrize("name", NAMED)
def test_a_state_without_a_monitor_is_rejected(name):
    params = params_for({})
    tx = make(name, 1e-2, monitor=True)
    with pytest.raises(ValueError, match="but the state was created without a monitor"):
        tx.update(params, make(name, 1e-2).init(params), params)


@pytest.mark.parametrize("name", NAMED)
def test_a_state_with_a_monitor_is_rejected(name):
    """The monitor would never change again."""
    params = params_for({})
    tx = make(name, 1e-2)
    with pytest.raises(ValueError, match="monitor=False, but the state was created wi"):
        tx.update(params, make(name, 1e-2, monitor=True).init(params), params)


@pytest.mark.parametrize("name", NAMED)
def test_inject_hyperparams(name):
    static_args = NAMED[name].static_args
    make_injected = optax.inject_hyperparams(NAMED[name].ours, static_args=static_args)
    softening = optax.linear_schedule(1.0, 0.0, 3)
    tx = make_injected(learning_rate=LEARNING_RATE, opposed_weight=softening)
    _, state = run(tx, params_for({}), steps=4)
    np.testing.assert_allclose(state.hyperparams["opposed_weight"], 0.0, atol=1e-6)
    np.testing.assert_allclose(state.hyperparams["min_fraction"], 1e-3)


# Only Adafactor looks at its learning rate.
@pytest.mark.parametrize(
    ("name", "rate"),
    [*((name, -1e-2) for name in NAMED), ("adafactor", np.float32(-1e-2))],
)
def test_a_negative_learning_rate_climbs(name, rate):
    params = params_for({})
    tx = make(name, rate)
    state = tx.init(params)
    grads = params
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        assert all(
            jnp.vdot(u, g) > 0 for u, g in zip(*map(jax.tree.leaves, (updates, grads)))
        )


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        *((name, 1e-2) for name in NAMED),
        ("adafactor", np.float32(1e-2)),
        ("adafactor", jnp.float32(1e-2)),
    ],
)
def test_it_can_be_built_under_jit(name, rate):
    params = params_for({})

    def step(grads, rate):
        tx = make(name, rate, monitor=True)
        return tx.update(grads, tx.init(params), params)[0]

    expected = step(params, rate)
    for updates in (
        jax.jit(functools.partial(step, rate=rate))(params),
        jax.jit(step)(params, rate),
    ):
        # Muon's orthogonalization amplifies differences in rounding.
        chex.assert_trees_all_close(updates, expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_inject_hyperparams_in_the_parameters_dtype(dtype):
    """Optax casts every number to the dtype of the parameters."""
    params = {"w": jnp.ones(3, dtype)}
    tx = optax.inject_hyperparams(optax_cautious.cautious_adamw)(
        LEARNING_RATE, opposed_weight=0.5
    )
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    traced, _ = jax.eval_shape(tx.update, params, state, params)
    assert updates["w"].dtype == traced["w"].dtype == dtype


@pytest.mark.parametrize("name", NAMED)
def test_a_callable_equinox_module(name):
    model = eqx.filter(eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.is_array)
    assert callable(model)
    tx = NAMED[name].ours(1e-2)
    updates = jax.eval_shape(lambda x: tx.update(x, tx.init(x), x)[0], model)
    assert jax.tree.structure(updates) == jax.tree.structure(model)


def test_adafactor_under_inject_hyperparams_without_a_static_dtype():
    """Optax's default, jnp.float32, is callable and would be taken for a schedule."""
    make = optax.inject_hyperparams(
        optax_cautious.cautious_adafactor, static_args="min_dim_size_to_factor"
    )
    run(make(learning_rate=1e-2, momentum=0.9), params_for({}))
