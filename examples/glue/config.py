"""Settings of the classifier and its data, and the tasks of GLUE."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from examples.training.checks import (
    require,
    require_between,
    require_positive,
    require_utf8,
)

Score = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
_REGRESSION: tuple[Score, ...] = ("pearson", "spearman")


@dataclass(frozen=True)
class HeadConfig:
    """The linear layer on top of the pretrained model."""

    num_labels: int = 8
    """Number of classes. 1: predict a number instead."""

    def __post_init__(self) -> None:
        """Validate the settings."""
        require_positive("num_labels", self.num_labels)


@dataclass(frozen=True)
class DataConfig:
    """Labelled texts, or labelled pairs of texts."""

    data: tuple[str, ...] = ()
    """A CSV, TSV, JSON lines or Parquet file; or a Hugging Face dataset, hf:NAME or
    hf:NAME:CONFIG, such as hf:nyu-mll/glue:mrpc, where NAME may be a local directory.
    Empty: a task built from the source of the Python standard library; see --made."""
    made: Literal["package", "docstring"] = "package"
    """Task to build if --data is not given. package: which package is this snippet from
    (one text, eight labels)? docstring: does this docstring belong to this function
    (two texts, two labels)?"""
    text_columns: tuple[str, ...] = ("text",)
    """Text column, or the two columns of a pair."""
    label_column: str = "label"
    """Column of the label, or of the number to predict."""
    train_split: str = "train"
    """Training split of a Hugging Face dataset."""
    validation_split: str = "validation"
    """Validation split of a Hugging Face dataset."""
    validation_fraction: float = 0.2
    """Fraction held out for validation: of the rows of a file, or of the modules of the
    standard library."""
    metrics: tuple[Score, ...] = ("accuracy",)
    """Scores to report: accuracy, f1 (of the second class) or matthews for classes;
    pearson or spearman for numbers."""
    sequence_length: int = 128
    """Maximum tokens per example; longer ones are truncated."""
    batch_size: int = 32
    """Examples per training step, over all devices."""
    validation_batches: int = 0
    """Maximum number of validation batches. 0: no limit."""

    def __post_init__(self) -> None:
        """Validate the settings."""
        require_positive("batch_size", self.batch_size)
        require(
            self.validation_batches >= 0,
            f"validation_batches must be at least 0, got {self.validation_batches}.",
        )
        require(
            self.sequence_length >= 4,
            f"sequence_length must be at least 4, got {self.sequence_length}.",
        )
        require_between("validation_fraction", self.validation_fraction, 0, 1)
        require(
            len(self.text_columns) in (1, 2),
            f"text_columns must name one or two columns, got {len(self.text_columns)}.",
        )
        require(
            len(self.data) <= 1,
            "data must be a single file or Hugging Face dataset, got "
            f"{len(self.data)}.",
        )
        require(bool(self.metrics), "metrics must not be empty.")
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                require_utf8(name, str(text))

    def require_head(self, head: HeadConfig) -> None:
        """Check that the metrics suit what the head predicts.

        Raises:
            InputError: if they do not.
        """
        is_regression = head.num_labels == 1
        wrong = [m for m in self.metrics if (m in _REGRESSION) != is_regression]
        kind = "numbers" if is_regression else "classes"
        require(
            not wrong,
            f"metrics: {', '.join(wrong)} cannot be computed for {kind}, which "
            f"--num-labels {head.num_labels} predicts.",
        )
        require(
            "f1" not in self.metrics or head.num_labels == 2,
            f"metrics: f1 requires num_labels to be 2, got {head.num_labels}.",
        )


class GlueDataset(NamedTuple):
    """A task of GLUE: a configuration of the dataset nyu-mll/glue."""

    columns: tuple[str, ...]
    metrics: tuple[Score, ...]
    examples: int
    """Number of training examples."""
    labels: int = 2
    epochs: int = 3
    validation_split: str = "validation"


_PAIR = "sentence1", "sentence2"
GLUE = {
    "cola": GlueDataset(("sentence",), ("matthews",), 8_551),
    "sst2": GlueDataset(("sentence",), ("accuracy",), 67_349),
    "mrpc": GlueDataset(_PAIR, ("accuracy", "f1"), 3_668, epochs=5),
    "stsb": GlueDataset(_PAIR, ("pearson", "spearman"), 5_749, labels=1),
    "qqp": GlueDataset(("question1", "question2"), ("accuracy", "f1"), 363_846),
    "mnli": GlueDataset(
        ("premise", "hypothesis"),
        ("accuracy",),
        392_702,
        labels=3,
        validation_split="validation_matched",
    ),
    "qnli": GlueDataset(("question", "sentence"), ("accuracy",), 104_743),
    "rte": GlueDataset(_PAIR, ("accuracy",), 2_490),
    "wnli": GlueDataset(_PAIR, ("accuracy",), 635, epochs=5),
}
"""The tasks, with the sizes, columns and metrics of Wang et al., arXiv:1804.07461."""
