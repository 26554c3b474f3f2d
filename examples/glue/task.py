"""Text classification as a training task, and its presets."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

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
from examples.llama.transformers_files import Pretrained
from examples.training.attention import require_kernel
from examples.training.checks import InputError, read_text, require_same_architecture
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
from examples.training.trained import Source, load_trained, require_checkpoint


@dataclass(frozen=True)
class ClassificationTask:
    """Prediction of the label of a text or a pair of texts."""

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
        """Check that the metrics and the attention kernel suit the model."""
        self.data.require_head(self.head)
        model, length = self.model, self.data.sequence_length
        require_kernel(model.attention, model.dtype, length, model.head_dim)

    @property
    def architecture(self) -> Mapping[str, object]:
        """The settings of the body."""
        return self.model.architecture

    @property
    def units(self) -> int:
        """Examples per step."""
        return self.data.batch_size

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that each mesh axis must divide."""
        return divided_sizes(self.model)

    def describe(self) -> str:
        """Describe a batch."""
        length = self.data.sequence_length
        return f"{self.data.batch_size} texts of {length} tokens"

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Return None: the best rate depends on the pretrained model."""
        return None

    def init(self, seed: int) -> Params:
        """Initialize all parameters; ``start_from`` uses only the head's."""
        model = Classifier(self.model, self.head.num_labels, nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Compute the mean cross-entropy, or the mean squared error of numbers.

        Args:
            params: the parameters.
            batch: ``tokens``, ``[B, T]``; ``last``, ``label`` and ``weight``, ``[B]``.

        Returns:
            A float32 scalar.
        """
        loss, _ = self.evaluate(params, batch)
        return loss

    def evaluate(
        self, params: Params, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the loss, and the logits and labels that ``scores`` needs."""
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
        """Compute the metrics of the task, without the padding of the last batch."""
        valid = outputs["weight"] > 0
        logits, label = outputs["logits"][valid], outputs["label"][valid]
        return scores(self.data.metrics, logits, label)

    def check_source(self, source: Path) -> None:
        """Check that ``source`` is a Llama, pretrained or fine-tuned, of this size."""
        found = _open(source).model.architecture
        require_same_architecture(source, found, self.architecture)

    def start_from(self, source: Path, seed: int) -> Params:
        """Load the body from ``source`` and initialize the head."""
        # XLA eliminates the unused body.
        head = jax.jit(lambda: self.init(seed)["score"])()
        body = _open(source).load_params()
        names = jax.eval_shape(lambda: self.init(0))
        new = {"score": jax.tree.map(np.asarray, head)}
        return {name: new.get(name) or body[name] for name in names}

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Load rows and tokenize them with the pretrained Llama's tokenizer."""
        if source is None:
            raise InputError(
                "from: fine-tuning needs a pretrained Llama; pass the directory of a "
                "run of examples.llama, or of a model in Hugging Face's format."
            )
        found = _open(source)
        return load_data(
            self.data,
            self.head,
            read_vocabulary(
                "from", found.tokenizer, found.start_of_document, self.model.vocab_size
            ),
            read_text("from", found.tokenizer),
            seed,
            process,
            processes,
        )

    def batch_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of a batch."""
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
        """Count the FLOPs of a step."""
        length = self.data.sequence_length
        each = flops_per_token(self.model, count_parameters(self), length)
        return self.units * length * each

    def show(self, models: LoadModels, data: LoadData, directory: Path) -> list[Path]:
        """Draw nothing."""
        return []

    @property
    def layers(self) -> Mapping[str, int]:
        """Number of stacked blocks."""
        return {"blocks": self.model.num_layers}


def _open(source: Path) -> Pretrained:
    """Open a pretrained Llama, or the body of a fine-tuning run."""
    if not (source / LABELS_NAME).is_file():
        return open_pretrained(source)
    require_checkpoint("from", source)
    kept = read_labels("from", source)

    def load_params() -> Params:
        return load_trained(Source(source), ClassificationTask, "from").params

    path = source / CONFIG_NAME
    config = from_json(read_text("from", path), f"from: {path}", ClassificationTask)
    start = kept.start_of_document
    tokenizer = source / TOKENIZER_NAME
    return Pretrained(config.task.model, load_params, tokenizer, start, start)


def with_model(
    config: TrainConfig[ClassificationTask], name: str
) -> TrainConfig[ClassificationTask]:
    """Return the configuration with the architecture ``MODELS[name]``."""
    return replace(config, task=replace(config.task, model=MODELS[name]))


def _recipe(**optimizer: Any) -> OptimizerConfig:
    """Build the fine-tuning settings of Liu et al. (arXiv:1907.11692)."""
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
    """Build a preset with AdamW's best learning rate of 2e-3, 4e-3 and 8e-3."""
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
    "package, docstring: tasks built from the source of the Python standard library, "
    "for the demo's Llama. Others: the tasks of GLUE, batch size 32, 3 epochs (5 for "
    "MRPC and WNLI), betas 0.9 and 0.999, learning rate linear to zero.",
    MODELS,
    with_model,
)
