"""The interface between the training program and an experiment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import grain
import jax

Params = dict[str, Any]
"""Arrays by the names of the modules that hold them."""

Batch = Any
"""A tree of arrays whose first axis is that of the examples, ``[B, ...]``."""


@dataclass(frozen=True)
class Data:
    """What a process trains and validates on."""

    train: grain.IterDataset[Batch]
    """This process's rows of each batch, without end: trees of NumPy arrays,
    ``[batch_size / processes, ...]``. An iterator has a state from which another goes
    on exactly."""
    validation: Batch
    """Its rows of the validation batches: a tree of NumPy arrays,
    ``[validation_batches, batch_size / processes, ...]``."""
    fingerprint: str
    """Hash of the data, the same on all processes."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files kept with a run: contents by name. A run that starts from another's
    weights must have the same files. The option that sets one is called after it, as in
    ``--tokenizer RUN/tokenizer.json``."""


class Model(NamedTuple):
    """A model that was trained."""

    task: Any
    params: Params


LoadModels = Callable[[], Mapping[str, Model]]
LoadData = Callable[[], Data]


class Batches(Protocol):
    """What all settings of data have."""

    @property
    def batch_size(self) -> int:
        """Examples in a step, over all devices."""

    @property
    def validation_batches(self) -> int:
        """Batches on which the validation loss is measured."""


class Task(Protocol):
    """A model, its loss and its data, with their settings.

    A task is a frozen dataclass. Its fields, and those of the dataclasses among them,
    are settings of the command line and of a run's ``config.json``.

    Randomness belongs to the batch: a loss that draws numbers draws them from seeds
    that the data bring for each example. A step is then the same on any mesh, in any
    number of parts and processes, and after a restart.
    """

    name: ClassVar[str]
    """Of the experiment: its runs are in ``outputs/NAME``."""
    unit: ClassVar[str]
    """The unit of throughput, such as "tokens"."""
    metrics: ClassVar[Mapping[str, Callable[[float], float]]]
    """Other metrics computed from a loss, such as ``{"perplexity": exp}``."""
    layout: ClassVar[Mapping[str, tuple[str | None, ...]]]
    """Mesh axes of each parameter's dimensions, by the name of its module. A
    parameter that is not listed is on every device."""
    not_decayed: ClassVar[frozenset[str]]
    """Names of parameters, or of what holds them, that weight decay spares."""
    free: ClassVar[frozenset[str]]
    """Settings that may change when a run resumes."""

    @property
    def data(self) -> Batches:
        """The settings of the data."""

    @property
    def units(self) -> int:
        """How many units, such as tokens, there are in a step."""

    @property
    def layers(self) -> Mapping[str, int]:
        """Children of the parameters that stack layers, and how many each stacks."""

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that must be divisible by each axis of the mesh, by setting."""

    def describe(self) -> str:
        """Describes a batch, such as "16 x 128 tokens"."""

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Returns a tuned learning rate for this model, or None."""

    def init(self, seed: int) -> Params:
        """Draws the initial parameters."""

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """Computes the mean loss of a batch, a float32 scalar."""

    def evaluate(self, params: Params, batch: Batch) -> tuple[jax.Array, Any]:
        """Computes the mean loss of a batch, and what ``scores`` needs of it.

        The latter is a tree of arrays, ``[B, ...]``; it may be empty.
        """

    def scores(self, outputs: Any) -> dict[str, float]:
        """Computes what is reported beside the loss, such as an accuracy, by name.

        Args:
            outputs: those of ``evaluate`` for all validation examples, as NumPy arrays,
                ``[N, ...]``.
        """

    def check_source(self, source: Path) -> None:
        """Checks what ``--from`` names: a run, or what else the task can read.

        Raises:
            InputError: where there is none, or it is of another model.
        """

    def start_from(self, source: Path, seed: int) -> Params:
        """Loads the parameters to start from, into the host's memory.

        Args:
            source: what ``--from`` names.
            seed: draws what the source does not have.

        Raises:
            InputError: where they cannot be read.
        """

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Loads what a process trains on.

        Args:
            seed: decides the order.
            process: which of the processes this is.
            processes: how many share each batch.
            source: what ``--from`` names, or the run itself if it resumes, for data
                that depend on the model's files.

        Raises:
            InputError: for data that cannot be had or do not fit.
        """

    def batch_like(self) -> Batch:
        """Returns the shapes and dtypes of a batch."""

    def flops(self) -> float:
        """Counts the operations of a training step."""

    def show(self, models: "LoadModels", data: LoadData, directory: Path) -> list[Path]:
        """Draws what trained models do, side by side, and returns the files.

        Args:
            models: loads the models, by what to call them. Their settings may differ.
            data: loads the data that this task is validated on.
            directory: where the files go.
        """

    def unrolled(self, layers: Mapping[str, int]) -> Self:
        """Returns the task with its layer scans unrolled by these factors."""


class LossAlone:
    """Mixin for tasks that report only their loss."""

    def evaluate(self: Any, params: Params, batch: Batch) -> tuple[jax.Array, Any]:
        """Computes the mean loss of a batch."""
        return self.loss(params, batch), ()

    def scores(self, outputs: Any) -> dict[str, float]:
        """Returns no scores."""
        return {}


def count_parameters(task: Task) -> int:
    """Counts the parameters of a model without making it."""
    like = jax.eval_shape(lambda: task.init(0))
    return sum(leaf.size for leaf in jax.tree.leaves(like))
