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

    Unless ``monitor=True``, the state is that of :func:`optax.sgd`, and each restores
    the other's checkpoints. Without momentum, the update is the gradient, and caution
    only rescales leaves with zero gradients.

    Args:
      learning_rate: scalar or schedule; for this and all arguments up to
        `accumulator_dtype` see :func:`optax.sgd`.
      momentum: decay rate of the momentum; none by default.
      nesterov: whether to use Nesterov momentum.
      accumulator_dtype: dtype of the momentum; that of the parameters by default.
      alignment: whether elements, leaves or the whole tree are compared. For this and
        all following arguments see :func:`cautious`.
      opposed_weight: weight of a coordinate whose update opposes the gradient.
      renormalize: how the surviving coordinates are rescaled.
      min_fraction: lower bound on the fraction by which the update is divided.
      neutral: treatment of coordinates whose update or gradient is zero or NaN.
      stacked: number of leading axes along which leaves are stacked.
      axis_name: mapped axes along which the leaves are split.
      caution_mask: which leaves caution applies to (``mask`` of :func:`cautious`).
      monitor: whether the state records the fraction of coordinates that agreed.

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
