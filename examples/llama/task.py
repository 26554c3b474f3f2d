"""The Llama as a task, and the recipes that it is trained by."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.llama.config import MODELS, DataConfig, ModelConfig
from examples.llama.data.load import load_data
from examples.llama.model import (
    LAYOUT,
    Llama,
    divided_sizes,
    flops_per_token,
    make_graphdef,
)
from examples.llama.transformers_files import open_huggingface, require_same_model
from examples.training.checkpoint import (
    CHECKPOINTS_NAME,
    load_params,
    require_weights,
)
from examples.training.checks import read_text, require
from examples.training.config import TrainConfig, from_json
from examples.training.experiment import Experiment
from examples.training.optimizers import OptimizerConfig
from examples.training.run_dir import CONFIG_NAME
from examples.training.task import (
    Data,
    LoadData,
    LoadModels,
    LossAlone,
    Params,
    count_parameters,
)


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss in nats."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class LlamaTask(LossAlone):
    """Predict the next token."""

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

    @property
    def units(self) -> int:
        """Tokens in a step."""
        return self.data.batch_size * self.data.sequence_length

    @property
    def layers(self) -> Mapping[str, int]:
        """The blocks are stacked."""
        return {"blocks": self.model.num_layers}

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that must be divisible by each axis of the mesh."""
        return divided_sizes(self.model)

    def describe(self) -> str:
        """Describes a batch."""
        return f"{self.data.batch_size} x {self.data.sequence_length} tokens"

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Returns the tuned rate of the tiny model, for models that are no wider."""
        if self.model.hidden_size > MODELS["tiny"].hidden_size:
            return None
        return {"adamw": 2e-3, "lion": 5e-4}.get(optimizer)

    def init(self, seed: int) -> Params:
        """Draws the initial weights."""
        return nnx.to_pure_dict(nnx.state(Llama(self.model, nnx.Rngs(seed)), nnx.Param))

    def loss(self, params: Params, batch: jax.Array) -> jax.Array:
        """Computes the mean cross-entropy of the next token.

        Args:
            params: the weights.
            batch: windows of tokens, ``[B, T + 1]``.

        Returns:
            A float32 scalar, in nats.
        """
        tokens = batch.astype(jnp.int32)
        graphdef = make_graphdef(self.model)
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])  # [B, T, V]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        )
        return losses.mean()

    def check_source(self, source: Path) -> None:
        """Checks another run, or a Llama in Hugging Face's format."""
        if (source / CHECKPOINTS_NAME).is_dir():
            require_weights(source, jax.eval_shape(lambda: self.init(0)))
            path = source / CONFIG_NAME
            run = from_json(read_text("from", path), f"from: {path}", type(self))
            require_same_model(source, run.task.model, self.model)
            return
        found = open_huggingface(source)
        require_same_model(source, found.model, self.model)
        tokenizer = self.data.tokenizer
        require(
            bool(tokenizer) and Path(tokenizer).resolve() == found.tokenizer.resolve(),
            f"from: {source} has its own tokenizer; pass --tokenizer "
            f"{found.tokenizer} --end-of-document '{found.end_of_document}'",
        )

    def start_from(self, source: Path, seed: int) -> Params:
        """Loads the weights."""
        if (source / CHECKPOINTS_NAME).is_dir():
            return load_params(source, jax.eval_shape(lambda: self.init(0)))
        params = open_huggingface(source).load_params()
        require("logits" in params, f"from: {source} has no output layer")
        return params

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Loads text files, or a Hugging Face dataset."""
        return load_data(self.data, self.model.vocab_size, seed, process, processes)

    def batch_like(self) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of a batch."""
        shape = self.data.batch_size, self.data.sequence_length + 1
        is_small = self.model.vocab_size <= 2**16
        return jax.ShapeDtypeStruct(shape, np.uint16 if is_small else np.uint32)

    def flops(self) -> float:
        """Counts the operations of a step, as in PaLM."""
        length = self.data.sequence_length
        parameters = count_parameters(self)
        return self.units * flops_per_token(self.model, parameters, length)

    def show(self, models: LoadModels, data: LoadData, directory: Path) -> list[Path]:
        """Draws nothing: ``generate`` shows what a model has learned."""
        return []

    def unrolled(self, layers: Mapping[str, int]) -> Self:
        """Sets the unroll factor of the scan over the blocks."""
        return replace(self, model=replace(self.model, unroll=layers["blocks"]))


def with_model(config: TrainConfig[LlamaTask], name: str) -> TrainConfig[LlamaTask]:
    """Sets the architecture, and the length of the sequences that goes with it."""
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
    "command in the README of the paper's code, also its first version: 60m on C4, "
    "10 000 steps of 512 x 1024 tokens, b2 0.999, no decay. paper: its Table 1 from "
    "the second version on: 100m, 50 billion tokens, 2 million a step, b2 0.95, decay "
    "0.1; for Lion give --b1 0.95 --b2 0.98.",
    MODELS,
    with_model,
)
