"""Every setting of the program, its default, and the check of its value."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

OptimizerName = Literal["adamw", "cautious_adamw", "lion", "cautious_lion"]

TITLES: dict[OptimizerName, str] = {
    "adamw": "AdamW",
    "cautious_adamw": "cautious AdamW",
    "lion": "Lion",
    "cautious_lion": "cautious Lion",
}

DEFAULT_LEARNING_RATES: dict[OptimizerName, float] = {
    "adamw": 2e-3,
    "cautious_adamw": 2e-3,
    "lion": 5e-4,
    "cautious_lion": 5e-4,
}
"""The best of a sweep for the optimizer without caution; with it, the same."""

BYTES = 256
"""Tokens that a byte-level tokenizer has before it merges any."""

END_OF_DOCUMENT = "<|endoftext|>"
"""The one special token, written after each document."""


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


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises an ``InputError`` unless the value is one of the choices."""
    require(
        value in choices, f"{name} is {value!r}: choose one of {', '.join(choices)}"
    )


def make_directory(name: str, path: Path) -> None:
    """Makes a directory, or raises an ``InputError`` that says why it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: cannot make {path} ({error.strerror})") from error


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "optax-cautious"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    vocab_size: int = 2048
    """Tokens in the vocabulary: 256 bytes, one special token, the rest merges."""
    hidden_size: int = 128
    """Features of the residual stream."""
    intermediate_size: int = 344
    """Features inside the feed-forward layer."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads, each shared by num_heads / num_kv_heads query heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type computed in. Parameters, logits and loss are float32 always."""

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        ):
            require_positive(name, getattr(self, name))
        require(
            self.vocab_size > BYTES,
            f"vocab_size is {self.vocab_size}: it has to be at least {BYTES + 1}, "
            f"for {BYTES} bytes and the end-of-document token",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"num_heads ({self.num_heads}) does not divide hidden_size "
            f"({self.hidden_size}): choose a hidden_size that is a multiple of it",
        )
        require(
            self.head_dim % 2 == 0,
            f"hidden_size / num_heads is {self.head_dim}: it has to be even, as rotary "
            "embeddings turn features in pairs",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads ({self.num_kv_heads}) does not divide num_heads "
            f"({self.num_heads}): each key/value head serves equally many query heads",
        )
        require_positive("rope_theta", self.rope_theta)
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class DataConfig:
    """The corpus and the windows cut from it."""

    data: tuple[Path, ...] = ()
    """Text files, or directories of them; one file is one document. Empty: the source
    of the Python standard library on this machine."""
    cache_dir: Path = field(default_factory=_default_cache_dir)
    """Where the tokenizer and the tokens are kept between runs."""
    validation_fraction: float = 0.1
    """Share of the documents kept out of training."""
    sequence_length: int = 128
    """Tokens the model sees at once."""
    batch_size: int = 16
    """Windows in a training step."""
    validation_batches: int = 8
    """Batches on which the validation loss is measured, the same at each evaluation."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("sequence_length", "batch_size", "validation_batches"):
            require_positive(name, getattr(self, name))
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is {self.validation_fraction}: it has to lie "
            "between 0 and 1",
        )


@dataclass(frozen=True)
class RecipeConfig:
    """What an optimizer takes besides its name and its learning rate.

    The defaults are those of the Cautious Optimizers paper's language models.
    """

    b1: float = 0.9
    """Decay of AdamW's momentum; share of Lion's momentum in its update."""
    b2: float | None = None
    """Decay of AdamW's second moment, 0.999 by default, or Lion's momentum, 0.99."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    exempt_embedding: bool = False
    """Leave the embedding to the optimizer without caution. Most of its rows have a
    zero gradient, as their tokens are not in the batch: this shows what is gained
    elsewhere."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the learning rate grows from zero."""
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a share of its peak."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("b1", "b2", "warmup_fraction"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < 1,
                f"{name} is {value}: it has to be at least 0 and below 1",
            )
        require(
            self.weight_decay >= 0,
            f"weight_decay is {self.weight_decay}: it has to be at least 0",
        )
        require(
            0 <= self.final_fraction <= 1,
            f"final_fraction is {self.final_fraction}: it has to lie between 0 and 1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run, but for the optimizer's name and learning rate."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    steps: int = 600
    """Training steps."""
    eval_every: int = 25
    """Steps between two measurements of the validation loss."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive("steps", self.steps)
        require_positive("eval_every", self.eval_every)
        require(
            0 <= self.seed < 2**32,
            f"seed is {self.seed}: it has to be at least 0 and below 2**32",
        )


def run_command(function: Callable[..., Any]) -> None:
    """Calls a function with the arguments of the command line.

    The fields of nested settings become options without prefix. An ``InputError`` ends
    the program with its message alone.
    """
    try:
        tyro.cli(function, config=(tyro.conf.OmitArgPrefixes,))
    except InputError as error:
        sys.exit(f"error: {error}")
