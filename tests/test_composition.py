"""Caution inside Optax's wrappers and in the training loops of JAX libraries."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from optax_cautious import cautious, cautious_adamw, provide_gradient, with_caution

PARAMS = {
    "w": jnp.asarray(np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(3, 4)),
    "b": jnp.asarray(np.array([1.0, -2.0], np.float32)),
}
# For the same wrappers with with_caution, see test_usage.py.
CHAIN = provide_gradient(optax.chain(optax.sgd(0.1, momentum=0.9), cautious()))


def gradient(step: int) -> dict:
    keys = jax.random.split(jax.random.key(step), 2)
    return {
        "w": jax.random.normal(keys[0], (3, 4)),
        "b": jax.random.normal(keys[1], (2,)),
    }


def assert_close(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def masked_update(u: dict, g: dict) -> dict:
    return cautious().update(u, optax.EmptyState(), grad=g)[0]


# Inside Optax's wrappers.


@pytest.mark.parametrize("compatible", [False, True])
def test_masked_with_the_callers_gradient(compatible):
    """The gradient has leaves where the updates hold MaskedNode, or is masked too."""
    tx = optax.masked(
        cautious(), {"w": True, "b": False}, mask_compatible_extra_args=compatible
    )
    u, g = gradient(0), gradient(1)
    out, _ = tx.update(u, tx.init(u), grad=g)
    assert_close(out, {"w": masked_update(u, g)["w"], "b": u["b"]})


@pytest.mark.parametrize("compatible", [False, True])
def test_partition_with_the_callers_gradient(compatible):
    tx = optax.partition(
        {
            "cautious": optax.chain(optax.trace(0.9), cautious(direction="ascent")),
            "plain": optax.trace(0.9),
        },
        {"w": "cautious", "b": "plain"},
        mask_compatible_extra_args=compatible,
    )
    whole = with_caution(optax.trace(0.9), direction="ascent")
    plain = optax.trace(0.9)
    states = [t.init(PARAMS) for t in (tx, whole, plain)]
    for step in range(4):
        g = gradient(step)
        out, states[0] = tx.update(g, states[0], grad=g)
        expected, states[1] = whole.update(g, states[1])
        unmasked, states[2] = plain.update(g, states[2])
        assert_close(out, {"w": expected["w"], "b": unmasked["b"]})


def test_a_caution_mask_inside_a_partition():
    """The mask has the structure of the whole tree; the updates hold MaskedNode."""
    inner = with_caution(optax.trace(0.9), mask={"w": True, "b": False})
    tx = optax.partition({"a": inner, "b": optax.identity()}, {"w": "a", "b": "b"})
    out, _ = tx.update(gradient(0), tx.init(PARAMS))
    assert_close(out["b"], gradient(0)["b"])


def test_multi_steps_compares_with_the_accumulated_gradient():
    tx = optax.MultiSteps(CHAIN, every_k_schedule=2)
    state, expected_state = tx.init(PARAMS), CHAIN.init(PARAMS)
    for step in range(4):
        first, second = gradient(2 * step), gradient(2 * step + 1)
        # The caller's gradient, that of a micro-batch, must be ignored.
        updates, state = tx.update(first, state, PARAMS, grad=first)
        assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        updates, state = tx.update(second, state, PARAMS, grad=second)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, expected_state = CHAIN.update(mean, expected_state, PARAMS)
        assert_close(updates, expected)


def test_inject_hyperparams_schedules_the_opposed_weight():
    make = optax.inject_hyperparams(cautious)
    tx = make(opposed_weight=optax.piecewise_constant_schedule(1.0, {2: 0.0}))
    state = tx.init(PARAMS)
    u, g = gradient(0), gradient(1)
    update = jax.jit(lambda u, state, g: tx.update(u, state, u, grad=g))
    outputs = []
    for _ in range(4):
        out, state = update(u, state, g)
        outputs.append(out)
    assert_close(outputs[0], u)
    assert_close(outputs[3], masked_update(u, g))
    assert update._cache_size() == 1
    state.hyperparams["min_fraction"] = jnp.float32(1.0)
    limited, _ = cautious(min_fraction=1.0).update(u, optax.EmptyState(), grad=g)
    assert_close(update(u, state, g)[0], limited)


def test_inject_hyperparams_takes_a_callable_mask_as_a_static_argument():
    make = optax.inject_hyperparams(cautious, static_args="mask")
    tx = make(mask=lambda updates: {"w": False, "b": True}, opposed_weight=0.5)
    u, g = gradient(0), gradient(1)
    out, _ = tx.update(u, tx.init(u), u, grad=g)
    assert_close(out["w"], u["w"])


def test_apply_if_finite_sees_the_nan():
    tx = optax.apply_if_finite(CHAIN, max_consecutive_errors=3)
    state = tx.init(PARAMS)
    bad = {**gradient(0), "b": jnp.array([jnp.nan, 1.0])}
    updates, state = tx.update(bad, state, PARAMS)
    assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert state.notfinite_count == 1
    updates, state = tx.update(gradient(0), state, PARAMS)
    assert state.notfinite_count == 0
    assert jnp.any(updates["b"] != 0)


def minimize(step, params, state, steps: int = 400):
    def body(carry, _):
        return step(*carry), None

    (params, state), _ = jax.lax.scan(body, (params, state), length=steps)
    return params, state


def loss(params) -> jax.Array:
    return sum(jnp.sum((x - 1.0) ** 2) for x in jax.tree.leaves(params))


def test_lookahead():
    tx = optax.lookahead(CHAIN, sync_period=5, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)

    def step(params, state):
        grads = jax.grad(loss)(params.fast)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = minimize(step, params, tx.init(params))
    assert loss(params.slow) < 1e-6


def test_schedule_free():
    """Caution goes inside: the outer state assumes an unmodified update."""
    base = provide_gradient(optax.chain(optax.sgd(0.1), cautious()))
    tx = optax.contrib.schedule_free(base, learning_rate=0.1)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = minimize(step, PARAMS, tx.init(PARAMS))
    assert loss(optax.contrib.schedule_free_eval_params(state, params)) < 1e-3


@pytest.mark.parametrize("opaque", [False, True])
def test_sam(opaque):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    tx = optax.contrib.sam(CHAIN, ascent, sync_period=2, opaque_mode=opaque)
    extra = {"grad_fn": jax.grad(lambda p, _: loss(p))} if opaque else {}

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, _ = minimize(step, PARAMS, tx.init(PARAMS))
    assert loss(params) < 1e-3


def test_named_chain_and_tree_map_params():
    tx = provide_gradient(
        optax.named_chain(
            ("adam", optax.adam(1e-2)), ("caution", cautious(monitor=True))
        )
    )
    state = tx.init(PARAMS)
    _, state = tx.update(gradient(0), state, PARAMS)
    assert state["caution"].aligned_fraction == 1.0
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert_close(
        doubled["adam"][0].mu, jax.tree.map(lambda x: 2 * x, state["adam"][0].mu)
    )
    assert doubled["caution"] == state["caution"]


# In the training loops of JAX libraries, each compared with a plain loop.

# Drawn with NumPy: with JAX, every worker would compile the generator on import.
INPUTS = np.random.default_rng(0).standard_normal((16, 3), np.float32)
TARGETS = np.sin(INPUTS @ np.array([[1.0], [2.0], [-1.0]], np.float32))
STEPS = 12


def optimizer() -> optax.GradientTransformationExtraArgs:
    return provide_gradient(optax.chain(optax.adamw(0.1), cautious()))


def callers_optimizer() -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.adamw(0.1), cautious())


def train(tx, objective, params):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def plain_loop(objective, params):
    """Train a tree of arrays with `with_caution`, as the reference."""
    return train(with_caution(optax.adamw(0.1)), objective, params)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


def linen_objective(params) -> jax.Array:
    return jnp.mean((LinenModel().apply(params, INPUTS) - TARGETS) ** 2)


def assert_trees_close(a, b) -> None:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in leaves:
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_caution_changes_the_plain_loop():
    params = LinenModel().init(jax.random.key(1), INPUTS)
    cautious_params = plain_loop(linen_objective, params)
    plain = train(optax.adamw(0.1), linen_objective, params)
    differences = jax.tree.map(
        lambda x, y: jnp.max(jnp.abs(x - y)), cautious_params, plain
    )
    assert max(jax.tree.leaves(differences)) > 0.01


@pytest.mark.parametrize("callers", [False, True])
def test_flax_train_state(callers):
    params = LinenModel().init(jax.random.key(1), INPUTS)
    state = TrainState.create(
        apply_fn=LinenModel().apply,
        params=params,
        tx=callers_optimizer() if callers else optimizer(),
    )

    @jax.jit
    def step(state):
        grads = jax.grad(linen_objective)(state.params)
        if not callers:
            return state.apply_gradients(grads=grads)
        # apply_gradients does not forward extra arguments, so call update directly.
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, grad=grads
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state)

    for _ in range(STEPS):
        state = step(state)
    assert_trees_close(state.params, plain_loop(linen_objective, params))


@pytest.mark.parametrize("callers", [False, True])
def test_flax_nnx_optimizer(callers):
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(3, 8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.hidden(x)))

    def model_loss(model) -> jax.Array:
        return jnp.mean((model(INPUTS) - TARGETS) ** 2)

    model = Model(nnx.Rngs(1))
    graph, start = nnx.split(model)
    start = jax.tree.map(jnp.copy, start)  # training changes the model in place
    tx = callers_optimizer() if callers else optimizer()
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, opt):
        grads = nnx.grad(model_loss)(model)
        opt.update(model, grads, **({"grad": grads} if callers else {}))

    for _ in range(STEPS):
        step(model, opt)
    expected = plain_loop(lambda p: model_loss(nnx.merge(graph, p)), start)
    assert_trees_close(nnx.state(model), expected)


@pytest.mark.parametrize("callers", [False, True])
def test_equinox_with_none_leaves(callers):
    """The activation is not an array, so its leaf is None in the gradient."""
    model = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(1))
    tx = callers_optimizer() if callers else optimizer()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None))

    def model_loss(model) -> jax.Array:
        return jnp.mean((jax.vmap(model)(INPUTS) - TARGETS) ** 2)

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(model_loss)(model)
        updates, state = tx.update(
            grads,
            state,
            eqx.filter(model, eqx.is_inexact_array),
            **({"grad": grads} if callers else {}),
        )
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    expected = plain_loop(lambda p: model_loss(eqx.combine(p, static)), params)
    assert_trees_close(eqx.filter(model, eqx.is_inexact_array), expected)


def test_equinox_module_as_a_mask():
    """A callable mask, such as a module, is still treated as a tree."""
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    mask = jax.tree.map(lambda x: x.ndim == 2, model)
    assert callable(mask)
    grads = jax.tree.map(jnp.ones_like, model)
    tx = cautious(mask=mask)
    out, _ = tx.update(grads, tx.init(grads), grad=grads)
    np.testing.assert_array_equal(out.weight, 0)
    np.testing.assert_array_equal(out.bias, 1)


@pytest.mark.parametrize("callers", [False, True])
def test_haiku(callers):
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([8, 1], activation=jnp.tanh)(x))
    )
    params = start = network.init(jax.random.key(1), INPUTS)

    def objective(params) -> jax.Array:
        return jnp.mean((network.apply(params, INPUTS) - TARGETS) ** 2)

    tx = callers_optimizer() if callers else optimizer()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(objective)(params)
        extra_args = {"grad": grads} if callers else {}
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    assert_trees_close(params, plain_loop(objective, start))


def test_a_named_optimizer_inside_several_wrappers():
    """Clipping, a schedule, accumulation and a finite check around cautious AdamW."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 100)
    tx = optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(optax.clip_by_global_norm(1.0), cautious_adamw(schedule)), 5
        ),
        every_k_schedule=2,
    )

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, _ = minimize(step, PARAMS, tx.init(PARAMS), steps=200)
    assert loss(params) < 0.1
