"""The Llama task and its training recipes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llama.config import MODELS, DataConfig, ModelConfig
from examples.llama.data.load import load_data
from examples.llama.loss import mean_cross_entropy
from examples.llama.model import (
    LAYOUT,
    Llama,
    divided_sizes,
    flops_per_token,
    make_graphdef,
)
from examples.llama.transformers_files import open_huggingface
from examples.training.attention import require_kernel
from examples.training.checkpoint import (
    CHECKPOINTS_NAME,
    load_params,
)
from examples.training.checks import require, require_same_architecture
from examples.training.config import TrainConfig
from examples.training.experiment import Experiment
from examples.training.optimizers import OptimizerConfig
from examples.training.task import (
    Data,
    LoadData,
    LoadModels,
    LossAlone,
    Params,
    count_parameters,
)
from examples.training.trained import require_same_model


def perplexity(loss: float) -> float:
    """Compute the perplexity of a loss in nats."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class LlamaTask(LossAlone):
    """Next-token prediction with a Llama."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    name: ClassVar[str] = "llama"
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[Mapping[str, Callable[[float], float]]] = {
        "perplexity": perplexity
    }
    layout: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **LAYOUT,
        "logits": ("fsdp", "tensor"),  # [D, V]
    }
    not_decayed: ClassVar[frozenset[str]] = frozenset({"scale", "embedding"})
    free: ClassVar[frozenset[str]] = frozenset({"cache_dir", "unroll"})

    def __post_init__(self) -> None:
        """Check that the attention kernel supports dtype and sizes."""
        model, length = self.model, self.data.sequence_length
        require_kernel(model.attention, model.dtype, length, model.head_dim)

    @property
    def architecture(self) -> Mapping[str, object]:
        """The settings of the model, without how it is computed."""
        return self.model.architecture

    @property
    def units(self) -> int:
        """Tokens per step."""
        return self.data.batch_size * self.data.sequence_length

    @property
    def layers(self) -> Mapping[str, int]:
        """The stacked blocks."""
        return {"blocks": self.model.num_layers}

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that each mesh axis must divide, by setting."""
        return divided_sizes(self.model)

    def describe(self) -> str:
        """Describe a batch."""
        return f"{self.data.batch_size} x {self.data.sequence_length} tokens"

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Return the rate tuned on the tiny model, or None for wider models."""
        if self.model.hidden_size > MODELS["tiny"].hidden_size:
            return None
        return {"adamw": 2e-3, "lion": 5e-4}.get(optimizer)

    def init(self, seed: int) -> Params:
        """Draw the initial parameters."""
        return nnx.to_pure_dict(nnx.state(Llama(self.model, nnx.Rngs(seed)), nnx.Param))

    def loss(self, params: Params, batch: jax.Array) -> jax.Array:
        """Compute the mean next-token cross-entropy.

        Args:
            params: the parameters.
            batch: windows of tokens, ``[B, T + 1]``.

        Returns:
            A float32 scalar, in nats.
        """
        tokens = batch.astype(jnp.int32)
        graphdef = make_graphdef(self.model)
        model = nnx.merge(graphdef, params)
        features, _ = model.features(tokens[:, :-1])  # [B, T, D]
        return mean_cross_entropy(features, model.logits, tokens[:, 1:])

    def check_source(self, source: Path) -> None:
        """Check that a run or a Llama in Hugging Face's format fits the settings."""
        if (source / CHECKPOINTS_NAME).is_dir():
            require_same_model(source, self)
            return
        found = open_huggingface(source)
        require_same_architecture(source, found.model.architecture, self.architecture)
        tokenizer = self.data.tokenizer
        require(
            bool(tokenizer) and Path(tokenizer).resolve() == found.tokenizer.resolve(),
            f"from: {source} has its own tokenizer; pass --tokenizer "
            f"{found.tokenizer} --end-of-document '{found.end_of_document}'.",
        )

    def start_from(self, source: Path, seed: int) -> Params:
        """Load the parameters to start from."""
        if (source / CHECKPOINTS_NAME).is_dir():
            return load_params(source, jax.eval_shape(lambda: self.init(0)))
        params = open_huggingface(source).load_params()
        require("logits" in params, f"from: {source} has no output layer.")
        return params

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Load text files or a Hugging Face dataset."""
        return load_data(self.data, self.model.vocab_size, seed, process, processes)

    def batch_like(self) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype of a batch."""
        shape = self.data.batch_size, self.data.sequence_length + 1
        is_small = self.model.vocab_size <= 2**16
        return jax.ShapeDtypeStruct(shape, np.uint16 if is_small else np.uint32)

    def flops(self) -> float:
        """Compute the FLOPs of a training step, as in PaLM."""
        length = self.data.sequence_length
        parameters = count_parameters(self)
        return self.units * flops_per_token(self.model, parameters, length)

    def show(self, models: LoadModels, data: LoadData, directory: Path) -> list[Path]:
        """Draw nothing; use ``generate`` to sample from a trained model."""
        return []


def with_model(config: TrainConfig[LlamaTask], name: str) -> TrainConfig[LlamaTask]:
    """Set the architecture and the sequence length that goes with it."""
    length = {"tiny": 128, "7b": 2048}.get(name, 1024)
    data = replace(config.task.data, sequence_length=length)
    return replace(config, task=LlamaTask(MODELS[name], data))


_C4 = DataConfig(
    data=("hf:allenai/c4:en",),
    tokenizer="t5-base",
    end_of_document="</s>",
    batch_size=512,
    validation_batches=4,
)
PRESETS: dict[str, TrainConfig[LlamaTask]] = {
    "demo": TrainConfig(LlamaTask()),
    "c-optim": with_model(
        TrainConfig(
            LlamaTask(data=_C4),
            OptimizerConfig(b1=0.9, b2=0.999),
            steps=10_000,
            log_every=10,
            eval_every=500,
            checkpoint_every=500,
        ),
        "60m",
    ),
    # 24 000 steps of 2048 x 1024 tokens are 50 billion.
    "paper": with_model(
        TrainConfig(
            LlamaTask(data=replace(_C4, batch_size=2048, validation_batches=1)),
            OptimizerConfig(b1=0.9, b2=0.95, weight_decay=0.1),
            steps=24_000,
            log_every=10,
            eval_every=500,
            checkpoint_every=500,
        ),
        "100m",
    ),
}

EXPERIMENT = Experiment(
    LlamaTask,
    PRESETS,
    "demo: a tiny model on the source of the Python standard library. c-optim: the "
    "command in the README of the paper's code, and the recipe of the paper's first "
    "version: 60m on C4, 10,000 steps of 512 x 1024 tokens, b2 0.999, no weight decay. "
    "paper: Table 1 of the paper since its second version: 100m, 50 billion tokens, "
    "2 million per step, b2 0.95, weight decay 0.1; for Lion pass --b1 0.95 --b2 0.98.",
    MODELS,
    with_model,
)
