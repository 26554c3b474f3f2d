"""The cautious rule on arrays: agreement, weights and rescaling."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious._mean import mean
from optax_cautious._settings import AxisName, Direction, Rule, merge, split


class Agreement(NamedTuple):
    """The a_i of a leaf: -1, 0 or 1 as int8; 0 where either side is NaN.

    Both fields hold the same values. They are separate expressions where recomputing
    them moves less memory than storing them.
    """

    #: The a_i from which the weights are computed.
    weighed: jax.Array
    #: The a_i over which the mean is taken.
    counted: jax.Array


class Leaf(NamedTuple):
    """An array of updates with its gradient."""

    u: jax.Array
    g: jax.Array
    #: Number of leading axes along which separate leaves are stacked.
    stacked: int


def apply(
    rule: Rule, leaves: list[Leaf], agreements: list[Agreement]
) -> list[jax.Array]:
    """Return the cautious updates; only `alignment="element"` uses the agreements."""
    static, arrays = split(rule)
    if rule.alignment == "element":
        return [
            _by_element(leaf.u, a, arrays, rule=static, stacked=leaf.stacked)
            for leaf, a in zip(leaves, agreements, strict=True)
        ]
    if rule.alignment == "leaf":
        return [
            _by_inner_product(
                [leaf.u], [leaf.g], arrays, rule=static, stacked=leaf.stacked
            )[0]
            for leaf in leaves
        ]
    us, gs = [leaf.u for leaf in leaves], [leaf.g for leaf in leaves]
    return _by_inner_product(us, gs, arrays, rule=static, stacked=0)


# With jax.jit, leaves of equal shape are traced once, and outside of jit each leaf is
# one call. Operations on whole leaves use jax.lax, which traces three times as fast as
# jax.numpy.
@functools.partial(jax.jit, static_argnames="direction")
def agreement(u: jax.Array, g: jax.Array, *, direction: Direction) -> jax.Array:
    """Return a_i = s * sign(u_i) * sign(g_i), or 0 where either side is NaN.

    s is -1 for "descent", since an update that is added to the parameters agrees if its
    sign is opposite to the gradient's, and 1 for "ascent".

    The signs are multiplied, never the values: u_i * g_i underflows to zero long before
    either factor does. For complex leaves a_i = s * sign(Re(u_i * conj(g_i))).
    """
    if jnp.iscomplexobj(u):
        u, g = (_normalized([x], x.ndim, _accumulator_dtype(x))[0] for x in (u, g))
        real, imaginary = jnp.moveaxis(u * g, -1, 0)
        # The sign of their sum. The sum itself need not be zero when they cancel: if a
        # compiler fuses product and sum, the product's rounding error remains.
        a = (real > -imaginary).astype(jnp.int8) - (real < -imaginary).astype(jnp.int8)
    else:
        a = lax.mul(lax.sign(u), lax.convert_element_type(lax.sign(g), u.dtype))
        a = lax.select(lax.ne(a, a), lax.full_like(a, 0), a)  # NaN != NaN.
    a = a if direction == "ascent" else lax.neg(a)
    # If a compiler stores the result, it takes one byte per coordinate.
    return lax.convert_element_type(a, jnp.int8)


def compare(u: jax.Array, g: jax.Array, direction: Direction) -> Agreement:
    """Return the agreement of an update with its gradient."""
    a = agreement(u, g, direction=direction)
    return Agreement(weighed=a, counted=a)


@functools.partial(jax.jit, static_argnames=("stacked", "axis_name"))
def aligned_fraction(
    a: jax.Array, *, stacked: int, axis_name: AxisName = None
) -> jax.Array:
    """Return the fraction with a_i > 0 in each slice; 0 for an empty leaf."""
    if a.size == 0:
        return jnp.zeros(a.shape[:stacked], jnp.float32)
    agrees = lax.gt(a, lax.full_like(a, 0))
    fraction = mean(agrees, _axes(a, stacked), jnp.float32)
    return fraction if axis_name is None else lax.pmean(fraction, axis_name)


@functools.partial(jax.jit, static_argnames=("rule", "stacked"))
def _by_element(
    u: jax.Array,
    a: Agreement,
    arrays: dict[str, Any],
    *,
    rule: Rule,
    stacked: int,
) -> jax.Array:
    if u.size == 0:
        return u
    rule, dtype = merge(rule, arrays), _accumulator_dtype(u)
    w = _weights(rule, a.weighed, dtype)
    if rule.renormalize is not None:
        w = lax.convert_element_type(w, dtype) * _scale(rule, a.counted, stacked, dtype)
    return _multiply(u, w)


@functools.partial(jax.jit, static_argnames=("rule", "stacked"))
def _by_inner_product(
    us: list[jax.Array],
    gs: list[jax.Array],
    arrays: dict[str, Any],
    *,
    rule: Rule,
    stacked: int,
) -> list[jax.Array]:
    """Multiply by 1 where s * <u, g> >= 0 over all leaves, else by `opposed_weight`."""
    if sum(u.size for u in us) == 0:
        return us
    product = _inner_product(us, gs, stacked, rule.axis_name)
    s = -1 if rule.direction == "descent" else 1
    a = s * jnp.nan_to_num(jnp.sign(product))
    rule = merge(rule, arrays)._replace(neutral="follow")
    w = _weights(rule, a, product.dtype)
    return [
        _multiply(u, jnp.broadcast_to(lax.expand_dims(w, _axes(u, stacked)), u.shape))
        for u in us
    ]


def _weights(rule: Rule, a: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the w_i, as bools if they can only be 0 or 1."""
    follows = rule.neutral == "follow"
    if _is_zero(rule.opposed_weight):
        return (lax.ge if follows else lax.gt)(a, lax.full_like(a, 0))
    gamma = jnp.asarray(jnp.real(rule.opposed_weight), dtype)
    at_zero = 1 if follows else jnp.maximum(gamma, 0)
    return jnp.where(a > 0, 1, jnp.where(a < 0, gamma, at_zero))


def _scale(rule: Rule, a: jax.Array, stacked: int, dtype: DTypeLike) -> jax.Array:
    """Return the factor that rescales each slice."""
    axes, ignores = _axes(a, stacked), rule.neutral == "ignore"
    n = float(math.prod(a.shape[axis] for axis in axes))
    w = _weights(rule, a, dtype)
    if w.dtype != jnp.bool_:
        w = jnp.where(a == 0, 0, jnp.abs(w)) if ignores else jnp.abs(w)
    total = mean(w, axes, dtype)
    live: Any = mean(a != 0, axes, dtype) if ignores else 1.0
    if rule.axis_name is not None:
        total, live = lax.pmean((total, live), rule.axis_name)
        n = n * lax.psum(1, rule.axis_name)
    # Both are fractions of n. A coordinate is live if it is not neutral.
    # A slice without live coordinates is not rescaled.
    has_live = live > 0
    if ignores:
        live = jnp.where(has_live, live, 1)  # The derivative of 0 / 0 is NaN.
    if rule.renormalize == "clamp":
        min_fraction = jnp.asarray(jnp.real(rule.min_fraction), dtype)
        scale = live / jnp.maximum(total, min_fraction * live)
    else:
        scale = live / (total + 1 / n)
    if ignores:
        scale = jnp.where(has_live, scale, 1)
    return lax.expand_dims(scale, axes)


def _inner_product(
    us: list[jax.Array], gs: list[jax.Array], stacked: int, axis_name: AxisName
) -> jax.Array:
    """Return <u, g> of each slice, up to a positive factor."""
    dtype = _accumulator_dtype(*us, *gs)
    pairs = zip(
        _normalized(us, stacked, dtype, axis_name),
        _normalized(gs, stacked, dtype, axis_name),
        strict=True,
    )
    sums = [jnp.sum(u * g, _axes(u, stacked)) for u, g in pairs]
    product = jnp.sum(jnp.stack(sums), axis=0)
    return product if axis_name is None else lax.psum(product, axis_name)


def _normalized(
    xs: list[jax.Array], stacked: int, dtype: DTypeLike, axis_name: AxisName = None
) -> list[jax.Array]:
    """Return the real parts of each slice, scaled by a common power of two.

    The largest magnitude is then about 1, so products of two such arrays do not
    underflow.
    """
    parts = [_real_parts(x, dtype) for x in xs]
    largest = [jnp.max(jnp.abs(p), _axes(p, stacked), initial=0) for p in parts]
    exponent = _exponent(jnp.max(jnp.stack(largest), axis=0))
    if axis_name is not None:
        exponent = lax.pmax(exponent, axis_name)
    return [jnp.ldexp(p, -jnp.expand_dims(exponent, _axes(p, stacked))) for p in parts]


def _real_parts(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the real (and imaginary) parts along a new last axis, 0 for NaN."""
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    parts = [jnp.where(jnp.isnan(x), 0, p) for p in parts]
    return jnp.stack(parts, axis=-1).astype(dtype)


def _exponent(largest: jax.Array) -> jax.Array:
    """Return e such that 2^(e-1) <= largest < 2^e; the minimum exponent for zero."""
    exponent = jnp.frexp(largest)[1]
    # A leaf of zeros must not determine the common scale.
    return jnp.where(largest == 0, jnp.finfo(largest.dtype).minexp, exponent)


def _axes(x: jax.Array, stacked: int) -> tuple[int, ...]:
    """Return the axes of a slice."""
    return tuple(range(stacked, x.ndim))


def _accumulator_dtype(*xs: jax.Array) -> DTypeLike:
    """Return float64 if any leaf has that precision, else float32.

    A bfloat16 fraction has 8 bits: an error of half a percent in every coordinate.
    """
    is_double = any(x.dtype in (jnp.float64, jnp.complex128) for x in xs)
    return jnp.float64 if is_double else jnp.float32


def _is_zero(x: ArrayLike) -> bool:
    """Return whether x is known to be zero at compile time."""
    return not isinstance(x, jax.Array) and x == 0


def _multiply(u: jax.Array, w: jax.Array) -> jax.Array:
    """Return u * w in the dtype of u, rounded once."""
    if jnp.iscomplexobj(u):
        # A product with w + 0j would turn an infinite part into NaN.
        return lax.complex(_multiply(lax.real(u), w), _multiply(lax.imag(u), w))
    if w.dtype == jnp.bool_:
        # XLA turns the product with a bool into a selection of 0, which hides a NaN.
        return lax.select(w, u, lax.mul(u, lax.full_like(u, 0)))
    product = lax.mul(lax.convert_element_type(u, w.dtype), w)
    return lax.convert_element_type(product, u.dtype)
