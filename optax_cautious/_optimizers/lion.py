"""C-Lion."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious._caution import Caution, chain
from optax_cautious._decay import decayed_weights
from optax_cautious._settings import Alignment, AxisName, Neutral, Renormalize
from optax_cautious._trees import Mask, Stacked


def cautious_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    cautious_decay: bool = False,
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
    r"""C-Lion: Lion that does not move against the gradient.

    With :math:`w_t, \rho_t` the weights and their mean as in :func:`cautious`:

    .. math::

      \begin{align*}
        u_t &\leftarrow \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
        u_t &\leftarrow u_t \cdot w_t / \max(\rho_t, \rho_{\min}) \\
        \theta_{t+1} &\leftarrow \theta_t - \alpha_t (u_t + \lambda \theta_t) \\
        m_t &\leftarrow \beta_2 m_{t-1} + (1 - \beta_2) g_t
      \end{align*}

    The weight decay is outside the mask. The state is :func:`optax.lion`'s, but for
    ``monitor=True``: either restores the other's checkpoints.
    ``renormalize="plus_one"`` gives the scale of the authors' C-Lion.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.lion`, as for all the
        arguments up to `mask`.
      b1: rate at which momentum and gradient are combined.
      b2: decay rate of the momentum.
      mu_dtype: dtype of the momentum; that of the parameters by default.
      weight_decay: strength of the decay, multiplied with the learning rate.
      mask: the leaves to decay.
      cautious_decay: whether to decay only where that does not oppose the update, see
        :func:`add_cautious_decayed_weights`.
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
      >>> from optax_cautious import cautious_lion
      >>> loss = lambda params: jnp.sum(params**2)
      >>> tx = cautious_lion(learning_rate=0.003)
      >>> params = jnp.array([1., 2., 3.])
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      13.82

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024

      Chen et al, `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    caution = Caution.of(locals(), direction="ascent", mask=caution_mask)
    return chain(
        caution,
        [optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype)],
        [
            decayed_weights(weight_decay, mask, cautious_decay),
            optax.scale_by_learning_rate(learning_rate),
        ],
    )
