"""Caution as an optax transformation, and the ways to hand it the gradient."""

from typing import Any

import optax
from jax.typing import ArrayLike

from optax_cautious import _caution, _checks, _rule, _trees
from optax_cautious._rule import Alignment, AxisName, Direction, Renormalize
from optax_cautious._trees import Mask

_NO_GRADIENT = """cautious() needs the gradient, and a link in optax.chain is not \
given it: it sees only what the link before it returned. Any of these hands it over:
  updates, state = tx.update(grads, state, params, grad=grads)
  tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))
  tx = with_caution(optax.adamw(3e-4))
  tx = cautious_adamw(3e-4)"""


def cautious(
    *,
    direction: Direction = "descent",
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
    axis_name: AxisName = None,
    mask: Mask = None,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Do not move where the update and the gradient disagree in sign.

    For a leaf with :math:`n` coordinates, update :math:`u` and gradient :math:`g`:

    .. math::

      \begin{align*}
        a_i &= s \cdot \operatorname{sign}(u_i) \cdot \operatorname{sign}(g_i) \\
        w_i &= \begin{cases}
          1 & \text{if } a_i > 0 \\
          \gamma & \text{if } a_i < 0 \\
          \max(\gamma, 0) & \text{if } a_i = 0
          \end{cases} \\
        \rho &= \tfrac{1}{n} \textstyle\sum_i |w_i| \\
        u_i &\leftarrow u_i \cdot w_i / \max(\rho, \rho_{\min})
      \end{align*}

    where :math:`s` is -1 for ``direction="descent"`` and +1 for ``"ascent"``,
    :math:`\gamma` is ``opposed_weight`` and :math:`\rho_{\min}` ``min_fraction``.

    To make an optimizer cautious, change this::

      tx = optax.adamw(3e-4)
      updates, state = tx.update(grads, state, params)

    to this::

      tx = optax.chain(optax.adamw(3e-4), cautious())
      updates, state = tx.update(grads, state, params, grad=grads)

    or keep the call to ``update`` and let :func:`provide_gradient` pass the gradient.

    An update that contains weight decay, as :func:`optax.adamw`'s does, is masked with
    its decay; the named optimizers, such as :func:`cautious_adamw`, mask the update
    alone.

    Args:
      direction: ``"descent"`` for an update that is to be added to the parameters, as
        optimizers return it; ``"ascent"`` for one that still points up the loss, as
        ``optax.scale_by_*`` return it.
      alignment: what the signs are compared of. ``"element"``: each coordinate, as
        above. ``"tensor"``: each leaf by its inner product with the gradient, weight 1
        where :math:`s \langle u, g \rangle \ge 0` and ``opposed_weight`` elsewhere.
        ``"tree"``: the same with the inner product over all leaves. The latter two do
        not rescale, since that would cancel the weight.
      opposed_weight: scalar in [-1, 1], may be traced, and is then not checked. The
        weight of a coordinate that disagrees: 0 is Cautious, 1 the base optimizer, -1
        Grams, values between them soft caution. A coordinate at which either side is
        zero has weight ``max(opposed_weight, 0)``.
      renormalize: how the remaining coordinates make up for the missing ones.
        ``"clamp"``: as above. ``"paper"``: :math:`n / (n \rho + 1)`. ``"none"``: 1.
      min_fraction: scalar in (0, 1], may be traced, and is then not checked. With
        ``"clamp"``, the update is scaled up by at most ``1 / min_fraction``. This
        matters for the embedding of a large vocabulary: rows whose token is absent from
        the batch have a zero gradient and do not count as agreeing, so the others are
        scaled up for them. A large factor may overflow a float16 update.
      axis_name: the mapped axis, or axes, that the leaves are split along, equally, in
        ``jax.shard_map`` or ``jax.pmap``. Needed there alone: under ``jax.jit`` the
        fraction of a sharded leaf is global already. Do not give it for leaves that
        every device holds whole, or separate them by ``optax.partition``.
      mask: a tree of bools with the structure of the updates, or a prefix of it, or a
        function of the updates that returns one. Leaves at False pass untouched. Under
        :func:`optax.inject_hyperparams` a function has to be named in ``static_args``,
        or Optax takes it for a schedule.
      monitor: whether the state carries the fraction of coordinates that agreed, over
        all leaves in the mask, for ``optax.tree.get(state, "aligned_fraction")``. An
        update of zero agrees with nothing: behind a learning rate of zero it is 0.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose update takes the gradient
      as the keyword ``grad``, a tree like the updates, and returns the updates in their
      own dtypes. Its state is empty, or :class:`CautiousState` with ``monitor=True``.
      A coordinate whose update or gradient is NaN comes out NaN.

    Raises:
      ValueError: for an argument outside its range; in the update, if the gradient is
        missing or does not match the updates in tree, shape or kind.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_cautious import cautious
      >>> tx = cautious()
      >>> state = tx.init(jnp.zeros(4))
      >>> updates = jnp.array([-1., 1., 1., 1.])
      >>> grads = jnp.array([2., 2., 2., -2.])
      >>> updates, state = tx.update(updates, state, grad=grads)
      >>> print(updates)
      [-2.  0.  0.  2.]

      A schedule for the opposed weight, from the base optimizer to Cautious:

      >>> tx = optax.inject_hyperparams(cautious)(
      ...     opposed_weight=optax.linear_schedule(1., 0., transition_steps=1000))

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024

      Cao et al, `Grams: Gradient Descent with Adaptive Momentum Scaling
      <https://arxiv.org/abs/2412.17107>`_, 2024
    """
    caution = _caution.make(
        direction=direction,
        alignment=alignment,
        opposed_weight=opposed_weight,
        renormalize=renormalize,
        min_fraction=min_fraction,
        axis_name=axis_name,
        mask=mask,
        monitor=monitor,
    )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        if grad is None:
            raise ValueError(_NO_GRADIENT)
        return caution.update(updates, state, grad)

    return optax.GradientTransformationExtraArgs(caution.init, update_fn)


def provide_gradient(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Pass the updates that arrive on as the extra argument ``grad``, too.

    What arrives at an optimizer is the gradient, so a :func:`cautious` anywhere in
    ``tx`` finds it there without the caller's help. Put it around the whole optimizer::

      tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))

    Inside :func:`optax.MultiSteps` it passes the accumulated gradient, where a caller
    could only pass that of the last micro-batch. A ``grad`` from the caller is
    replaced.

    Args:
      tx: a transformation that takes, or contains one that takes, ``grad``.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with the state of ``tx``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_cautious import cautious, provide_gradient
      >>> tx = provide_gradient(optax.chain(optax.sgd(0.5, momentum=0.9), cautious()))
      >>> params = jnp.array([1., -2.])
      >>> state = tx.init(params)
      >>> grads = 2 * params
      >>> updates, state = tx.update(grads, state, params)
      >>> print(updates)
      [-1.  2.]
    """
    inner = optax.with_extra_args_support(tx)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(updates, state, params, **{**extra_args, "grad": updates})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def with_caution(
    optimizer: optax.GradientTransformation,
    *,
    direction: Direction = "descent",
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
    axis_name: AxisName = None,
    mask: Mask = None,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Make any optimizer cautious, and keep its state.

    With :math:`(u_t, S_{t+1})` the update and the new state that the optimizer returns
    for the gradient :math:`g_t`, and :math:`w_t, \rho_t` the weights and their mean as
    in :func:`cautious`:

    .. math::

      u_t \leftarrow u_t \cdot w_t / \max(\rho_t, \rho_{\min})

    The same as ``provide_gradient(optax.chain(optimizer, cautious(...)))``, except that
    the state is the optimizer's own: a checkpoint written without caution can be
    continued with it, and the other way round.

    Caution must have the last word about the step, and the optimizer must not assume
    that its update is applied whole. So it goes inside
    :func:`optax.contrib.schedule_free`, :func:`optax.contrib.mechanize` and a line
    search, around the optimizer that they are given.

    Args:
      optimizer: the transformation whose updates are compared with the gradient, which
        is what arrives at it.
      direction: see :func:`cautious`, as for all the arguments that follow.
      alignment: what the signs are compared of.
      opposed_weight: the weight of a coordinate that disagrees.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
      axis_name: the mapped axes that the leaves are split along.
      mask: the leaves to be cautious with.
      monitor: whether to report the fraction of coordinates that agreed. The state is
        then the pair of the optimizer's and a :class:`CautiousState`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: see :func:`cautious`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_cautious import with_caution
      >>> tx = with_caution(optax.adamw(1e-3), monitor=True)
      >>> params = {"w": jnp.array([1., -2.])}
      >>> state = tx.init(params)
      >>> grads = {"w": 2 * params["w"]}
      >>> updates, state = tx.update(grads, state, params)
      >>> print(optax.tree.get(state, "aligned_fraction"))
      1.0

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024
    """
    caution = _caution.make(
        direction=direction,
        alignment=alignment,
        opposed_weight=opposed_weight,
        renormalize=renormalize,
        min_fraction=min_fraction,
        axis_name=axis_name,
        mask=mask,
        monitor=monitor,
    )
    return _caution.wrap(optimizer, caution)


def aligned_fraction(
    updates: optax.Updates, grad: optax.Updates, *, direction: Direction = "descent"
) -> optax.Updates:
    r"""Report, for each leaf, the fraction of coordinates at which the signs agree.

    For a leaf with :math:`n` coordinates, and :math:`s` as in :func:`cautious`:

    .. math::

      \tfrac{1}{n} \left| \{ i :
        s \cdot \operatorname{sign}(u_i) \cdot \operatorname{sign}(g_i) > 0 \} \right|

    Args:
      updates: a tree of updates: floating-point or complex arrays of any shape.
      grad: the gradient, a tree like `updates`.
      direction: ``"descent"`` for updates that are to be added to the parameters,
        ``"ascent"`` for ones that point up the loss.

    Returns:
      A tree like `updates` with a float32 scalar in [0, 1] for each leaf. A coordinate
      at which either side is zero or NaN does not agree; an empty leaf has 0.

    Raises:
      ValueError: for an unknown direction, or if `grad` does not match `updates` in
        tree, shape or kind.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_cautious import aligned_fraction
      >>> updates = {"w": jnp.array([-1., 1., 0., -3.])}
      >>> grads = {"w": jnp.array([2., 2., 2., 2.])}
      >>> print(aligned_fraction(updates, grads)["w"])
      0.5

    References:
      Liang et al, `Cautious Optimizers: Improving Training with One Line of Code
      <https://arxiv.org/abs/2411.16085>`_, 2024
    """
    _checks.check_direction(direction)
    pairs = _trees.pair(updates, grad)
    return pairs.unflatten(
        [
            _rule.aligned_fraction(_rule.compare(u, g, direction))
            for u, g in zip(pairs.updates, pairs.grads, strict=True)
        ]
    )
