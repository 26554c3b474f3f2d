"""Training, loading and checking of tokenizers, and tokenization of documents."""

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
"""Batch size for calls of ``encode`` on many documents."""

_SAMPLE = 1_000_000
"""Characters of text on which a given tokenizer is checked."""
_MOST_LOST = 0.5
"""Largest share of them that a tokenizer may lose."""


def train_tokenizer(
    documents: list[str], vocab_size: int, end_of_document: str
) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes any text losslessly."""
    require(
        vocab_size > BYTES,
        f"vocab_size must be at least {BYTES + 1}, got {vocab_size}: a tokenizer "
        f"trained here has {BYTES} tokens for the bytes and one for the end of a "
        "document.",
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
        f"end_of_document must not be part of ordinary text, got {end_of_document!r}; "
        f"pass a token such as {END_OF_DOCUMENT}.",
    )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a file or from the Hugging Face Hub.

    Raises:
        InputError: if it is found in neither place, or cannot be read.
    """
    is_file = Path(name).is_file()
    try:
        tokenizer = (
            Tokenizer.from_file(name) if is_file else Tokenizer.from_pretrained(name)
        )
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(
            f"tokenizer: {name} is not a valid tokenizer.json ({reason(error)})."
            if is_file
            else f"tokenizer: {name} is neither a file nor a tokenizer on the Hugging "
            f"Face Hub ({reason(error)})."
        ) from error
    # A tokenizer.json may enable both, but a token stream needs neither.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Text that spells out a special token must not become it. A tokenizer.json does
    # not store this setting.
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    """Save a tokenizer to a file."""
    # Not tokenizer.save, which does not raise an OSError if it cannot write.
    file.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def given_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer | None:
    """Load the tokenizer that the settings name, or return None if they name none.

    Raises:
        InputError: if the tokenizer cannot be loaded or does not fit.
    """
    if not config.tokenizer:
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    check_tokenizer(tokenizer, config, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: DataConfig, vocab_size: int) -> None:
    """Check that a tokenizer fits the settings and the model.

    Raises:
        InputError: if it does not; the message names the setting to change.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    listed = ", ".join(special[:8]) + ", ..." * (len(special) > 8)
    require(
        config.end_of_document in special,
        f"end_of_document: {config.end_of_document!r} is not a special token of the "
        f"tokenizer {config.tokenizer}; pass --end-of-document with one that is (it "
        f"has {listed or 'none'}).",
    )
    size = text_size(tokenizer, config.end_of_document)
    padded = -(-size // 128) * 128
    require(
        size <= vocab_size,
        f"tokenizer: {config.tokenizer} has {size} tokens, but the model's vocab_size "
        f"is {vocab_size}; pass --vocab-size {size}, or {padded}, which can be sharded "
        "over more devices.",
    )


@functools.lru_cache(maxsize=2)
def text_size(tokenizer: Tokenizer, end_of_document: str) -> int:
    """Count the ids up to the last one used for text or for the end of a document.

    Special tokens after it, such as the hundred of T5's tokenizer, need no embedding.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special} - {end_of_document}
    ids = (i for token, i in tokenizer.get_vocab().items() if token not in special)
    return max(ids) + 1


def encode(
    documents: list[str], tokenizer: Tokenizer, end_of_document: str
) -> np.ndarray:
    """Tokenize documents into one stream, ``[tokens]``, each followed by its end."""
    end: Any = tokenizer.token_to_id(end_of_document)
    size = text_size(tokenizer, end_of_document)
    dtype = np.uint16 if size <= 2**16 else np.uint32
    parts = []
    for encoding in _encode_batch(tokenizer.encode_batch_fast, documents):
        ids: np.ndarray = np.array(encoding.ids, np.int64)
        # Some models, such as T5's, have the special tokens among their own pieces and
        # find them in the text. Text must not end its own document.
        is_text = (ids != end) & (ids < size)
        parts.append(np.append(ids[is_text], end).astype(dtype))
    return np.concatenate(parts)


def _encode_batch(method: Callable[..., list[Any]], documents: list[str]) -> list[Any]:
    """Tokenize each document separately with a method of a tokenizer."""
    try:
        return method(documents, add_special_tokens=False)
    except Exception as error:  # The package raises no narrower type.
        raise InputError(
            f"tokenizer: cannot tokenize the text ({reason(error)}); pass a tokenizer "
            "with an unknown token or byte fallback, or omit --tokenizer to train one."
        ) from error


def report_loss(
    tokenizer: Tokenizer, config: DataConfig, documents: Iterable[str]
) -> None:
    """Warn about the share of the text that a given tokenizer loses, if any.

    A character is lost if it is covered by no token, or only by the unknown token.
    Whitespace does not count.

    Args:
        tokenizer: the tokenizer.
        config: the data settings that name it.
        documents: the text, of which only the beginning is checked.

    Raises:
        InputError: if most of the text is lost, or cannot be tokenized.
    """
    texts: list[str] = []
    room = _SAMPLE
    for text in documents:
        texts.append(text[:room])
        room -= len(texts[-1])
        if not room:
            break
    if tokenizer.normalizer:
        # Otherwise combining accents that the normalizer composes would count as lost.
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
        f"tokenizer: {message}; pass a tokenizer made for such text, or omit "
        "--tokenizer to train one.",
    )
    if lost:
        print(f"Warning: the tokenizer {message}.", flush=True)


def _kept(length: int, encoding: Any, lost_ids: list[int]) -> np.ndarray:
    """Compute a mask of the characters that are not lost."""
    kept = np.zeros(length, bool)
    spans: np.ndarray = np.array(encoding.offsets, int).reshape(-1, 2)
    is_lost = np.isin(encoding.ids, lost_ids)
    for start, stop in spans[~is_lost]:
        kept[start:stop] = True
    # After the loop above: the offsets of a space inserted before a word cover the
    # first character of the word.
    for start, stop in spans[is_lost]:
        kept[start:stop] = False
    return kept


def _mark_lost(
    tokenizer: Tokenizer, end_of_document: str
) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer that marks lost text with tokens, and the ids of these tokens.

    A BPE model without an unknown token drops unknown text, and the offsets of later
    tokens are then wrong, so it is given an unknown token.
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
    # ``encode`` drops the tokens from ``size`` on.
    size = text_size(tokenizer, end_of_document)
    dropped = [token for token, i in tokenizer.get_vocab().items() if i >= size]
    ids = map(marking.token_to_id, [unknown, end_of_document, *dropped])
    return marking, [i for i in ids if i is not None]
