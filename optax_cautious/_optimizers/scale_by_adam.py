"""Adam fused with caution, which saves a pass over Adam's second moment."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious import _mean, _rule
from optax_cautious._caution import Caution, Compare
from optax_cautious._settings import Direction, merge, split


class _Momentum(NamedTuple):
    """The settings of Adam's first moment; `b1` may be traced."""

    b1: ArrayLike
    nesterov: bool


def scale_by_cautious_adam(
    caution: Caution,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    eps_root: ArrayLike,
    mu_dtype: DTypeLike | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    r"""Build a cautious :func:`optax.scale_by_adam`.

    The denominator of :math:`u_t = \hat{m}_t / (\sqrt{\hat{v}_t} + \varepsilon)` is
    positive, so the sign of :math:`u_t` is that of :math:`\hat{m}_t`, which depends on
    the gradient and the first moment alone. Counting agreements by :math:`\hat{m}_t`
    reads two arrays instead of three. (Where the update underflows to zero, the
    coordinate is still counted as agreeing, while its weight has no effect.)
    """
    adam = optax.scale_by_adam(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
    )
    # A number must not become an array here: 1 - b1 would round differently than in
    # Optax, and the compiler could no longer merge the two computations.
    momentum, arrays = split(_Momentum(b1, nesterov))

    def compare_by(state: optax.ScaleByAdamState) -> Compare:
        compare_leaf = functools.partial(
            _compare, momentum=momentum, direction=caution.rule.direction
        )
        return lambda pairs: [
            compare_leaf(leaf.g, m, state.count, arrays)
            for leaf, m in zip(pairs.leaves, pairs.like(state.mu), strict=True)
        ]

    return caution.around(adam, compare_by)


@functools.partial(jax.jit, static_argnames=("momentum", "direction"))
def _compare(
    g: jax.Array,
    m: jax.Array,
    count: jax.Array,
    arrays: dict[str, Any],
    *,
    momentum: _Momentum,
    direction: Direction,
) -> _rule.Agreement:
    momentum = merge(momentum, arrays)

    def agreement(g: jax.Array, m: jax.Array) -> jax.Array:
        m_hat = _m_hat(g, m, count, momentum)
        return _rule.agreement(m_hat, g, direction=direction)

    def recomputed(g: jax.Array, m: jax.Array) -> jax.Array:
        # Without the barrier a compiler merges this with the agreement for the weights
        # and stores that, or the moment, between count and step: more traffic than
        # reading g and m twice. Only m passes the barrier, which would materialize g if
        # it was just computed, by clipping for example. XLA:CPU copies its operands.
        return agreement(g, jax.lax.optimization_barrier(m))

    weighed = agreement(g, m)
    if g.size <= _mean.SMALL:
        return _rule.Agreement(weighed=weighed, counted=weighed)
    counted = jax.lax.platform_dependent(g, m, cpu=agreement, default=recomputed)
    return _rule.Agreement(weighed=weighed, counted=counted)


def _m_hat(
    g: jax.Array, m: jax.Array, count: jax.Array, momentum: _Momentum
) -> jax.Array:
    """Return Adam's m-hat, up to a positive factor."""
    b1 = momentum.b1
    m = optax.tree.update_moment(g, m, b1, 1)
    if not momentum.nesterov:
        return m
    m_hat = optax.tree.bias_correction(m, b1, count + 2)
    g_hat = optax.tree.bias_correction(g, b1, count + 1)
    return b1 * m_hat + (1 - b1) * g_hat
