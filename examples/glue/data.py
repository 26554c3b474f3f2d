"""Batches of tokens and labels from rows of text."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from examples.glue.config import DataConfig, HeadConfig
from examples.glue.standard_library import Row
from examples.glue.tables import read_rows
from examples.llama.config import TOKENIZER_NAME
from examples.llama.pretrained import Vocabulary
from examples.training.checks import InputError, read_text, require
from examples.training.task import Data

LABELS_NAME = "labels.json"
"""The file with the label names, in the order of the logits, and the
start-of-document token."""

Example = dict[str, np.ndarray]
"""``tokens``, ``[T]``; ``last``, the position of the last token; ``label``; and
``weight``, the weight of the example in the mean loss: 0 for padding of a batch."""

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


class Labels(NamedTuple):
    """The labels of a run, and the token before each text."""

    names: list[str]
    """In the order of the logits; empty for numbers."""
    start_of_document: str
    """The special token before each text."""


def read_labels(setting: str, run_dir: Path) -> Labels:
    """Read the labels of a run.

    Args:
        setting: the setting that names the directory, for messages.
        run_dir: the directory of the run.

    Raises:
        InputError: if they cannot be read.
    """
    path = run_dir / LABELS_NAME
    text = read_text(setting, path)
    try:
        kept = json.loads(text)
        return Labels(kept["labels"], kept["start_of_document"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{setting}: {path} is damaged; restore it, or fine-tune again."
        ) from error


def load_data(
    config: DataConfig,
    head: HeadConfig,
    vocabulary: Vocabulary,
    tokenizer: str,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Load the configured data.

    Args:
        config: the configuration.
        head: the settings of the head.
        vocabulary: the vocabulary of the pretrained model.
        tokenizer: the content of its tokenizer.json, to keep with the run.
        seed: determines the order of the training examples.
        process_index: index of this process.
        process_count: number of processes that share each batch.

    Raises:
        InputError: if the data cannot be loaded, or do not suit the settings.
    """
    train, validation = read_rows(config)
    names = label_names(train, validation, head)
    require(
        len(train) >= config.batch_size,
        f"data: {len(train)} training examples are too few for a batch of "
        f"{config.batch_size}; provide more data or reduce --batch-size.",
    )
    limit = config.batch_size * config.validation_batches or len(validation)
    skipped = max(0, len(validation) - limit)
    validation = validation[:limit]
    splits = [
        make_examples(rows, names, vocabulary, config) for rows in (train, validation)
    ]
    truncated = sum(count for _, count in splits)
    examples = [split for split, _ in splits]
    digest = hashlib.sha256()
    for split in examples:
        for name in sorted(split):
            digest.update(split[name].tobytes())
    own = slice(process_index, None, process_count)
    kept = {"labels": names, "start_of_document": vocabulary.start_of_document}
    data = Data(
        _train_batches(examples[0], config, seed, own),
        _validation_batches(examples[1], config, own),
        digest.hexdigest(),
        {TOKENIZER_NAME: tokenizer, LABELS_NAME: json.dumps(kept, indent=2) + "\n"},
    )
    if process_index == 0:
        print(
            f"Data: {len(train):,} training and {len(validation):,} validation "
            "examples.",
            flush=True,
        )
        if skipped:
            print(f"Skipped {skipped:,} other validation examples.", flush=True)
        if truncated:
            print(
                f"Truncated {truncated:,} examples to {config.sequence_length} tokens; "
                "increase --sequence-length to keep more.",
                flush=True,
            )
    return data


def label_names(
    train: Sequence[Row], validation: Sequence[Row], head: HeadConfig
) -> list[str]:
    """List the labels in the order of the logits; empty for numbers.

    Raises:
        InputError: if the validation data have another label, or if the number of
            labels differs from ``head.num_labels``.
    """
    if head.num_labels == 1:
        return []
    found = {row.label for row in train}
    for row in validation:
        require(
            row.label in found,
            f"data: only the validation data have the label {row.label!r}; add "
            "training examples with it, or change --validation-fraction.",
        )
    try:
        names = sorted(found, key=int)
    except ValueError:
        names = sorted(found)
    listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    require(
        len(names) == head.num_labels,
        f"num_labels is {head.num_labels}, but the training data have {len(names)} "
        f"labels ({listed}); pass --num-labels {len(names)}.",
    )
    return names


def make_examples(
    rows: Sequence[Row],
    names: Sequence[str],
    vocabulary: Vocabulary,
    config: DataConfig,
) -> tuple[Example, int]:
    """Tokenize rows and look up their labels.

    As in pretraining, the start-of-document token precedes each text, in a pair both.

    Args:
        rows: texts and labels.
        names: the labels in the order of the logits; empty for numbers.
        vocabulary: the vocabulary of the pretrained model.
        config: the configuration.

    Returns:
        The stacked examples, and how many were truncated.

    Raises:
        InputError: if a label that must be a number is not.
    """
    count, length = len(rows), config.sequence_length
    texts = zip(*[row.texts for row in rows], strict=True)
    sides = [vocabulary.tokenize(side) for side in texts]
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    tokens = np.full((count, length), vocabulary.start, dtype)
    last = np.zeros(count, np.int32)
    truncated = 0
    for i, parts in enumerate(zip(*sides, strict=True)):
        kept = truncate(parts, length - len(parts))
        truncated += kept != list(map(len, parts))
        written = [
            np.append(np.array([vocabulary.start], dtype), part[:size])
            for part, size in zip(parts, kept, strict=True)
        ]
        line = np.concatenate(written)
        tokens[i, : len(line)] = line
        # If the second text is empty, this is the last token of the first.
        last[i] = max(np.flatnonzero(line != vocabulary.start), default=0)
    labels = [_label(row.label, names) for row in rows]
    return {
        "tokens": tokens,
        "last": last,
        "label": np.array(labels, np.int32 if names else np.float32),
        "weight": np.ones(count, np.float32),
    }, truncated


def truncate(parts: Sequence[np.ndarray], room: int) -> list[int]:
    """Return how many tokens to keep of each text, truncating the longer one first."""
    sizes = [len(part) for part in parts]
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    if sum(sizes) <= room:
        return sizes
    shorter = min(*sizes, room // 2)
    kept = [shorter, room - shorter]
    return kept if sizes[0] <= sizes[1] else kept[::-1]


def _label(text: str, names: Sequence[str]) -> float:
    if names:
        return names.index(text)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    require(
        math.isfinite(number),
        f"label_column: {text!r} is not a number; to predict classes, pass "
        "--num-labels with their number.",
    )
    return number


def _train_batches(
    examples: Example, config: DataConfig, seed: int, own: slice
) -> grain.IterDataset[Example]:
    """Build endless training batches, reshuffled in each epoch."""

    def take(i: int) -> Example:
        return {name: column[i] for name, column in examples.items()}

    dataset = grain.MapDataset.range(len(examples["label"])).map(take)
    dataset = dataset.shuffle(seed).repeat()[own]
    processes = own.step
    dataset = dataset.batch(config.batch_size // processes, drop_remainder=True)
    return dataset.to_iter_dataset(_READ_OPTIONS)


def _validation_batches(examples: Example, config: DataConfig, own: slice) -> Example:
    """Build the validation batches, padding the last one with examples of weight 0.

    The other weights are scaled up, so that the mean over all slots is the mean over
    the examples.
    """
    count = len(examples["label"])
    batches = -(-count // config.batch_size)
    slots = batches * config.batch_size
    shape = batches, config.batch_size
    filled = {
        name: np.concatenate([x, np.zeros((slots - count, *x.shape[1:]), x.dtype)])
        for name, x in examples.items()
    }
    filled["weight"] *= slots / count
    return {name: x.reshape(*shape, *x.shape[1:])[:, own] for name, x in filled.items()}
