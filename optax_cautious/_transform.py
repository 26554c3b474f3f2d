"""Caution as a link of a chain, as a wrapper, and as a statistic."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import optax
from jax.typing import ArrayLike

from optax_cautious import _rule, _trees
from optax_cautious._caution import Caution
from optax_cautious._gradient import transformation
from optax_cautious._settings import (
    Alignment,
    AxisName,
    Direction,
    Neutral,
    Renormalize,
    check_direction,
)
from optax_cautious._trees import Mask, Stacked

_NO_GRADIENT = """cautious() needs the gradient, and a link in optax.chain is not \
given it: it sees only what the link before it returned. Any of these hands it over:
  updates, state = tx.update(grads, state, params, grad=grads)
  tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))
  tx = with_caution(optax.adamw(3e-4))
  tx = cautious_adamw(3e-4)"""

_NOT_A_WRAPPER = """cautious() is a link for optax.chain and takes keywords alone, got \
{args!r}. To make an optimizer cautious, write one of these:
  tx = with_caution(optax.adamw(3e-4))
  tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))"""

_NO_OPTIMIZER = """with_caution() takes the optimizer to be made cautious first:
  tx = with_caution(optax.adamw(3e-4))
The link for optax.chain, which takes none, is cautious()."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _takes(
    is_right: Callable[..., bool], message: str
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Answers a call of the wrong form with a message instead of Python's."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)  # inject_hyperparams goes by the signature.
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not is_right(*args, **kwargs):
                raise TypeError(message.format(args=args))
            return function(*args, **kwargs)

        return checked

    return decorate


@_takes(lambda *args, **_: not args, _NOT_A_WRAPPER)
def cautious(
    *,
    direction: Direction = "descent",
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
    neutral: Neutral = "hold",
    stacked: Stacked = None,
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

    A step may be all zeros, even twice in a row, before anything has converged: the
    momentum may oppose the gradient everywhere. A stopping rule that goes by the size
    of the step would stop there; use the size of the gradient instead.

    Args:
      direction: ``"ascent"`` behind ``optax.scale_by_*``, whose update still points up
        the loss, and behind a learning rate below zero, which maximizes; ``"descent"``
        behind a whole optimizer, whose update is to be added to the parameters. With
        the wrong direction nothing moves at the first step, and the aligned fraction
        of that step is 0.
      alignment: what the signs are compared of. ``"element"``: each coordinate, as
        above. ``"leaf"``: each leaf by its inner product with the gradient, weight 1
        where :math:`s \langle u, g \rangle \ge 0` and ``opposed_weight`` elsewhere.
        ``"tree"``: the same with the inner product over all leaves. The latter two do
        not rescale, since that would cancel the weight: ``renormalize``,
        ``min_fraction`` and ``neutral`` are for ``"element"``.
      opposed_weight: scalar in [-1, 1], may be traced, and is then not checked. The
        weight of a coordinate that disagrees: 0 is Cautious, 1 the base optimizer, -1
        Grams, values between them soft caution.
      renormalize: how the remaining coordinates make up for the missing ones.
        ``"clamp"``: as above. ``"plus_one"``: :math:`n / (n \rho + 1)`, as in the
        paper's first version. ``None``: not at all.
      min_fraction: scalar in (0, 1], may be traced, and is then not checked. With
        ``"clamp"``, the update is scaled up by at most ``1 / min_fraction``. A large
        factor may overflow a float16 update.
      neutral: what to do with the coordinates at which update or gradient is exactly
        zero or NaN, as the gradient is in the rows of an embedding whose token is not
        in the batch, and in a mixture's idle experts. ``"hold"``: as above; they have
        weight ``max(opposed_weight, 0)`` and count in the mean, so the others are
        scaled up for them. ``"follow"``: they have weight 1. ``"ignore"``: their weight
        is that of ``"hold"``, and they do not count in the mean, neither in the sum nor
        in :math:`n`; where there are no others, nothing is rescaled.
      stacked: how many leading axes of a leaf stack things that are leaves of their own
        in another spelling: 1 for the layers of a scan, 2 for layers and experts. Each
        slice has its own mean (with ``"leaf"``, its own inner product). An int for all
        leaves, a tree of ints with the structure of the updates, or a prefix of it such
        as ``{"layers": 1, "head": 0}``, or a function of the updates that returns one.
        ``stacked=None`` is 0 everywhere.
      axis_name: the mapped axis, or axes, that the leaves are split along, equally, in
        ``jax.shard_map`` or ``jax.pmap``. Needed there alone: under ``jax.jit`` the
        fraction of a sharded leaf is global already. Do not give it for leaves that
        every device holds whole, or separate them by ``optax.partition``; nor an axis
        that splits ``stacked`` ones.
      mask: a tree of bools with the structure of the updates, or a prefix of it, or a
        function of the updates that returns one. Leaves at False pass untouched. Under
        :func:`optax.inject_hyperparams` ``mask`` and ``stacked`` have to be named in
        ``static_args`` where they are given, or Optax makes hyperparameters of them.
      monitor: whether the state carries the fraction of coordinates that agreed, over
        all leaves in the mask, for ``optax.tree.get(state, "aligned_fraction")``. An
        update of zero agrees with nothing: behind a learning rate of zero it is 0.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose update takes the gradient
      as the keyword ``grad``, a tree like the updates, and returns the updates in their
      own dtypes, integers as float32. Its state is empty, or :class:`CautiousState`
      with ``monitor=True``. An update that is NaN, or infinite and opposed, comes out
      NaN; a finite one stays finite, whatever its gradient, unless the scale makes it
      overflow.

    Raises:
      ValueError: for an argument outside its range; in the update, if the gradient is
        missing or does not match the updates in tree, shape or kind.
      TypeError: if it is called with an optimizer, as :func:`with_caution` is.

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
    caution = Caution.of(locals())

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
        return caution.update(updates, grad)

    return optax.GradientTransformationExtraArgs(lambda _: caution.init(), update_fn)


@_takes(lambda *args, **kwargs: bool(args) or "optimizer" in kwargs, _NO_OPTIMIZER)
def with_caution(
    optimizer: optax.GradientTransformation,
    *,
    direction: Direction = "descent",
    alignment: Alignment = "element",
    opposed_weight: ArrayLike = 0.0,
    renormalize: Renormalize = "clamp",
    min_fraction: ArrayLike = 1e-3,
    neutral: Neutral = "hold",
    stacked: Stacked = None,
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

    Around links that do not end in a learning rate, such as ``optax.scale_by_adam()``
    in a chain of the user's own, give ``direction="ascent"``: their update still points
    up the loss. With the wrong direction nothing moves at the first step.

    Caution must have the last word about the step, and the optimizer must not assume
    that its update is applied whole. So it goes inside :class:`optax.MultiSteps`,
    :func:`optax.contrib.schedule_free`, :func:`optax.contrib.mechanize` and a line
    search, around the optimizer that they are given; docs/usage.md has a table.

    Args:
      optimizer: the transformation whose updates are compared with the gradient, which
        is what arrives at it.
      direction: ``"ascent"`` if the optimizer's update points up the loss, as that of
        ``optax.scale_by_*`` does, and that of an optimizer with a learning rate below
        zero; ``"descent"`` if it is to be added to the parameters. See
        :func:`cautious`, as for all the arguments that follow.
      alignment: what the signs are compared of.
      opposed_weight: the weight of a coordinate that disagrees.
      renormalize: how the remaining coordinates make up for the missing ones.
      min_fraction: the least fraction that the update is divided by.
      neutral: what to do where update or gradient is exactly zero or NaN.
      stacked: how many leading axes stack leaves.
      axis_name: the mapped axes that the leaves are split along.
      mask: the leaves to be cautious with.
      monitor: whether to report the fraction of coordinates that agreed. The state is
        then the pair of the optimizer's and a :class:`CautiousState`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: see :func:`cautious`.
      TypeError: if ``optimizer`` is not an optimizer, or is an
        :class:`optax.MultiSteps`, which goes around this.

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
    caution = Caution.of(locals())
    return caution.around(transformation(optimizer, "with_caution"))


def aligned_fraction(
    updates: optax.Updates,
    grad: optax.Updates,
    *,
    direction: Direction = "descent",
    stacked: Stacked = None,
) -> optax.Updates:
    r"""Report, for each leaf, the fraction of coordinates at which the signs agree.

    For a leaf with :math:`n` coordinates, and :math:`s` as in :func:`cautious`:

    .. math::

      \tfrac{1}{n} \left| \{ i :
        s \cdot \operatorname{sign}(u_i) \cdot \operatorname{sign}(g_i) > 0 \} \right|

    Args:
      updates: a tree of updates: arrays of any shape and any type of numbers.
      grad: the gradient, a tree like `updates`.
      direction: ``"descent"`` for updates that are to be added to the parameters,
        ``"ascent"`` for ones that point up the loss.
      stacked: how many leading axes of a leaf stack leaves; see :func:`cautious`.

    Returns:
      A tree like `updates` with a float32 scalar in [0, 1] for each leaf, or an array
      of them over its stacked axes. A coordinate at which either side is zero or NaN
      does not agree; an empty leaf has 0.

    Raises:
      ValueError: for an unknown direction, or if `grad` does not match `updates` in
        tree, shape or kind, or `stacked` does not.

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
    check_direction(direction)
    pairs = _trees.pair(updates, grad, mask=None, stacked=stacked)
    return pairs.unflatten(
        _rule.aligned_fraction(
            _rule.agreement(leaf.u, leaf.g, direction=direction), stacked=leaf.stacked
        )
        for leaf in pairs.leaves
    )
