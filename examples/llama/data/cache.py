"""A disk cache of directories, each keyed by everything its content depends on."""

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
    """Return the directory of a key; fill it first if it does not exist.

    Args:
        cache_dir: the directory of the cache.
        key: everything the content depends on, serializable as JSON. The version of
            the package ``tokenizers`` is added.
        fill: writes the content to the directory it is given. An ``OSError`` that it
            raises is reported as a failure to write.

    Raises:
        InputError: if the directory cannot be created or written.
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
        # NumPy's errors have no errno, only a message on how much was written.
        raise InputError(
            f"cache_dir: cannot write to {directory.parent} "
            f"({error.strerror or reason(error)}); free some space or pass another "
            "--cache-dir."
        ) from error
    return directory


def _rename(partial: Path, directory: Path) -> None:
    """Rename a directory, unless another process has written the same one meanwhile."""
    try:
        os.rename(partial, directory)
    except OSError:
        if not directory.exists():
            raise
