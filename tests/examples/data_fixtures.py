"""Helpers for tests of data: documents, files and checks."""

import gzip
import json
import random
import sys
from contextlib import contextmanager

import chex
import numpy as np

from examples.llama.config import END_OF_DOCUMENT
from examples.llama.data.text_files import split_documents
from examples.llama.data.tokenizer import train_tokenizer

WORDS = ["the", "optimizer", "moves", "a", "weight", "along", "its", "gradient"]


def make_documents(count, words, seed=0):
    """Make distinct documents from a few words."""
    generator = random.Random(seed)
    return [
        f"document {seed} {i}\n" + " ".join(generator.choices(WORDS, k=words))
        for i in range(count)
    ]


TRAINING = make_documents(48, 24, seed=1)
VALIDATION = make_documents(40, 24, seed=2)


def write_text_files(directory):
    """Write thirty documents, one per file."""
    for i, text in enumerate(make_documents(30, 400)):
        (directory / f"{i}.txt").write_text(text)
    return directory


def write_shard(path, documents):
    """Write documents and their URLs, in the format of the file's suffix."""
    rows = [{"url": f"u{i}", "text": text} for i, text in enumerate(documents)]
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path, row_group_size=5)
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_dataset(directory, kind="parquet", validation=VALIDATION):
    """Write a dataset of four training files and one validation file."""
    for i in range(4):
        write_shard(directory / f"train-{i}.{kind}", TRAINING[12 * i :][:12])
    write_shard(directory / f"validation-0.{kind}", validation)
    return directory


def save_tokenizer(directory):
    """Write the tokenizer that is trained on the text files."""
    documents, _ = split_documents(make_documents(30, 400), 0.1)
    path = directory / "tokenizer.json"
    train_tokenizer(documents, 300, END_OF_DOCUMENT).save(str(path))
    return path


def record_training(monkeypatch, module):
    """Return a list that records the vocabulary size of each tokenizer trained."""
    sizes = []

    def train(documents, vocab_size, end_of_document):
        sizes.append(vocab_size)
        return train_tokenizer(documents, vocab_size, end_of_document)

    monkeypatch.setattr(f"examples.llama.data.{module}.train_tokenizer", train)
    return sizes


def split_at_ends(stream, tokenizer):
    """Return the documents that end in a stream of tokens."""
    ends = np.flatnonzero(stream == tokenizer.token_to_id(END_OF_DOCUMENT))
    return [
        tokenizer.decode(part.tolist()[:-1])
        for part in np.split(stream, ends + 1)[: len(ends)]
    ]


def sorted_rows(batch):
    return sorted(map(tuple, batch.tolist()))


def assert_resumes(dataset, steps, every=1):
    """Check that new and used iterators resume exactly from each state."""
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(steps):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    used = iter(dataset)
    next(used)
    for step in range(0, steps - 3, every):
        fresh = iter(dataset)
        for other in (fresh, used):
            other.set_state(json.loads(states[step]))
            assert json.dumps(other.get_state()) == states[step]
            for expected in batches[step : step + 3]:
                chex.assert_trees_all_equal(next(other), expected)
        fresh.close()
    used.set_state(json.loads(states[3]))
    for expected in batches[3:]:
        chex.assert_trees_all_equal(next(used), expected)


@contextmanager
def short_turns():
    """Shorten the switch interval, for which short calls that release the GIL wait."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)
