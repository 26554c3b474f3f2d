"""The named optimizers: drop-in for optax's, decay outside the mask."""

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

BASES = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": optax.sgd,
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
}
CAUTION_KEYWORDS = (
    "alignment",
    "opposed_weight",
    "renormalize",
    "min_fraction",
    "axis_name",
    "caution_mask",
    "monitor",
)
LEARNING_RATE = optax.cosine_decay_schedule(1e-2, 100)
BIASES = {"w": True, "b": False}
# Every way in which the optimizers are configured, each as optax takes it.
CONFIGURATIONS = [
    ("adamw", {}),
    ("adamw", {"weight_decay": 0.3, "mask": BIASES, "nesterov": True}),
    ("adamw", {"b1": 0.8, "b2": 0.9, "eps": 1e-4, "eps_root": 1e-6}),
    ("adamw", {"mu_dtype": "bfloat16", "weight_decay": LEARNING_RATE}),
    ("lion", {}),
    ("lion", {"b1": 0.8, "b2": 0.95, "weight_decay": 0.3, "mask": BIASES}),
    ("lion", {"mu_dtype": "bfloat16", "weight_decay": LEARNING_RATE}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "accumulator_dtype": "bfloat16"}),
    ("muon", {}),
    ("muon", {"weight_decay": 0.3, "adam_weight_decay": 0.2}),
    ("muon", {"weight_decay": 0.3, "weight_decay_mask": {"w": False, "b": True}}),
    ("muon", {"weight_decay": 0.3, "weight_decay_mask": BIASES, "beta": 0.8}),
    ("muon", {"weight_decay": LEARNING_RATE, "adam_learning_rate": 1e-3}),
    ("muon", {"ns_coeffs": "dion", "preconditioning": "aol", "consistent_rms": 0.2}),
    (
        "muon",
        {
            "adam_weight_decay": 0.3,
            "muon_weight_dimension_numbers": {
                "w": optax.contrib.MuonDimensionNumbers((0, 1), 2),
                "b": None,
            },
        },
    ),
    (
        "muon",
        {
            "ns_steps": 3,
            "eps": 1e-2,
            "mu_dtype": "bfloat16",
            "nesterov": False,
            "adaptive": True,
            "adam_b1": 0.8,
            "adam_b2": 0.9,
            "adam_eps_root": 1e-2,
        },
    ),
    ("adafactor", {}),
    ("adafactor", {"decay_rate": 0.5, "decay_offset": -3, "eps": 1e-3}),
    ("adafactor", {"min_dim_size_to_factor": 2, "factored": False}),
    ("adafactor", {"momentum": 0.9, "weight_decay_rate": 1e-2}),
    ("adafactor", {"min_dim_size_to_factor": 2, "clipping_threshold": None}),
    (
        "adafactor",
        {
            "multiply_by_parameter_scale": False,
            "momentum": 0.9,
            "dtype_momentum": jnp.bfloat16,
            "weight_decay_rate": LEARNING_RATE,
            "weight_decay_mask": BIASES,
        },
    ),
]


def named(name: str):
    return getattr(optax_cautious, f"cautious_{name}")


def params_for(kwargs: dict) -> dict:
    shape = (2, 3, 4) if "muon_weight_dimension_numbers" in kwargs else (3, 4)
    return {"w": jax.random.normal(jax.random.key(0), shape), "b": jnp.ones(5)}


def gradients(params: dict, steps: int) -> list[dict]:
    keys = jax.random.split(jax.random.key(1), steps)
    return [
        {k: jax.random.normal(key, x.shape) for k, x in params.items()} for key in keys
    ]


def run(tx: optax.GradientTransformation, params: dict, steps: int = 6, state=None):
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for grads in gradients(params, steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", BASES)
def test_signature_is_optaxs_then_the_caution_keywords(name):
    base = list(inspect.signature(BASES[name]).parameters.values())
    ours = list(inspect.signature(named(name)).parameters.values())
    shared, added = ours[: len(base)], ours[len(base) :]
    for mine, theirs in zip(shared, base, strict=True):
        assert mine.name == theirs.name
        assert mine.kind == theirs.kind
        assert mine.default == theirs.default
    assert tuple(p.name for p in added) == CAUTION_KEYWORDS
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)
    cautious = inspect.signature(optax_cautious.cautious).parameters
    for p in added:
        assert p.default == cautious[p.name.removeprefix("caution_")].default


@pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
def test_with_opposed_weight_one_it_is_the_base_optimizer(name, kwargs):
    params = params_for(kwargs)
    base = BASES[name](LEARNING_RATE, **kwargs)
    ours = named(name)(LEARNING_RATE, **kwargs, opposed_weight=1.0)
    expected, expected_state = run(base, params)
    actual, state = run(ours, params)
    # Muon's iterations amplify the rounding of the decay, which is added elsewhere.
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
def test_state_tree_is_the_base_optimizers(name, kwargs):
    params = params_for(kwargs)
    base = BASES[name](LEARNING_RATE, **kwargs)
    ours = named(name)(LEARNING_RATE, **kwargs)
    for mine, theirs in (
        (ours.init(params), base.init(params)),
        (run(ours, params)[1], run(base, params)[1]),
    ):
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        chex.assert_trees_all_equal_shapes_and_dtypes(mine, theirs)


@pytest.mark.parametrize(("name", "kwargs"), CONFIGURATIONS)
def test_caution_changes_the_steps(name, kwargs):
    """Where there is momentum; the state is independent of what is applied."""
    params = params_for(kwargs)
    base, _ = run(BASES[name](LEARNING_RATE, **kwargs), params, steps=40)
    ours, _ = run(named(name)(LEARNING_RATE, **kwargs), params, steps=40)
    has_momentum = name not in ("sgd", "adafactor") or kwargs.get("momentum")
    equal = jnp.array_equal(base["w"], ours["w"])
    assert bool(equal) != bool(has_momentum)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_checkpoints_restore_both_ways(name, tmp_path):
    params = params_for({})
    kwargs = {"momentum": 0.9} if name == "sgd" else {}
    base = BASES[name](LEARNING_RATE, **kwargs)
    ours = named(name)(LEARNING_RATE, **kwargs)
    checkpointer = ocp.StandardCheckpointer()
    for writer, reader in ((base, ours), (ours, base)):
        _, written = run(writer, params)
        path = tmp_path / ("base" if writer is base else "ours")
        checkpointer.save(path, written)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, reader.init(params))
        chex.assert_trees_all_equal(restored, written)
        run(reader, params, state=restored)


OPPOSED = {
    "adamw": {"weight_decay": 0.3},
    "lion": {"weight_decay": 0.3},
    "muon": {"weight_decay": 0.3, "adam_weight_decay": 0.3},
    "adafactor": {"momentum": 0.9, "weight_decay_rate": 0.3 * 1e-2},
}


@pytest.mark.parametrize("name", OPPOSED)
def test_decay_is_outside_the_mask(name):
    """A gradient that turns against the momentum everywhere: only decay moves."""
    params = {"w": jnp.ones((4, 4)) + jnp.eye(4), "b": jnp.arange(1.0, 5.0)}
    tx = named(name)(1e-2, **OPPOSED[name])
    state = tx.init(params)
    first = {"w": jnp.eye(4) + 1, "b": jnp.ones(4)}
    _, state = tx.update(first, state, params)
    opposed = jax.tree.map(lambda g: -1e-6 * g, first)
    updates, _ = tx.update(opposed, state, params)
    if name == "muon":  # orthogonalized momentum may agree somewhere: not there
        agree = jax.tree.map(lambda u, p: u != -3e-3 * p, updates, params)
        moved = jax.tree.map(lambda u, p: u + 3e-3 * p, updates, params)
        chex.assert_trees_all_close(updates["b"], -3e-3 * params["b"], rtol=1e-6)
        assert not jnp.all(agree["w"])
        assert jnp.all(moved["w"] * opposed["w"] <= 0)
    else:
        chex.assert_trees_all_close(
            updates, jax.tree.map(lambda p: -3e-3 * p, params), rtol=1e-6
        )


@pytest.mark.parametrize("name", BASES)
def test_the_caution_keywords_arrive(name):
    """The named optimizer against `with_caution` around optax's, without decay."""
    decay = {"adamw": "weight_decay", "lion": "weight_decay"}.get(name)
    kwargs = {decay: 0.0} if decay else {}
    if name in ("sgd", "adafactor"):
        kwargs["momentum"] = 0.9
    params = params_for({})
    for caution in (
        {"opposed_weight": -0.3, "renormalize": "none"},
        {"renormalize": "paper", "mask": BIASES},
        {"min_fraction": 0.9},
        {"alignment": "tensor", "opposed_weight": 0.1},
        {"alignment": "tree", "opposed_weight": 0.1},
    ):
        wrapped = optax_cautious.with_caution(BASES[name](1e-2, **kwargs), **caution)
        expected, _ = run(wrapped, params)
        renamed = {k.replace("mask", "caution_mask"): v for k, v in caution.items()}
        actual, _ = run(named(name)(1e-2, **kwargs, **renamed), params)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("decays", [False, True])
def test_monitor_reports_the_tree_wide_fraction(name, decays):
    kwargs = OPPOSED.get(name, {}) if decays else {}
    params = params_for({})
    tx = named(name)(1e-2, **kwargs, monitor=True)
    state = tx.init(params)
    assert optax.tree.get(state, "aligned_fraction") == 0.0
    for grads in gradients(params, 3):
        updates, state = jax.jit(tx.update)(grads, state, params)
    fraction = optax.tree.get(state, "aligned_fraction")
    if not decays:
        plain = named(name)(1e-2, **kwargs, opposed_weight=1.0)
        if name in ("adamw", "lion"):  # whose default decay would blur the signs
            plain = named(name)(1e-2, weight_decay=0.0, opposed_weight=1.0)
        state = plain.init(params)
        for grads in gradients(params, 3):
            updates, state = jax.jit(plain.update)(grads, state, params)
        agree = jax.tree.map(lambda u, g: jnp.sum(u * g < 0), updates, grads)
        expected = sum(jax.tree.leaves(agree)) / 17
        np.testing.assert_allclose(fraction, expected, rtol=1e-6)
    assert 0 < fraction <= 1


@pytest.mark.parametrize("name", BASES)
def test_inject_hyperparams(name):
    static = {
        "adafactor": ("min_dim_size_to_factor", "dtype_momentum"),
        "muon": ("ns_coeffs", "ns_steps"),
    }
    make = optax.inject_hyperparams(named(name), static_args=static.get(name, ()))
    softening = optax.linear_schedule(1.0, 0.0, 3)
    tx = make(learning_rate=LEARNING_RATE, opposed_weight=softening)
    _, state = run(tx, params_for({}), steps=4)
    np.testing.assert_allclose(state.hyperparams["opposed_weight"], 0.0, atol=1e-6)
    np.testing.assert_allclose(state.hyperparams["min_fraction"], 1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_inject_hyperparams_in_the_parameters_dtype(dtype):
    """Optax casts every number to the dtype of the parameters."""
    params = {"w": jnp.ones(3, dtype)}
    tx = optax.inject_hyperparams(optax_cautious.cautious_adamw)(
        LEARNING_RATE, opposed_weight=0.5
    )
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, state, params)
        assert updates["w"].dtype == dtype


@pytest.mark.parametrize("name", BASES)
def test_an_equinox_module_that_is_callable(name):
    model = eqx.filter(eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.is_array)
    assert callable(model)
    tx = named(name)(1e-2)
    updates, _ = tx.update(model, tx.init(model), model)
    assert jax.tree.structure(updates) == jax.tree.structure(model)


def test_adafactor_injects_without_naming_its_dtype():
    """Optax's default, jnp.float32, is callable and would be taken for a schedule."""
    make = optax.inject_hyperparams(
        optax_cautious.cautious_adafactor, static_args="min_dim_size_to_factor"
    )
    run(make(learning_rate=1e-2, momentum=0.9), params_for({}))
