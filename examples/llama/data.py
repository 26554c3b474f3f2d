"""From text to batches of tokens.

Text files are read whole: documents are split into training and validation, tokenized,
packed end to end into windows of equal length, and shuffled. Tokenizer and tokens are
cached under a key made of everything they depend on.

A Hugging Face dataset is streamed: each process reads its own documents, tokenizes and
packs them as it goes, and shuffles among the next windows.

Either way each process gets its rows of every batch, and an iterator over the batches
has a state from which another goes on exactly where it was.
"""

import atexit
import functools
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from examples.llama.checks import InputError, make_directory, reason, require
from examples.llama.config import BYTES, END_OF_DOCUMENT, DataConfig

_CACHE_VERSION = 2
_HUGGING_FACE = "hf:"
_NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_DOCUMENTS_AT_ONCE = 32
_TOKENIZER_DOCUMENTS = 10_000
"""Documents of a streamed dataset on which a tokenizer is trained."""
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


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
    if any(source.startswith(_HUGGING_FACE) for source in config.data):
        return _load_stream(config, vocab_size, seed, process_index, process_count)
    corpus = load_corpus(config, vocab_size)
    data = Data(
        corpus.tokenizer,
        train_batches(corpus, config, seed, process_index, process_count),
        validation_batches(corpus, config)[:, process_index::process_count],
    )
    if process_index == 0:
        train, validation = corpus.documents
        print(
            f"Corpus: {train} training and {validation} validation documents, "
            f"{len(corpus.train):,} and {len(corpus.validation):,} tokens.",
            flush=True,
        )
    return data


# Tokenizers


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


def _given_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer | None:
    """Loads the tokenizer that the configuration names, if it names one."""
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


# Text files


def load_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """Reads and tokenizes text files, or takes their tokens from the cache.

    Raises:
        InputError: where there is no text, or too little of it, and for a tokenizer
            that does not fit.
    """
    documents = read_documents(tuple(map(Path, config.data)))
    train, validation = split_documents(documents, config.validation_fraction)
    tokenizer = _given_tokenizer(config, vocab_size)

    def fill(directory: Path) -> None:
        used = tokenizer or train_tokenizer(train, vocab_size, config.end_of_document)
        used.save(str(directory / "tokenizer.json"))
        for name, documents in (("train", train), ("validation", validation)):
            tokens = pack(documents, used, config.end_of_document)
            np.save(directory / f"{name}.npy", tokens)

    made_by = tokenizer.to_str() if tokenizer else vocab_size
    key = [made_by, config.end_of_document, _hash(train), _hash(validation)]
    directory = _cached(config.cache_dir, key, fill)
    return Corpus(
        train=np.load(directory / "train.npy", mmap_mode="r"),
        validation=np.load(directory / "validation.npy", mmap_mode="r"),
        documents=(len(train), len(validation)),
        tokenizer=load_tokenizer(str(directory / "tokenizer.json")),
    )


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


def pack(
    documents: list[str], tokenizer: Tokenizer, end_of_document: str
) -> np.ndarray:
    """Does what ``encode`` does, to many documents, and shows how far it is."""
    parts = []
    with tqdm(
        total=len(documents), desc="Tokenizing", unit="document", leave=False
    ) as bar:
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            some = documents[start : start + _DOCUMENTS_AT_ONCE]
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
    dataset = dataset.batch(config.batch_size // process_count)
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


# Hugging Face datasets


def _load_stream(
    config: DataConfig,
    vocab_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Data:
    """Loads a Hugging Face dataset."""
    require(
        len(config.data) == 1,
        "data: a Hugging Face dataset is given alone, not beside other sources",
    )
    (source,) = config.data
    splits = _open_dataset(source)
    train = _take_split(splits, config, "train_split")
    validation = _take_split(splits, config, "validation_split")
    tokenizer = _stream_tokenizer(train, config, vocab_size)
    data = Data(
        tokenizer,
        stream_batches(train, tokenizer, config, seed, process_index, process_count),
        first_batches(validation, tokenizer, config)[:, process_index::process_count],
    )
    if process_index == 0:
        same = config.validation_split == config.train_split
        print(
            f"Corpus: {source}, streamed; validation on the first "
            f"{config.validation_batches * config.batch_size:,} windows of "
            f"{config.validation_split}{', which are trained on too' * same}.",
            flush=True,
        )
    return data


def _import_datasets() -> Any:
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise InputError(
            "data: hf:... needs the package datasets; pip install '.[hf]'"
        ) from error
    return datasets


def _open_dataset(source: str) -> Any:
    """Opens the dataset ``hf:NAME`` or ``hf:NAME:CONFIG``: its splits by name."""
    datasets = _import_datasets()
    name, _, subset = source.removeprefix(_HUGGING_FACE).partition(":")
    try:
        return datasets.load_dataset(name, subset or None, streaming=True)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(f"data: cannot load {source} ({reason(error)})") from error


def _take_split(splits: Any, config: DataConfig, setting: str) -> Any:
    """Takes the split that the setting names, and checks that it has documents."""
    (source,) = config.data
    split = getattr(config, setting)
    option = "--" + setting.replace("_", "-")
    require(
        split in splits,
        f"{setting}: {source} has no split {split!r}; pass {option} and one of those "
        f"it has: {', '.join(splits)}",
    )
    row = _first_row(splits[split], source)
    require(row is not None, f"{setting}: the split {split!r} of {source} is empty")
    column = config.text_column
    require(
        isinstance(row.get(column, ""), str | None) and column in row,
        f"text_column: {source} has no column {column!r} of text; pass --text-column "
        f"and one of those it has: {', '.join(row)}",
    )
    return splits[split]


def _first_row(dataset: Any, source: str) -> Any:
    """Reads a row, or returns None where there is none."""
    try:
        return next(iter(dataset), None)
    except Exception as error:  # The packages below raise errors of many kinds.
        raise InputError(f"data: cannot read {source} ({reason(error)})") from error


def _stream_tokenizer(train: Any, config: DataConfig, vocab_size: int) -> Tokenizer:
    """Loads the tokenizer, or trains one on the first documents, or takes that one."""
    if tokenizer := _given_tokenizer(config, vocab_size):
        return tokenizer

    def fill(directory: Path) -> None:
        texts = islice(_texts(train, config.text_column), _TOKENIZER_DOCUMENTS)
        documents = list(tqdm(texts, "Reading", unit="document", leave=False))
        tokenizer = train_tokenizer(documents, vocab_size, config.end_of_document)
        tokenizer.save(str(directory / "tokenizer.json"))

    (source,) = config.data
    directory = Path(source.removeprefix(_HUGGING_FACE))
    key = [
        f"{_HUGGING_FACE}{directory.resolve()}" if directory.is_dir() else source,
        config.train_split,
        config.text_column,
        config.end_of_document,
        _TOKENIZER_DOCUMENTS,
        vocab_size,
    ]
    directory = _cached(config.cache_dir, key, fill)
    return load_tokenizer(str(directory / "tokenizer.json"))


def _texts(dataset: Any, column: str) -> Generator[str, None, None]:
    """Yields each document; one that is missing is empty."""
    for row in dataset:
        yield row.get(column) or ""


def stream_batches(
    dataset: Any,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[np.ndarray]:
    """Makes the training data of a process from a streamed dataset.

    Documents are packed end to end, so every token is in one window. Each process reads
    its own files; where their number is not a multiple of that of the processes, it
    reads all of them and keeps its own documents. To go on from a state, the
    ``shuffle_windows`` windows among which the next is drawn are read again.

    Args:
        dataset: a ``datasets.IterableDataset``.
        tokenizer: what to tokenize with.
        config: the configuration.
        seed: decides the order within the ``shuffle_windows`` windows.
        process_index: which of the processes this is.
        process_count: how many processes share each batch.

    Returns:
        This process's rows of each batch, without end.
    """
    split_dataset_by_node = _import_datasets().distributed.split_dataset_by_node
    own = split_dataset_by_node(dataset, process_index, process_count)
    require(
        _first_row(own, config.data[0]) is not None,
        f"data: too few documents in {config.train_split} for {process_count} "
        "processes; give more of them",
    )
    tokenize = functools.partial(
        encode, tokenizer=tokenizer, end_of_document=config.end_of_document
    )
    documents = _Documents(own, config.text_column)
    tokens = documents.batch(_DOCUMENTS_AT_ONCE, batch_fn=list).map(tokenize)
    windows = grain.experimental.WindowShuffleIterDataset(
        _Windows(tokens, config.sequence_length + 1),
        window_size=config.shuffle_windows,
        # The number of the shuffle is added to it, and the sum has to fit 32 bits.
        seed=seed % 2**31,
    )
    rows = config.batch_size // process_count
    return _Prefetch(
        windows.batch(rows),
        # A shuffle begins when all its windows are there: read them during the last.
        max(2, config.shuffle_windows // rows),
    )


def first_batches(dataset: Any, tokenizer: Tokenizer, config: DataConfig) -> np.ndarray:
    """Takes the first windows of a streamed dataset, to validate on.

    Returns:
        Tokens, ``[validation_batches, batch_size, sequence_length + 1]``.
    """
    length = config.sequence_length + 1
    count = config.validation_batches * config.batch_size
    texts = _texts(dataset, config.text_column)
    parts: list[np.ndarray] = []
    have = 0
    with tqdm(total=count, desc="Tokenizing", unit="window", leave=False) as bar:
        while have < count * length and (
            some := list(islice(texts, _DOCUMENTS_AT_ONCE))
        ):
            parts.append(encode(some, tokenizer, config.end_of_document))
            have += len(parts[-1])
            bar.update(min(have // length, count) - bar.n)
    require(
        have >= count * length,
        f"validation_split: the documents of {config.validation_split!r} fill "
        f"{have // length} windows, too few for {config.validation_batches} batches of "
        f"{config.batch_size}; pass fewer --validation-batches",
    )
    tokens = np.concatenate(parts)[: count * length]
    return tokens.reshape(config.validation_batches, config.batch_size, length)


class _Documents(grain.IterDataset[str]):  # type: ignore[misc]
    """The documents of a streamed dataset, pass after pass in the same order."""

    def __init__(self, dataset: Any, column: str) -> None:
        super().__init__()
        self._dataset = dataset
        self._column = column

    def __iter__(self) -> grain.DatasetIterator[str]:
        return _DocumentIterator(self._dataset, self._column)


class _DocumentIterator(grain.DatasetIterator[str]):  # type: ignore[misc]
    def __init__(self, dataset: Any, column: str) -> None:
        super().__init__()
        self._source = dataset
        self._column = column
        self._begin(None)

    def _begin(self, position: Any) -> None:
        """Begins a pass, or goes on with one where the position is not None."""
        # A dataset holds the position of its iteration, and one that was loaded stays
        # for the passes to come. Each pass takes the only shard of one: a copy that
        # shares no position.
        self._dataset = self._source.shard(num_shards=1, index=0)
        if position is not None:
            self._dataset.load_state_dict(position)
        self._position = position
        self._texts = _texts(self._dataset, self._column)

    def __next__(self) -> str:
        if _ending.is_set():
            raise RuntimeError("the program ends")
        text = next(self._texts, None)
        if text is None:
            self._begin(None)
            text = next(self._texts)
        self._position = self._dataset.state_dict()
        return text

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin(state["position"])

    def close(self) -> None:
        super().close()
        self._texts.close()


class _Windows(grain.IterDataset[np.ndarray]):  # type: ignore[misc]
    """Concatenates the arrays of its parent and cuts the stream at equal distances."""

    def __init__(self, parent: grain.IterDataset[np.ndarray], length: int) -> None:
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _WindowIterator(iter(self._parent), self._length)


class _WindowIterator(grain.DatasetIterator[np.ndarray]):  # type: ignore[misc]
    def __init__(self, parent: grain.DatasetIterator[np.ndarray], length: int) -> None:
        super().__init__(parent)
        self._length = length
        self._array: np.ndarray | None = None
        # The state from which the parent gives the array, and what is cut from it.
        self._before, self._taken = parent.get_state(), 0

    def __next__(self) -> np.ndarray:
        parts: list[np.ndarray] = []
        missing = self._length
        while missing:
            if self._array is None:
                self._array = next(self._parent)
            parts.append(self._array[self._taken : self._taken + missing])
            missing -= len(parts[-1])
            self._taken += len(parts[-1])
            if self._taken == len(self._array):
                self._array = None
                self._before, self._taken = self._parent.get_state(), 0
        return np.concatenate(parts)

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._array = None
        self._before, self._taken = state["before"], state["taken"]
        self._parent.set_state(self._before)


_ending = threading.Event()
_running: weakref.WeakSet[grain.DatasetIterator[np.ndarray]] = weakref.WeakSet()


class _Prefetch(grain.IterDataset[np.ndarray]):  # type: ignore[misc]
    """Prefetches in a thread that ends before the interpreter does.

    Else a thread which is inside of a tokenizer by then aborts the process.
    """

    def __init__(self, parent: grain.IterDataset[np.ndarray], size: int) -> None:
        super().__init__(parent)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        iterator = _PrefetchIterator(iter(self._parent), self._size)
        _running.add(iterator)
        return iterator


class _PrefetchIterator(
    grain.experimental.ThreadPrefetchDatasetIterator  # type: ignore[misc]
):
    def close(self) -> None:
        # It is closed again when it is deleted, maybe after the modules it needs.
        if not self._closed:
            super().close()


@atexit.register
def _end_threads() -> None:
    _ending.set()
    for iterator in list(_running):
        iterator.close()


# Cache and messages


def _cached(cache_dir: Path, key: list[Any], fill: Callable[[Path], None]) -> Path:
    """Returns the directory of a key, filled before if it was not there."""
    text = json.dumps([_CACHE_VERSION, tokenizers.__version__, *key])
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    directory = cache_dir / "llama" / name
    if directory.exists():
        return directory
    make_directory("cache_dir", directory.parent)
    try:
        partial = Path(tempfile.mkdtemp(dir=directory.parent))
    except OSError as error:
        raise InputError(
            f"cache_dir: cannot write to {directory.parent} ({error.strerror})"
        ) from error
    try:
        fill(partial)
        try:
            os.rename(partial, directory)
        except OSError:
            if not directory.exists():  # Else another process wrote the same meanwhile.
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _hash(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
