"""The interface between the training program and an experiment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import grain
import jax

Params = dict[str, Any]
"""Arrays by the names of the modules that hold them."""

Batch = Any
"""A tree of arrays whose first axis is that of the examples, ``[B, ...]``."""


@dataclass(frozen=True)
class Data:
    """The training and validation data of a process."""

    train: grain.IterDataset[Batch]
    """This process's rows of each batch, as an infinite stream: trees of NumPy arrays,
    ``[batch_size / processes, ...]``. The state of an iterator lets another one resume
    exactly."""
    validation: Batch
    """This process's rows of the validation batches: a tree of NumPy arrays,
    ``[validation_batches, batch_size / processes, ...]``."""
    fingerprint: str
    """Hash of the data, identical on all processes."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Additional files saved with a run: contents by name."""
    shared: frozenset[str] = frozenset()
    """Names of the files that must be the same in a run from whose weights this one
    starts. The option that sets a file is named after it, as in ``--tokenizer
    RUN/tokenizer.json``."""


class Model(NamedTuple):
    """A trained model."""

    task: Any
    params: Params


LoadModels = Callable[[], Mapping[str, Model]]
LoadData = Callable[[], Data]


class Batches(Protocol):
    """The settings that all data configurations have."""

    @property
    def batch_size(self) -> int:
        """Examples per step, over all devices."""

    @property
    def validation_batches(self) -> int:
        """Batches over which the validation loss is computed."""


class Task(Protocol):
    """A model, its loss and its data, with their settings.

    A task is a frozen dataclass. Its fields, and those of nested dataclasses, are
    settings on the command line and in a run's ``config.json``.

    Randomness belongs to the batch: a loss that needs random numbers derives them from
    per-example seeds in the data. A step is therefore the same on any mesh, with any
    number of accumulated parts and of processes, and after a restart.
    """

    name: ClassVar[str]
    """Name of the experiment; its runs are in ``outputs/NAME``."""
    unit: ClassVar[str]
    """The unit of throughput, such as "tokens"."""
    metrics: ClassVar[Mapping[str, Callable[[float], float]]]
    """Metrics derived from the loss, such as ``{"perplexity": exp}``."""
    layout: ClassVar[Mapping[str, tuple[str | None, ...]]]
    """Mesh axes of each parameter's dimensions, by module name. Parameters that are not
    listed are replicated."""
    not_decayed: ClassVar[frozenset[str]]
    """Names of parameters, or of modules, that are exempt from weight decay."""
    free: ClassVar[frozenset[str]]
    """Settings that may change when a run resumes."""

    @property
    def data(self) -> Batches:
        """The data settings."""

    @property
    def architecture(self) -> Mapping[str, object]:
        """The settings that weights belong to, such as the number of heads."""

    @property
    def units(self) -> int:
        """Units per step, such as tokens."""

    @property
    def layers(self) -> Mapping[str, int]:
        """Top-level names of parameters that stack layers, with their layer counts."""

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that a mesh axis ("fsdp" or "tensor") must divide, by setting."""

    def describe(self) -> str:
        """Describe a batch, as in "16 x 128 tokens"."""

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Return a tuned learning rate for this model, or None."""

    def init(self, seed: int) -> Params:
        """Initialize the parameters."""

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """Compute the mean loss of a batch, a float32 scalar."""

    def evaluate(self, params: Params, batch: Batch) -> tuple[jax.Array, Any]:
        """Compute the mean loss of a batch, and the outputs that ``scores`` needs.

        The outputs are a tree of arrays, ``[B, ...]``, which may be empty.
        """

    def scores(self, outputs: Any) -> dict[str, float]:
        """Compute the scores to report besides the loss, such as accuracy, by name.

        Args:
            outputs: the outputs of ``evaluate`` for all validation examples, as NumPy
                arrays, ``[N, ...]``.
        """

    def check_source(self, source: Path) -> None:
        """Check the argument of ``--from``: a run, or any format the task can read.

        Raises:
            InputError: if it does not exist or contains another model.
        """

    def start_from(self, source: Path, seed: int) -> Params:
        """Load the parameters to start from into host memory.

        Args:
            source: the argument of ``--from``.
            seed: seed of the parameters that the source lacks.

        Raises:
            InputError: if the parameters cannot be read.
        """

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Load the data of a process.

        Args:
            seed: seed of the data order.
            process: index of this process.
            processes: number of processes that share each batch.
            source: the argument of ``--from``, or the run itself if it resumes, for
                data that depend on the model's files.

        Raises:
            InputError: if the data cannot be loaded or do not fit the settings.
        """

    def batch_like(self) -> Batch:
        """Return the shapes and dtypes of a whole batch, over all processes."""

    def flops(self) -> float:
        """Compute the FLOPs of a training step."""

    def show(self, models: "LoadModels", data: LoadData, directory: Path) -> list[Path]:
        """Draw the outputs of trained models side by side, and return the files.

        Args:
            models: loads the models, by display name. Their settings may differ.
            data: loads the data on which this task is validated.
            directory: the output directory.
        """


class LossAlone:
    """Mixin for tasks that report only the loss."""

    def evaluate(self: Any, params: Params, batch: Batch) -> tuple[jax.Array, Any]:
        """Compute the mean loss of a batch."""
        return self.loss(params, batch), ()

    def scores(self, outputs: Any) -> dict[str, float]:
        """Return no scores."""
        return {}


def count_parameters(task: Task) -> int:
    """Count the parameters of a model without creating it."""
    like = jax.eval_shape(lambda: task.init(0))
    return sum(leaf.size for leaf in jax.tree.leaves(like))
