"""The numerical traps in implementing caution, with a test for each."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cautious
from optax_cautious import aligned_fraction, cautious

SMALLEST_SAFE = {"float16": 1e-5, "bfloat16": 1e-20, "float32": 1e-20}


def apply(tx, updates, grad):
    return tx.update(updates, tx.init(updates), grad=grad)[0]


@pytest.mark.parametrize("dtype", SMALLEST_SAFE)
@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
def test_products_that_underflow_still_have_a_sign(alignment, dtype):
    tiny = jnp.full(4, SMALLEST_SAFE[dtype], dtype)
    tx = cautious(alignment=alignment, direction="ascent")
    np.testing.assert_array_equal(apply(tx, tiny, tiny), tiny)
    np.testing.assert_array_equal(apply(tx, tiny, -tiny), jnp.zeros_like(tiny))


@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_complex_products_out_of_range_still_have_a_sign(alignment, magnitude):
    u = jnp.full(4, magnitude * (1 + 2j), jnp.complex64)
    tx = cautious(alignment=alignment, direction="ascent")
    np.testing.assert_array_equal(apply(tx, u, u), u)
    np.testing.assert_array_equal(apply(tx, u, -u), jnp.zeros_like(u))


def test_complex_alignment_is_the_sign_of_the_real_inner_product():
    u = jnp.array([1 + 1j, 1 + 1j, 1 + 1j, 2 - 1j])
    g = jnp.array([1 + 0j, -1 - 0.5j, 1 - 1j, 1 + 1j])  # Re(u conj g): 1, -1.5, 0, 1
    tx = cautious(direction="ascent", renormalize=None, opposed_weight=-1.0)
    np.testing.assert_array_equal(apply(tx, u, g), u * jnp.array([1, -1, 0, 1]))


@pytest.mark.parametrize(
    ("u", "g", "weight", "expected"),
    [
        (np.inf, 1.0, 0.5, np.inf),
        (np.inf, -1.0, 0.5, np.inf),
        (np.inf, -1.0, 0.0, np.nan),
        (np.inf, 0.0, 0.0, np.nan),
        (np.inf + 1j, 1.0, 0.0, np.inf + 1j),
        (np.inf + 1j, -1.0, 0.5, np.inf + 0.5j),
        (np.inf + 1j, -1.0, 0.0, np.nan + 0j),
        (np.nan + 1j, 1.0, 1.0, np.nan + 1j),
    ],
)
def test_an_infinite_update_times_its_weight(u, g, weight, expected):
    tx = cautious(opposed_weight=weight, renormalize=None, direction="ascent")
    out = apply(tx, jnp.array([u]), jnp.array([g]).astype(jnp.array(u).dtype))
    # One part of a complex NaN may be finite.
    np.testing.assert_array_equal(jnp.real(out), [np.real(expected)])
    np.testing.assert_array_equal(jnp.imag(out), [np.imag(expected)])


@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
@pytest.mark.parametrize("renormalize", ["clamp", "plus_one", None])
@pytest.mark.parametrize("u", [np.nan, np.inf])
def test_a_non_finite_scalar_stays_visible(u, renormalize, alignment):
    tx = cautious(alignment=alignment, renormalize=renormalize)
    for update in (jnp.array(u), jnp.array([u])):
        assert not jnp.isfinite(apply(tx, update, jnp.ones_like(update))).any()


@pytest.mark.parametrize("opposed_weight", [0.0, 1.0, -1.0])
@pytest.mark.parametrize(
    ("alignment", "renormalize", "neutral"),
    [
        *itertools.product(
            ["element"], ["clamp", "plus_one", None], ["hold", "follow", "ignore"]
        ),
        # The others do not rescale.
        ("leaf", "clamp", "hold"),
        ("tree", "clamp", "hold"),
    ],
)
def test_a_non_finite_update_stays_visible(
    alignment, renormalize, neutral, opposed_weight
):
    tx = cautious(
        alignment=alignment,
        opposed_weight=opposed_weight,
        renormalize=renormalize,
        neutral=neutral,
    )
    for u_0, g_0 in (
        (np.nan, 1.0),
        (np.nan, -1.0),
        (np.nan, 0.0),
        (np.inf, 1.0),
        (np.inf, -1.0),
        (-np.inf, 0.0),
    ):
        u = jnp.array([u_0, 1.0, -1.0, -1.0])
        g = jnp.array([g_0, 1.0, 1.0, 1.0])
        out = apply(tx, u, g)
        assert not jnp.isfinite(out[0])
        assert jnp.all(jnp.isfinite(out[1:]))  # it does not spread


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
@pytest.mark.parametrize("neutral", ["hold", "follow", "ignore"])
@pytest.mark.parametrize("opposed_weight", [0.0, 0.5, -1.0])
def test_a_nan_gradient_is_not_reintroduced(opposed_weight, neutral, alignment, dtype):
    """A `zero_nans` or `apply_if_finite` before it has already handled the NaN."""
    tx = cautious(alignment=alignment, opposed_weight=opposed_weight, neutral=neutral)
    g = jnp.array([jnp.nan, 1.0, 1.0, 1.0], dtype)
    for signs in ([1, 1, -1, -1], [1, 1, 1, -1]):
        u = jnp.array(signs, dtype)
        out = apply(tx, u, g)
        assert jnp.all(jnp.isfinite(out))
        # Like a zero gradient, it agrees with nothing.
        np.testing.assert_array_equal(out, apply(tx, u, g.at[0].set(0.0)))


def test_a_nan_counts_as_not_aligned():
    u = jnp.array([jnp.nan, -1.0, -1.0, -1.0])
    g = jnp.ones(4)
    np.testing.assert_allclose(apply(cautious(), u, g)[1:], -4 / 3, rtol=1e-6)
    assert aligned_fraction(u, g) == 0.75


def test_an_infinite_gradient_has_a_sign():
    out = apply(cautious(), jnp.array([-1.0, 1.0]), jnp.array([jnp.inf, jnp.inf]))
    np.testing.assert_array_equal(out, [-2.0, 0.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_mean_of_many_ones_is_one(dtype):
    """Sums in bfloat16 stall at 256, and sums in float16 overflow."""
    u = jnp.full(10**6, 0.5, dtype)
    out = apply(cautious(direction="ascent"), u, u)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, u)


def test_the_mean_is_not_rounded_to_the_updates_dtype():
    """1 / 0.333 = 3.0030 rounds to 3, 1 / bfloat16(0.333) = 3.0118 to 3.0156."""
    g = jnp.where(jnp.arange(1000) < 333, 1, -1).astype(jnp.bfloat16)
    out = apply(cautious(direction="ascent"), jnp.full_like(g, 171), g)
    expected = np.float32(171 * 1000 / 333)
    assert out[0] == jnp.bfloat16(expected)
    # The trap would result in another value.
    trap = jnp.bfloat16(171) * (1 / jnp.bfloat16(333 / 1000))
    assert trap != jnp.bfloat16(expected)


@pytest.mark.parametrize("u_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("g_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
def test_the_output_keeps_the_updates_dtype(alignment, u_dtype, g_dtype):
    u = {"a": jnp.ones(3, u_dtype), "b": jnp.ones(2, "float32")}
    g = {"a": jnp.ones(3, g_dtype), "b": jnp.ones(2, "bfloat16")}
    out = jax.eval_shape(functools.partial(apply, cautious(alignment=alignment)), u, g)
    assert (out["a"].dtype, out["b"].dtype) == (u_dtype, "float32")


def test_strict_dtype_promotion_is_respected():
    with jax.numpy_dtype_promotion("strict"):
        u, g = jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float32)
        for alignment in ("element", "leaf", "tree"):
            apply(cautious(alignment=alignment), u, g)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64")
def test_float64_is_computed_in_float64():
    u = jnp.ones(7, jnp.float64)
    g = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0], jnp.float64)
    out = apply(cautious(direction="ascent"), u, g)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out[:3], 7 / 3, rtol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alignment", ["leaf", "tree"])
def test_a_float64_gradient_keeps_its_precision(alignment):
    """1 - (1 + 1e-12) is negative; in float32, where both are 1, it would be zero."""
    u = jnp.ones(2, jnp.float32)
    g = jnp.array([1.0, -1.0 - 1e-12], jnp.float64)
    tx = cautious(alignment=alignment, direction="ascent")
    np.testing.assert_array_equal(apply(tx, u, g), 0.0)


def test_the_product_is_rounded_once():
    """Neither factor is rounded to bfloat16 before the multiplication."""
    g = jnp.where(jnp.arange(1000) < 333, 1, -1).astype(jnp.bfloat16)
    for value in (131, 139, 171):
        u = jnp.full_like(g, value)
        out = apply(cautious(direction="ascent"), u, g)
        assert out[0] == jnp.bfloat16(np.float32(value * 1000 / 333))
    # The trap would result in another value.
    trap = jnp.bfloat16(139) * jnp.bfloat16(1000 / 333)
    assert trap != jnp.bfloat16(np.float32(139 * 1000 / 333))


def test_rows_without_a_gradient_scale_up_the_others_to_the_limit():
    """An embedding of 5000 rows with one in the batch: scaled by 1 / 1e-3, not 5000."""
    g = jnp.zeros((5000, 2)).at[7].set(1.0)
    u = -jnp.ones((5000, 2))
    out = apply(cautious(), u, g)
    np.testing.assert_allclose(out[7], -1000.0, rtol=1e-6)
    assert jnp.all(out[:7] == 0)
    np.testing.assert_allclose(apply(cautious(min_fraction=0.1), u, g)[7], -10.0)
    np.testing.assert_array_equal(apply(cautious(mask=False), u, g), u)


@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
def test_none_and_masked_leaves_scalars_and_empty_leaves(alignment):
    u = {
        "none": None,
        "masked": optax.MaskedNode(),
        "scalar": jnp.float32(-1.0),
        "python": -1.0,
        "numpy": -np.ones(2, np.float32),
        "empty": jnp.zeros((0, 3)),
    }
    g = {
        "none": None,
        "masked": {"any": jnp.ones(3), "thing": jnp.ones((2, 2))},
        "scalar": jnp.float32(1.0),
        "python": 1.0,
        "numpy": np.ones(2, np.float32),
        "empty": jnp.zeros((0, 3)),
    }
    tx = cautious(alignment=alignment, monitor=True)
    with jax.debug_nans(True):
        out, state = tx.update(u, tx.init(u), grad=g)
    assert jax.tree.structure(out) == jax.tree.structure(u)
    assert out["scalar"] == -1.0
    assert out["python"] == -1.0
    np.testing.assert_array_equal(out["numpy"], -1.0)
    assert out["empty"].shape == (0, 3)
    assert state.aligned_fraction == 1.0


@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": jnp.zeros((0,))}])
@pytest.mark.parametrize("alignment", ["element", "leaf", "tree"])
def test_a_tree_without_coordinates(alignment, tree):
    tx = cautious(alignment=alignment, monitor=True)
    with jax.debug_nans(True):
        out, state = tx.update(tree, tx.init(tree), grad=tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert state.aligned_fraction == 0.0


def test_no_default_is_callable():
    """optax.inject_hyperparams takes any callable default for a schedule."""
    for name in optax_cautious.__all__:
        function = getattr(optax_cautious, name)
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.default is not inspect.Parameter.empty:
                    assert not callable(parameter.default), (name, parameter)
