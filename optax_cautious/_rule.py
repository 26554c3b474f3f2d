"""The cautious rule on arrays: alignment, weights and their rescaling."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

Direction = Literal["descent", "ascent"]
Alignment = Literal["element", "tensor", "tree"]
Renormalize = Literal["clamp", "paper", "none"]
AxisName = str | Sequence[str] | None


#: Stands among the agreements, which are int8, where either side is NaN.
NAN = 2


class Rule(NamedTuple):
    """The settings of the rule; `opposed_weight` and `min_fraction` may be traced."""

    direction: Direction
    alignment: Alignment
    opposed_weight: ArrayLike
    renormalize: Renormalize
    min_fraction: ArrayLike
    axis_name: AxisName


class Agreement(NamedTuple):
    """The a_i of a leaf: int8 of -1, 0 and 1, or NAN where either side is NaN.

    Both fields hold the same numbers. They are two expressions where computing them
    twice moves less memory than keeping them would.
    """

    #: What decides the weights.
    weighed: jax.Array
    #: What the mean of the weights is taken of.
    counted: jax.Array


def apply(
    rule: Rule,
    updates: list[jax.Array],
    grads: list[jax.Array],
    agreements: list[Agreement],
) -> list[jax.Array]:
    """Returns the cautious updates, leaf by leaf."""
    if rule.alignment == "element":
        leaves = zip(updates, agreements, strict=True)
        return [_by_element(rule, u, a) for u, a in leaves]
    if rule.alignment == "tensor":
        pairs = zip(updates, grads, strict=True)
        return [_by_inner_product(rule, [u], [g])[0] for u, g in pairs]
    return _by_inner_product(rule, updates, grads)


def agreement(u: jax.Array, g: jax.Array, direction: Direction) -> jax.Array:
    """Returns a_i = s * sign(u_i) * sign(g_i), NAN where either side is NaN.

    The signs are multiplied, never the values: u_i * g_i underflows to zero long
    before either factor does. For complex leaves a_i = s * sign(Re(u_i * conj(g_i))).
    """
    if jnp.iscomplexobj(u):
        u, g = (_real_parts(x, _accumulator_dtype(u, g)) for x in (u, g))
        u, g = (jnp.ldexp(x, -_exponent(x, axis=0)) for x in (u, g))
        a = jnp.sign(jnp.sum(u * g, axis=0))
    else:
        a = jnp.sign(u) * jnp.sign(g).astype(u.dtype)
    a = _sign(direction) * a
    # One byte a coordinate is all that a compiler may have to keep.
    return jnp.where(jnp.isnan(a), NAN, a).astype(jnp.int8)


def compare(u: jax.Array, g: jax.Array, direction: Direction) -> Agreement:
    """Returns how an update agrees with its gradient, which the two alone tell."""
    a = agreement(u, g, direction)
    return Agreement(weighed=a, counted=a)


def aligned_fraction(a: Agreement, axis_name: AxisName = None) -> jax.Array:
    """Returns the fraction of the coordinates with a_i > 0; 0 for an empty leaf."""
    if a.counted.size == 0:
        return jnp.zeros((), jnp.float32)
    return _mean(a.counted == 1, jnp.float32, axis_name)


def _by_element(rule: Rule, u: jax.Array, a: Agreement) -> jax.Array:
    if u.size == 0:
        return u
    dtype = _accumulator_dtype(u)
    gamma = jnp.asarray(jnp.real(rule.opposed_weight), dtype)

    def weights(a: jax.Array) -> jax.Array:
        return jnp.where(a == 1, 1, jnp.where(a == -1, gamma, jnp.maximum(gamma, 0)))

    if _is_zero(rule.opposed_weight):
        rho = _mean(a.counted == 1, dtype, rule.axis_name)
    else:
        rho = _mean(jnp.abs(weights(a.counted)), dtype, rule.axis_name)
    # A NaN must stay visible: u * w keeps the update's own, this the gradient's.
    w = jnp.where(a.weighed == NAN, jnp.nan, weights(a.weighed))
    return _multiply(u, w * _scale(rule, rho, u.size))


def _scale(rule: Rule, rho: jax.Array, local_size: int) -> ArrayLike:
    if rule.renormalize == "clamp":
        return 1 / jnp.maximum(rho, jnp.asarray(jnp.real(rule.min_fraction), rho.dtype))
    if rule.renormalize == "paper":
        shards = 1 if rule.axis_name is None else jax.lax.psum(1, rule.axis_name)
        return 1 / (rho + 1 / (local_size * shards))  # n / (sum_i |w_i| + 1)
    return 1.0


def _by_inner_product(
    rule: Rule, updates: list[jax.Array], grads: list[jax.Array]
) -> list[jax.Array]:
    """Weighs all leaves by 1 where s * <u, g> >= 0, by `opposed_weight` elsewhere."""
    if sum(u.size for u in updates) == 0:
        return updates
    product = _sign(rule.direction) * _inner_product(updates, grads, rule.axis_name)
    gamma = jnp.asarray(jnp.real(rule.opposed_weight), product.dtype)
    w = jnp.where(product < 0, gamma, 1)
    # The inner product of a diverged run is NaN: whatever hangs on it shows that.
    w = jnp.where(jnp.isnan(product), jnp.nan, w)
    return [_multiply(u, w) for u in updates]


def _inner_product(
    updates: list[jax.Array], grads: list[jax.Array], axis_name: AxisName
) -> jax.Array:
    """Returns <u, g> up to a positive factor, which keeps it from underflowing."""
    dtype = _accumulator_dtype(*updates, *grads)

    def normalized(xs: list[jax.Array]) -> list[jax.Array]:
        parts = [_real_parts(x, dtype) for x in xs]
        exponent = jnp.max(jnp.stack([_exponent(p) for p in parts]))
        if axis_name is not None:
            exponent = jax.lax.pmax(exponent, axis_name)
        return [jnp.ldexp(p, -exponent) for p in parts]

    pairs = zip(normalized(updates), normalized(grads), strict=True)
    product = jnp.sum(jnp.stack([jnp.sum(u * g) for u, g in pairs]))
    return product if axis_name is None else jax.lax.psum(product, axis_name)


def _real_parts(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the real (and imaginary) parts along a new first axis."""
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    return jnp.stack(parts).astype(dtype)


def _exponent(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns the e for which 2^(e-1) <= max|x| < 2^e, the least for zeros."""
    largest = jnp.max(jnp.abs(x), axis=axis, initial=0)
    exponent = jnp.frexp(largest)[1]
    # Zeros must not set the scale for what else there is.
    return jnp.where(largest == 0, jnp.finfo(x.dtype).minexp, exponent)


def _sign(direction: Direction) -> int:
    """Returns s: an update that is to be added agrees where it opposes the gradient."""
    return -1 if direction == "descent" else 1


def _accumulator_dtype(*xs: jax.Array) -> DTypeLike:
    """Returns float32, or float64 if any leaf has that precision.

    A bfloat16 fraction has 8 bits: half a percent of error in every coordinate.
    """
    is_double = any(jnp.finfo(x.dtype).bits == 64 for x in xs)
    return jnp.float64 if is_double else jnp.float32


def _mean(x: jax.Array, dtype: DTypeLike, axis_name: AxisName) -> jax.Array:
    mean = (_fraction if x.dtype == jnp.bool_ else jnp.mean)(x, dtype=dtype)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def _fraction(mask: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns jnp.mean(mask, dtype=dtype)."""
    return jax.lax.platform_dependent(
        mask,
        cpu=functools.partial(_fraction_on_cpu, dtype=dtype),
        default=functools.partial(jnp.mean, dtype=dtype),
    )


def _fraction_on_cpu(mask: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Counts groups of fewer than 32 in int8, then the groups.

    XLA:CPU computes what so short a reduction reads as it goes. What a longer one reads
    it stores first, here as four bytes a coordinate, and fresh memory is dear there.
    """
    if mask.ndim == 0 or jax.typeof(mask).sharding.spec[-1] is not None:
        # An axis that is sharded in the type cannot be split into any groups.
        return jnp.mean(mask, dtype=dtype)
    n = mask.shape[-1]
    group = next(k for k in range(31, 0, -1) if n % k == 0)
    groups = mask.reshape(*mask.shape[:-1], n // group, group)
    counts = jnp.sum(groups, axis=-1, dtype=jnp.int8)
    return jnp.sum(counts, dtype=dtype) / mask.size


def _is_zero(x: ArrayLike) -> bool:
    """Returns whether x is known to be zero when it is compiled."""
    return not isinstance(x, jax.core.Tracer) and complex(x) == 0


def _multiply(u: jax.Array, w: jax.Array) -> jax.Array:
    """Returns u * w, rounded once, in the dtype of u."""
    if jnp.iscomplexobj(u):
        return u * w.astype(u.dtype)
    return (u.astype(w.dtype) * w).astype(u.dtype)
