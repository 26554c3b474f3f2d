"""C-AdamW."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious._caution import Caution
from optax_cautious._decay import decayed_weights
from optax_cautious._optimizers.scale_by_adam import scale_by_cautious_adam
from optax_cautious._settings import Alignment, AxisName, Neutral, Renormalize
from optax_cautious._trees import Mask, Stacked


def cautious_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
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
    r"""C-AdamW: AdamW that does not move against the gradient.

    With :math:`\hat{m}_t, \hat{v}_t` as in :func:`optax.adamw` and
    :math:`w_t, \rho_t` the weights and their mean as in :func:`cautious`:

    .. math::

      \begin{align*}
        u_t &\leftarrow \hat{m}_t / (\sqrt{\hat{v}_t + \bar{\varepsilon}}
          + \varepsilon) \\
        u_t &\leftarrow u_t \cdot w_t / \max(\rho_t, \rho_{\min}) \\
        \theta_{t+1} &\leftarrow \theta_t - \alpha_t (u_t + \lambda \theta_t)
      \end{align*}

    Weight decay is not masked. Unless ``monitor=True``, the state is that of
    :func:`optax.adamw`, and each restores the other's checkpoints.

    Tune the learning rate again: in small Llamas, the best one was up to twice that of
    :func:`optax.adamw`. There, ``b1=0.9`` was a good value with caution, and ``b1=0.8``
    without.

    Args:
      learning_rate: scalar or schedule; for this and all arguments up to
        `nesterov` see :func:`optax.adamw`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside the square root.
      eps_root: added to the denominator inside the square root.
      mu_dtype: dtype of the first moment; that of the parameters by default.
      weight_decay: strength of the decay, multiplied by the learning rate.
      mask: which leaves to decay.
      nesterov: whether to use Nesterov momentum.
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
      monitor: whether the state records the fraction of coordinates that agreed. A
        coordinate whose update underflows to zero counts by its first moment.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: see :func:`cautious`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_cautious import cautious_adamw
      >>> loss = lambda params: jnp.sum(params**2)
      >>> tx = cautious_adamw(learning_rate=0.003)
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
    """
    caution = Caution.of(locals(), direction="ascent", mask=caution_mask)
    return optax.chain(
        scale_by_cautious_adam(
            caution,
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
        ),
        decayed_weights(weight_decay, mask, cautious_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
