"""Caution as a chain link, as a wrapper, and as a statistic."""

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

_NO_GRADIENT = """cautious() needs the gradient, but optax.chain passes to a link only \
the output of the previous one. Any of these passes the gradient:
  updates, state = tx.update(grads, state, params, grad=grads)
  tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))
  tx = with_caution(optax.adamw(3e-4))
  tx = cautious_adamw(3e-4)
A wrapper that does not pass on extra arguments belongs outside: \
wrapper(provide_gradient(...))."""

_NOT_A_WRAPPER = """cautious() is a link for optax.chain and takes only keyword \
arguments, got {args!r}. To make an optimizer cautious, write one of these:
  tx = with_caution(optax.adamw(3e-4))
  tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))"""

_NO_OPTIMIZER = """with_caution() takes an optimizer as its first argument:
  tx = with_caution(optax.adamw(3e-4))
The link for optax.chain, which takes no optimizer, is cautious()."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _takes(
    is_right: Callable[..., bool], message: str
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Build a decorator that raises a TypeError with `message` for invalid calls."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)  # inject_hyperparams inspects the signature.
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
    r"""Set the update to zero where it would move a parameter uphill.

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
    :math:`\gamma` is ``opposed_weight`` and :math:`\rho_{\min}` ``min_fraction``. A
    coordinate agrees with the gradient if :math:`a_i > 0`: it moves downhill.

    To make an optimizer cautious, change this::

      tx = optax.adamw(3e-4)
      updates, state = tx.update(grads, state, params)

    to this::

      tx = optax.chain(optax.adamw(3e-4), cautious())
      updates, state = tx.update(grads, state, params, grad=grads)

    or leave the call to ``update`` as it is and let :func:`provide_gradient` pass the
    gradient.

    If the update contains weight decay, as that of :func:`optax.adamw` does, the decay
    is masked too. The named optimizers, such as :func:`cautious_adamw`, mask only the
    update.

    A step may be zero, even several times in a row, long before convergence: the
    momentum may oppose the gradient everywhere. A stopping rule based on the size of
    the step would then stop; use the size of the gradient instead.

    Args:
      direction: ``"ascent"`` after ``optax.scale_by_*``, whose update still points
        uphill, and after a negative learning rate, which maximizes; ``"descent"`` after
        a complete optimizer, whose update is added to the parameters. With the wrong
        direction, the first step is zero, and so is its aligned fraction.
      alignment: what is compared with the gradient. ``"element"``: each coordinate, as
        above. ``"leaf"``: each leaf, by its inner product with the gradient; its weight
        is 1 if :math:`s \langle u, g \rangle \ge 0` and ``opposed_weight`` otherwise.
        ``"tree"``: all leaves together, by the inner product over all of them. The
        latter two do not rescale, since that would cancel the weight: ``renormalize``,
        ``min_fraction`` and ``neutral`` only affect ``"element"``.
      opposed_weight: scalar in [-1, 1]; may be traced, in which case its range is not
        checked. The weight of a coordinate that disagrees: 0 is Cautious, 1 the base
        optimizer, -1 Grams (without rescaling), and values in between are soft caution.
      renormalize: how the surviving coordinates are rescaled. ``"clamp"``: as above.
        ``"plus_one"``: by :math:`n / (n \rho + 1)`, as in the paper's first version.
        ``None``: not at all.
      min_fraction: scalar in (0, 1]; may be traced, in which case its range is not
        checked. With ``"clamp"``, the update is scaled up by at most
        ``1 / min_fraction``. A large factor may overflow a float16 update.
      neutral: treatment of coordinates whose update or gradient is exactly zero or NaN.
        Gradients are zero in the embedding rows of tokens that are absent from the
        batch, and in idle experts. ``"hold"``: as above; such coordinates have weight
        ``max(opposed_weight, 0)`` and count in the mean, so the others are scaled up.
        ``"follow"``: they have weight 1. ``"ignore"``: they have the same weight as
        with ``"hold"``, but are excluded from the mean, both from the sum and from
        :math:`n`; a slice with no other coordinates is not rescaled.
      stacked: number of leading axes along which separate leaves are stacked: 1 for
        scanned layers, 2 for layers and experts. Each slice then has its own mean
        (with ``"leaf"``, its own inner product). An int for all leaves; a tree of ints
        with the structure of the updates, or a prefix of it such as
        ``{"layers": 1, "head": 0}``; or a function of the updates that returns one.
        ``None`` means 0 everywhere. Under :func:`optax.inject_hyperparams`, list
        ``stacked`` in ``static_args``, or Optax turns it into a hyperparameter.
      axis_name: name or names of the mapped axes along which the leaves are split
        evenly in ``jax.shard_map`` or ``jax.pmap``. Not needed elsewhere: under
        ``jax.jit`` the fraction of a sharded leaf is already global. Must not be set
        for replicated leaves (separate them with ``optax.partition``), nor include an
        axis that splits a ``stacked`` axis.
      mask: a tree of bools with the structure of the updates, or a prefix of it, or a
        function of the updates that returns one. Leaves at False pass unchanged. Under
        :func:`optax.inject_hyperparams`, list ``mask`` in ``static_args`` if it is a
        function.
      monitor: whether the state records the fraction of coordinates that agreed, over
        all leaves in the mask. Read it with
        ``optax.tree.get(state, "aligned_fraction")``. A zero update does not agree, so
        the fraction is 0 after a learning rate of zero.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose ``update`` takes the
      gradient, a tree like the updates, as the keyword argument ``grad``. It keeps the
      dtypes of the updates, except that integers become float32. Its state is empty,
      or a :class:`CautiousState` with ``monitor=True``. A NaN in the update stays NaN;
      an infinite value stays infinite, or becomes NaN if its weight is 0; a finite
      update stays finite, whatever its gradient, unless rescaling makes it overflow.

    Raises:
      ValueError: for an argument outside its range; in ``update``, if the gradient is
        missing or does not match the updates in tree, shape or kind.
      TypeError: if called with an optimizer; that is what :func:`with_caution` takes.

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
    r"""Make any optimizer cautious, without changing its state.

    With :math:`u_t` the update that the optimizer returns for the gradient :math:`g_t`,
    and :math:`w_t, \rho_t` the weights and their mean as in :func:`cautious`:

    .. math::

      u_t \leftarrow u_t \cdot w_t / \max(\rho_t, \rho_{\min})

    This is equivalent to ``provide_gradient(optax.chain(optimizer, cautious(...)))``,
    except that the state is the optimizer's own: a run can turn caution on or off at
    any checkpoint.

    Around links without a learning rate, such as ``optax.scale_by_adam()`` in a chain
    of your own, set ``direction="ascent"``: their update still points uphill. With the
    wrong direction, the first step is zero.

    The cautious update must be applied as it is, apart from its length and weight
    decay, and the optimizer must not assume that its own update is applied. So put
    ``with_caution`` inside :class:`optax.MultiSteps`,
    :func:`optax.contrib.schedule_free`, :func:`optax.contrib.mechanize` and line
    searches, around the optimizer that they wrap; docs/usage.md has a table.

    Args:
      optimizer: the transformation to make cautious. Its incoming updates must be the
        gradient.
      direction: ``"ascent"`` if the optimizer's update points uphill, as that of
        ``optax.scale_by_*`` or of an optimizer with a negative learning rate does;
        ``"descent"`` if it is added to the parameters. For this and all following
        arguments see :func:`cautious`.
      alignment: whether elements, leaves or the whole tree are compared.
      opposed_weight: weight of a coordinate that disagrees.
      renormalize: how the surviving coordinates are rescaled.
      min_fraction: lower bound on the fraction by which the update is divided.
      neutral: treatment of coordinates whose update or gradient is zero or NaN.
      stacked: number of leading axes along which leaves are stacked.
      axis_name: mapped axes along which the leaves are split.
      mask: which leaves caution applies to.
      monitor: whether to record the fraction of coordinates that agreed. If so, the
        state is a pair of the optimizer's state and a :class:`CautiousState`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: see :func:`cautious`.
      TypeError: if ``optimizer`` is not an optimizer, or is an
        :class:`optax.MultiSteps`, which must be the outer one; in ``init``, if it is a
        chain with one.

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
    r"""Compute the fraction of coordinates of each leaf that move downhill.

    For a leaf with :math:`n` coordinates, and :math:`s` as in :func:`cautious`:

    .. math::

      \tfrac{1}{n} \left| \{ i :
        s \cdot \operatorname{sign}(u_i) \cdot \operatorname{sign}(g_i) > 0 \} \right|

    Args:
      updates: a tree of updates, arrays of any shape and numeric dtype.
      grad: the gradient, a tree like `updates`.
      direction: ``"descent"`` for updates that are added to the parameters,
        ``"ascent"`` for updates that still point uphill.
      stacked: number of leading axes along which separate leaves are stacked; see
        :func:`cautious`.

    Returns:
      A tree like `updates` with a float32 scalar in [0, 1] for each leaf, or an array
      with the shape of its stacked axes. A coordinate whose update or gradient is zero
      or NaN does not agree; the fraction of an empty leaf is 0.

    Raises:
      ValueError: for an unknown direction, or if `grad` or `stacked` does not match
        `updates` in tree, shape or kind.

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
