"""The cautious rule on trees, and around an optimizer or in front of one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cautious import _rule, _settings, _trees
from optax_cautious._gradient import provide_gradient

#: From updates and gradients to how each leaf agrees.
Compare = Callable[[_trees.Pairs], list[_rule.Agreement]]


class CautiousState(NamedTuple):
    """State of :func:`cautious` with ``monitor=True``.

    Attributes:
      aligned_fraction: float32 scalar, the fraction of all coordinates at which the
        last update and its gradient agreed; 0 before the first step.
    """

    aligned_fraction: jax.Array


class Caution(NamedTuple):
    """The settings of caution, checked, and what they do to a tree of updates."""

    rule: _settings.Rule
    stacked: _trees.Stacked
    mask: _trees.Mask
    monitor: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> "Caution":
        """Picks the settings from the arguments of a function, and checks them.

        Args:
          arguments: the function's `locals()`, with a value for each setting.
          **others: settings that are not among the arguments.
        """
        given = {**arguments, **others}
        rule = _settings.Rule(*(given[name] for name in _settings.Rule._fields))
        return cls(
            _settings.checked(rule), given["stacked"], given["mask"], given["monitor"]
        )

    def init(self) -> optax.OptState:
        """Makes the state of caution alone."""
        if self.monitor:
            return CautiousState(aligned_fraction=jnp.zeros((), jnp.float32))
        return optax.EmptyState()

    def update(
        self,
        updates: optax.Updates,
        grad: optax.Updates,
        compare: Compare | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Returns the cautious updates and the new state.

        Args:
          updates: the updates.
          grad: their gradient.
          compare: tells how they agree, by default from the two alone.
        """
        pairs = _trees.pair(updates, grad, mask=self.mask, stacked=self.stacked)
        agreements = []
        if self.monitor or self.rule.alignment == "element":
            agreements = (compare or self._compare)(pairs)
        new = pairs.unflatten(_rule.apply(self.rule, pairs.leaves, agreements))
        if not self.monitor:
            return new, optax.EmptyState()
        return new, CautiousState(self._tree_fraction(pairs.leaves, agreements))

    def around(
        self,
        optimizer: optax.GradientTransformation,
        compare_by: Callable[[optax.OptState], Compare] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Makes the updates of `optimizer` cautious, in its own state.

        `compare_by` makes the comparison from the state before the step.
        """
        inner = optax.with_extra_args_support(optimizer)

        def init_fn(params: optax.Params) -> optax.OptState:
            return self.attach(inner.init(params), self.init())

        def update_fn(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            old, grad = self.detach(state), updates
            updates, new = inner.update(grad, old, params, **extra_args)
            compare = None if compare_by is None else compare_by(old)
            updates, own = self.update(updates, grad, compare)
            return updates, self.attach(new, own)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def before(
        self, link: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Shows a link of a chain cautious updates, in the link's own state.

        The gradient is the extra argument `grad`.
        """
        inner = optax.with_extra_args_support(link)

        def init_fn(params: optax.Params) -> optax.OptState:
            return self.attach(inner.init(params), self.init())

        def update_fn(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            *,
            grad: optax.Updates,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            old = self.detach(state)
            updates, own = self.update(updates, grad)
            updates, new = inner.update(updates, old, params, **extra_args)
            return updates, self.attach(new, own)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def attach(self, inner: optax.OptState, own: optax.OptState) -> optax.OptState:
        """Puts the monitor's state, if there is one, beside that of an optimizer."""
        return (inner, own) if self.monitor else inner

    def detach(self, state: optax.OptState) -> optax.OptState:
        """Returns the optimizer's state without the monitor's."""
        if not self.monitor:
            return state
        if [type(part) for part in state[1:]] != [CautiousState]:
            raise ValueError(
                "monitor=True, but the state is one without a monitor: a "
                f"{type(state).__name__} where a pair that ends in a CautiousState was "
                "expected. Make the state with this optimizer's init; docs/usage.md "
                "shows how to convert an older one."
            )
        return state[0]

    def _compare(self, pairs: _trees.Pairs) -> list[_rule.Agreement]:
        direction = self.rule.direction
        return [_rule.compare(leaf.u, leaf.g, direction) for leaf in pairs.leaves]

    def _tree_fraction(
        self, leaves: list[_rule.Leaf], agreements: list[_rule.Agreement]
    ) -> jax.Array:
        """Returns the mean of the leaves' fractions, weighted by their sizes."""
        # As integers JAX would take them for int32, which ends at 2^31.
        sizes = [float(leaf.u.size) for leaf in leaves]
        if sum(sizes) == 0:
            return jnp.zeros((), jnp.float32)
        fractions = [
            _rule.aligned_fraction(
                a.counted, stacked=leaf.stacked, axis_name=self.rule.axis_name
            )
            for leaf, a in zip(leaves, agreements, strict=True)
        ]
        # Of slices, which are of one size, the mean is that of the leaf.
        counts = [
            (jnp.mean(x) if x.ndim else x) * n
            for x, n in zip(fractions, sizes, strict=True)
            if n
        ]
        return jnp.float32(sum(counts) / sum(sizes))


def chain(
    caution: Caution,
    direction: list[optax.GradientTransformation],
    step: list[optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Chains links, with caution between those that find a direction and the rest.

    The state is that of :func:`optax.chain` of all links.
    """
    first, *rest = step
    tx = optax.chain(*direction, caution.before(first), *rest)
    return provide_gradient(tx)
