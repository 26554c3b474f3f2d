"""Text files, from documents to batches of tokens.

All files are read up front: documents are split into training and validation,
tokenized, packed end to end into windows of equal length, and shuffled. A single
document is first cut into pieces. The tokenizer and the tokens are cached under a key
of everything they depend on.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.llama.config import DataConfig
from examples.llama.data.cache import cached
from examples.llama.data.tokenizer import (
    DOCUMENTS_AT_ONCE,
    encode,
    given_tokenizer,
    load_tokenizer,
    report_loss,
    save_tokenizer,
    train_tokenizer,
)
from examples.training.checks import require
from examples.training.files import (
    files_below,
    list_some,
    split_hashes,
    standard_library,
)

_DATA_FILE = re.compile(
    r"\.((jsonl|ndjson|parquet|arrow|csv|tsv)(\.(gz|bz2|xz|zst))?|json\.(gz|bz2|xz|zst))$",
    re.IGNORECASE,
)
"""Matches the names of data files, which the package ``datasets`` reads."""
_OTHER_COLUMN = "and --text-column if their text is not in the column 'text'"
_BLANK_LINES = re.compile(r"\n\s*\n")
_PIECES = 100
"""Approximate number of pieces a single document is cut into."""
_PIECE = 1000
"""Minimum length of a piece, in characters."""
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


@dataclass(frozen=True)
class Corpus:
    """Tokenized text files, as two token streams that share no document."""

    train: np.ndarray
    """Tokens of the training documents: unsigned integers, ``[tokens]``."""
    validation: np.ndarray
    """Tokens of the validation documents: unsigned integers, ``[tokens]``."""
    documents: tuple[int, int]
    """Number of training and of validation documents."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of the training and the validation documents."""


def load_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """Read and tokenize text files, or load their tokens from the cache.

    Raises:
        InputError: if there is no text or too little of it, or if the tokenizer does
            not fit.
    """
    require(
        "" not in config.data,
        "data: '' is not a file; omit --data to use Python's standard library.",
    )
    return make_corpus(
        read_documents(tuple(map(Path, config.data))), config, vocab_size
    )


def make_corpus(documents: list[str], config: DataConfig, vocab_size: int) -> Corpus:
    """Split and tokenize documents, or load their tokens from the cache.

    Args:
        documents: the documents, without duplicates. A single one is cut into parts.
        config: the settings of the split, the tokenizer and the cache.
        vocab_size: size of the model's vocabulary.

    Raises:
        InputError: if there is too little text, or if the tokenizer does not fit.
    """
    if len(documents) == 1:
        documents = cut_document(documents[0])
    train, validation = split_documents(documents, config.validation_fraction)
    tokenizer = given_tokenizer(config, vocab_size)
    if tokenizer:
        report_loss(tokenizer, config, [*train, *validation])

    def fill(directory: Path) -> None:
        used = tokenizer or train_tokenizer(train, vocab_size, config.end_of_document)
        save_tokenizer(used, directory / "tokenizer.json")
        for name, documents in (("train", train), ("validation", validation)):
            tokens = pack(documents, used, config.end_of_document)
            np.save(directory / f"{name}.npy", tokens)

    made_by = tokenizer.to_str() if tokenizer else vocab_size
    hashes = _hash(train), _hash(validation)
    key = [made_by, config.end_of_document, *hashes]
    directory = cached(config.cache_dir, key, fill)
    return Corpus(
        train=np.load(directory / "train.npy", mmap_mode="r"),
        validation=np.load(directory / "validation.npy", mmap_mode="r"),
        documents=(len(train), len(validation)),
        tokenizer=load_tokenizer(str(directory / "tokenizer.json")),
        fingerprint=hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def _hash(documents: list[str]) -> str:
    """Hash texts and their order."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def read_documents(paths: tuple[Path, ...]) -> list[str]:
    """Read each file as one document and drop exact duplicates.

    Args:
        paths: text files, or directories to read recursively; if empty, the standard
            library of this Python. Files named here must be UTF-8. In a directory,
            files that are not UTF-8, empty, hidden or data files are skipped.

    Raises:
        InputError: if a path cannot be read, or no text is found.
    """
    documents: dict[str, None] = {}  # An ordered set.
    skipped: list[Path] = []
    files = list(_files(paths) if paths else ((f, False) for f in standard_library()))
    for file, named in tqdm(files, "Reading", unit="file", leave=False):
        text = _read(file, named)
        if text is None:
            skipped.append(file)
        elif text.strip():
            documents[text] = None
    if skipped:
        print(
            f"Skipped {len(skipped)} files that are not readable UTF-8 text: "
            f"{list_some(skipped)}."
        )
    where = " ".join(map(str, paths)) or (
        "the standard library, which has no source files here"
    )
    require(bool(documents), f"data: no text in {where}; pass text files as --data.")
    return list(documents)


def _read(file: Path, named: bool) -> str | None:
    """Read a file; return None if it cannot be read and the user did not name it."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        require(not named, f"data: cannot read {file} ({reason}).")
        return None


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield each file and whether the user named it."""
    named = [path for path in paths if not path.is_dir()]
    for path in named:
        require(path.exists(), f"data: {path} does not exist.")
    _, data = _separate_data_files(named)
    require(
        not data,
        f"data: cannot read data files as plain text: {list_some(data)}; make a "
        "directory with a file train.* and a file validation.*, and pass --data "
        f"hf:DIRECTORY, {_OTHER_COLUMN}.",
    )
    for path in paths:
        if path.is_dir():
            for file in _files_below(path):
                yield file, False
        else:
            yield path, True


def _files_below(directory: Path) -> list[Path]:
    """List the files of a directory that are neither hidden nor data files."""
    text, data = _separate_data_files(files_below(directory))
    if data:
        require(
            any(not _describes_data(file) for file in text),
            f"data: cannot read data files as plain text: {list_some(data)}; pass "
            f"--data hf:{directory}, {_OTHER_COLUMN}.",
        )
        print(
            f"Ignored {len(data)} data files among the text files: "
            f"{list_some(data)}. To train on them instead, move them to a separate "
            f"directory and pass --data hf:DIRECTORY, {_OTHER_COLUMN}."
        )
    return text


def _separate_data_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Separate text files from data files.

    JSON files, such as settings, count as text unless there is no other text.
    """
    text = [file for file in files if not _DATA_FILE.search(file.name)]
    if all(_is_json(file) for file in text):
        text = []
    return text, sorted({*files} - {*text})


def _is_json(file: Path) -> bool:
    return file.suffix.lower() == ".json"


def _describes_data(file: Path) -> bool:
    """Return whether a file accompanies data files, such as a README or a license."""
    return _is_json(file) or file.stem.lower() in ("readme", "license")


def cut_document(text: str) -> list[str]:
    """Cut one document into pieces, so that some can be held out for validation.

    Cut after blank lines, or else after the end of a line, or else anywhere.

    Returns:
        The pieces in order, without exact duplicates; a short document is one piece.
    """
    length = max(_PIECE, len(text) // _PIECES)
    pieces: dict[str, None] = {}  # An ordered set.
    start = 0
    while len(text) - start >= 3 * length:
        end = _find_cut(text, start + length, start + 2 * length)
        pieces[text[start:end]] = None
        start = end
    pieces[text[start:]] = None
    distinct = [piece for piece in pieces if piece.strip()]
    if len(distinct) > 1:
        print(
            f"Cut the only document, of {len(text):,} characters, into "
            f"{len(distinct)} distinct pieces, at blank lines where possible, to train "
            "and validate on."
        )
    return distinct


def _find_cut(text: str, start: int, stop: int) -> int:
    """Return the best position to cut within a range."""
    if blank := _BLANK_LINES.search(text, start, stop):
        return blank.end()
    return text.find("\n", start, stop) + 1 or start


def split_documents(
    documents: list[str], fraction: float
) -> tuple[list[str], list[str]]:
    """Split documents into training and validation by their hashes.

    The split depends neither on the names of the files nor on the order in which they
    are read, and adding a document moves at most one other document across the split.

    Args:
        documents: at least two texts, all different.
        fraction: share of the documents to validate on, at least one document.

    Returns:
        Training documents and validation documents.
    """
    require(
        len(documents) > 1,
        f"data: only one document, of {sum(map(len, documents)):,} characters (not "
        "counting duplicates), which leaves none to validate on; pass two files, or "
        f"one of at least {3 * _PIECE:,} characters.",
    )
    by_hash = {hashlib.sha256(text.encode()).digest(): text for text in documents}
    train, validation = split_hashes(by_hash, fraction)
    return [by_hash[h] for h in train], [by_hash[h] for h in validation]


def pack(
    documents: list[str], tokenizer: Tokenizer, end_of_document: str
) -> np.ndarray:
    """Tokenize documents like ``encode``, but in batches and with a progress bar."""
    parts = []
    with tqdm(
        total=len(documents), desc="Tokenizing", unit="document", leave=False
    ) as bar:
        for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
            some = documents[start : start + DOCUMENTS_AT_ONCE]
            parts.append(encode(some, tokenizer, end_of_document))
            bar.update(len(some))
    return np.concatenate(parts)


def cut_windows(stream: np.ndarray, sequence_length: int, source: str) -> np.ndarray:
    """Cut a stream into windows, ``[windows, sequence_length + 1]``.

    The inputs are a window without its last token and the targets a window without its
    first, so adjacent windows overlap by one token, and every token but the first is a
    target exactly once. Tokens that do not fill a last window are dropped. A window may
    span several documents; attention is not masked between them.
    """
    require(
        len(stream) > sequence_length,
        f"data: the {source} documents have {len(stream)} tokens, too few for one "
        f"window of {sequence_length + 1}; add more text or pass a smaller "
        "--sequence-length.",
    )
    windows = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)
    return windows[::sequence_length]


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[np.ndarray]:
    """Build the training data of a process.

    Returns:
        An infinite dataset of this process's rows of each batch. The windows are
        reshuffled in each epoch, and the seed determines every batch.
    """
    windows = cut_windows(corpus.train, config.sequence_length, "training")
    require(
        len(windows) >= config.batch_size,
        f"data: the training documents fill {len(windows)} windows, too few for a "
        f"batch of {config.batch_size}; add more text or pass a smaller --batch-size.",
    )
    dataset = grain.MapDataset.source(windows).shuffle(seed).repeat()
    # Rows p, p + P, ... of the global batch.
    dataset = dataset[process_index::process_count]
    dataset = dataset.batch(config.batch_size // process_count, drop_remainder=True)
    return dataset.to_iter_dataset(_READ_OPTIONS)


def validation_batches(corpus: Corpus, config: DataConfig) -> np.ndarray:
    """Take windows evenly spaced over the validation stream.

    Returns:
        Tokens, ``[validation_batches, batch_size, sequence_length + 1]``.
    """
    windows = cut_windows(corpus.validation, config.sequence_length, "validation")
    count = config.validation_batches * config.batch_size
    require(
        len(windows) >= count,
        f"data: the validation documents fill {len(windows)} windows, too few for "
        f"{config.validation_batches} batches of {config.batch_size}; add more text or "
        "pass a larger --validation-fraction or fewer --validation-batches.",
    )
    chosen = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    return chosen.reshape(config.validation_batches, config.batch_size, -1)
