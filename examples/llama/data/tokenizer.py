"""Tokenizers: trained here or given, their check, and documents turned into tokens."""

import functools
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.llama.config import BYTES, END_OF_DOCUMENT, DataConfig
from examples.training.checks import InputError, reason, require

DOCUMENTS_AT_ONCE = 32
"""How many documents to give to ``encode`` where there are many."""

_SAMPLE = 1_000_000
"""Characters on which a given tokenizer is tested."""
_MOST_LOST = 0.5
"""Share of them that it may drop."""


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


def save_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    """Writes a tokenizer. Its own method hides that an error is an ``OSError``."""
    file.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


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
    for encoding in _encode_batch(tokenizer.encode_batch_fast, documents):
        ids: np.ndarray = np.array(encoding.ids, np.int64)
        # Some models, as T5's, have the special tokens among their own pieces, and find
        # them in the text. A document does not end itself.
        is_text = (ids != end) & (ids < size)
        parts.append(np.append(ids[is_text], end).astype(dtype))
    return np.concatenate(parts)


def _encode_batch(method: Callable[..., list[Any]], documents: list[str]) -> list[Any]:
    """Tokenizes documents, each by itself, with a method of a tokenizer."""
    try:
        return method(documents, add_special_tokens=False)
    except Exception as error:  # The package has no narrower one.
        raise InputError(
            f"tokenizer: it cannot tokenize the text ({reason(error)}); give one that "
            "has an unknown token or bytes, or leave --tokenizer out to train one"
        ) from error


def report_loss(
    tokenizer: Tokenizer, config: DataConfig, documents: Iterable[str]
) -> None:
    """Warns of the share of the text that a given tokenizer drops, if any.

    A character is lost where no token stands for it but the unknown one, or none at
    all. White space does not count.

    Args:
        tokenizer: the tokenizer.
        config: the configuration that names it.
        documents: the text, of which the beginning is tried.

    Raises:
        InputError: where most of the text is lost, or cannot be tokenized.
    """
    texts: list[str] = []
    room = _SAMPLE
    for text in documents:
        texts.append(text[:room])
        room -= len(texts[-1])
        if not room:
            break
    if tokenizer.normalizer:
        # Else accents that it composes with their letters seem to be left out.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    marking, lost_ids = _mark_lost(tokenizer, config.end_of_document)
    lost = total = 0
    encodings = _encode_batch(marking.encode_batch, texts)
    for text, encoding in zip(texts, encodings, strict=True):
        counted = np.array([not character.isspace() for character in text], bool)
        lost += int((counted & ~_kept(len(text), encoding, lost_ids)).sum())
        total += int(counted.sum())
    share = lost / max(total, 1)
    message = (
        f"{config.tokenizer} has no token for {lost:,} of the first {total:,} "
        f"characters of the text ({share:.2%}), which are lost"
    )
    require(
        share <= _MOST_LOST,
        f"tokenizer: {message}; give one made for such text, or leave --tokenizer out "
        "to train one",
    )
    if lost:
        print(f"Warning: the tokenizer {message}.", flush=True)


def _kept(length: int, encoding: Any, lost_ids: list[int]) -> np.ndarray:
    """Returns a mask of the characters that the tokens cover."""
    kept = np.zeros(length, bool)
    spans: np.ndarray = np.array(encoding.offsets, int).reshape(-1, 2)
    is_lost = np.isin(encoding.ids, lost_ids)
    for start, stop in spans[~is_lost]:
        kept[start:stop] = True
    # Last, as a space put before a word is said to stand for its first character.
    for start, stop in spans[is_lost]:
        kept[start:stop] = False
    return kept


def _mark_lost(
    tokenizer: Tokenizer, end_of_document: str
) -> tuple[Tokenizer, list[int]]:
    """Returns a tokenizer that marks what the given one drops, and the marks' ids.

    A BPE without an unknown token leaves out what it does not know, and the places that
    it gives for what comes behind are wrong: it gets one.
    """
    written = json.loads(tokenizer.to_str())
    model: Any = written["model"]
    if model["type"] == "Unigram":
        index = model["unk_id"]
        unknown = "" if index is None else model["vocab"][index][0]
    else:
        unknown = model["unk_token"] or ""
    marking = tokenizer
    if model["type"] == "BPE" and not unknown:
        unknown = model["unk_token"] = "<no token of the tokenizer>"
        model["vocab"][unknown] = max(tokenizer.get_vocab().values()) + 1
        marking = Tokenizer.from_str(json.dumps(written))
        marking.encode_special_tokens = True
    # ``encode`` drops these.
    size = text_size(tokenizer, end_of_document)
    dropped = [token for token, i in tokenizer.get_vocab().items() if i >= size]
    ids = map(marking.token_to_id, [unknown, end_of_document, *dropped])
    return marking, [i for i in ids if i is not None]
