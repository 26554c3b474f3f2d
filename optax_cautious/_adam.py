"""Adam and caution in one, which saves a pass over Adam's second moment."""

import functools

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious import _caution, _rule


def scale_by_cautious_adam(
    caution: _caution.Caution,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    eps_root: ArrayLike,
    mu_dtype: DTypeLike | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes :func:`optax.scale_by_adam` cautious.

    The denominator of :math:`u_t = \hat{m}_t / (\sqrt{\hat{v}_t} + \varepsilon)` is
    positive, so the sign of :math:`u_t` is that of :math:`\hat{m}_t`, which takes the
    gradient and the first moment to know. Counting by it reads two arrays; by the
    update, three. (An update may also underflow to zero, which has no sign. Its weight
    changes nothing then, but it is counted.)
    """
    adam = optax.scale_by_adam(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
    )

    def agreements(grads: optax.Updates, state: optax.OptState) -> optax.Updates:
        compare = functools.partial(
            _compare,
            b1=b1,
            count=state.count,
            nesterov=nesterov,
            direction=caution.rule.direction,
        )
        return jax.tree.map(compare, grads, state.mu)

    return _caution.wrap(adam, caution, agreements)


def _compare(
    g: jax.Array,
    m: jax.Array,
    *,
    b1: ArrayLike,
    count: jax.Array,
    nesterov: bool,
    direction: _rule.Direction,
) -> _rule.Agreement:
    def agreement(g: jax.Array, m: jax.Array) -> jax.Array:
        momentum = _momentum(g, m, b1, count, nesterov)
        return _rule.agreement(momentum, g, direction)

    def computed_again(g: jax.Array, m: jax.Array) -> jax.Array:
        # Without the barrier a compiler merges this with the agreement for the weights
        # and keeps that, or the moment, from the count to the step: more traffic than
        # reading g and m twice. Only m goes through: clipping, say, may just have made
        # g, which the barrier would store. XLA:CPU would copy what goes through.
        return agreement(g, jax.lax.optimization_barrier(m))

    return _rule.Agreement(
        weighed=agreement(g, m),
        counted=jax.lax.platform_dependent(g, m, cpu=agreement, default=computed_again),
    )


def _momentum(
    g: jax.Array, m: jax.Array, b1: ArrayLike, count: jax.Array, nesterov: bool
) -> jax.Array:
    """Returns Adam's m-hat, up to a positive factor."""
    m = optax.tree.update_moment(g, m, b1, 1)
    if not nesterov:
        return m
    m_hat = optax.tree.bias_correction(m, b1, count + 2)
    g_hat = optax.tree.bias_correction(g, b1, count + 1)
    return b1 * m_hat + (1 - b1) * g_hat
