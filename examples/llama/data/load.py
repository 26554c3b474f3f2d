"""Loading of training and validation data, from text files or a Hugging Face dataset.

Either way each process gets its own rows of every batch, and a new iterator over the
batches can resume from the state of another.
"""

import hashlib

from examples.llama.config import TOKENIZER_NAME, DataConfig
from examples.llama.data.streaming import (
    first_batches,
    is_streamed,
    open_splits,
    stream_batches,
    stream_tokenizer,
)
from examples.llama.data.text_files import (
    Corpus,
    load_corpus,
    train_batches,
    validation_batches,
)
from examples.training.task import Data


def load_data(
    config: DataConfig,
    vocab_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Load the data that the settings name.

    The rows of all processes make up the batch. With text files, the windows in a batch
    do not depend on the number of processes. With a Hugging Face dataset they do, since
    each process packs its own documents.

    Args:
        config: the data settings.
        vocab_size: vocabulary size of the model.
        seed: seed of the order of the training windows, below ``2**32``.
        process_index: index of this process.
        process_count: number of processes that share each batch.

    Raises:
        InputError: if the data or the tokenizer cannot be loaded, or do not fit the
            settings.

    Returns:
        Batches of tokens, ``[batch_size / process_count, sequence_length + 1]``, and a
        fingerprint: a hash of all documents for text files; for a dataset, which is
        never read completely, a hash of the tokens of all validation batches.
    """
    load = _load_stream if is_streamed(config) else _load_text_files
    return load(config, vocab_size, seed, process_index, process_count)


def _load_text_files(
    config: DataConfig,
    vocab_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Load text files."""
    corpus = load_corpus(config, vocab_size)
    return data_of(corpus, config, seed, process_index, process_count)


def data_of(
    corpus: Corpus,
    config: DataConfig,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Batch a corpus; the arguments are those of ``load_data``."""
    data = Data(
        train_batches(corpus, config, seed, process_index, process_count),
        validation_batches(corpus, config)[:, process_index::process_count],
        corpus.fingerprint,
        {TOKENIZER_NAME: corpus.tokenizer.to_str(pretty=True)},
        shared=frozenset({TOKENIZER_NAME}),
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
    """Load a Hugging Face dataset."""
    train, validation = open_splits(config)
    tokenizer = stream_tokenizer(train, config, vocab_size)
    batches = stream_batches(
        train, tokenizer, config, seed, process_index, process_count
    )
    whole = first_batches(validation, tokenizer, config)
    data = Data(
        batches,
        whole[:, process_index::process_count],
        hashlib.sha256(whole.tobytes()).hexdigest(),
        {TOKENIZER_NAME: tokenizer.to_str(pretty=True)},
        shared=frozenset({TOKENIZER_NAME}),
    )
    if process_index == 0:
        same = config.validation_split == config.train_split
        print(
            f"Corpus: {config.data[0]}, streamed; validation on the first "
            f"{config.validation_batches * config.batch_size:,} windows of "
            f"{config.validation_split}{', which are also trained on' * same}.",
            flush=True,
        )
    return data
