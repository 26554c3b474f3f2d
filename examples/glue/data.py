"""From rows of text to batches of tokens, each example with its label."""

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
"""The file that keeps the names of the labels, in the order of the logits, and the
token at the start of a document."""

Example = dict[str, np.ndarray]
"""``tokens``, ``[T]``; ``last``, the position of the last one; ``label``; and
``weight``, of the example's loss in the mean: 0 for one that fills up a batch."""

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


class Labels(NamedTuple):
    """The labels of a run, and how its texts begin."""

    names: list[str]
    """In the order of the logits; none for numbers."""
    start_of_document: str
    """The special token before each text."""


def read_labels(setting: str, run_dir: Path) -> Labels:
    """Reads the labels of a run.

    Raises:
        InputError: where it cannot be read; it names the setting.
    """
    kept = json.loads(read_text(setting, run_dir / LABELS_NAME))
    return Labels(kept["labels"], kept["start_of_document"])


def load_data(
    config: DataConfig,
    head: HeadConfig,
    vocabulary: Vocabulary,
    tokenizer: str,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Loads the data that the configuration names.

    Args:
        config: the configuration.
        head: what is predicted.
        vocabulary: the pretrained model's.
        tokenizer: its tokenizer.json, to keep with the run.
        seed: decides the order of the training examples.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Raises:
        InputError: for data that cannot be had or do not fit.
    """
    train, validation = read_rows(config)
    names = label_names(train, head)
    require(
        len(train) >= config.batch_size,
        f"data: {len(train)} examples to train on, too few for a batch of "
        f"{config.batch_size}; give more or a smaller --batch-size",
    )
    most = config.batch_size * config.validation_batches or len(validation)
    left_out = max(0, len(validation) - most)
    validation = validation[:most]
    made = [
        make_examples(rows, names, vocabulary, config) for rows in (train, validation)
    ]
    cut = sum(cut for _, cut in made)
    examples = [of_side for of_side, _ in made]
    digest = hashlib.sha256()
    for of_side in examples:
        for name in sorted(of_side):
            digest.update(of_side[name].tobytes())
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
            f"Data: {len(train):,} examples to train on and {len(validation):,} to "
            "validate on.",
            flush=True,
        )
        if left_out:
            print(f"Left out {left_out:,} other validation examples.", flush=True)
        if cut:
            print(
                f"Truncated {cut:,} of them to {config.sequence_length} tokens; a "
                "larger --sequence-length keeps more.",
                flush=True,
            )
    return data


def label_names(train: Sequence[Row], head: HeadConfig) -> list[str]:
    """Lists the labels in the order of the logits; none for numbers.

    Raises:
        InputError: where their number is not that of the head.
    """
    if head.num_labels == 1:
        return []
    found = {row.label for row in train}
    try:
        names = sorted(found, key=int)
    except ValueError:
        names = sorted(found)
    listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    require(
        len(names) == head.num_labels,
        f"num_labels is {head.num_labels}, and the training data have {len(names)}: "
        f"{listed}; pass --num-labels {len(names)}",
    )
    return names


def make_examples(
    rows: Sequence[Row],
    names: Sequence[str],
    vocabulary: Vocabulary,
    config: DataConfig,
) -> tuple[Example, int]:
    """Tokenizes rows and looks up their labels.

    As in pretraining, the token that starts a document comes before each text, and in a
    pair before both.

    Args:
        rows: texts and labels.
        names: the labels in the order of the logits; none for numbers.
        vocabulary: what to tokenize with.
        config: the configuration.

    Returns:
        The examples, stacked, and how many were truncated.

    Raises:
        InputError: for a label that is not among the names, or is no number.
    """
    count, length = len(rows), config.sequence_length
    texts = zip(*[row.texts for row in rows], strict=True)
    sides = [vocabulary.tokenize(of_side) for of_side in texts]
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    tokens = np.full((count, length), vocabulary.start, dtype)
    last = np.zeros(count, np.int32)
    cut = 0
    for i, parts in enumerate(zip(*sides, strict=True)):
        kept = truncate(parts, length - len(parts))
        cut += kept != list(map(len, parts))
        written = [
            np.append(np.array([vocabulary.start], dtype), part[:size])
            for part, size in zip(parts, kept, strict=True)
        ]
        line = np.concatenate(written)
        tokens[i, : len(line)] = line
        # Where the second text is empty, this is the last token of the first.
        last[i] = max(np.flatnonzero(line != vocabulary.start), default=0)
    labels = [_label(row.label, names) for row in rows]
    return {
        "tokens": tokens,
        "last": last,
        "label": np.array(labels, np.int32 if names else np.float32),
        "weight": np.ones(count, np.float32),
    }, cut


def truncate(parts: Sequence[np.ndarray], room: int) -> list[int]:
    """Returns how many tokens to keep of each text; truncates the longer one first."""
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
        if text not in names:
            raise InputError(
                f"data: the validation data have the label {text!r}, and the training "
                f"data only {', '.join(names[:8])}"
            )
        return names.index(text)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    require(
        math.isfinite(number),
        f"label_column: {text!r} is no number; pass --num-labels with the number of "
        "different labels",
    )
    return number


def _train_batches(
    examples: Example, config: DataConfig, seed: int, own: slice
) -> grain.IterDataset[Example]:
    """Makes batches without end; each epoch has an order of its own."""

    def take(i: int) -> Example:
        return {name: column[i] for name, column in examples.items()}

    dataset = grain.MapDataset.range(len(examples["label"])).map(take)
    dataset = dataset.shuffle(seed).repeat()[own]
    processes = own.step
    dataset = dataset.batch(config.batch_size // processes, drop_remainder=True)
    return dataset.to_iter_dataset(_READ_OPTIONS)


def _validation_batches(examples: Example, config: DataConfig, own: slice) -> Example:
    """Pads the last batch with examples of weight 0.

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
