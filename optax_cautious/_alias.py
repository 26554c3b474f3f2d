"""Cautious versions of optax's optimizers, with their signatures and their states."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious import _caution
from optax_cautious._adam import scale_by_cautious_adam
from optax_cautious._rule import Alignment, AxisName, Renormalize
from optax_cautious._transform import with_caution
from optax_cautious._trees import Mask

_Coefficients = tuple[ArrayLike, ArrayLike, ArrayLike]
NsCoeffs = _Coefficients | tuple[_Coefficients, ...] | str

# Not optax's jnp.float32, which is callable: inject_hyperparams, which goes by that,
# would take it for a schedule.
_FLOAT32 = jnp.dtype("float32")


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
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
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

    The weight decay is outside the mask. The state is :func:`optax.adamw`'s: either
    restores the other's checkpoints.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.adamw`, as for all the
        arguments up to `nesterov`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside the square root.
      eps_root: added to the denominator inside the square root.
      mu_dtype: dtype of the first moment; that of the parameters by default.
      weight_decay: strength of the decay, multiplied with the learning rate.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      alignment: what the signs are compared of, see :func:`cautious`, as for all the
        arguments that follow.
      opposed_weight: the weight of a coordinate that disagrees with the gradient.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
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
    caution = _caution.make(
        direction="ascent",
        alignment=alignment,
        opposed_weight=opposed_weight,
        renormalize=renormalize,
        min_fraction=min_fraction,
        axis_name=axis_name,
        mask=caution_mask,
        monitor=monitor,
    )
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
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def cautious_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
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

    The weight decay is outside the mask. The state is :func:`optax.lion`'s: either
    restores the other's checkpoints. ``renormalize="paper"`` gives the scale of the
    authors' C-Lion.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.lion`, as for all the
        arguments up to `mask`.
      b1: rate at which momentum and gradient are combined.
      b2: decay rate of the momentum.
      mu_dtype: dtype of the momentum; that of the parameters by default.
      weight_decay: strength of the decay, multiplied with the learning rate.
      mask: the leaves to decay.
      alignment: what the signs are compared of, see :func:`cautious`, as for all the
        arguments that follow.
      opposed_weight: the weight of a coordinate that disagrees with the gradient.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
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
    return optax.chain(
        with_caution(
            optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype),
            direction="ascent",
            alignment=alignment,
            opposed_weight=opposed_weight,
            renormalize=renormalize,
            min_fraction=min_fraction,
            axis_name=axis_name,
            mask=caution_mask,
            monitor=monitor,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


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
    return optax.chain(
        with_caution(
            optax.identity()
            if momentum is None
            else optax.trace(
                decay=momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype
            ),
            direction="ascent",
            alignment=alignment,
            opposed_weight=opposed_weight,
            renormalize=renormalize,
            min_fraction=min_fraction,
            axis_name=axis_name,
            mask=caution_mask,
            monitor=monitor,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


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
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
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
    :func:`optax.adafactor`'s.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.adafactor`, as for all the
        arguments up to `weight_decay_mask`.
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
      alignment: what the signs are compared of, see :func:`cautious`, as for all the
        arguments that follow.
      opposed_weight: the weight of a coordinate that disagrees with the gradient.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
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
    links: list[optax.GradientTransformation] = [
        optax.scale_by_factored_rms(
            factored, decay_rate, decay_offset, min_dim_size_to_factor, eps
        )
    ]
    if clipping_threshold is not None:
        links.append(optax.clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        links.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        links.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        links.append(
            optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum)
        )
    undecayed = with_caution(
        optax.chain(*links),
        direction="ascent",
        alignment=alignment,
        opposed_weight=opposed_weight,
        renormalize=renormalize,
        min_fraction=min_fraction,
        axis_name=axis_name,
        mask=caution_mask,
        monitor=monitor,
    )
    finish = [optax.scale(-1)]
    if weight_decay_rate is not None:
        decay = optax.add_decayed_weights(weight_decay_rate, weight_decay_mask)
        finish.insert(0, decay)
    decayed = optax.chain(*finish)
    n = 2 if monitor else len(links)

    # A chain of chains whose states stand side by side, as those of one chain do.
    def init_fn(params: optax.Params) -> optax.OptState:
        return (*undecayed.init(params), *decayed.init(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, first = undecayed.update(updates, state[:n], params, **extra_args)
        updates, last = decayed.update(updates, state[n:], params, **extra_args)
        return updates, (*first, *last)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def cautious_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: NsCoeffs = (3.4445, -4.7750, 2.0315),
    ns_steps: ArrayLike = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius",
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    adam_weight_decay: ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: ArrayLike | None = None,
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
    axis_name: AxisName = None,
    caution_mask: Mask = None,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""C-Muon: Muon, with its Adam, that does not move against the gradient.

    With :math:`O_t` the orthogonalized and scaled momentum of a matrix, or the Adam
    update of any other leaf, with :math:`\alpha_t, \lambda` the learning rate and the
    decay of either kind, and :math:`w_t, \rho_t` the weights and their mean as in
    :func:`cautious`:

    .. math::

      \theta_{t+1} \leftarrow \theta_t
        - \alpha_t (O_t \cdot w_t / \max(\rho_t, \rho_{\min}) + \lambda \theta_t)

    The weight decays are outside the mask. The state is :func:`optax.contrib.muon`'s.

    Args:
      learning_rate: scalar or schedule; see :func:`optax.contrib.muon`, as for all the
        arguments up to `consistent_rms`.
      ns_coeffs: coefficients of the Newton-Schulz iteration, or a preset's name.
      ns_steps: number of Newton-Schulz iterations.
      beta: decay rate of the momentum.
      eps: added to denominators.
      weight_decay: strength of the matrices' decay, multiplied with the learning rate.
      weight_decay_mask: the leaves to decay.
      mu_dtype: dtype of the momentum; that of the parameters by default.
      nesterov: whether to use Nesterov momentum.
      adaptive: whether to scale by the dual norm of the momentum.
      preconditioning: what to normalize by before the iterations.
      adam_b1: Adam's decay rate of the first moment.
      adam_b2: Adam's decay rate of the second moment.
      adam_eps_root: added inside Adam's square root.
      adam_weight_decay: strength of the other leaves' decay.
      adam_learning_rate: learning rate of the other leaves; `learning_rate` by default.
      muon_weight_dimension_numbers: which axes of which leaves form matrices.
      consistent_rms: scale at which updates have a shape-independent root mean square.
      alignment: what the signs are compared of, see :func:`cautious`, as for all the
        arguments that follow.
      opposed_weight: the weight of a coordinate that disagrees with the gradient.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
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
      >>> from optax_cautious import cautious_muon
      >>> loss = lambda params: jnp.sum(params**2)
      >>> tx = cautious_muon(learning_rate=0.03)
      >>> params = jnp.array([[1., 2.], [3., 4.]])
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      28.13

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024

      Jordan, `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024

      Liu et al, `Muon is Scalable for LLM Training
      <https://arxiv.org/abs/2502.16982>`_, 2025
    """
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate

    def muon(
        weight_decay: ArrayLike, adam_weight_decay: ArrayLike
    ) -> optax.GradientTransformationExtraArgs:
        return with_caution(
            optax.contrib.muon(
                learning_rate,
                ns_coeffs,
                ns_steps,
                beta,
                eps,
                weight_decay,
                weight_decay_mask,
                mu_dtype,
                nesterov=nesterov,
                adaptive=adaptive,
                preconditioning=preconditioning,
                adam_b1=adam_b1,
                adam_b2=adam_b2,
                adam_eps_root=adam_eps_root,
                adam_weight_decay=adam_weight_decay,
                adam_learning_rate=adam_learning_rate,
                muon_weight_dimension_numbers=muon_weight_dimension_numbers,
                consistent_rms=consistent_rms,
            ),
            alignment=alignment,
            opposed_weight=opposed_weight,
            renormalize=renormalize,
            min_fraction=min_fraction,
            axis_name=axis_name,
            mask=caution_mask,
            monitor=monitor,
        )

    # Muon decays within its two partitions, caution acts on the whole tree: Muon is run
    # without decay, and the links that it has for that are run again behind caution.
    undecayed = muon(0.0, 0.0)
    decays = {
        "muon": optax.chain(
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "adam": optax.chain(
            optax.add_decayed_weights(adam_weight_decay),
            optax.scale_by_learning_rate(adam_learning_rate),
        ),
    }

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        before = state[0] if monitor else state
        updates, state = undecayed.update(updates, state, params, **extra_args)
        after = state[0] if monitor else state

        momentum = before.inner_states["muon"].inner_state[0].mu
        labels = jax.tree.map(
            lambda mu: "adam" if isinstance(mu, optax.MaskedNode) else "muon",
            momentum,
            is_leaf=lambda mu: isinstance(mu, optax.MaskedNode),
        )
        decay, decayed = optax.partition(decays, lambda _: labels).update(
            jax.tree.map(jnp.zeros_like, updates),
            _map_links(before, lambda links: links[-2:]),
            params,
        )
        updates = optax.tree.add(updates, decay)
        after = _map_links(after, lambda links, last: links[:-2] + last, decayed)
        return updates, (after, *state[1:]) if monitor else after

    return optax.GradientTransformationExtraArgs(
        muon(weight_decay, adam_weight_decay).init, update_fn
    )


def _map_links(
    state: optax.OptState, f: Callable[..., tuple[Any, ...]], *others: optax.OptState
) -> optax.OptState:
    """Maps the chains' states in the state of an :func:`optax.partition` of chains."""
    return state._replace(
        inner_states={
            label: masked._replace(
                inner_state=f(
                    masked.inner_state,
                    *(other.inner_states[label].inner_state for other in others),
                )
            )
            for label, masked in state.inner_states.items()
        }
    )
