"""From text files to batches of tokens.

Documents are read, split into training and validation, tokenized by a byte-level BPE
trained on the training documents, and packed end to end into windows of equal length.
Tokenizer and tokens are cached under a key made of everything they depend on.
"""

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from examples.llama.config import END_OF_DOCUMENT, DataConfig, make_directory, require

_CACHE_VERSION = 1
_NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_DOCUMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: two streams of tokens that share no document."""

    train: np.ndarray
    """Tokens of the training documents, ``[tokens]``, unsigned integers."""
    validation: np.ndarray
    """Tokens of the validation documents, likewise."""
    tokenizer: Tokenizer


def load_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """Reads and tokenizes the corpus, or takes it from the cache.

    Raises:
        InputError: where there is no text, or too little of it.
    """
    documents = read_documents(config.data)
    train, validation = split_documents(documents, config.validation_fraction)
    directory = config.cache_dir / "llama" / _cache_key(train, validation, vocab_size)
    if not directory.exists():
        make_directory("cache_dir", directory.parent)
        _fill_cache(directory, train, validation, vocab_size)
    corpus = Corpus(
        train=np.load(directory / "train.npy"),
        validation=np.load(directory / "validation.npy"),
        tokenizer=load_tokenizer(directory / "tokenizer.json"),
    )
    print(
        f"Corpus: {len(train)} training and {len(validation)} validation documents, "
        f"{len(corpus.train):,} and {len(corpus.validation):,} tokens.",
        flush=True,
    )
    return corpus


def read_documents(paths: tuple[Path, ...]) -> list[str]:
    """Reads each file as one document, without exact duplicates.

    Args:
        paths: text files, or directories read with all that is below them; none for
            the standard library of this Python. A file named here has to be UTF-8; in
            a directory, a file that is not is skipped, and so is an empty one.

    Raises:
        InputError: for a path that cannot be read, or where no text is found.
    """
    documents: dict[str, None] = {}  # A set that keeps the order.
    skipped = 0
    files = list(_files(paths) if paths else _standard_library())
    for file, named in tqdm(files, "Reading", unit="file", leave=False):
        text = _read(file, named)
        if text is None:
            skipped += 1
        elif text.strip():
            documents[text] = None
    if skipped:
        print(f"Skipped {skipped} files that cannot be read as UTF-8 text.")
    where = " ".join(map(str, paths)) or "the standard library, here without source"
    require(bool(documents), f"data: no text in {where}; give --data text files")
    return list(documents)


def _read(file: Path, named: bool) -> str | None:
    """Reads a file; returns None if it cannot be read and the user did not name it."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        require(not named, f"data: cannot read {file} ({reason})")
        return None


def _standard_library() -> Iterator[tuple[Path, bool]]:
    """Yields the modules of the standard library, but for its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not _NOT_CORPUS.intersection(file.relative_to(root).parts):
            yield file, False


def _files(paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Yields each file, and whether the user named it."""
    for path in paths:
        require(path.exists(), f"data: there is no {path}")
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield file, False
        else:
            yield path, True


def split_documents(
    documents: list[str], fraction: float
) -> tuple[list[str], list[str]]:
    """Splits documents into training and validation.

    The order of their hashes decides, so that neither the names of the files nor the
    order in which they were read matters, and a document more moves one other at most.

    Args:
        documents: at least two texts, all different.
        fraction: share of the documents to validate on; at least one is.

    Returns:
        Training documents and validation documents.
    """
    require(
        len(documents) > 1,
        "data: one document only, and validation takes whole documents; give two files "
        "or more (`split -C 100k FILE part-` makes several of one)",
    )
    ordered = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    count = min(max(1, round(fraction * len(ordered))), len(ordered) - 1)
    return ordered[count:], ordered[:count]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which can write any text and gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    # A document that spells the special token out does not contain it.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer that ``train_tokenizer`` made."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # Not saved with the rest.
    return tokenizer


def pack(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Tokenizes documents into one stream, ``[tokens]``, each followed by its end."""
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    stream = []
    with tqdm(
        total=len(documents), desc="Tokenizing", unit="document", leave=False
    ) as bar:
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            some = documents[start : start + _DOCUMENTS_AT_ONCE]
            for encoding in tokenizer.encode_batch_fast(some):
                stream.append(np.array([*encoding.ids, end], dtype))
            bar.update(len(some))
    return np.concatenate(stream)


def cut_windows(stream: np.ndarray, sequence_length: int, source: str) -> np.ndarray:
    """Cuts a stream into windows, ``[windows, sequence_length + 1]``.

    Inputs are a window without its last token and targets a window without its first,
    so neighbours share one token and every token but the first is a target once. The
    tokens that do not fill a last window are left out. A window may hold the end of
    one document and the beginning of the next; attention does not stop between them.
    """
    require(
        len(stream) > sequence_length,
        f"data: the {source} documents hold {len(stream)} tokens, too few for one "
        f"window of {sequence_length + 1}; give more text or a smaller "
        "--sequence-length",
    )
    windows = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)
    return windows[::sequence_length]


def train_batches(
    corpus: Corpus, config: DataConfig, seed: int
) -> grain.MapDataset[np.ndarray]:
    """Makes the training data: element ``i`` is the batch of step ``i``.

    Returns:
        An endless dataset of ``[batch_size, sequence_length + 1]``, shuffled anew in
        each pass over the corpus; the seed determines every batch.
    """
    windows = cut_windows(corpus.train, config.sequence_length, "training")
    dataset = grain.MapDataset.source(windows).shuffle(seed).repeat()
    return dataset.batch(config.batch_size)


def validation_batches(corpus: Corpus, config: DataConfig) -> np.ndarray:
    """Takes windows at equal distances from the whole of the validation stream.

    Returns:
        Tokens, ``[validation_batches, batch_size, sequence_length + 1]``.
    """
    windows = cut_windows(corpus.validation, config.sequence_length, "validation")
    count = config.validation_batches * config.batch_size
    require(
        len(windows) >= count,
        f"data: the validation documents fill {len(windows)} windows, too few for "
        f"{config.validation_batches} batches of {config.batch_size}; give more text, "
        "a larger --validation-fraction or fewer --validation-batches",
    )
    chosen = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    return chosen.reshape(config.validation_batches, config.batch_size, -1)


def _cache_key(train: list[str], validation: list[str], vocab_size: int) -> str:
    """Hashes all that tokenizer and tokens depend on."""
    digest = hashlib.sha256(
        f"{_CACHE_VERSION} {tokenizers.__version__} {vocab_size}".encode()
    )
    for documents in (train, validation):
        digest.update(f" {len(documents)}".encode())
        for text in documents:
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]


def _fill_cache(
    directory: Path, train: list[str], validation: list[str], vocab_size: int
) -> None:
    """Trains the tokenizer, tokenizes, and writes the whole directory or nothing."""
    print(
        f"Training a tokenizer of {vocab_size} tokens on {len(train)} documents.",
        flush=True,
    )
    tokenizer = train_tokenizer(train, vocab_size)
    partial = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        np.save(partial / "train.npy", pack(train, tokenizer))
        np.save(partial / "validation.npy", pack(validation, tokenizer))
        try:
            os.rename(partial, directory)
        except OSError:
            if not directory.exists():  # Else another process wrote the same meanwhile.
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
