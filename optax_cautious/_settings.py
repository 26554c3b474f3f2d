"""The settings of the rule, and their validation."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Direction = Literal["descent", "ascent"]
Alignment = Literal["element", "leaf", "tree"]
Renormalize = Literal["clamp", "plus_one"] | None
Neutral = Literal["hold", "follow", "ignore"]
AxisName = str | Sequence[str] | None

#: jax.typing.ArrayLike, for isinstance.
ARRAY_LIKE = get_args(ArrayLike)

# A float32 schedule may overshoot its end value by this much.
_ROUNDING = 1e-6


class Rule(NamedTuple):
    """The settings shared by all leaves; the two numbers may be traced."""

    direction: Direction
    alignment: Alignment
    opposed_weight: ArrayLike
    renormalize: Renormalize
    min_fraction: ArrayLike
    neutral: Neutral
    axis_name: AxisName


def checked(rule: Rule) -> Rule:
    """Validate a rule and make it hashable, except for numbers that are arrays.

    Raises:
      ValueError: for an invalid setting.
    """
    check_direction(rule.direction)
    _check_choice("alignment", rule.alignment, get_args(Alignment))
    _check_choice("renormalize", rule.renormalize, ("clamp", "plus_one", None))
    _check_choice("neutral", rule.neutral, get_args(Neutral))
    return rule._replace(
        opposed_weight=_opposed_weight(rule.opposed_weight),
        min_fraction=_min_fraction(rule.min_fraction),
        axis_name=_axis_name(rule.axis_name),
    )


def check_direction(direction: Any) -> None:
    """Raise a ValueError for an unknown direction."""
    _check_choice("direction", direction, get_args(Direction))


def check_weight_decay(weight_decay: Any) -> None:
    """Raise a ValueError for a decay that is a concrete negative number."""
    if isinstance(weight_decay, jax.core.Tracer) or callable(weight_decay):
        return
    # optax.inject_hyperparams makes all numbers complex if a parameter is complex.
    if np.any(np.real(np.asarray(weight_decay)) < 0):
        raise ValueError(
            f"weight_decay must not be negative, got {weight_decay}: a positive decay "
            "shrinks the weights, whatever the direction of the update."
        )


_Settings = TypeVar("_Settings", bound=NamedTuple)


def split(settings: _Settings) -> tuple[_Settings, dict[str, Any]]:
    """Split a NamedTuple into its static, hashable part and its arrays.

    `jax.jit` recompiles for each new value of the static part only.
    """
    arrays = {
        name: value
        for name, value in settings._asdict().items()
        if isinstance(value, (jax.Array, np.ndarray))
    }
    return settings._replace(**dict.fromkeys(arrays)), arrays


def merge(settings: _Settings, arrays: dict[str, Any]) -> _Settings:
    """Put the arrays back: the inverse of `split`."""
    return settings._replace(**arrays)


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


def _opposed_weight(opposed_weight: Any) -> ArrayLike:
    number, value = _number("opposed_weight", opposed_weight)
    if value is not None and not abs(value) <= 1 + _ROUNDING:
        raise ValueError(
            f"opposed_weight must lie in [-1, 1], got {value}: 0 is Cautious, 1 the "
            "base optimizer, -1 Grams."
        )
    return number


def _min_fraction(min_fraction: Any) -> ArrayLike:
    number, value = _number("min_fraction", min_fraction)
    if value is not None and not 0 < value <= 1 + _ROUNDING:
        raise ValueError(
            f"min_fraction must lie in (0, 1], got {value}: the update is scaled up by "
            "at most 1 / min_fraction."
        )
    return number


def _axis_name(axis_name: Any) -> AxisName:
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    if isinstance(axis_name, (tuple, list)) and all(
        isinstance(name, str) for name in axis_name
    ):
        return tuple(axis_name)
    raise ValueError(
        "axis_name must be the name of a mapped axis, or a sequence of names, got "
        f"{axis_name!r}."
    )


def _number(name: str, value: Any) -> tuple[ArrayLike, float | None]:
    """Validate a number, and return it together with its value if that is concrete.

    An array stays an array: its value may change between steps, so it must not be
    compiled in as a constant.
    """
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return value, None
    is_scalar = isinstance(value, ARRAY_LIKE) and jnp.ndim(value) == 0
    if not is_scalar or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        hint = (
            " For a schedule, use optax.inject_hyperparams." if callable(value) else ""
        )
        raise ValueError(f"{name} must be a number, got {value!r}.{hint}")
    # optax.inject_hyperparams makes all numbers complex if a parameter is complex.
    number = complex(value)
    if number.imag != 0:
        raise ValueError(f"{name} must be a real number, got {value!r}.")
    return (value if isinstance(value, jax.Array) else number.real), number.real
