"""C-Muon."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_cautious._caution import Caution
from optax_cautious._decay import decayed_weights
from optax_cautious._settings import Alignment, AxisName, Neutral, Renormalize
from optax_cautious._trees import Mask, Stacked

_Coefficients = tuple[ArrayLike, ArrayLike, ArrayLike]
NsCoeffs = _Coefficients | tuple[_Coefficients, ...] | str


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
    cautious_decay: bool = False,
    caution_on: Literal["update", "momentum"] = "update",
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
    r"""C-Muon: Muon, and Adam for other leaves, that do not move against the gradient.

    With :math:`O_t` the orthogonalized and scaled momentum of a matrix, or the Adam
    update of any other leaf, :math:`\alpha_t, \lambda` the learning rate and the decay
    of its kind of leaf, and :math:`w_t, \rho_t` the weights and their mean as in
    :func:`cautious`:

    .. math::

      \theta_{t+1} \leftarrow \theta_t
        - \alpha_t (O_t \cdot w_t / \max(\rho_t, \rho_{\min}) + \lambda \theta_t)

    Apart from weight decay, no step moves a coordinate against the gradient. With
    ``caution_on="momentum"``, as in the authors' current C-Muon, the momentum
    :math:`m_t` of a matrix is masked before it is orthogonalized:

    .. math::

      \theta_{t+1} \leftarrow \theta_t - \alpha_t
        (O(m_t \cdot w_t / \max(\rho_t, \rho_{\min})) + \lambda \theta_t)

    The step then keeps its spectrum, but may move against the gradient. Since
    orthogonalization removes the scale, unless ``adaptive=True`` restores it,
    ``renormalize`` and ``min_fraction`` only affect the other leaves, whose updates are
    masked as before.

    Weight decay is not masked. Unless ``monitor=True``, the state is that of
    :func:`optax.contrib.muon`.

    In a small Llama with ``beta`` and the learning rate tuned, Muon ended lower than
    with caution on the update; with caution on the momentum, no difference was seen.

    Args:
      learning_rate: scalar or schedule; for this and all arguments up to
        `consistent_rms` see :func:`optax.contrib.muon`.
      ns_coeffs: coefficients of the Newton-Schulz iteration, or a preset's name.
      ns_steps: number of Newton-Schulz iterations.
      beta: decay rate of the momentum.
      eps: added to denominators.
      weight_decay: strength of the matrices' decay, multiplied by the learning rate.
      weight_decay_mask: which leaves to decay.
      mu_dtype: dtype of the momentum; that of the parameters by default.
      nesterov: whether to use Nesterov momentum.
      adaptive: whether to scale by the dual norm of the momentum.
      preconditioning: norm to normalize by before the iterations.
      adam_b1: Adam's decay rate of the first moment.
      adam_b2: Adam's decay rate of the second moment.
      adam_eps_root: added inside Adam's square root.
      adam_weight_decay: strength of the other leaves' decay.
      adam_learning_rate: learning rate of the other leaves; `learning_rate` by default.
      muon_weight_dimension_numbers: which axes of which leaves form matrices.
      consistent_rms: if given, scale updates so that their root mean square does not
        depend on their shape, with this factor; by default, scale them by their width.
      cautious_decay: whether to decay only where decay does not oppose the update; see
        :func:`add_cautious_decayed_weights`.
      caution_on: ``"update"`` masks the orthogonalized momentum, ``"momentum"`` masks
        the momentum before orthogonalization.
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
    caution = Caution.of(locals(), direction="ascent", mask=caution_mask)
    if caution_on not in ("update", "momentum"):
        raise ValueError(
            f"caution_on must be one of 'update', 'momentum', got {caution_on!r}."
        )
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate

    whole = functools.partial(
        optax.contrib.muon,
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        eps=eps,
        mu_dtype=mu_dtype,
        adaptive=adaptive,
        preconditioning=preconditioning,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
        consistent_rms=consistent_rms,
    )
    muon = whole(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        nesterov=nesterov,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
    )
    # With a learning rate of -1, the update points uphill.
    direction = whole(-1.0, beta=beta, nesterov=nesterov)
    momentum = {
        "muon": optax.chain(
            _momentum(beta, nesterov, mu_dtype), *[optax.identity()] * 3
        ),
        "adam": optax.chain(
            optax.scale_by_adam(
                adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, nesterov=nesterov
            ),
            *[optax.identity()] * 2,
        ),
    }
    # Without momentum, Muon orthogonalizes its input, and uses only the coefficients
    # from its state.
    orthogonalize = whole(-1.0, beta=0.0, nesterov=False)
    step = {
        "muon": optax.chain(
            decayed_weights(weight_decay, weight_decay_mask, cautious_decay),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "adam": optax.chain(
            decayed_weights(adam_weight_decay, None, cautious_decay),
            optax.scale_by_learning_rate(adam_learning_rate),
        ),
    }

    def update_fn(
        grads: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        state = caution.detach(state)
        labels = _labels(state)

        def partition(
            transforms: dict[str, optax.GradientTransformationExtraArgs],
        ) -> optax.GradientTransformationExtraArgs:
            # A tree of labels may itself be callable, as an Equinox module is.
            return optax.partition(transforms, lambda _: labels)

        # Muon's state holds a chain per label, which ends in decay and learning rate.
        # Caution, which needs the whole tree, comes before these two.
        first = _map_links(
            lambda links: (*links[:-2], optax.EmptyState(), optax.EmptyState()), state
        )
        last = _map_links(lambda links: links[-2:], state)
        if caution_on == "update":
            updates, first = direction.update(grads, first, params)
            updates, own = caution.update(updates, grads)
        else:
            updates, first = partition(momentum).update(grads, first, params)
            updates, own = caution.update(updates, grads)
            orthogonal, _ = orthogonalize.update(updates, first, params)
            updates = jax.tree.map(
                lambda label, o, u: o if label == "muon" else u,
                labels,
                orthogonal,
                updates,
            )
        updates, last = partition(step).update(updates, last, params)
        state = _map_links(lambda links, end: (*links[:-2], *end), first, last)
        return updates, caution.attach(state, own)

    def init_fn(params: optax.Params) -> optax.OptState:
        return caution.attach(muon.init(params), caution.init())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _momentum(
    beta: ArrayLike, nesterov: bool, mu_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """Build the momentum of :func:`optax.contrib.scale_by_muon`, with its state."""

    def update_fn(
        grads: optax.Updates,
        state: optax.contrib.MuonState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.contrib.MuonState]:
        del params
        mu = optax.tree.update_moment(grads, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        if nesterov:
            mu_hat = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
            g_hat = optax.tree.bias_correction(grads, beta, count)
            mu_hat = optax.tree.update_moment(g_hat, mu_hat, beta, 1)
        else:
            mu_hat = optax.tree.bias_correction(mu, beta, count)
        mu = optax.tree.cast(mu, mu_dtype)
        return mu_hat, state._replace(count=count, mu=mu)

    # Muon itself initializes the state.
    return optax.GradientTransformation(lambda _: optax.EmptyState(), update_fn)


def _labels(state: optax.OptState) -> Any:
    """Label as "muon" the leaves with a momentum in Muon's state, others as "adam"."""

    def is_masked(mu: Any) -> bool:
        return isinstance(mu, optax.MaskedNode)

    return jax.tree.map(
        lambda mu: "adam" if is_masked(mu) else "muon",
        state.inner_states["muon"].inner_state[0].mu,
        is_leaf=is_masked,
    )


def _map_links(
    f: Callable[..., tuple[Any, ...]], state: optax.OptState, *others: optax.OptState
) -> optax.OptState:
    """Map over the chains' states in the state of an :func:`optax.partition`."""
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
