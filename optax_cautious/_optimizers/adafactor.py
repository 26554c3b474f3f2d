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

# Not optax's jnp.float32, which is callable: inject_hyperparams, which goes by that,
# would take it for a schedule.
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

    The update of :func:`optax.adafactor` before its weight decay, :math:`u_t`, with
    :math:`w_t, \rho_t` the weights and their mean as in :func:`cautious`:

    .. math::

      \theta_{t+1} \leftarrow \theta_t - u_t \cdot w_t / \max(\rho_t, \rho_{\min})
        - \lambda \theta_t

    Without momentum Adafactor's update has the signs of the gradient, and caution
    changes only the scale of leaves with zero gradients. The state is
    :func:`optax.adafactor`'s, but for ``monitor=True``.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.adafactor`, as for all the
        arguments up to `weight_decay_mask`. To maximize, give a negative number, not a
        schedule or a traced value: the rate is applied before caution, which has to
        know which way the update points.
      min_dim_size_to_factor: factor only where two dimensions are this large.
      decay_rate: exponent of the second moment's decay.
      decay_offset: the step at which fine-tuning starts.
      multiply_by_parameter_scale: whether to scale by the parameter's norm.
      clipping_threshold: the largest root mean square of a leaf's update.
      momentum: decay rate of the momentum; none by default.
      dtype_momentum: dtype of the momentum.
      weight_decay_rate: strength of the decay, not multiplied with the learning rate.
      eps: added to the mean square of the gradient.
      factored: whether to factor the second moment.
      weight_decay_mask: the leaves to decay.
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
    # The learning rate comes before the momentum, and so before caution. A negative one
    # turns the update around.
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
    """Returns whether it is a number that is known by now, and below zero."""
    rate: Any = learning_rate
    if rate is None or callable(rate) or isinstance(rate, jax.core.Tracer):
        return False
    # Not jnp.real, whose result is traced where the optimizer is made under jit.
    return complex(rate).real < 0
