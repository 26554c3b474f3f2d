"""Every setting of the program, its default, and the check of its value."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pydantic

from examples.llama.checks import (
    InputError,
    require,
    require_choice,
    require_positive,
    require_utf8,
)

OptimizerName = Literal[
    "adamw",
    "cautious_adamw",
    "lion",
    "cautious_lion",
    "sgd",
    "cautious_sgd",
    "muon",
    "cautious_muon",
    "adafactor",
    "cautious_adafactor",
    "nadamw",
    "cautious_nadamw",
    "amsgrad",
    "cautious_amsgrad",
    "adabelief",
    "cautious_adabelief",
    "adan",
    "cautious_adan",
    "lamb",
    "cautious_lamb",
    "adopt",
    "cautious_adopt",
    "ademamix",
    "cautious_ademamix",
]
ModelName = Literal[
    "tiny",
    "9m",
    "20m",
    "35m",
    "60m",
    "71m",
    "100m",
    "130m",
    "250m",
    "350m",
    "1b",
    "3b",
    "7b",
]
PresetName = Literal["demo", "paper"]

DEFAULT_LEARNING_RATES = {"adamw": 2e-3, "lion": 5e-4}
"""The best for the optimizer without caution in a sweep of the tiny model; with it,
the same."""

BYTES = 256
"""Tokens that a byte-level tokenizer has before it merges any."""

END_OF_DOCUMENT = "<|endoftext|>"
"""The one special token of a tokenizer trained here, written after each document."""


def title(name: str) -> str:
    """Writes an optimizer's name as it stands in a table or a picture."""
    base = base_name(name)
    written = {
        "adamw": "AdamW",
        "sgd": "SGD",
        "nadamw": "NAdamW",
        "amsgrad": "AMSGrad",
        "adabelief": "AdaBelief",
        "lamb": "LAMB",
        "adopt": "ADOPT",
        "ademamix": "AdEMAMix",
    }
    pretty = written.get(base, base.capitalize())
    return pretty if name == base else f"cautious {pretty}"


def base_name(name: str) -> str:
    """Takes caution off an optimizer's name."""
    return name.removeprefix("cautious_")


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type computed in. Parameters, logits and loss are float32 always."""
    remat: bool = False
    """Keep only the input of each block for the backward pass, and compute the rest of
    it again. Saves most of the activations' memory for a third more computation."""
    unroll: int = 3
    """Blocks in each iteration of the loop over them. More take longer to compile."""

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "rope_theta",
            "unroll",
        ):
            require_positive(name, getattr(self, name))
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
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is {self.validation_fraction}: it has to lie "
            "between 0 and 1",
        )
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                require_utf8(name, str(text))


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the schedule of its learning rate.

    The defaults are those of the Cautious Optimizers paper's language models. Where a
    value is not given, it is the optimizer's own.
    """

    optimizer: OptimizerName = "cautious_adamw"
    """What to train with. Any cautious one takes the settings of its base."""
    learning_rate: float | None = None
    """The peak of the schedule. Not given, for models no wider than the tiny one: for
    AdamW 2e-3 and for Lion 5e-4, with and without caution, the best of a sweep."""
    b1: float | None = None
    """Decay of the momentum; for Lion, the momentum's share in the update."""
    b2: float | None = None
    """Decay of the second moment; for Lion, of the momentum."""
    eps: float | None = None
    """What is added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices but the embedding's; never masked by
    caution."""
    max_grad_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the learning rate grows from zero."""
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a share of its peak."""
    opposed_weight: float | None = None
    """Caution: weight of the coordinates whose update opposes the gradient."""
    min_fraction: float | None = None
    """Caution: the aligned fraction below which the update is not scaled up further."""
    renormalize: Literal["clamp", "plus_one", "none"] | None = None
    """Caution: how the update is scaled up."""
    neutral: Literal["hold", "follow", "ignore"] | None = None
    """Caution: what happens where the update or the gradient is exactly zero."""
    alignment: Literal["element", "leaf", "tree"] | None = None
    """Caution: what agrees or opposes as one. A tree is one layer, or all that is
    outside the layers."""
    exempt_embedding: bool = False
    """Caution: leave the embedding to the optimizer without it. Most of its rows have a
    zero gradient, as their tokens are not in the batch: this shows what is gained
    elsewhere."""

    @property
    def peak(self) -> float:
        """The learning rate, be it given or the default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return DEFAULT_LEARNING_RATES[base_name(self.optimizer)]

    @property
    def caution(self) -> dict[str, Any]:
        """The options of caution that are given."""
        names = (
            "opposed_weight",
            "min_fraction",
            "renormalize",
            "neutral",
            "alignment",
        )
        given = {name: getattr(self, name) for name in names}
        options = {name: value for name, value in given.items() if value is not None}
        if options.get("renormalize") == "none":
            options["renormalize"] = None
        return options

    def named(self, name: OptimizerName, learning_rate: float | None) -> Self:
        """Changes the name and the learning rate, and drops what the name has not."""
        if name != base_name(name):
            return replace(self, optimizer=name, learning_rate=learning_rate)
        none: dict[str, Any] = dict.fromkeys(self.caution)
        return replace(
            self,
            optimizer=name,
            learning_rate=learning_rate,
            exempt_embedding=False,
            **none,
        )

    def __post_init__(self) -> None:
        """Checks the values."""
        require_choice("optimizer", self.optimizer, get_args(OptimizerName))
        base = base_name(self.optimizer)
        require(
            self.learning_rate is not None or base in DEFAULT_LEARNING_RATES,
            f"learning_rate: there is no default for {self.optimizer}; give one",
        )
        require_positive("learning_rate", self.peak)
        if self.max_grad_norm is not None:
            require_positive("max_grad_norm", self.max_grad_norm)
        if self.eps is not None:
            require_positive("eps", self.eps)
        for name in ("b1", "b2", "warmup_fraction"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < 1,
                f"{name} is {value}: it has to be at least 0 and below 1",
            )
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}: it has to be at least 0",
        )
        require(
            0 <= self.final_fraction <= 1,
            f"final_fraction is {self.final_fraction}: it has to lie between 0 and 1",
        )
        given = [*self.caution, *["exempt_embedding"] * self.exempt_embedding]
        require(
            base != self.optimizer or not given,
            f"{', '.join(given)}: {self.optimizer} has no caution; choose "
            f"cautious_{base}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 600
    """Training steps."""
    accumulate: int = 1
    """Parts into which a batch is cut, one after the other, to save memory; the
    gradient is their mean."""
    log_every: int = 25
    """Steps between two writings of the log, which has a line for every step."""
    eval_every: int = 25
    """Steps between two measurements of the validation loss."""
    checkpoint_every: int = 100
    """Steps between two checkpoints, a multiple of eval_every."""
    keep: int = 2
    """How many of the newest checkpoints are kept, beside the best."""
    mesh: tuple[int, int, int] | None = None
    """Devices along the axes data, fsdp and tensor. Each sequence of a batch is on one
    device of data x fsdp; parameters are split over fsdp x tensor. Not given: all
    devices on fsdp."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in (
            "steps",
            "accumulate",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep",
        ):
            require_positive(name, getattr(self, name))
        require(
            self.checkpoint_every % self.eval_every == 0,
            f"checkpoint_every ({self.checkpoint_every}) is not a multiple of "
            f"eval_every ({self.eval_every}): a checkpoint is judged by its validation "
            "loss",
        )
        require(
            self.mesh is None or len(self.mesh) == 3,
            f"mesh is {self.mesh}: give a size for data, fsdp and tensor",
        )
        for size in self.mesh or ():
            require_positive("mesh", size)
        require(
            self.data.batch_size % self.accumulate == 0,
            f"accumulate ({self.accumulate}) does not divide batch_size "
            f"({self.data.batch_size})",
        )
        require(
            0 <= self.seed < 2**32,
            f"seed is {self.seed}: it has to be at least 0 and below 2**32",
        )


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


MODELS: dict[ModelName, ModelConfig] = {
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


def require_learning_rate(config: TrainConfig) -> None:
    """Raises an ``InputError`` where the default was found for a smaller model."""
    size = MODELS["tiny"].hidden_size
    require(
        config.optimizer.learning_rate is not None or config.model.hidden_size <= size,
        f"learning_rate: the default was found with a hidden_size of {size}, and here "
        f"it is {config.model.hidden_size}; give one",
    )


def with_model(config: TrainConfig, name: ModelName) -> TrainConfig:
    """Sets the architecture, and the length of the sequences that goes with it."""
    require_choice("model", name, tuple(MODELS))
    length = {"tiny": 128, "7b": 2048}.get(name, 1024)
    data = replace(config.data, sequence_length=length)
    return replace(config, model=MODELS[name], data=data)


PRESETS: dict[PresetName, TrainConfig] = {
    "demo": TrainConfig(),
    "paper": with_model(
        TrainConfig(
            data=DataConfig(
                data=("hf:allenai/c4:en",),
                tokenizer="t5-base",
                end_of_document="</s>",
                batch_size=512,
                validation_batches=4,
            ),
            steps=10_000,
            log_every=10,
            eval_every=500,
            checkpoint_every=500,
        ),
        "60m",
    ),
}
"""The demo's settings, and the recipe of the paper's language models."""


_JSON = pydantic.TypeAdapter(TrainConfig)


def to_json(config: TrainConfig) -> str:
    """Writes a configuration so that ``from_json`` reads it back."""
    return _JSON.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str, source: str) -> TrainConfig:
    """Reads what ``to_json`` wrote. A setting that is not there has its default.

    Args:
        text: the JSON.
        source: where it comes from, for messages.

    Raises:
        InputError: for anything else, naming the source and what is wrong with it.
    """
    try:
        return _JSON.validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        wrong = [
            ": ".join([*[".".join(map(str, e["loc"]))] * bool(e["loc"]), e["msg"]])
            # What pydantic says before the message of a __post_init__.
            .replace("Value error, ", "")
            for e in error.errors()
        ]
        raise InputError(
            f"{source} is not the configuration of a run: {'; '.join(wrong)}"
        ) from error
