"""The cautious rule on trees, wrapped around an optimizer or placed before a link."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cautious import _rule, _settings, _trees
from optax_cautious._gradient import provide_gradient

#: Computes the agreement of each leaf of the update with its gradient.
Compare = Callable[[_trees.Pairs], list[_rule.Agreement]]


class CautiousState(NamedTuple):
    """State of :func:`cautious` with ``monitor=True``.

    Attributes:
      aligned_fraction: float32 scalar, the fraction of all coordinates at which the
        last update and its gradient agreed; 0 before the first step.
    """

    aligned_fraction: jax.Array


class Caution(NamedTuple):
    """The validated settings of caution, and their application to a tree of updates."""

    rule: _settings.Rule
    stacked: _trees.Stacked
    mask: _trees.Mask
    monitor: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> "Caution":
        """Collect and validate the caution settings among a function's arguments.

        Args:
          arguments: the function's `locals()`.
          **others: settings that are not among the arguments.
        """
        given = {**arguments, **others}
        rule = _settings.Rule(*(given[name] for name in _settings.Rule._fields))
        return cls(
            _settings.checked(rule), given["stacked"], given["mask"], given["monitor"]
        )

    def init(self) -> optax.OptState:
        """Return the initial state of caution itself."""
        if self.monitor:
            return CautiousState(aligned_fraction=jnp.zeros((), jnp.float32))
        return optax.EmptyState()

    def update(
        self,
        updates: optax.Updates,
        grad: optax.Updates,
        compare: Compare | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Return the cautious updates and the new state.

        Args:
          updates: the updates.
          grad: the gradient.
          compare: computes the agreement of the two; by default, compares their signs.
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
        """Build a transformation that makes the updates of `optimizer` cautious.

        The state is the optimizer's own. `compare_by` builds the comparison from the
        state before the step.
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
            # Without a monitor of its own, a user's optimizer may still have one.
            may_have_monitor = compare_by is None and not self.monitor
            old = state if may_have_monitor else self.detach(state)
            grad = updates
            updates, new = inner.update(grad, old, params, **extra_args)
            compare = None if compare_by is None else compare_by(old)
            updates, own = self.update(updates, grad, compare)
            return updates, self.attach(new, own)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def before(
        self, link: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Build a transformation that makes updates cautious, then applies `link`.

        The state is the link's own. The gradient is the extra argument `grad`.
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
        """Combine the states of an optimizer and of the monitor, if enabled."""
        return (inner, own) if self.monitor else inner

    def detach(self, state: optax.OptState) -> optax.OptState:
        """Return the optimizer's state without the monitor's."""
        has_monitor = (
            type(state) is tuple
            and len(state) == 2
            and isinstance(state[1], CautiousState)
        )
        if has_monitor and not self.monitor:
            raise ValueError(
                "monitor=False, but the state was created with a monitor: it contains "
                "a pair that ends in a CautiousState. Set monitor=True, or convert the "
                "state as docs/usage.md shows."
            )
        if self.monitor and not has_monitor:
            raise ValueError(
                "monitor=True, but the state was created without a monitor: expected a "
                f"pair that ends in a CautiousState, got a {type(state).__name__}. "
                "Create the state with this optimizer's init; docs/usage.md shows how "
                "to convert an older one."
            )
        return state[0] if self.monitor else state

    def _compare(self, pairs: _trees.Pairs) -> list[_rule.Agreement]:
        direction = self.rule.direction
        return [_rule.compare(leaf.u, leaf.g, direction) for leaf in pairs.leaves]

    def _tree_fraction(
        self, leaves: list[_rule.Leaf], agreements: list[_rule.Agreement]
    ) -> jax.Array:
        """Return the mean of the leaves' fractions, weighted by their sizes."""
        # Python integers would become int32, which overflows at 2^31.
        sizes = [float(leaf.u.size) for leaf in leaves]
        if sum(sizes) == 0:
            return jnp.zeros((), jnp.float32)
        fractions = [
            _rule.aligned_fraction(
                a.counted, stacked=leaf.stacked, axis_name=self.rule.axis_name
            )
            for leaf, a in zip(leaves, agreements, strict=True)
        ]
        # Slices have equal sizes, so the leaf's fraction is the mean of theirs.
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
    """Chain links that compute the direction, caution, and links that make the step.

    The state is that of :func:`optax.chain` over all links.
    """
    first, *rest = step
    tx = optax.chain(*direction, caution.before(first), *rest)
    return provide_gradient(tx)
