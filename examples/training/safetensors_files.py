"""Model files in the format of Hugging Face's transformers."""

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
"""What one file holds at most, unless it is a single tensor."""


def require_empty(output_dir: Path) -> None:
    """Raises an ``InputError`` for a directory that has something in it."""
    require(
        not (output_dir.is_dir() and any(output_dir.iterdir())),
        f"output_dir: {output_dir} is not empty; choose another",
    )


def split_tensors(
    tensors: Mapping[str, np.ndarray], limit: int
) -> list[dict[str, np.ndarray]]:
    """Divides tensors, in their order, among files of at most ``limit`` bytes each.

    One that is larger has a file of its own.
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
    """Writes model.safetensors, or several files and an index of them.

    Args:
        tensors: by their names.
        directory: where to.
        limit: what one file holds at most, in bytes.
    """
    shards = split_tensors(tensors, limit)
    files = list(_file_names(len(shards)))
    for file, shard in zip(files, shards, strict=True):
        # safetensors writes the memory as it lies, that of a transposed view too.
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
    """Writes a file that people can read, too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load_tensors(setting: str, directory: Path) -> dict[str, np.ndarray]:
    """Reads model.safetensors, or the files that its index lists, in float32.

    Args:
        setting: the setting that names the directory, for messages.
        directory: where they are.

    Raises:
        InputError: where there are none, or they cannot be read.
    """
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        try:
            listed = json.loads(read_text(setting, index))["weight_map"]
            files = sorted({*listed.values()})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{setting}: {index} lists no files") from error
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        path = directory / file
        require(
            path.is_file(),
            f"{setting}: there is no {path}; give a directory with a model in "
            "safetensors files",
        )
        try:
            # JAX has the type bfloat16, and NumPy has not.
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                loaded = load_file(path)
        except Exception as error:  # The package raises errors of its own.
            raise InputError(
                f"{setting}: cannot read {path} ({reason(error)})"
            ) from error
        for name, tensor in loaded.items():
            require(
                jnp.issubdtype(tensor.dtype, jnp.floating),
                f"{setting}: {name} in {path} is of {tensor.dtype}, not of a floating "
                "type; give a model that is not quantized",
            )
            tensors[name] = np.asarray(tensor, np.float32)
    return tensors
