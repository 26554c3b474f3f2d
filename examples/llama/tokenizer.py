"""Tokenizers: trained here or given, their check, and documents turned into tokens."""

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.llama.checks import InputError, reason, require
from examples.llama.config import BYTES, END_OF_DOCUMENT, DataConfig

DOCUMENTS_AT_ONCE = 32
"""How many documents to give to ``encode`` where there are many."""


def train_tokenizer(
    documents: list[str], vocab_size: int, end_of_document: str
) -> Tokenizer:
    """Trains a byte-level BPE, which can write any text and gives it back exactly."""
    require(
        vocab_size > BYTES,
        f"vocab_size is {vocab_size}: a tokenizer trained here has at least "
        f"{BYTES + 1} tokens, for {BYTES} bytes and the end of a document",
    )
    print(
        f"Training a tokenizer of {vocab_size} tokens on {len(documents)} documents.",
        flush=True,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(end_of_document).ids
    require(
        bool(ids) and tokenizer.token_to_id(end_of_document) not in ids,
        f"end_of_document is {end_of_document!r}: a tokenizer trained here needs what "
        f"is not a part of text, such as {END_OF_DOCUMENT}",
    )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a tokenizer from a file, or from the Hugging Face hub.

    Raises:
        InputError: where neither has it.
    """
    is_file = Path(name).is_file()
    try:
        tokenizer = (
            Tokenizer.from_file(name) if is_file else Tokenizer.from_pretrained(name)
        )
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(
            f"tokenizer: {name} is not a tokenizer.json ({reason(error)})"
            if is_file
            else f"tokenizer: there is no file {name}, and none of that name on the "
            f"Hugging Face hub ({reason(error)})"
        ) from error
    # Neither belongs into a stream of tokens, and a tokenizer.json may set both.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Text that spells out a special token does not become it. This is never saved.
    tokenizer.encode_special_tokens = True
    return tokenizer


def given_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer | None:
    """Loads the tokenizer that the configuration names, if it names one.

    Raises:
        InputError: where it cannot be had or does not fit.
    """
    if not config.tokenizer:
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    check_tokenizer(tokenizer, config, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: DataConfig, vocab_size: int) -> None:
    """Checks that a tokenizer goes with the configuration and the model.

    Raises:
        InputError: naming the setting that does not fit.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    listed = ", ".join(special[:8]) + ", ..." * (len(special) > 8)
    require(
        config.end_of_document in special,
        f"end_of_document: {config.end_of_document!r} is not a special token of the "
        f"tokenizer {config.tokenizer}; pass --end-of-document and one that is: "
        f"{listed or 'it has none'}",
    )
    size = text_size(tokenizer, config.end_of_document)
    padded = -(-size // 128) * 128
    require(
        size <= vocab_size,
        f"tokenizer: {config.tokenizer} has {size} tokens and the model's vocab_size "
        f"is {vocab_size}; pass --vocab-size {size}, or {padded}, which more devices "
        "divide",
    )


@functools.lru_cache(maxsize=2)
def text_size(tokenizer: Tokenizer, end_of_document: str) -> int:
    """Counts the ids up to the last that can stand for text or for its end.

    T5's has a hundred special tokens behind them, which a model need not know.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special} - {end_of_document}
    ids = (i for token, i in tokenizer.get_vocab().items() if token not in special)
    return max(ids) + 1


def encode(
    documents: list[str], tokenizer: Tokenizer, end_of_document: str
) -> np.ndarray:
    """Tokenizes documents into one stream, ``[tokens]``, each followed by its end."""
    end: Any = tokenizer.token_to_id(end_of_document)
    size = text_size(tokenizer, end_of_document)
    dtype = np.uint16 if size <= 2**16 else np.uint32
    parts = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids: np.ndarray = np.array(encoding.ids, np.int64)
        # Some models, as T5's, have the special tokens among their own pieces, and find
        # them in the text. A document does not end itself.
        is_text = (ids != end) & (ids < size)
        parts.append(np.append(ids[is_text], end).astype(dtype))
    return np.concatenate(parts)
