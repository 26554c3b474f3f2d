"""Model files in the format of Hugging Face transformers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file
from safetensors.numpy import save_file

from examples.training.checks import InputError, read_text, reason, require

SHARD_BYTES = 5_000_000_000
"""Maximum size of a file, unless it contains a single tensor."""


def require_empty(output_dir: Path) -> None:
    """Raise an ``InputError`` if a directory is not empty."""
    require(
        not (output_dir.is_dir() and any(output_dir.iterdir())),
        f"output_dir: {output_dir} is not empty; choose another.",
    )


def split_tensors(
    tensors: Mapping[str, np.ndarray], limit: int
) -> list[dict[str, np.ndarray]]:
    """Split tensors, in order, into files of at most ``limit`` bytes each.

    A larger tensor gets a file of its own.
    """
    shards: list[dict[str, np.ndarray]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def save_tensors(
    tensors: Mapping[str, np.ndarray], directory: Path, limit: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or several files and their index.

    Args:
        tensors: the tensors by name.
        directory: the output directory.
        limit: maximum size of a file in bytes.
    """
    shards = split_tensors(tensors, limit)
    files = list(_file_names(len(shards)))
    for file, shard in zip(files, shards, strict=True):
        # safetensors writes raw memory, ignoring the strides of a transposed view.
        contiguous = {name: np.ascontiguousarray(x) for name, x in shard.items()}
        save_file(contiguous, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
            "weight_map": {
                name: file
                for file, shard in zip(files, shards, strict=True)
                for name in shard
            },
        }
        save_json(index, directory / "model.safetensors.index.json")


def _file_names(count: int) -> Iterator[str]:
    if count == 1:
        yield "model.safetensors"
        return
    for i in range(1, count + 1):
        yield f"model-{i:05}-of-{count:05}.safetensors"


def save_json(content: Any, path: Path) -> None:
    """Write human-readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def tensor_files(setting: str, directory: Path) -> list[Path]:
    """List model.safetensors, or the files that its index lists.

    Args:
        setting: the setting that names the directory, for error messages.
        directory: the directory of the model.

    Raises:
        InputError: if files are missing.
    """
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        try:
            listed = json.loads(read_text(setting, index))["weight_map"]
            files = sorted({*listed.values()})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{setting}: {index} lists no files.") from error
    paths = [directory / file for file in files]
    for path in paths:
        require(
            path.is_file(),
            f"{setting}: {path} does not exist; pass a directory with a model in "
            "safetensors format.",
        )
    return paths


def load_tensors(setting: str, directory: Path) -> dict[str, np.ndarray]:
    """Load the tensors of a model as float32.

    Args:
        setting: the setting that names the directory, for error messages.
        directory: the directory of the model.

    Raises:
        InputError: if files are missing or cannot be read.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in tensor_files(setting, directory):
        try:
            # Loaded by JAX, because NumPy has no bfloat16.
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                loaded = load_file(path)
        except Exception as error:  # The package may raise any error.
            raise InputError(
                f"{setting}: cannot read {path} ({reason(error)})."
            ) from error
        for name, tensor in loaded.items():
            require(
                jnp.issubdtype(tensor.dtype, jnp.floating),
                f"{setting}: {name} in {path} has dtype {tensor.dtype}, which is not "
                "floating point; pass a model that is not quantized.",
            )
            tensors[name] = np.asarray(tensor, np.float32)
    return tensors
