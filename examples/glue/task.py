"""Sentence tasks as a task of the training program, and the recipes of GLUE."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.glue.config import GLUE, DataConfig, GlueDataset, HeadConfig
from examples.glue.data import LABELS_NAME, load_data, read_labels
from examples.glue.model import Classifier, make_graphdef
from examples.glue.scores import scores
from examples.llama.config import MODELS, TOKENIZER_NAME, ModelConfig
from examples.llama.model import LAYOUT, divided_sizes, flops_per_token
from examples.llama.pretrained import open_pretrained, read_vocabulary
from examples.llama.transformers_files import Pretrained, require_same_model
from examples.training.checks import InputError, read_text
from examples.training.config import TrainConfig, from_json
from examples.training.experiment import Experiment
from examples.training.optimizers import OptimizerConfig
from examples.training.run_dir import CONFIG_NAME
from examples.training.task import (
    Data,
    LoadData,
    LoadModels,
    Params,
    count_parameters,
)
from examples.training.trained import Source, load_trained


@dataclass(frozen=True)
class ClassificationTask:
    """Predict the label of a text, or of a pair of texts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)

    name: ClassVar[str] = "glue"
    unit: ClassVar[str] = "examples"
    metrics: ClassVar[Mapping[str, Callable[[float], float]]] = {}
    layout: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **LAYOUT,
        "score": ("fsdp", None),  # [D, labels]
    }
    not_decayed: ClassVar[frozenset[str]] = frozenset({"scale"})
    free: ClassVar[frozenset[str]] = frozenset({"unroll"})

    def __post_init__(self) -> None:
        """Checks that the scores are of what the head predicts."""
        self.data.require_head(self.head)

    @property
    def units(self) -> int:
        """Examples in a step."""
        return self.data.batch_size

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that must be divisible by each axis of the mesh."""
        return divided_sizes(self.model)

    def describe(self) -> str:
        """Describes the texts of a batch."""
        length = self.data.sequence_length
        return f"{self.data.batch_size} texts of {length} tokens"

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Returns None: it depends on the pretrained model."""
        return None

    def init(self, seed: int) -> Params:
        """Draws all weights; ``start_from`` keeps the head's."""
        model = Classifier(self.model, self.head.num_labels, nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Computes the mean cross-entropy, or the mean squared error of numbers.

        Args:
            params: the weights.
            batch: ``tokens``, ``[B, T]``; ``last``, ``label`` and ``weight``, ``[B]``.

        Returns:
            A float32 scalar.
        """
        loss, _ = self.evaluate(params, batch)
        return loss

    def evaluate(
        self, params: Params, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss, and the logits beside the labels."""
        model = nnx.merge(make_graphdef(self.model, self.head.num_labels), params)
        logits = model(batch["tokens"].astype(jnp.int32), batch["last"])
        label, weight = batch["label"], batch["weight"]
        if self.head.num_labels == 1:
            losses = optax.losses.squared_error(logits[:, 0], label)
        else:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, label
            )
        outputs = {"logits": logits, "label": label, "weight": weight}
        return (weight * losses).mean(), outputs

    def scores(self, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Computes the scores of the task."""
        there = outputs["weight"] > 0
        logits, label = outputs["logits"][there], outputs["label"][there]
        return scores(self.data.metrics, logits, label)

    def check_source(self, source: Path) -> None:
        """Checks a pretrained Llama, or another run of fine-tuning."""
        require_same_model(source, _open(source).model, self.model)

    def start_from(self, source: Path, seed: int) -> Params:
        """Loads the body of the source, and draws the head."""
        # XLA leaves out the body, which is not returned.
        head = jax.jit(lambda: self.init(seed)["score"])()
        body = _open(source).load_params()
        names = jax.eval_shape(lambda: self.init(0))
        drawn = {"score": jax.tree.map(np.asarray, head)}
        return {name: drawn.get(name) or body[name] for name in names}

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Loads rows, and tokenizes them as the pretrained Llama's text was."""
        if source is None:
            raise InputError(
                "from: give the pretrained Llama: the directory of a run of "
                "examples.llama, or of a model in Hugging Face's format"
            )
        found = _open(source)
        return load_data(
            self.data,
            self.head,
            read_vocabulary(
                found.tokenizer, found.start_of_document, self.model.vocab_size
            ),
            read_text("from", found.tokenizer),
            seed,
            process,
            processes,
        )

    def batch_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a batch."""
        count, length = self.data.batch_size, self.data.sequence_length
        is_small = self.model.vocab_size <= 2**16
        label = jnp.float32 if self.head.num_labels == 1 else jnp.int32
        return {
            "tokens": jax.ShapeDtypeStruct(
                (count, length), jnp.uint16 if is_small else jnp.uint32
            ),
            "last": jax.ShapeDtypeStruct((count,), jnp.int32),
            "label": jax.ShapeDtypeStruct((count,), label),
            "weight": jax.ShapeDtypeStruct((count,), jnp.float32),
        }

    def flops(self) -> float:
        """Counts the operations of a step."""
        length = self.data.sequence_length
        each = flops_per_token(self.model, count_parameters(self), length)
        return self.units * length * each

    def show(self, models: LoadModels, data: LoadData, directory: Path) -> list[Path]:
        """Draws nothing."""
        return []

    @property
    def layers(self) -> Mapping[str, int]:
        """The blocks are stacked."""
        return {"blocks": self.model.num_layers}

    def unrolled(self, layers: Mapping[str, int]) -> Self:
        """Sets the unroll factor of the scan over the blocks."""
        return replace(self, model=replace(self.model, unroll=layers["blocks"]))


def _open(source: Path) -> Pretrained:
    """Finds a pretrained Llama, or the body of a run of fine-tuning."""
    if not (source / LABELS_NAME).is_file():
        return open_pretrained(source)
    kept = read_labels("from", source)

    def load_params() -> Params:
        return load_trained(Source(source), ClassificationTask).params

    path = source / CONFIG_NAME
    config = from_json(read_text("from", path), f"from: {path}", ClassificationTask)
    start = kept.start_of_document
    tokenizer = source / TOKENIZER_NAME
    return Pretrained(config.task.model, load_params, tokenizer, start, start)


def with_model(
    config: TrainConfig[ClassificationTask], name: str
) -> TrainConfig[ClassificationTask]:
    """Sets the architecture of the pretrained model."""
    return replace(config, task=replace(config.task, model=MODELS[name]))


def _recipe(**optimizer: Any) -> OptimizerConfig:
    """Sets what Liu et al. (arXiv:1907.11692) fine-tune with."""
    return OptimizerConfig(
        b1=0.9,
        b2=0.999,
        eps=1e-6,
        schedule="linear",
        warmup_fraction=0.06,
        final_fraction=0.0,
        **optimizer,
    )


def _demo(made: Any, labels: int, steps: int) -> TrainConfig[ClassificationTask]:
    """Sets the best rate for AdamW of 2e-3, 4e-3 and 8e-3."""
    data = DataConfig(made=made, sequence_length=48, validation_batches=24)
    return TrainConfig(
        ClassificationTask(head=HeadConfig(labels), data=data),
        _recipe(learning_rate=4e-3),
        steps=steps,
        log_every=25,
        eval_every=steps,
        checkpoint_every=steps,
    )


def _glue(name: str, task: GlueDataset) -> TrainConfig[ClassificationTask]:
    data = DataConfig(
        data=(f"hf:nyu-mll/glue:{name}",),
        text_columns=task.columns,
        validation_split=task.validation_split,
        metrics=task.metrics,
    )
    steps = task.epochs * math.ceil(task.examples / data.batch_size)
    every = max(1, steps // 10)
    return TrainConfig(
        ClassificationTask(MODELS["100m"], HeadConfig(task.labels), data),
        _recipe(),
        steps=steps,
        log_every=10,
        eval_every=every,
        checkpoint_every=every,
    )


PRESETS: dict[str, TrainConfig[ClassificationTask]] = {
    "package": _demo("package", 8, 64),
    "docstring": _demo("docstring", 2, 64),
    **{name: _glue(name, task) for name, task in GLUE.items()},
}

EXPERIMENT = Experiment(
    ClassificationTask,
    PRESETS,
    "package, docstring: tasks made of the source of the Python standard library, for "
    "the demo's Llama. The others are those of GLUE: batches of 32, 3 epochs (MRPC and "
    "WNLI 5), betas 0.9 and 0.999, linear to zero.",
    MODELS,
    with_model,
)
