"""The error for invalid input, and the checks that raise it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

_LONGEST = 300


class InputError(ValueError):
    """An invalid setting or corpus, with which the program cannot start."""


def require(condition: bool, message: str) -> None:
    """Raise an ``InputError`` with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(name: str, value: float) -> None:
    """Raise an ``InputError`` unless the value is finite and positive."""
    require(value > 0, f"{name} must be positive, got {value}.")
    require(math.isfinite(value), f"{name} must be finite, got {value}.")


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Raise an ``InputError`` unless the value lies strictly between two others."""
    require(
        low < value < high,
        f"{name} must be strictly between {low:g} and {high:g}, got {value}.",
    )


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise an ``InputError`` unless the value is one of the choices."""
    require(
        value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}."
    )


def require_same_architecture(
    source: Path, found: Mapping[str, object], expected: Mapping[str, object]
) -> None:
    """Check that trained weights belong to the settings.

    Args:
        source: the argument of ``--from``.
        found: the settings of its model, by name.
        expected: the settings to which they must be equal.

    Raises:
        InputError: if they are not; the message lists the options to pass.
    """
    options = [
        f"--{'no-' * (value is False)}{name.replace('_', '-')}"
        + f" {value}" * (not isinstance(value, bool))
        for name, value in found.items()
        if value != expected.get(name)
    ]
    require(
        not options,
        f"from: {source} has another architecture; pass {' '.join(options)}.",
    )


def require_utf8(name: str, value: str) -> None:
    """Raise an ``InputError`` unless the value can be encoded as UTF-8.

    A path may not be valid UTF-8; Python represents its other bytes as surrogates.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: {value!r} is not UTF-8, the encoding in which a run stores its "
            "settings; choose another name."
        ) from error


def make_directory(name: str, path: Path) -> None:
    """Create a directory, or raise an ``InputError`` with the reason."""
    require(
        ":/" not in str(path),
        f"{name}: {path} is not a directory on this machine; mount the bucket and pass "
        "its mount point.",
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: cannot create {path} ({error.strerror}).") from error


def read_text(name: str, path: Path) -> str:
    """Read a text file, or raise an ``InputError`` with the reason."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{name}: cannot read {path} ({why}).") from error


def reason(error: Exception) -> str:
    """Format the message of an error as a single line of limited length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def human_size(size: float) -> str:
    """Format a number of bytes with a suitable unit."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
