"""The cautious rule on arrays: agreement, weights and their rescaling."""

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
    """The a_i of a leaf, int8 of -1, 0 and 1; 0 where either side is NaN.

    Both fields hold the same numbers. They are two expressions where computing them
    twice moves less memory than keeping them would.
    """

    #: What decides the weights.
    weighed: jax.Array
    #: What the mean of the weights is taken of.
    counted: jax.Array


class Leaf(NamedTuple):
    """An array of updates beside its gradient."""

    u: jax.Array
    g: jax.Array
    #: How many leading axes stack things that are leaves of their own elsewhere.
    stacked: int


def apply(
    rule: Rule, leaves: list[Leaf], agreements: list[Agreement]
) -> list[jax.Array]:
    """Returns the cautious updates; the agreements are for `alignment="element"`."""
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


# Under jax.jit leaves of one shape are traced once, and without it each is one call.
# Whole leaves go through jax.lax, which takes a third of the time to trace.
@functools.partial(jax.jit, static_argnames="direction")
def agreement(u: jax.Array, g: jax.Array, *, direction: Direction) -> jax.Array:
    """Returns a_i = s * sign(u_i) * sign(g_i), 0 where either side is NaN.

    s is -1 for "descent": an update that is to be added agrees where it opposes the
    gradient. For "ascent" it is 1.

    The signs are multiplied, never the values: u_i * g_i underflows to zero long
    before either factor does. For complex leaves a_i = s * sign(Re(u_i * conj(g_i))).
    """
    if jnp.iscomplexobj(u):
        u, g = (_normalized([x], x.ndim, _accumulator_dtype(x))[0] for x in (u, g))
        real, imaginary = jnp.moveaxis(u * g, -1, 0)
        # The sign of their sum. Added up, they need not cancel: of a product that a
        # compiler fuses with the sum, the rounding error is left.
        a = (real > -imaginary).astype(jnp.int8) - (real < -imaginary).astype(jnp.int8)
    else:
        a = lax.mul(lax.sign(u), lax.convert_element_type(lax.sign(g), u.dtype))
        a = lax.select(lax.ne(a, a), lax.full_like(a, 0), a)  # A NaN is not itself.
    a = a if direction == "ascent" else lax.neg(a)
    # One byte a coordinate is all that a compiler may have to keep.
    return lax.convert_element_type(a, jnp.int8)


def compare(u: jax.Array, g: jax.Array, direction: Direction) -> Agreement:
    """Returns how an update agrees with its gradient, which the two alone tell."""
    a = agreement(u, g, direction=direction)
    return Agreement(weighed=a, counted=a)


@functools.partial(jax.jit, static_argnames=("stacked", "axis_name"))
def aligned_fraction(
    a: jax.Array, *, stacked: int, axis_name: AxisName = None
) -> jax.Array:
    """Returns the fraction with a_i > 0 in each slice; 0 for an empty leaf."""
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
    w = lax.convert_element_type(_weights(rule, a.weighed, dtype), dtype)
    return _multiply(u, w * _scale(rule, a.counted, stacked, dtype))


@functools.partial(jax.jit, static_argnames=("rule", "stacked"))
def _by_inner_product(
    us: list[jax.Array],
    gs: list[jax.Array],
    arrays: dict[str, Any],
    *,
    rule: Rule,
    stacked: int,
) -> list[jax.Array]:
    """Weighs all leaves by 1 where s * <u, g> >= 0, by `opposed_weight` elsewhere."""
    if sum(u.size for u in us) == 0:
        return us
    product = _inner_product(us, gs, stacked, rule.axis_name)
    s = -1 if rule.direction == "descent" else 1
    a = s * jnp.nan_to_num(jnp.sign(product))
    rule = merge(rule, arrays)._replace(neutral="follow")
    w = _weights(rule, a, product.dtype).astype(product.dtype)
    return [
        _multiply(u, jnp.broadcast_to(lax.expand_dims(w, _axes(u, stacked)), u.shape))
        for u in us
    ]


def _weights(rule: Rule, a: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the w_i, as bools where they can only be 0 and 1."""
    follows = rule.neutral == "follow"
    if _is_zero(rule.opposed_weight):
        return (lax.ge if follows else lax.gt)(a, lax.full_like(a, 0))
    gamma = jnp.asarray(jnp.real(rule.opposed_weight), dtype)
    at_zero = 1 if follows else jnp.maximum(gamma, 0)
    return jnp.where(a > 0, 1, jnp.where(a < 0, gamma, at_zero))


def _scale(rule: Rule, a: jax.Array, stacked: int, dtype: DTypeLike) -> ArrayLike:
    """Returns what makes up for the weights, one factor for each slice."""
    if rule.renormalize is None:
        return 1.0
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
    # Both are in units of n. Where nothing is live, there is nothing to make up for.
    if rule.renormalize == "clamp":
        min_fraction = jnp.asarray(jnp.real(rule.min_fraction), dtype)
        scale = live / jnp.maximum(total, min_fraction * live)
    else:
        scale = live / (total + 1 / n)
    if ignores:
        scale = jnp.where(live > 0, scale, 1)
    return lax.expand_dims(scale, axes)


def _inner_product(
    us: list[jax.Array], gs: list[jax.Array], stacked: int, axis_name: AxisName
) -> jax.Array:
    """Returns <u, g> of each slice, up to a positive factor."""
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
    """Returns the real parts of each slice times a power of two that they share.

    The largest of all is then about 1, and the products of two such do not underflow.
    """
    parts = [_real_parts(x, dtype) for x in xs]
    largest = [jnp.max(jnp.abs(p), _axes(p, stacked), initial=0) for p in parts]
    exponent = _exponent(jnp.max(jnp.stack(largest), axis=0))
    if axis_name is not None:
        exponent = lax.pmax(exponent, axis_name)
    return [jnp.ldexp(p, -jnp.expand_dims(exponent, _axes(p, stacked))) for p in parts]


def _real_parts(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the real (and imaginary) parts along a new last axis, 0 for NaN."""
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    parts = [jnp.where(jnp.isnan(x), 0, p) for p in parts]
    return jnp.stack(parts, axis=-1).astype(dtype)


def _exponent(largest: jax.Array) -> jax.Array:
    """Returns the e for which 2^(e-1) <= largest < 2^e, the least for zero."""
    exponent = jnp.frexp(largest)[1]
    # Zeros must not set the scale for what else there is.
    return jnp.where(largest == 0, jnp.finfo(largest.dtype).minexp, exponent)


def _axes(x: jax.Array, stacked: int) -> tuple[int, ...]:
    """Returns the axes of a slice."""
    return tuple(range(stacked, x.ndim))


def _accumulator_dtype(*xs: jax.Array) -> DTypeLike:
    """Returns float32, or float64 if any leaf has that precision.

    A bfloat16 fraction has 8 bits: half a percent of error in every coordinate.
    """
    is_double = any(x.dtype in (jnp.float64, jnp.complex128) for x in xs)
    return jnp.float64 if is_double else jnp.float32


def _is_zero(x: ArrayLike) -> bool:
    """Returns whether x is known to be zero when it is compiled."""
    return not isinstance(x, jax.Array) and x == 0


def _multiply(u: jax.Array, w: jax.Array) -> jax.Array:
    """Returns u * w, rounded once, in the dtype of u."""
    wide = u.dtype if jnp.iscomplexobj(u) else w.dtype
    product = lax.mul(
        lax.convert_element_type(u, wide), lax.convert_element_type(w, wide)
    )
    return lax.convert_element_type(product, u.dtype)
