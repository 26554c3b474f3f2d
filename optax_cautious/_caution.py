"""The cautious rule on trees, and around an optimizer or in front of one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cautious import _rule, _settings, _trees
from optax_cautious._gradient import provide_gradient

#: From an update, its gradient, and the leaves of further trees, to how they agree.
Compare = Callable[..., _rule.Agreement]


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
        *beside: optax.Updates,
        compare: Compare | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Returns the cautious updates and the new state.

        Args:
          updates: the updates.
          grad: their gradient.
          *beside: trees like the updates, of what `compare` is to know besides.
          compare: tells how an update and its gradient agree, by default as the two
            say.
        """
        pairs = _trees.pair(updates, grad, mask=self.mask, stacked=self.stacked)
        compare = compare or functools.partial(
            _rule.compare, direction=self.rule.direction
        )
        agreements = []
        if self.monitor or self.rule.alignment == "element":
            others = zip(*map(pairs.like, beside), strict=True)
            agreements = [
                compare(leaf.u, leaf.g, *(next(others) if beside else ()))
                for leaf in pairs.leaves
            ]
        new = pairs.unflatten(_rule.apply(self.rule, pairs.leaves, agreements))
        if not self.monitor:
            return new, optax.EmptyState()
        return new, CautiousState(self._tree_fraction(pairs.leaves, agreements))

    def around(
        self,
        optimizer: optax.GradientTransformation,
        compare_with: Callable[
            [optax.OptState], tuple[Compare | None, tuple[optax.Updates, ...]]
        ] = lambda state: (None, ()),
    ) -> optax.GradientTransformationExtraArgs:
        """Makes the updates of `optimizer` cautious, in its own state.

        `compare_with` tells from the state before the step what is to compare, and
        which trees it is to be shown besides.
        """
        inner = optax.with_extra_args_support(optimizer)

        def init_fn(params: optax.Params) -> optax.OptState:
            return self.join(inner.init(params), self.init())

        def update_fn(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            old, grad = self.inner(state), updates
            updates, new = inner.update(grad, old, params, **extra_args)
            compare, beside = compare_with(old)
            updates, own = self.update(updates, grad, *beside, compare=compare)
            return updates, self.join(new, own)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def before(
        self, link: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Shows a link of a chain cautious updates, in the link's own state.

        The gradient is the extra argument `grad`.
        """
        inner = optax.with_extra_args_support(link)

        def init_fn(params: optax.Params) -> optax.OptState:
            return self.join(inner.init(params), self.init())

        def update_fn(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            *,
            grad: optax.Updates,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            old = self.inner(state)
            updates, own = self.update(updates, grad)
            updates, new = inner.update(updates, old, params, **extra_args)
            return updates, self.join(new, own)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def join(self, inner: optax.OptState, own: optax.OptState) -> optax.OptState:
        """Adds the state of caution to that of what it surrounds, if it has any."""
        return (inner, own) if self.monitor else inner

    def inner(self, state: optax.OptState) -> optax.OptState:
        """Takes the state of caution off again."""
        if not self.monitor:
            return state
        if [type(part) for part in state[1:]] != [CautiousState]:
            raise ValueError(
                "monitor=True, but the state is one without a monitor: a "
                f"{type(state).__name__} that does not end in a CautiousState. Make it "
                "by the init of this optimizer; docs/usage.md shows how to take over "
                "an older one."
            )
        return state[0]

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
