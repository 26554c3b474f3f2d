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

    Weight decay is not masked. Unless ``monitor=True``, the state is that of
    :func:`optax.lion`, and each restores the other's checkpoints.
    ``renormalize="plus_one"`` rescales as the authors' C-Lion does.

    In a small Llama with ``b1`` and the learning rate tuned, C-Lion ended lower than
    :func:`optax.lion` with ``b2=0.98``, and higher with ``b2=0.95``.

    Args:
      learning_rate: scalar or schedule; for this and all arguments up to
        `mask` see :func:`optax.lion`.
      b1: weight of the momentum in the update.
      b2: decay rate of the momentum.
      mu_dtype: dtype of the momentum; that of the parameters by default.
      weight_decay: strength of the decay, multiplied by the learning rate.
      mask: which leaves to decay.
      cautious_decay: whether to decay only where decay does not oppose the update; see
        :func:`add_cautious_decayed_weights`.
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
