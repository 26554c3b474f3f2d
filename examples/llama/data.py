"""What a process trains and validates on: text files, or a Hugging Face dataset.

Either way each process gets its rows of every batch, and an iterator over the batches
has a state from which another goes on exactly where it was.
"""

import hashlib
from dataclasses import dataclass

import grain
import numpy as np
from tokenizers import Tokenizer

from examples.llama.checks import require
from examples.llama.config import DataConfig
from examples.llama.streaming import (
    first_batches,
    is_streamed,
    open_splits,
    stream_batches,
    stream_tokenizer,
)
from examples.llama.text_files import load_corpus, train_batches, validation_batches


@dataclass(frozen=True)
class Data:
    """What a process trains and validates on."""

    tokenizer: Tokenizer
    train: grain.IterDataset[np.ndarray]
    """This process's rows of each batch, without end: integers,
    ``[batch_size / process_count, sequence_length + 1]``."""
    validation: np.ndarray
    """Its rows of the validation batches: integers, ``[validation_batches,
    batch_size / process_count, sequence_length + 1]``."""
    fingerprint: str
    """Hash of the corpus, the same on all processes: of text files, of all documents,
    and of a Hugging Face dataset, which is never read whole, of the tokens of all
    validation batches."""


def load_data(
    config: DataConfig,
    vocab_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Loads the data that the configuration names.

    The rows of all processes together are the batch. Of text files, a batch has the
    same windows whatever the number of processes; of a Hugging Face dataset, it does
    not, as each process packs its own documents.

    Args:
        config: the configuration.
        vocab_size: tokens in the model's vocabulary.
        seed: decides the order of the training windows; below ``2**32``.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Raises:
        InputError: for data or a tokenizer that cannot be had or do not fit.
    """
    require(
        config.batch_size % process_count == 0,
        f"batch_size ({config.batch_size}) does not divide among {process_count} "
        "processes: choose a multiple of their number",
    )
    load = _load_stream if is_streamed(config) else _load_text_files
    return load(config, vocab_size, seed, process_index, process_count)


def _load_text_files(
    config: DataConfig,
    vocab_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Loads text files."""
    corpus = load_corpus(config, vocab_size)
    data = Data(
        corpus.tokenizer,
        train_batches(corpus, config, seed, process_index, process_count),
        validation_batches(corpus, config)[:, process_index::process_count],
        corpus.fingerprint,
    )
    if process_index == 0:
        train, validation = corpus.documents
        print(
            f"Corpus: {train} training and {validation} validation documents, "
            f"{len(corpus.train):,} and {len(corpus.validation):,} tokens.",
            flush=True,
        )
    return data


def _load_stream(
    config: DataConfig,
    vocab_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Loads a Hugging Face dataset."""
    train, validation = open_splits(config)
    tokenizer = stream_tokenizer(train, config, vocab_size)
    batches = stream_batches(
        train, tokenizer, config, seed, process_index, process_count
    )
    whole = first_batches(validation, tokenizer, config)
    data = Data(
        tokenizer,
        batches,
        whole[:, process_index::process_count],
        hashlib.sha256(whole.tobytes()).hexdigest(),
    )
    if process_index == 0:
        same = config.validation_split == config.train_split
        print(
            f"Corpus: {config.data[0]}, streamed; validation on the first "
            f"{config.validation_batches * config.batch_size:,} windows of "
            f"{config.validation_split}{', which are trained on too' * same}.",
            flush=True,
        )
    return data
