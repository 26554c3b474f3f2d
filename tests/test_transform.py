"""The interface: `cautious`, `provide_gradient`, `with_caution`, `aligned_fraction`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cautious import (
    CautiousState,
    aligned_fraction,
    cautious,
    provide_gradient,
    with_caution,
)

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.array([1.0, -2.0])}


def gradient(step: int) -> dict:
    keys = jax.random.split(jax.random.key(step), 2)
    return {
        "w": jax.random.normal(keys[0], (3, 4)),
        "b": jax.random.normal(keys[1], (2,)),
    }


def run(tx: optax.GradientTransformation, steps: int = 5, **extra_args):
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(steps):
        updates, state = tx.update(gradient(step), state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_trees_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_four_forms_agree():
    base = optax.adamw(1e-2)
    chain = optax.chain(base, cautious())
    params, state = PARAMS, chain.init(PARAMS)
    for step in range(5):
        g = gradient(step)
        updates, state = chain.update(g, state, params, grad=g)
        params = optax.apply_updates(params, updates)
    assert_trees_equal(run(provide_gradient(chain))[0], params)
    assert_trees_equal(run(with_caution(base))[0], params)
    assert not jnp.array_equal(run(base)[0]["w"], params["w"])


def test_provide_gradient_replaces_the_callers():
    tx = provide_gradient(optax.chain(optax.sgd(1e-2, momentum=0.9), cautious()))
    wrong = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_trees_equal(run(tx, grad=wrong)[0], run(tx)[0])


@pytest.mark.parametrize(
    "wrap", [provide_gradient, lambda tx: with_caution(tx, opposed_weight=1.0)]
)
def test_the_other_extra_arguments_are_forwarded(wrap):
    tx = wrap(optax.polyak_sgd())
    updates, _ = tx.update(gradient(0), tx.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    base = optax.polyak_sgd()
    expected, _ = base.update(
        gradient(0), base.init(PARAMS), PARAMS, value=jnp.float32(1.0)
    )
    assert_trees_equal(updates, expected)


def test_with_caution_calls_the_optimizer_as_the_caller_did():
    """The optimizer's own `grad`, as for a line search, is the caller's."""
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = with_caution(inner)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad="theirs", value=1.0)
    assert seen == {"grad": "theirs", "value": 1.0}


def test_the_state_is_empty():
    assert cautious().init(PARAMS) == optax.EmptyState()
    assert cautious(mask={"w": True, "b": False}).init(PARAMS) == optax.EmptyState()


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2), optax.sgd(1e-2, 0.9)])
def test_with_caution_keeps_the_optimizers_state(optimizer):
    tx = with_caution(optimizer)
    assert_trees_equal(tx.init(PARAMS), optimizer.init(PARAMS))
    assert jax.tree.structure(tx.init(PARAMS)) == jax.tree.structure(
        optimizer.init(PARAMS)
    )
    # Each continues from the other's state.
    _, state = run(optimizer)
    _, state = tx.update(gradient(6), state, PARAMS)
    optimizer.update(gradient(7), state, PARAMS)


def test_monitor_reports_the_tree_wide_fraction():
    tx = cautious(monitor=True)
    state = tx.init(PARAMS)
    assert isinstance(state, CautiousState)
    assert optax.tree.get(state, "aligned_fraction") == 0.0

    u, g = gradient(0), gradient(1)
    _, state = tx.update(u, state, grad=g)
    agree = sum(int(jnp.sum(jnp.sign(u[k]) == -jnp.sign(g[k]))) for k in u)
    fraction = optax.tree.get(state, "aligned_fraction")
    assert fraction.dtype == jnp.float32
    np.testing.assert_allclose(fraction, agree / 14, rtol=1e-6)


@pytest.mark.parametrize("opposed_weight", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
def test_monitor_counts_coordinates_under_every_rule(alignment, opposed_weight):
    tx = cautious(monitor=True, alignment=alignment, opposed_weight=opposed_weight)
    _, state = tx.update(gradient(0), tx.init(PARAMS), grad=gradient(1))
    reference = cautious(monitor=True)
    _, expected = reference.update(
        gradient(0), reference.init(PARAMS), grad=gradient(1)
    )
    assert state.aligned_fraction == expected.aligned_fraction


def test_with_caution_keeps_the_monitor_beside_the_optimizers_state():
    tx = with_caution(optax.adamw(1e-2), monitor=True)
    _, state = run(tx)
    inner, monitor = state
    assert jax.tree.structure(inner) == jax.tree.structure(
        optax.adamw(1e-2).init(PARAMS)
    )
    assert isinstance(monitor, CautiousState)
    assert 0 < optax.tree.get(state, "aligned_fraction") < 1


def test_aligned_fraction_of_each_leaf():
    u = {"w": jnp.array([1.0, -1.0, 1.0, 0.0]), "b": None}
    g = {"w": jnp.array([-1.0, 1.0, 1.0, 1.0]), "b": None}
    assert aligned_fraction(u, g) == {"w": 0.5, "b": None}
    assert aligned_fraction(u, g, direction="ascent") == {"w": 0.25, "b": None}


# Masks.


@pytest.mark.parametrize(
    "mask",
    [
        {"w": True, "b": False},
        {"w": np.True_, "b": np.False_},
        {"w": jnp.array(True), "b": jnp.array(False)},
        {"w": 1, "b": 0},
        lambda updates: {"w": True, "b": False},
        lambda updates: jax.tree.map(lambda u: u.ndim == 2, updates),
    ],
)
def test_leaves_outside_the_mask_pass_untouched(mask):
    tx = cautious(mask=mask)
    u, g = gradient(0), gradient(1)
    out, _ = tx.update(u, tx.init(u), grad=g)
    whole, _ = cautious().update(u, optax.EmptyState(), grad=g)
    assert_trees_equal(out, {"w": whole["w"], "b": u["b"]})


def test_a_mask_may_be_a_prefix():
    u = {"layer": gradient(0), "head": jnp.ones(2)}
    g = {"layer": gradient(1), "head": jnp.ones(2)}
    tx = cautious(mask={"layer": False, "head": True})
    out, _ = tx.update(u, tx.init(u), grad=g)
    assert_trees_equal(out, {"layer": gradient(0), "head": jnp.zeros(2)})


def test_masked_leaves_are_excluded_from_inner_product_and_monitor():
    u = {"big": jnp.ones(8), "small": jnp.ones(2)}
    g = {"big": jnp.ones(8), "small": -jnp.ones(2)}
    mask = {"big": False, "small": True}
    tx = cautious(alignment="tree", mask=mask, monitor=True)
    out, state = tx.update(u, tx.init(u), grad=g)
    assert_trees_equal(out, u)
    assert state.aligned_fraction == 1.0


def test_a_masked_leaf_may_be_of_any_kind():
    u = {"w": jnp.ones(2), "steps": jnp.arange(3)}
    g = {"w": -jnp.ones(2), "steps": jnp.ones(7)}
    tx = cautious(mask={"w": True, "steps": False})
    assert_trees_equal(tx.update(u, tx.init(u), grad=g)[0], u)


# Errors: each names the argument or the leaf and says what to do.


@pytest.mark.parametrize(
    "make", [cautious, lambda **kw: with_caution(optax.sgd(1), **kw)]
)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"direction": "up"}, "direction must be one of 'descent', 'ascent', got 'up'"),
        (
            {"alignment": "tensor"},
            "alignment must be one of 'element', 'leaf', 'tree', got 'tensor'",
        ),
        (
            {"renormalize": True},
            "renormalize must be one of 'clamp', 'plus_one', None, got True",
        ),
        (
            {"neutral": "keep"},
            "neutral must be one of 'hold', 'follow', 'ignore', got 'keep'",
        ),
        ({"opposed_weight": 1.5}, r"opposed_weight must lie in \[-1, 1\], got 1.5"),
        ({"opposed_weight": 1 + 1e-4}, "opposed_weight must lie in"),
        ({"opposed_weight": np.float32(-2)}, r"opposed_weight must lie in \[-1, 1\]"),
        ({"opposed_weight": jnp.array(3.0)}, r"opposed_weight must lie in \[-1, 1\]"),
        ({"opposed_weight": float("nan")}, "opposed_weight must lie in"),
        ({"opposed_weight": "0.5"}, "opposed_weight must be a number, got '0.5'"),
        ({"opposed_weight": jnp.zeros(2)}, "opposed_weight must be a number"),
        ({"opposed_weight": None}, "opposed_weight must be a number, got None"),
        ({"opposed_weight": lambda step: 0.0}, "use optax.inject_hyperparams"),
        ({"opposed_weight": 1j}, "opposed_weight must be a real number, got 1j"),
        ({"axis_name": 3}, "axis_name must be the name of a mapped axis"),
        ({"axis_name": ("fsdp", 1)}, "axis_name must be the name of a mapped axis"),
        ({"min_fraction": 0.0}, r"min_fraction must lie in \(0, 1\], got 0.0"),
        ({"min_fraction": -1e-3}, r"min_fraction must lie in \(0, 1\]"),
        ({"min_fraction": 1.5}, r"min_fraction must lie in \(0, 1\]"),
        ({"min_fraction": "small"}, "min_fraction must be a number"),
    ],
)
def test_arguments_out_of_range(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_aligned_fraction_checks_its_direction():
    with pytest.raises(ValueError, match="direction must be one of"):
        aligned_fraction(PARAMS, PARAMS, direction="up")


@pytest.mark.parametrize("opposed_weight", [-1, 0, 1, 0.3, jnp.array(0.5)])
def test_the_range_includes_its_limits(opposed_weight):
    cautious(opposed_weight=opposed_weight, min_fraction=1)


def test_a_schedule_may_overshoot_its_end_by_rounding():
    cautious(opposed_weight=np.nextafter(np.float32(-1), np.float32(-2)))


def test_without_a_gradient_the_error_shows_the_fixes():
    tx = optax.chain(optax.adamw(1e-3), cautious())
    with pytest.raises(ValueError, match="needs the gradient") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    for fix in ("grad=grads", "provide_gradient", "with_caution", "cautious_adamw"):
        assert fix in str(error.value)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        ({"w": jnp.ones((3, 4))}, r"no leaf at \['b'\], where the update has one"),
        ({**PARAMS, "c": jnp.ones(1)}, r"a leaf at \['c'\], where the update has none"),
        ({**PARAMS, "b": jnp.ones(3)}, r"at \['b'\] has shape \(3,\)"),
        ({**PARAMS, "b": jnp.ones(2, complex)}, r"\['b'\] has dtype complex64"),
        ({**PARAMS, "b": jnp.ones(2, bool)}, r"\['b'\] has dtype bool.* with a mask"),
        (
            {**PARAMS, "b": np.zeros(2, jax.dtypes.float0)},
            r"\['b'\] has dtype .*float0.* with a mask",
        ),
        ({**PARAMS, "b": jnp.ones((5, 2))}, "apply caution after the link"),
        ({**PARAMS, "b": "x"}, r"gradient at \['b'\] is 'x', not an array"),
        ({**PARAMS, "b": None}, r"at \['b'\] is None"),
        ({**PARAMS, "b": {"x": jnp.ones(2)}}, r"at \['b'\] is a dict"),
        ({**PARAMS, "b": optax.MaskedNode()}, r"at \['b'\] is a MaskedNode"),
        (tuple(PARAMS.values()), r"no leaf at \['b'\]"),
        (jnp.ones(3), r"no leaf at \['b'\]"),
    ],
)
def test_a_gradient_that_does_not_match(grad, message):
    with pytest.raises(ValueError, match=message):
        cautious().update(PARAMS, optax.EmptyState(), grad=grad)
    with pytest.raises(ValueError, match=message):
        aligned_fraction(PARAMS, grad)


def test_leaves_that_the_update_omits_are_not_reported():
    """A masked leaf and a None come first, followed by a superfluous leaf."""
    updates = {"a": optax.MaskedNode(), "b": None, "w": jnp.ones(2)}
    grad = {"a": {"x": jnp.ones(1)}, "b": jnp.ones(1), "w": jnp.ones(2), "z": 1.0}
    with pytest.raises(
        ValueError, match=r"a leaf at \['z'\], where the update has none"
    ):
        cautious().update(updates, optax.EmptyState(), grad=grad)


def test_a_gradient_in_other_containers():
    with pytest.raises(ValueError, match="its containers are"):
        cautious().update([PARAMS["w"]], optax.EmptyState(), grad=(PARAMS["w"],))


def test_a_single_array_is_named_the_root():
    with pytest.raises(ValueError, match="at the root has shape"):
        cautious().update(jnp.ones(2), optax.EmptyState(), grad=jnp.ones(3))


def test_an_integer_has_a_sign():
    """A counter or a table of integers, whose gradient may be zero."""
    u = {"steps": jnp.array([1, 2, -3, 4]), "w": jnp.ones(4)}
    g = {"steps": jnp.array([2, -1, -1, 0], jnp.int8), "w": jnp.ones(4, jnp.uint8)}
    out, _ = cautious(direction="ascent").update(u, optax.EmptyState(), grad=g)
    np.testing.assert_array_equal(out["steps"], [2.0, 0.0, -6.0, 0.0])
    assert out["steps"].dtype == jnp.float32
    np.testing.assert_array_equal(out["w"], 1.0)


@pytest.mark.parametrize(
    "mask",
    [
        {"w": True},
        {"w": True, "b": "yes"},
        {"w": True, "b": 2},
        {"w": lambda _: True, "b": lambda _: True},
        [True, False],
        {"w": {"x": True}, "b": True},
    ],
)
def test_a_mask_that_does_not_match(mask):
    with pytest.raises(ValueError, match="mask must be a tree of bools"):
        cautious(mask=mask).update(PARAMS, optax.EmptyState(), grad=PARAMS)


def test_a_traced_mask():
    def update(keep):
        return cautious(mask=keep).update(PARAMS, optax.EmptyState(), grad=PARAMS)

    with pytest.raises(ValueError, match=r"mask .* is traced"):
        jax.jit(update)(True)
