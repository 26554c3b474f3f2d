"""Cautious Adafactor."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious._caution import Caution, chain
from optax_cautious._decay import decayed_weights
from optax_cautious._settings import Alignment, AxisName, Neutral, Renormalize
from optax_cautious._trees import Mask, Stacked

# Optax's default, jnp.float32, is callable, so inject_hyperparams would take it for a
# schedule.
_FLOAT32 = jnp.dtype("float32")


def cautious_adafactor(
    learning_rate: optax.ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: ArrayLike = 0.8,
    decay_offset: ArrayLike = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: ArrayLike | None = 1.0,
    momentum: ArrayLike | None = None,
    dtype_momentum: DTypeLike = _FLOAT32,
    weight_decay_rate: optax.ScalarOrSchedule | None = None,
    eps: ArrayLike = 1e-30,
    factored: bool = True,
    weight_decay_mask: Mask = None,
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
    r"""Adafactor that does not move against the gradient.

    With :math:`u_t` the update of :func:`optax.adafactor` before weight decay and
    :math:`w_t, \rho_t` the weights and their mean as in :func:`cautious`:

    .. math::

      \theta_{t+1} \leftarrow \theta_t - u_t \cdot w_t / \max(\rho_t, \rho_{\min})
        - \lambda \theta_t

    Without momentum, the signs of Adafactor's update are those of the gradient, and
    caution only rescales leaves with zero gradients. Unless ``monitor=True``, the state
    is that of :func:`optax.adafactor`.

    Args:
      learning_rate: scalar or schedule; for this and all arguments up to
        `weight_decay_mask` see :func:`optax.adafactor`. To maximize, pass a negative
        number, not a schedule or a traced value: the rate is applied before caution,
        which must know the direction of the update.
      min_dim_size_to_factor: factor the second moment only of leaves with at least two
        dimensions of this size.
      decay_rate: exponent of the second moment's decay.
      decay_offset: the step at which fine-tuning starts.
      multiply_by_parameter_scale: whether to scale by the parameter's norm.
      clipping_threshold: the largest root mean square of a leaf's update.
      momentum: decay rate of the momentum; none by default.
      dtype_momentum: dtype of the momentum.
      weight_decay_rate: strength of the decay, not multiplied by the learning rate.
      eps: added to the mean square of the gradient.
      factored: whether to factor the second moment.
      weight_decay_mask: which leaves to decay.
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
      >>> from optax_cautious import cautious_adafactor
      >>> loss = lambda params: jnp.sum(params**2)
      >>> tx = cautious_adafactor(learning_rate=0.003, momentum=0.9)
      >>> params = jnp.array([1., 2., 3.])
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      13.90

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024

      Shazeer et al, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    # The learning rate is applied before momentum, and so before caution. A negative
    # one flips the direction of the update.
    caution = Caution.of(
        locals(),
        direction="descent" if _is_negative(learning_rate) else "ascent",
        mask=caution_mask,
    )
    direction: list[optax.GradientTransformation] = [
        optax.scale_by_factored_rms(
            factored, decay_rate, decay_offset, min_dim_size_to_factor, eps
        )
    ]
    if clipping_threshold is not None:
        direction.append(optax.clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        direction.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        direction.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        direction.append(
            optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum)
        )
    step: list[optax.GradientTransformation] = [optax.scale(-1)]
    if weight_decay_rate is not None:
        decay = decayed_weights(weight_decay_rate, weight_decay_mask, cautious_decay)
        step.insert(0, decay)
    return chain(caution, direction, step)


def _is_negative(learning_rate: optax.ScalarOrSchedule | None) -> bool:
    """Return whether the rate is a concrete number below zero."""
    rate: Any = learning_rate
    if rate is None or callable(rate) or isinstance(rate, jax.core.Tracer):
        return False
    # The result of jnp.real would be traced where the optimizer is built under jit.
    return complex(rate).real < 0
