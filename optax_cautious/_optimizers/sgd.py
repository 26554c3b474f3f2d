"""C-GDM, gradient descent with cautious momentum."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious._caution import Caution, chain
from optax_cautious._settings import Alignment, AxisName, Neutral, Renormalize
from optax_cautious._trees import Mask, Stacked


def cautious_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
    neutral: Neutral = "hold",
    stacked: Stacked = None,
    axis_name: AxisName = None,
    caution_mask: Mask = None,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""C-GDM: gradient descent with momentum that does not move against the gradient.

    With :math:`w_t, \rho_t` the weights and their mean as in :func:`cautious`:

    .. math::

      \begin{align*}
        m_t &\leftarrow g_t + \mu m_{t-1} \\
        u_t &\leftarrow \begin{cases}
          m_t & \text{ if } \texttt{nesterov = False} \\
          g_t + \mu m_t & \text{ if } \texttt{nesterov = True}
          \end{cases} \\
        \theta_{t+1} &\leftarrow \theta_t
          - \alpha_t u_t \cdot w_t / \max(\rho_t, \rho_{\min})
      \end{align*}

    The state is :func:`optax.sgd`'s: either restores the other's checkpoints. Without
    momentum the update is the gradient, and only the rescaling for zero coordinates is
    left.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.sgd`, as for all the
        arguments up to `accumulator_dtype`.
      momentum: decay rate of the momentum; none by default.
      nesterov: whether to use Nesterov momentum.
      accumulator_dtype: dtype of the momentum; that of the parameters by default.
      alignment: what the signs are compared of, see :func:`cautious`, as for all the
        arguments that follow.
      opposed_weight: the weight of a coordinate that disagrees with the gradient.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
      neutral: what to do where update or gradient is exactly zero or NaN.
      stacked: how many leading axes stack leaves.
      axis_name: the mapped axes that the leaves are split along.
      caution_mask: the leaves to be cautious with (``mask`` of :func:`cautious`).
      monitor: whether the state carries the fraction of coordinates that agreed.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: see :func:`cautious`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_cautious import cautious_sgd
      >>> loss = lambda params: jnp.sum(params**2)
      >>> tx = cautious_sgd(learning_rate=0.003, momentum=0.9)
      >>> params = jnp.array([1., 2., 3.])
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      11.91

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024
    """
    caution = Caution.of(locals(), direction="ascent", mask=caution_mask)
    direction = (
        optax.identity()
        if momentum is None
        else optax.trace(
            decay=momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype
        )
    )
    return chain(caution, [direction], [optax.scale_by_learning_rate(learning_rate)])
