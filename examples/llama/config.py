"""Model and data settings, and the named architectures."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from examples.training.attention import AttentionName
from examples.training.checks import (
    require,
    require_between,
    require_choice,
    require_positive,
    require_utf8,
)
from examples.training.remat import Remat

TOKENIZER_NAME = "tokenizer.json"
"""Name of the tokenizer file, in a run and in a model in Hugging Face's format."""

BYTES = 256
"""Tokens in a byte-level tokenizer before any merge."""

END_OF_DOCUMENT = "<|endoftext|>"
"""The only special token of a tokenizer trained here; it follows each document."""


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "optax-cautious"


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and compute settings."""

    vocab_size: int = 2048
    """Vocabulary size."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 344
    """Width of the feed-forward layer."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads, each shared by num_heads / num_kv_heads query heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rms_epsilon: float = 1e-6
    """Epsilon of the RMS norms, added to the mean square."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, logits and loss are always float32."""
    attention: AttentionName = "auto"
    """Attention kernel. auto: splash on TPUs and cudnn on NVIDIA GPUs if they support
    the shapes, otherwise xla."""
    remat: Remat = "none"
    """What each block keeps for the backward pass: everything, the outputs of
    projections and attention, or only its input. The remaining activations are computed
    again, which takes up to a third more computation."""
    unroll: int = 3
    """Blocks per iteration of the scan over the blocks. Higher values take longer to
    compile."""

    @property
    def architecture(self) -> dict[str, float]:
        """The settings that define the model, without the compute settings."""
        compute = {"dtype", "attention", "remat", "unroll"}
        return {name: x for name, x in vars(self).items() if name not in compute}

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        """Validate the settings."""
        for name, value in {**self.architecture, "unroll": self.unroll}.items():
            require_positive(name, value)
        require(
            self.hidden_size % self.num_heads == 0,
            f"num_heads ({self.num_heads}) must divide hidden_size "
            f"({self.hidden_size}).",
        )
        require(
            self.head_dim % 2 == 0,
            f"hidden_size / num_heads must be even, got {self.head_dim}: rotary "
            "embeddings rotate pairs of features.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads ({self.num_kv_heads}) must divide num_heads "
            f"({self.num_heads}): every key/value head serves the same number of query "
            "heads.",
        )
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))
        require_choice("remat", self.remat, get_args(Remat))


@dataclass(frozen=True)
class DataConfig:
    """The corpus and the windows cut from it."""

    data: tuple[str, ...] = ()
    """Text files or directories of text files, one document per file; or a single
    Hugging Face dataset to stream, hf:NAME or hf:NAME:CONFIG, such as
    hf:allenai/c4:en. Empty: the source code of this machine's Python standard
    library."""
    text_column: str = "text"
    """Column of the Hugging Face dataset that holds the documents."""
    train_split: str = "train"
    """Split of the Hugging Face dataset to train on."""
    validation_split: str = "validation"
    """Split of the Hugging Face dataset to validate on."""
    tokenizer: str = ""
    """A tokenizer.json, or the name of a tokenizer on the Hugging Face Hub, such as
    t5-base. Empty: train one with the vocabulary size of the model."""
    end_of_document: str = END_OF_DOCUMENT
    """Special token of the tokenizer that ends each document."""
    cache_dir: Path = field(default_factory=_default_cache_dir)
    """Cache for tokenizers trained here and for the tokens of text files."""
    validation_fraction: float = 0.1
    """Fraction of the documents held out for validation. For text files only."""
    shuffle_windows: int = 10_000
    """Number of windows over which each process shuffles a streamed dataset."""
    sequence_length: int = 128
    """Tokens per sequence."""
    batch_size: int = 16
    """Sequences per training step, over all devices."""
    validation_batches: int = 8
    """Batches in each evaluation, always the same ones."""

    def __post_init__(self) -> None:
        """Validate the settings."""
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
"""The tiny model of the demo and the Llamas of the paper."""
