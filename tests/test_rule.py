"""The equations of `cautious` against an independent NumPy reference in float64."""

import itertools
import random

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_cautious import aligned_fraction, cautious
from tests import reference

REAL = ("float32", "bfloat16", "float16")
DTYPES = [*itertools.product(REAL, REAL), ("complex64", "complex64")]
SHAPES = [(), (1,), (7,), (3, 5), (2, 2, 2), (0,), (2, 0, 3)]
DIRECTIONS = ("descent", "ascent")
OPPOSED_WEIGHTS = (0.0, 1.0, -1.0, 0.5, -0.25)
# Ordinary magnitudes, and some whose products underflow or overflow float32.
COORDINATES = {
    "float32": (0.0, 1e-30, 1e-20, 1e-3, 0.7, 1.0, 3.0, 1e20, 1e30),
    "bfloat16": (0.0, 1e-30, 1e-20, 1e-3, 0.7, 1.0, 3.0, 1e20, 1e30),
    "float16": (0.0, 1e-4, 1e-3, 0.7, 1.0, 3.0, 60.0),
}
PARTS = (0.0, 0.1, -0.1, 0.7, -0.7, 1.0, -1.0, 3.0, -3.0)


def leaves(shape, dtype: str) -> st.SearchStrategy[np.ndarray]:
    if dtype == "complex64":
        # Parts of similar magnitude: in float32, 1e-40 is lost next to 1e40.
        parts = hnp.arrays(np.float64, shape, elements=st.sampled_from(PARTS))
        sizes = st.sampled_from((1e-30, 1e-20, 1.0, 1e20))
        return st.builds(
            lambda re, im, size: (size * (re + 1j * im)).astype(dtype),
            parts,
            parts,
            sizes,
        )
    signed = [s * x for x in COORDINATES[dtype] for s in (1.0, -1.0)]
    values = hnp.arrays(np.float64, shape, elements=st.sampled_from(signed))
    return values.map(lambda x: x.astype(jnp.dtype(dtype)))


def some(*choices, count: int) -> st.SearchStrategy[tuple]:
    """Draw from a few of the combinations, as each is compiled separately."""
    combinations = [*itertools.product(*choices)]
    return st.sampled_from(random.Random(0).sample(combinations, count))


def update_and_gradient(shape, dtypes) -> st.SearchStrategy[tuple]:
    return st.tuples(*(leaves(shape, dtype) for dtype in dtypes))


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def assert_close(actual: jax.Array, expected: np.ndarray, dtype) -> None:
    assert actual.dtype == dtype
    actual, limits = np.asarray(actual), jnp.finfo(dtype)
    if not np.iscomplexobj(actual):
        # Values out of range are infinite in the dtype and finite in the reference.
        actual, expected = (
            np.clip(x.astype(np.float64), float(limits.min), float(limits.max))
            for x in (actual, expected)
        )
    np.testing.assert_allclose(actual, expected, rtol=4 * float(limits.eps), atol=0)


SETTINGS = {
    "direction": DIRECTIONS,
    "opposed_weight": OPPOSED_WEIGHTS,
    "renormalize": ("clamp", "plus_one", None),
    "min_fraction": (1e-3, 0.3, 1.0),
    "neutral": ("hold", "follow", "ignore"),
}


@given(data=st.data(), program=some(SHAPES, DTYPES, *SETTINGS.values(), count=40))
def test_element_matches_the_reference(data, program):
    shape, dtypes, *values = program
    u, g = data.draw(update_and_gradient(shape, dtypes))
    settings = dict(zip(SETTINGS, values, strict=True))
    tx = cautious(**settings)
    actual, _ = tx.update(u, tx.init(u), grad=g)
    assert_close(actual, reference.element(wide(u), wide(g), **settings), u.dtype)


@st.composite
def trees_of_small_integers(draw) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw integers times a power of two: inner products are exact in float32."""
    shapes = draw(st.sampled_from(([(7,)], [(), (3, 5)], [(0,), (2, 2, 2), (1,)])))
    is_complex = draw(st.booleans())

    def tree() -> list[np.ndarray]:
        scale = 2.0 ** draw(st.sampled_from((-100, -60, 0, 60, 100)))
        parts = [
            [
                draw(hnp.arrays(np.int8, shape, elements=st.integers(-5, 5)))
                for shape in shapes
            ]
            for _ in range(1 + is_complex)
        ]
        if is_complex:
            return [
                np.asarray(scale * (x + 1j * y), np.complex64)
                for x, y in zip(*parts, strict=True)
            ]
        return [np.asarray(scale * x, np.float32) for x in parts[0]]

    return tree(), tree()


@given(
    trees=trees_of_small_integers(),
    rule=some(DIRECTIONS, OPPOSED_WEIGHTS, ("leaf", "tree"), count=6),
)
def test_inner_product_matches_the_reference(trees, rule):
    us, gs = trees
    direction, opposed_weight, alignment = rule
    tx = cautious(
        alignment=alignment, direction=direction, opposed_weight=opposed_weight
    )
    actual, _ = tx.update(us, tx.init(us), grad=gs)
    groups = [[i] for i in range(len(us))] if alignment == "leaf" else [range(len(us))]
    for group in groups:
        expected = reference.inner_product(
            [wide(us[i]) for i in group],
            [wide(gs[i]) for i in group],
            direction,
            opposed_weight,
        )
        for i, x in zip(group, expected, strict=True):
            assert_close(actual[i], x, us[i].dtype)


@given(data=st.data(), program=some(SHAPES, DTYPES, DIRECTIONS, count=20))
def test_aligned_fraction_matches_the_reference(data, program):
    shape, dtypes, direction = program
    u, g = data.draw(update_and_gradient(shape, dtypes))
    a = [
        reference.agreement(u_i, g_i, direction)
        for u_i, g_i in zip(wide(u).ravel().tolist(), wide(g).ravel().tolist())
    ]
    expected = np.mean(np.array(a) > 0) if a else 0.0
    actual = aligned_fraction(u, g, direction=direction)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("opposed_weight", "weights"),
    [
        (0.0, [1, 0, 0, 0, 0]),
        (0.5, [1, 0.5, 0.5, 0.5, 0.5]),
        (1.0, [1, 1, 1, 1, 1]),
        (-0.5, [1, -0.5, 0, 0, 0]),
        (-1.0, [1, -1, 0, 0, 0]),
    ],
)
def test_the_weights_of_aligned_opposed_and_zero_coordinates(opposed_weight, weights):
    u = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    g = jnp.array([1.0, -1.0, 0.0, 1.0, 0.0])
    tx = cautious(opposed_weight=opposed_weight, direction="ascent")
    actual, _ = tx.update(u, tx.init(u), grad=g)
    rho = sum(abs(w) for w in weights) / 5
    expected = [u_i * w / rho for u_i, w in zip(u.tolist(), weights)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_the_defaults_are_the_documented_settings():
    u = jnp.array([1.0, -1.0, 1.0, 0.0])
    g = jnp.array([-2.0, -2.0, 2.0, 2.0])
    explicit = cautious(
        direction="descent",
        alignment="element",
        opposed_weight=0.0,
        renormalize="clamp",
        min_fraction=1e-3,
        axis_name=None,
        mask=None,
        monitor=False,
    )
    default = cautious()
    assert (
        default.update(u, default.init(u), grad=g)[0].tolist()
        == explicit.update(u, explicit.init(u), grad=g)[0].tolist()
        == [4.0, 0.0, 0.0, 0.0]
    )


@pytest.mark.parametrize("renormalize", ["clamp", None])
def test_opposed_weight_one_is_the_base_optimizer(renormalize):
    u = jax.random.normal(jax.random.key(0), (100, 100))
    g = jax.random.normal(jax.random.key(1), (100, 100))
    tx = cautious(opposed_weight=1.0, renormalize=renormalize)
    np.testing.assert_array_equal(tx.update(u, tx.init(u), grad=g)[0], u)


def test_opposed_weight_minus_one_is_grams():
    u = jax.random.normal(jax.random.key(0), (100,))
    g = jax.random.normal(jax.random.key(1), (100,))
    tx = cautious(opposed_weight=-1.0)
    actual, _ = tx.update(u, tx.init(u), grad=g)
    np.testing.assert_array_equal(actual, -jnp.sign(g) * jnp.abs(u))
