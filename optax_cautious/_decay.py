"""Weight decay that does not oppose the update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cautious import _rule
from optax_cautious._settings import Direction, check_direction, check_weight_decay
from optax_cautious._trees import Mask


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Mask, cautious_decay: bool
) -> optax.GradientTransformation:
    """Build the weight decay of a named optimizer, for updates that point uphill."""
    if cautious_decay:
        return add_cautious_decayed_weights(weight_decay, mask)
    return optax.add_decayed_weights(weight_decay, mask)


def add_cautious_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    direction: Direction = "ascent",
) -> optax.GradientTransformation:
    r"""Add weight decay where it does not oppose the incoming update.

    With :math:`u` the update, :math:`\theta` the parameters, :math:`\lambda` the
    strength of the decay, and :math:`s = 1` for an update that still points uphill
    (``direction="ascent"``) and -1 for one that will be added to the parameters:

    .. math::

      u_i \leftarrow u_i + \begin{cases}
        s \lambda \theta_i & \text{if } s u_i \theta_i \ge 0 \\
        0 & \text{otherwise}
        \end{cases}

    A weight decays only where the update shrinks it too, or leaves it unchanged. The
    update is compared with the *parameters*, so no gradient is needed, and the link
    works in any chain. Change this::

      optax.chain(
          optax.scale_by_adam(),
          optax.add_decayed_weights(0.1),
          optax.scale_by_learning_rate(3e-4))

    to this::

      optax.chain(
          optax.scale_by_adam(),
          add_cautious_decayed_weights(0.1),
          optax.scale_by_learning_rate(3e-4))

    In the named optimizers, set ``cautious_decay=True``.

    Args:
      weight_decay: non-negative scalar, possibly traced, or a schedule.
      mask: a tree of bools with the structure of the parameters, or a prefix of it, or
        a function of the parameters that returns one. Leaves at True decay. Under
        :func:`optax.inject_hyperparams`, list ``mask`` in ``static_args`` if it is a
        function.
      direction: ``"ascent"`` for an update that still points uphill, as after
        ``optax.scale_by_*``; ``"descent"`` for one that will be added to the
        parameters, as after a complete optimizer. In both cases, a positive decay
        shrinks the weights.

    Returns:
      A :class:`optax.GradientTransformation` with the state of
      :func:`optax.add_decayed_weights`.

    Raises:
      ValueError: for an unknown direction or a negative decay; in ``update``, if the
        parameters are not passed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_cautious import add_cautious_decayed_weights
      >>> tx = add_cautious_decayed_weights(0.5)
      >>> params = jnp.array([2., 2., 2., -2.])
      >>> updates = jnp.array([1., -1., 0., -1.])
      >>> updates, state = tx.update(updates, tx.init(params), params)
      >>> print(updates)
      [ 2. -1.  1. -2.]

    References:
      Chen et al, `Cautious Weight Decay <https://arxiv.org/abs/2510.12402>`_, 2025
    """
    check_direction(direction)
    check_weight_decay(weight_decay)
    plain = optax.add_decayed_weights(weight_decay)

    def add(u: jax.Array, decay: jax.Array) -> jax.Array:
        # a < 0 where the decay term, s * decay, opposes the update.
        a = _rule.agreement(u, decay, direction=direction)
        return jnp.where(a < 0, u, u + decay if direction == "ascent" else u - decay)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "add_cautious_decayed_weights needs the parameters: call "
                "tx.update(grads, state, params)."
            )
        # The decay that Optax adds, with its schedule.
        zeros = jax.tree.map(jnp.zeros_like, updates)
        decay, state = plain.update(zeros, state, params)
        return jax.tree.map(add, updates, decay), state

    tx = optax.GradientTransformation(plain.init, update_fn)
    return tx if mask is None else optax.masked(tx, mask)
