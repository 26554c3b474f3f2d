"""Errors for arguments that cannot be meant."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_cautious._rule import Alignment, Direction, Renormalize

#: What counts as an array: jax.typing.ArrayLike, for isinstance.
ARRAY_LIKE = get_args(ArrayLike)

# A schedule in float32 may overshoot its own end value by this much.
_ROUNDING = 1e-6


def check_direction(direction: Any) -> None:
    _check_choice("direction", direction, get_args(Direction))


def check_alignment(alignment: Any) -> None:
    _check_choice("alignment", alignment, get_args(Alignment))


def check_renormalize(renormalize: Any) -> None:
    _check_choice("renormalize", renormalize, get_args(Renormalize))


def check_opposed_weight(opposed_weight: Any) -> None:
    value = _concrete("opposed_weight", opposed_weight)
    if value is not None and not abs(value) <= 1 + _ROUNDING:
        raise ValueError(
            f"opposed_weight must lie in [-1, 1], got {value}: 0 is Cautious, 1 the "
            "base optimizer, -1 Grams."
        )


def check_min_fraction(min_fraction: Any) -> None:
    value = _concrete("min_fraction", min_fraction)
    if value is not None and not 0 < value <= 1 + _ROUNDING:
        raise ValueError(
            f"min_fraction must lie in (0, 1], got {value}: the update is scaled up by "
            "at most 1 / min_fraction."
        )


def check_axis_name(axis_name: Any) -> None:
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(
            "axis_name must be the name of a mapped axis, or a sequence of names, got "
            f"{axis_name!r}."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


def _concrete(name: str, value: Any) -> float | None:
    """Returns the number, or None for a traced one, whose value is not known yet."""
    if isinstance(value, jax.core.Tracer):
        return None
    is_scalar = isinstance(value, ARRAY_LIKE) and jnp.ndim(value) == 0
    if not is_scalar or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        hint = (
            " For a schedule, use optax.inject_hyperparams." if callable(value) else ""
        )
        raise ValueError(f"{name} must be a number, got {value!r}.{hint}")
    # optax.inject_hyperparams makes all numbers complex where a parameter is.
    number = complex(value)
    if number.imag != 0:
        raise ValueError(f"{name} must be a real number, got {value!r}.")
    return number.real
