"""Text files, from documents to batches of tokens.

They are read whole: documents are split into training and validation, tokenized, packed
end to end into windows of equal length, and shuffled. A single document is cut before.
Tokenizer and tokens are cached under a key made of everything they depend on.
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
"""Names of data files, which the package ``datasets`` reads."""
_OTHER_COLUMN = "and --text-column if their text is not in the column 'text'"
_BLANK_LINES = re.compile(r"\n\s*\n")
_PIECES = 100
"""About how many pieces a single document is cut into."""
_PIECE = 1000
"""Least length of a piece, in characters."""
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


@dataclass(frozen=True)
class Corpus:
    """Tokenized text files: two streams of tokens that share no document."""

    train: np.ndarray
    """Tokens of the training documents, ``[tokens]``, unsigned integers."""
    validation: np.ndarray
    """Tokens of the validation documents, likewise."""
    documents: tuple[int, int]
    """How many documents there are to train and to validate on."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of the documents, of those to train on and of those to validate on."""


def load_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """Reads and tokenizes text files, or takes their tokens from the cache.

    Raises:
        InputError: where there is no text, or too little of it, and for a tokenizer
            that does not fit.
    """
    require(
        "" not in config.data,
        "data: '' is no file; leave --data out for the standard library of Python",
    )
    documents = read_documents(tuple(map(Path, config.data)))
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
    """Hashes texts and their order."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def read_documents(paths: tuple[Path, ...]) -> list[str]:
    """Reads each file as one document, without exact duplicates.

    Args:
        paths: text files, or directories read with all that is below them; none for
            the standard library of this Python. A file named here has to be UTF-8. Of
            a directory, what is not UTF-8, empty, hidden or a data file is left out.

    Raises:
        InputError: for a path that cannot be read, or where no text is found.
    """
    documents: dict[str, None] = {}  # A set that keeps the order.
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
            f"Skipped {len(skipped)} files that cannot be read as UTF-8 text: "
            f"{list_some(skipped)}."
        )
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


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yields each file, and whether the user named it."""
    named = [path for path in paths if not path.is_dir()]
    for path in named:
        require(path.exists(), f"data: there is no {path}")
    _, data = _part_data_files(named)
    require(
        not data,
        f"data: {list_some(data)}: rows, not plain text; make a directory "
        "with a file train.* and a file validation.*, and pass --data hf:DIRECTORY, "
        f"{_OTHER_COLUMN}",
    )
    for path in paths:
        if path.is_dir():
            for file in _files_below(path):
                yield file, False
        else:
            yield path, True


def _files_below(directory: Path) -> list[Path]:
    """Lists the files of a directory that are neither hidden nor data files."""
    text, data = _part_data_files(files_below(directory))
    if data:
        require(
            any(not _is_beside_data(file) for file in text),
            f"data: {list_some(data)}: rows, not plain text; pass --data "
            f"hf:{directory}, {_OTHER_COLUMN}",
        )
        print(
            f"Ignored {len(data)} data files beside text: "
            f"{list_some(data)}. To train on them instead, give them a directory of "
            f"their own and pass --data hf:DIRECTORY, {_OTHER_COLUMN}."
        )
    return text


def _part_data_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Separates text files from data files.

    JSON is text, such as a program's settings, unless there is nothing else.
    """
    text = [file for file in files if not _DATA_FILE.search(file.name)]
    if all(_is_json(file) for file in text):
        text = []
    return text, sorted({*files} - {*text})


def _is_json(file: Path) -> bool:
    return file.suffix.lower() == ".json"


def _is_beside_data(file: Path) -> bool:
    """Tells whether a file describes the data files with which it comes."""
    return _is_json(file) or file.stem.lower() in ("readme", "license")


def cut_document(text: str) -> list[str]:
    """Splits one document into pieces, so that some can be held out for validation.

    It is cut behind blank lines, where there are none behind the end of a line, and
    where there is none anywhere.

    Returns:
        The pieces in order, without exact duplicates; only one where it is short.
    """
    length = max(_PIECE, len(text) // _PIECES)
    pieces: dict[str, None] = {}  # A set that keeps the order.
    start = 0
    while len(text) - start >= 3 * length:
        end = _place_to_cut(text, start + length, start + 2 * length)
        pieces[text[start:end]] = None
        start = end
    pieces[text[start:]] = None
    distinct = [piece for piece in pieces if piece.strip()]
    if len(distinct) > 1:
        print(
            f"One document of {len(text):,} characters: cut into {len(distinct)} "
            "different pieces, at blank lines where there are any, to train and to "
            "validate on."
        )
    return distinct


def _place_to_cut(text: str, start: int, stop: int) -> int:
    """Finds the best place to cut in a range."""
    if blank := _BLANK_LINES.search(text, start, stop):
        return blank.end()
    return text.find("\n", start, stop) + 1 or start


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
        f"data: one document only, of {sum(map(len, documents)):,} characters (copies "
        "do not count), and no other to validate on; give two files, or one of "
        f"{3 * _PIECE:,} characters or more",
    )
    by_hash = {hashlib.sha256(text.encode()).digest(): text for text in documents}
    train, validation = split_hashes(by_hash, fraction)
    return [by_hash[h] for h in train], [by_hash[h] for h in validation]


def pack(
    documents: list[str], tokenizer: Tokenizer, end_of_document: str
) -> np.ndarray:
    """Does what ``encode`` does, to many documents, and shows how far it is."""
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
    corpus: Corpus,
    config: DataConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[np.ndarray]:
    """Makes the training data of a process.

    Returns:
        This process's rows of each batch, without end; the windows are shuffled anew in
        each pass over the corpus, and the seed determines every batch.
    """
    windows = cut_windows(corpus.train, config.sequence_length, "training")
    require(
        len(windows) >= config.batch_size,
        f"data: the training documents fill {len(windows)} windows, too few for a "
        f"batch of {config.batch_size}; give more text or a smaller --batch-size",
    )
    dataset = grain.MapDataset.source(windows).shuffle(seed).repeat()
    # Rows p, p + P, ... of what is one batch of one process.
    dataset = dataset[process_index::process_count]
    dataset = dataset.batch(config.batch_size // process_count, drop_remainder=True)
    return dataset.to_iter_dataset(_READ_OPTIONS)


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
