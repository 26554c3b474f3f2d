"""Directories on disk that are made once, each under a key of what it depends on."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from examples.training.checks import InputError, make_directory, reason

_CACHE_VERSION = 2


def cached(cache_dir: Path, key: list[Any], fill: Callable[[Path], None]) -> Path:
    """Returns the directory of a key, filled before if it was not there.

    Args:
        cache_dir: where all such directories are.
        key: all that the content depends on, as JSON can write it. The version of the
            package ``tokenizers`` is added.
        fill: writes the content into a directory that it is given. An ``OSError`` of
            its is taken for one of writing.

    Raises:
        InputError: where the directory cannot be made.
    """
    text = json.dumps([_CACHE_VERSION, tokenizers.__version__, *key])
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    directory = cache_dir / "llama" / name
    if directory.exists():
        return directory
    make_directory("cache_dir", directory.parent)
    try:
        partial = Path(tempfile.mkdtemp(dir=directory.parent))
        try:
            fill(partial)
            _rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        # NumPy says how much it could not write, and gives no number.
        raise InputError(
            f"cache_dir: cannot write to {directory.parent} "
            f"({error.strerror or reason(error)}); make room there, or choose another "
            "--cache-dir"
        ) from error
    return directory


def _rename(partial: Path, directory: Path) -> None:
    """Renames a directory, unless another process wrote the same meanwhile."""
    try:
        os.rename(partial, directory)
    except OSError:
        if not directory.exists():
            raise
