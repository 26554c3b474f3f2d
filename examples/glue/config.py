"""The settings of the classifier and of its data, and the tasks of GLUE."""

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
    """The layer on top of the pretrained model."""

    num_labels: int = 8
    """Classes to tell apart. 1: predict a number instead."""

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive("num_labels", self.num_labels)


@dataclass(frozen=True)
class DataConfig:
    """Texts, or pairs of texts, and the label of each."""

    data: tuple[str, ...] = ()
    """A file of rows: CSV, JSON lines or Parquet. Or a Hugging Face dataset: hf:NAME or
    hf:NAME:CONFIG, as in hf:nyu-mll/glue:mrpc; NAME may be a local directory. Empty:
    made of the source of the Python standard library, see --made."""
    made: Literal["package", "docstring"] = "package"
    """The task to make when --data is not given. package: which package is this snippet
    from (one text, eight labels)? docstring: does this docstring belong to this
    function (two texts, two labels)?"""
    text_columns: tuple[str, ...] = ("text",)
    """The column with the text, or the two with a pair."""
    label_column: str = "label"
    """The column with the label, or with the number to predict."""
    train_split: str = "train"
    """Split of a Hugging Face dataset to train on."""
    validation_split: str = "validation"
    """Split of a Hugging Face dataset to validate on."""
    validation_fraction: float = 0.2
    """Share kept out of training: of the rows of a file, or of the modules of the
    standard library."""
    metrics: tuple[Score, ...] = ("accuracy",)
    """Scores reported: accuracy, f1 (of the second class), matthews; pearson and
    spearman for numbers."""
    sequence_length: int = 128
    """Tokens that the model sees of an example; longer ones are truncated."""
    batch_size: int = 32
    """Examples in a training step, over all devices."""
    validation_batches: int = 0
    """Maximum number of validation batches; 0: all there are."""

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive("batch_size", self.batch_size)
        require(
            self.validation_batches >= 0,
            f"validation_batches is {self.validation_batches}: it has to be at least 0",
        )
        require(
            self.sequence_length >= 4,
            f"sequence_length is {self.sequence_length}: it has to be at least 4",
        )
        require_between("validation_fraction", self.validation_fraction, 0, 1)
        require(
            len(self.text_columns) in (1, 2),
            f"text_columns: give one column, or two, not {len(self.text_columns)}",
        )
        require(
            len(self.data) <= 1,
            "data: give one file or one Hugging Face dataset",
        )
        require(bool(self.metrics), "metrics: give at least one")
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                require_utf8(name, str(text))

    def require_head(self, head: HeadConfig) -> None:
        """Checks that the scores are of what the head predicts.

        Raises:
            InputError: where they are not.
        """
        is_regression = head.num_labels == 1
        wrong = [m for m in self.metrics if (m in _REGRESSION) != is_regression]
        kind = "numbers" if is_regression else "classes"
        require(
            not wrong,
            f"metrics: {', '.join(wrong)} cannot be computed of {kind}, which "
            f"--num-labels {head.num_labels} predicts",
        )
        require(
            "f1" not in self.metrics or head.num_labels == 2,
            f"metrics: f1 is of two classes, and num_labels is {head.num_labels}",
        )


class GlueDataset(NamedTuple):
    """A task of GLUE, as a configuration of the dataset nyu-mll/glue."""

    columns: tuple[str, ...]
    metrics: tuple[Score, ...]
    examples: int
    """How many there are to train on."""
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
"""Sizes, columns and scores: Wang et al., arXiv:1804.07461."""
