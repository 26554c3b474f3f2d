"""The error of bad input, and the checks that raise it."""

import math
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 300


class InputError(ValueError):
    """A setting or a corpus with which the program cannot start."""


def require(condition: bool, message: str) -> None:
    """Raises an ``InputError`` with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(name: str, value: float) -> None:
    """Raises an ``InputError`` unless the value is finite and above zero."""
    require(
        value > 0 and math.isfinite(value), f"{name} is {value}: it has to be above 0"
    )


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Raises an ``InputError`` unless the value lies strictly between two others."""
    require(
        low < value < high,
        f"{name} is {value}: it has to lie between {low:g} and {high:g}",
    )


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises an ``InputError`` unless the value is one of the choices."""
    require(
        value in choices, f"{name} is {value!r}: choose one of {', '.join(choices)}"
    )


def require_utf8(name: str, value: str) -> None:
    """Raises an ``InputError`` unless the value can be written as UTF-8.

    The path of a file need not be: bytes that are no text arrive as surrogates.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: {value!r} is not UTF-8, in which a run keeps its settings; "
            "choose another name"
        ) from error


def make_directory(name: str, path: Path) -> None:
    """Makes a directory, or raises an ``InputError`` that says why it cannot."""
    require(
        ":/" not in str(path),
        f"{name}: {path} is no directory of this machine; mount the bucket, and give "
        "the directory where it is",
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: cannot make {path} ({error.strerror})") from error


def read_text(name: str, path: Path) -> str:
    """Reads a text file, or raises an ``InputError`` that says why it cannot."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{name}: cannot read {path} ({why})") from error


def reason(error: Exception) -> str:
    """Writes what an error says in one line, which some packages' do in many."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def human_size(size: float) -> str:
    """Writes a number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
