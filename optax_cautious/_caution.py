"""The cautious rule on trees: masks, monitoring, and caution around an optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_cautious import _checks, _rule, _trees
from optax_cautious._rule import Alignment, AxisName, Direction, Renormalize
from optax_cautious._trees import Mask


class CautiousState(NamedTuple):
    """State of :func:`cautious` with ``monitor=True``.

    Attributes:
      aligned_fraction: float32 scalar, the fraction of all coordinates at which the
        last update and its gradient agreed; 0 before the first step.
    """

    aligned_fraction: jax.Array


class Caution(NamedTuple):
    """The settings of caution, checked."""

    rule: _rule.Rule
    mask: Mask
    monitor: bool

    def init(self, params: optax.Params) -> optax.OptState:
        del params
        if self.monitor:
            return CautiousState(aligned_fraction=jnp.zeros((), jnp.float32))
        return optax.EmptyState()

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        grad: optax.Updates,
        agreements: optax.Updates | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Returns the cautious updates and the new state.

        `agreements` is a tree like the updates of how each leaf agrees with its
        gradient, by default as the two say.
        """
        selected = updates if self.mask is None else _trees.select(updates, self.mask)
        pairs = _trees.pair(selected, grad)
        if agreements is None:
            compared = [
                _rule.compare(u, g, self.rule.direction)
                for u, g in zip(pairs.updates, pairs.grads, strict=True)
            ]
        else:
            compared = pairs.flatten(agreements)
        new = _rule.apply(self.rule, pairs.updates, pairs.grads, compared)
        if self.monitor:
            state = CautiousState(_tree_fraction(compared, self.rule.axis_name))
        new = pairs.unflatten(new)
        return new if self.mask is None else _trees.fill(new, updates), state


def make(
    *,
    direction: Direction,
    alignment: Alignment,
    opposed_weight: ArrayLike,
    renormalize: Renormalize,
    min_fraction: ArrayLike,
    axis_name: AxisName,
    mask: Mask,
    monitor: bool,
) -> Caution:
    """Checks the arguments of :func:`cautious`."""
    _checks.check_direction(direction)
    _checks.check_alignment(alignment)
    _checks.check_renormalize(renormalize)
    _checks.check_opposed_weight(opposed_weight)
    _checks.check_min_fraction(min_fraction)
    _checks.check_axis_name(axis_name)
    rule = _rule.Rule(
        direction, alignment, opposed_weight, renormalize, min_fraction, axis_name
    )
    return Caution(rule, mask, monitor)


def wrap(
    optimizer: optax.GradientTransformation,
    caution: Caution,
    agreements: Callable[[optax.Updates, optax.OptState], optax.Updates] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the updates of `optimizer` cautious, in its own state.

    `agreements` may find out how the update will agree with the gradient from the
    gradient and the state that the optimizer is given.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        return (state, caution.init(params)) if caution.monitor else state

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        grad = updates
        old, last = state if caution.monitor else (state, optax.EmptyState())
        updates, new = inner.update(grad, old, params, **extra_args)
        compared = None if agreements is None else agreements(grad, old)
        updates, last = caution.update(updates, last, grad, compared)
        return updates, (new, last) if caution.monitor else new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _tree_fraction(agreements: list[_rule.Agreement], axis_name: AxisName) -> jax.Array:
    """Returns the mean of the leaves' fractions, weighted by their sizes."""
    sizes = jnp.array([a.counted.size for a in agreements], jnp.float32)
    if not any(a.counted.size for a in agreements):
        return jnp.zeros((), jnp.float32)
    fractions = [_rule.aligned_fraction(a, axis_name) for a in agreements]
    return jnp.average(jnp.stack(fractions), weights=sizes)
