"""Data files: listing them, and splitting them into training and validation."""

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def standard_library() -> list[Path]:
    """List the modules of Python's standard library, without its tests."""
    return [
        file
        for file in sorted(STANDARD_LIBRARY.rglob("*.py"))
        if not _NOT_LIBRARY.intersection(file.relative_to(STANDARD_LIBRARY).parts)
    ]


def files_below(directory: Path) -> list[Path]:
    """List the files in a directory, recursively and without hidden ones."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    hidden = [
        file
        for file in files
        if any(part.startswith(".") for part in file.relative_to(directory).parts)
    ]
    if hidden:
        print(f"Ignored {len(hidden)} hidden files: {list_some(hidden)}.")
    return sorted({*files} - {*hidden})


def list_some(files: Sequence[Path], most: int = 3) -> str:
    """Format the first few files and the number of the others."""
    names = ", ".join(map(str, files[:most]))
    # Names may contain bytes that cannot be printed.
    names = names.encode(errors="backslashreplace").decode()
    return names + f" and {len(files) - most} more" * (len(files) > most)


def split_hashes(
    hashes: Iterable[bytes], fraction: float
) -> tuple[list[bytes], list[bytes]]:
    """Split items into training and validation by their hashes.

    The split depends on the sorted hashes only, not on file names or reading order, and
    a new item moves at most one other between the two sets.

    Args:
        hashes: at least two distinct hashes.
        fraction: fraction to validate on; at least one item is.

    Returns:
        The training hashes and the validation hashes.
    """
    ordered = sorted(hashes)
    count = min(max(1, round(fraction * len(ordered))), len(ordered) - 1)
    return ordered[count:], ordered[:count]
