"""Errors for arguments that cannot be meant."""

from typing import Any, get_args

import jax
import numpy as np

from optax_cautious._rule import Alignment, Direction, Renormalize

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


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


def _concrete(name: str, value: Any) -> float | None:
    """Returns the number, or None for a traced one, whose value is not known yet."""
    if isinstance(value, jax.core.Tracer):
        return None
    if np.shape(value) != () or not np.issubdtype(np.asarray(value).dtype, np.number):
        hint = (
            " For a schedule, use optax.inject_hyperparams." if callable(value) else ""
        )
        raise ValueError(f"{name} must be a number, got {value!r}.{hint}")
    return float(value)
