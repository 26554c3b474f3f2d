"""The settings of the model and of its data, and the architectures by name."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.training.checks import (
    require,
    require_between,
    require_choice,
    require_positive,
    require_utf8,
)

TOKENIZER_NAME = "tokenizer.json"
"""The tokenizer's file, of a run and of a model in Hugging Face's format."""

BYTES = 256
"""Tokens that a byte-level tokenizer has before it merges any."""

END_OF_DOCUMENT = "<|endoftext|>"
"""The one special token of a tokenizer trained here, written after each document."""


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "optax-cautious"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, and how it is computed."""

    vocab_size: int = 2048
    """Tokens in the vocabulary."""
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
    rms_epsilon: float = 1e-6
    """Added to the mean square by which the norms divide."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type computed in. Parameters, logits and loss are float32 always."""
    remat: bool = False
    """Keep only the input of each block for the backward pass, and compute the rest of
    it again. Saves most of the activations' memory for a third more computation."""
    unroll: int = 3
    """Blocks in each iteration of the loop over them. More take longer to compile."""

    @property
    def architecture(self) -> dict[str, float]:
        """The settings that make the model, without how it is computed."""
        how = {"dtype", "remat", "unroll"}
        return {name: x for name, x in vars(self).items() if name not in how}

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, value in {**self.architecture, "unroll": self.unroll}.items():
            require_positive(name, value)
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
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class DataConfig:
    """The corpus and the windows cut from it."""

    data: tuple[str, ...] = ()
    """Text files, or directories of them; one file is one document. Or one Hugging Face
    dataset, streamed: hf:NAME or hf:NAME:CONFIG, as in hf:allenai/c4:en. Empty: the
    source of the Python standard library on this machine."""
    text_column: str = "text"
    """Column of a Hugging Face dataset that holds the documents."""
    train_split: str = "train"
    """Split of a Hugging Face dataset to train on."""
    validation_split: str = "validation"
    """Split of a Hugging Face dataset to validate on."""
    tokenizer: str = ""
    """A tokenizer.json, or the name of one on the Hugging Face hub, such as t5-base.
    Empty: one with as many tokens as the model's vocabulary, trained here."""
    end_of_document: str = END_OF_DOCUMENT
    """The special token of the tokenizer that is written after each document."""
    cache_dir: Path = field(default_factory=_default_cache_dir)
    """Where a tokenizer trained here and the tokens of text files are kept."""
    validation_fraction: float = 0.1
    """Share of the documents kept out of training, of text files."""
    shuffle_windows: int = 10_000
    """Windows of a streamed dataset among which each process draws the next."""
    sequence_length: int = 128
    """Tokens the model sees at once."""
    batch_size: int = 16
    """Windows in a training step, over all devices."""
    validation_batches: int = 8
    """Batches on which the validation loss is measured, the same at each evaluation."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in (
            "sequence_length",
            "batch_size",
            "validation_batches",
            "shuffle_windows",
        ):
            require_positive(name, getattr(self, name))
        require_between("validation_fraction", self.validation_fraction, 0, 1)
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                require_utf8(name, str(text))


def _paper_model(
    hidden_size: int, intermediate_size: int, num_heads: int, num_layers: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        num_layers=num_layers,
        dtype="bfloat16",
        unroll=1,
    )


MODELS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "9m": _paper_model(128, 352, 4, 4),
    "20m": _paper_model(256, 688, 4, 4),
    "35m": _paper_model(384, 1024, 8, 6),
    "60m": _paper_model(512, 1376, 8, 8),
    "71m": _paper_model(512, 1368, 8, 12),
    "100m": _paper_model(640, 1708, 10, 12),
    "130m": _paper_model(768, 2048, 12, 12),
    "250m": _paper_model(768, 2560, 16, 24),
    "350m": _paper_model(1024, 2736, 16, 24),
    "1b": _paper_model(2048, 5461, 32, 24),
    "3b": _paper_model(2560, 6848, 32, 32),
    "7b": _paper_model(4096, 11_008, 32, 32),
}
"""The tiny model of the demo, and the Llamas of the paper."""
