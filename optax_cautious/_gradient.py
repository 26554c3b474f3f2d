"""Pass the gradient to a link in the middle of a chain."""

from typing import Any

import optax


def transformation(
    tx: optax.GradientTransformation, what: str
) -> optax.GradientTransformationExtraArgs:
    """Return `tx` as a transformation with extra arguments.

    Args:
      tx: what a caller passed as an optimizer.
      what: name of the function that it was passed to.

    Raises:
      TypeError: if `tx` is not an optimizer.
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        hint = ""
        if callable(tx):
            name = getattr(tx, "__name__", "optimizer")
            hint = f" Call it first: {what}({name}(...))."
        raise TypeError(
            f"{what} takes an optimizer, as in {what}(optax.adamw(3e-4)), got "
            f"{tx!r}.{hint}"
        )
    # Both the MultiSteps object and its gradient_transformation() have such an update.
    if isinstance(getattr(tx.update, "__self__", None), optax.MultiSteps):
        raise TypeError(_MULTI_STEPS.format(what=what))
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        if _has_multi_steps(state):
            raise TypeError(_MULTI_STEPS.format(what=what))
        return state

    return optax.GradientTransformationExtraArgs(init_fn, inner.update)


def _has_multi_steps(state: optax.OptState) -> bool:
    """Return whether this is the state of a chain that contains a MultiSteps.

    In a partition, caution may not reach it.
    """
    if type(state) is tuple:
        return any(map(_has_multi_steps, state))
    return isinstance(state, optax.MultiStepsState)


_MULTI_STEPS = """{what} around optax.MultiSteps would compare the accumulated step \
with the gradient of the last micro-batch. Put it inside:
  optax.MultiSteps({what}(optimizer), every_k_schedule=...)"""


def provide_gradient(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Also pass the incoming updates to ``tx`` as the extra argument ``grad``.

    The incoming updates of a whole optimizer are the gradient, so a :func:`cautious`
    anywhere in ``tx`` receives it, and the caller need not change. Wrap the whole
    optimizer::

      tx = provide_gradient(optax.chain(optax.adamw(3e-4), cautious()))

    Inside :class:`optax.MultiSteps` this is the accumulated gradient, whereas a caller
    could only pass that of the last micro-batch. A ``grad`` passed by the caller is
    replaced.

    Args:
      tx: a transformation that takes ``grad``, or contains one that does.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with the state of ``tx``.

    Raises:
      TypeError: if ``tx`` is not a transformation, or is an :class:`optax.MultiSteps`,
        which must be the outer one; in ``init``, if it is a chain with one.

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
    inner = transformation(tx, "provide_gradient")

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(updates, state, params, **{**extra_args, "grad": updates})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
