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

from examples.llama.checks import InputError, make_directory

_CACHE_VERSION = 2


def cached(cache_dir: Path, key: list[Any], fill: Callable[[Path], None]) -> Path:
    """Returns the directory of a key, filled before if it was not there.

    Args:
        cache_dir: where all such directories are.
        key: all that the content depends on, as JSON can write it. The version of the
            package ``tokenizers`` is added.
        fill: writes the content into a directory that it is given.

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
    except OSError as error:
        raise InputError(
            f"cache_dir: cannot write to {directory.parent} ({error.strerror})"
        ) from error
    try:
        fill(partial)
        try:
            os.rename(partial, directory)
        except OSError:
            if not directory.exists():  # Else another process wrote the same meanwhile.
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
