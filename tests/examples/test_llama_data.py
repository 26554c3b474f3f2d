"""The data of the Llama example: text files, streamed datasets, and tokenizers."""

import gzip
import json
import random
import subprocess
import sys
import sysconfig
import types
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import grain
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.llama import data
from examples.llama.checks import InputError
from examples.llama.config import END_OF_DOCUMENT, DataConfig

WORDS = ["the", "optimizer", "moves", "a", "weight", "along", "its", "gradient"]


def make_documents(count, words, seed=0):
    """Documents made of a few words, all different."""
    generator = random.Random(seed)
    return [
        f"document {seed} {i}\n" + " ".join(generator.choices(WORDS, k=words))
        for i in range(count)
    ]


@pytest.fixture(scope="module", autouse=True)
def threads_take_turns_often():
    """Each of many short calls that let go of the interpreter waits for a turn."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("documents")
    for i, text in enumerate(make_documents(30, 400)):
        (directory / f"{i}.txt").write_text(text)
    return directory


@pytest.fixture(scope="module")
def config(text_files, tmp_path_factory):
    return DataConfig(
        data=(str(text_files),),
        cache_dir=tmp_path_factory.mktemp("cache"),
        sequence_length=32,
        batch_size=8,
        validation_batches=2,
    )


@pytest.fixture(scope="module")
def corpus(config):
    return data.load_corpus(config, 300)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def numbered(corpus, tokens):
    """The corpus with its tokens numbered."""
    return replace(corpus, train=np.arange(tokens), validation=np.arange(tokens))


def sorted_rows(batch):
    return sorted(map(tuple, batch.tolist()))


def assert_resumes(dataset, steps, every=1):
    """From each state, in a new iterator and in a used one, the same follows."""
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
                np.testing.assert_array_equal(next(other), expected)
        fresh.close()
    used.set_state(json.loads(states[3]))
    for expected in batches[3:]:
        np.testing.assert_array_equal(next(used), expected)


# Documents


def test_validation_shares_no_document_with_training():
    documents = [f"document {i}" for i in range(50)]
    training, validation = data.split_documents(documents, 0.1)
    assert len(validation) == 5
    assert sorted(training + validation) == sorted(documents)
    assert data.split_documents(documents[::-1], 0.1) == (training, validation)
    assert validation != documents[:5]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_gets_a_document(fraction):
    training, validation = data.split_documents(["a", "b", "c"], fraction)
    assert min(len(training), len(validation)) == 1


def test_a_copy_of_a_document_is_left_out(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other"), ("d", " \n")):
        (tmp_path / name).write_text(text)
    assert data.read_documents((tmp_path,)) == ["same", "other"]


def test_the_standard_library_without_its_tests():
    documents = set(data.read_documents(()))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert (stdlib / "json" / "decoder.py").read_bytes().decode() in documents
    tests = [*stdlib.glob("test/test_j*.py"), *stdlib.glob("idlelib/idle_test/t*.py")]
    assert not documents.intersection(file.read_bytes().decode() for file in tests)


def test_a_directory_may_hold_other_files(tmp_path, capsys):
    (tmp_path / "text").write_text("some text")
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    assert data.read_documents((tmp_path,)) == ["some text"]
    assert "Skipped 1 files" in capsys.readouterr().out


# Tokens


@given(st.text())
@settings(max_examples=100)
def test_tokens_give_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_document_cannot_end_itself(tokenizer):
    text = f"before {END_OF_DOCUMENT} after"
    ids = data.encode([text], tokenizer, END_OF_DOCUMENT).tolist()
    assert ids.index(tokenizer.token_to_id(END_OF_DOCUMENT)) == len(ids) - 1
    assert tokenizer.decode(ids[:-1]) == text


def test_packing_keeps_every_token(tokenizer):
    documents = [f"document {i} " * i for i in range(1, 70)]
    stream = data.pack(documents, tokenizer, END_OF_DOCUMENT)
    assert split_at_ends(stream, tokenizer) == documents
    assert stream[-1] == tokenizer.token_to_id(END_OF_DOCUMENT)
    assert stream.dtype == np.uint16


def split_at_ends(stream, tokenizer):
    """The documents that end in a stream of tokens."""
    ends = np.flatnonzero(stream == tokenizer.token_to_id(END_OF_DOCUMENT))
    return [
        tokenizer.decode(part.tolist()[:-1])
        for part in np.split(stream, ends + 1)[: len(ends)]
    ]


def test_the_settings_of_a_tokenizer_file_do_not_change_the_tokens(
    tokenizer, tokenizer_file, tmp_path
):
    other = Tokenizer.from_file(str(tokenizer_file))
    other.add_special_tokens(["[BOS]"])
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", other.token_to_id("[BOS]"))]
    )
    other.save(str(tmp_path / "other.json"))
    loaded = data.load_tokenizer(str(tmp_path / "other.json"))
    documents = [*make_documents(3, 20), f"x {END_OF_DOCUMENT} y"]
    np.testing.assert_array_equal(
        data.encode(documents, loaded, END_OF_DOCUMENT),
        data.encode(documents, tokenizer, END_OF_DOCUMENT),
    )


def test_a_model_that_has_special_tokens_among_its_pieces(tmp_path):
    pieces = ["<unk>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz</>", "<extra>"]
    model = models.Unigram([(p, -float(i > 1)) for i, p in enumerate(pieces)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<extra>"])
    tokenizer.save(str(tmp_path / "unigram.json"))
    loaded = data.load_tokenizer(str(tmp_path / "unigram.json"))
    assert "</s>" in loaded.encode("ab</s>cd").tokens
    assert "<extra>" in loaded.encode("ab<extra>cd").tokens
    ids = data.encode(["a<extra>b</s>cd", "", "é"], loaded, "</s>").tolist()
    tokens = [loaded.id_to_token(i) for i in ids]
    assert tokens == [*"▁abcd", "</s>", "</s>", "▁", "<unk>", "</s>"]
    # The model need not know the special tokens at the end.
    config = DataConfig(tokenizer="unigram.json", end_of_document="</s>")
    data.check_tokenizer(loaded, config, len(pieces) - 1)
    with pytest.raises(InputError, match=f"has {len(pieces) - 1} tokens"):
        data.check_tokenizer(loaded, config, len(pieces) - 2)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_are_as_narrow_as_the_vocabulary_allows(size, dtype):
    vocab = {f"w{i}": i for i in range(size - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.add_special_tokens(["end"])
    stream = data.encode(["w7", "unknown"], tokenizer, "end")
    assert stream.dtype == dtype
    assert stream.tolist() == [7, size - 1, 0, size - 1]


# Windows and batches of text files


@pytest.mark.parametrize("tokens", [5, 20, 21, 24, 1000])
def test_windows_lose_no_token_but_the_tail(tokens):
    stream = np.arange(tokens)
    windows = data.cut_windows(stream, 4, "training")
    kept = np.concatenate([windows[0], windows[1:, 1:].ravel()])
    np.testing.assert_array_equal(kept, stream[: len(kept)])
    assert 0 <= tokens - len(kept) < 4


def test_a_seed_gives_the_order_of_the_data(config, corpus):
    windows = data.cut_windows(corpus.train, 32, "training")
    shuffled = grain.MapDataset.source(windows).shuffle(3).repeat()
    expected = shuffled.batch(8)
    batches = data.train_batches(corpus, config, seed=3)
    steps = 3 * len(windows) // 8
    for step, batch in enumerate(islice(batches, steps)):
        np.testing.assert_array_equal(batch, expected[step])
    assert batch.shape == (8, 33)
    assert batch.dtype == np.uint16
    other = next(iter(data.train_batches(corpus, config, seed=4)))
    assert (other != expected[0]).any()


def test_a_pass_takes_each_window_once_and_the_next_in_another_order(config, corpus):
    short = replace(config, sequence_length=4)
    stream = numbered(corpus, 8 * 4 * 5 + 1)
    batches = iter(data.train_batches(stream, short, seed=0))
    passes = [np.concatenate([next(batches) for _ in range(5)]) for _ in range(2)]
    for windows in passes:
        assert sorted(windows[:, 0].tolist()) == list(range(0, 160, 4))
    assert (passes[0] != passes[1]).any()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_batches_of_one(count, config, corpus):
    whole = islice(data.train_batches(corpus, config, 5), 60)
    parts = [data.train_batches(corpus, config, 5, p, count) for p in range(count)]
    for batch, *shares in zip(whole, *parts):
        assert {share.shape for share in shares} == {(8 // count, 33)}
        assert sorted_rows(np.concatenate(shares)) == sorted_rows(batch)


def test_validation_is_the_same_on_more_processes(config):
    whole = data.load_data(config, 300, 0).validation
    parts = [data.load_data(config, 300, 0, p, 4).validation for p in range(4)]
    assert whole.shape == (2, 8, 33)
    assert {part.shape for part in parts} == {(2, 2, 33)}
    for i in range(2):
        shares = np.concatenate([part[i] for part in parts])
        assert sorted_rows(shares) == sorted_rows(whole[i])


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2)])
def test_batches_go_on_from_a_state(index, count, config, corpus):
    short = replace(config, sequence_length=4)
    stream = numbered(corpus, 8 * 4 * 5 + 12)  # A pass ends inside of a batch.
    assert_resumes(data.train_batches(stream, short, 0, index, count), 18)


def test_validation_windows_span_the_stream(config, corpus):
    chosen = data.validation_batches(numbered(corpus, 32 * 100 + 1), config)
    assert chosen.shape == (2, 8, 33)
    windows = chosen.reshape(16, 33)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 3200
    assert len(np.unique(windows[:, 0])) == 16


def test_the_corpus_is_summarized_once(config, corpus, capsys):
    data.load_data(config, 300, 0, 1, 2)
    assert "Corpus" not in capsys.readouterr().out
    loaded = data.load_data(config, 300, 0)
    tokens = f"{len(corpus.train):,} and {len(corpus.validation):,} tokens."
    expected = f"Corpus: 27 training and 3 validation documents, {tokens}\n"
    assert capsys.readouterr().out == expected
    assert loaded.tokenizer.get_vocab_size() == 300


# Cache


@pytest.fixture
def trained(monkeypatch):
    """The vocabulary sizes of the tokenizers that are trained."""
    sizes = []

    def train_tokenizer(documents, vocab_size, end_of_document):
        sizes.append(vocab_size)
        return original(documents, vocab_size, end_of_document)

    original = data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", train_tokenizer)
    return sizes


def test_the_cache_serves_the_same_and_nothing_else(
    text_files, config, corpus, tmp_path, trained
):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in text_files.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    again = data.load_corpus(replace(config, data=(str(copy),)), 300)
    assert trained == []
    np.testing.assert_array_equal(again.train, corpus.train)
    np.testing.assert_array_equal(again.validation, corpus.validation)
    assert isinstance(again.train, np.memmap)
    assert again.tokenizer.encode(END_OF_DOCUMENT).ids == (
        corpus.tokenizer.encode(END_OF_DOCUMENT).ids
    )

    assert data.load_corpus(config, 310).tokenizer.get_vocab_size() == 310
    (copy / "0.txt").write_text("something else entirely")
    changed = data.load_corpus(replace(config, data=(str(copy),)), 300)
    half = data.load_corpus(replace(config, validation_fraction=0.5), 300)
    ended = data.load_corpus(replace(config, end_of_document="[END]"), 300)
    assert trained == [310, 300, 300, 300]
    assert len(changed.train) + len(changed.validation) != (
        len(corpus.train) + len(corpus.validation)
    )
    assert len(half.validation) > 2 * len(corpus.validation)
    assert ended.train[-1] == ended.tokenizer.token_to_id("[END]")


def test_a_given_tokenizer_has_its_own_place_in_the_cache(
    config, corpus, tokenizer_file, tmp_path, trained
):
    given = replace(config, tokenizer=str(tokenizer_file), cache_dir=tmp_path / "new")
    same = data.load_corpus(given, 1000)  # Larger than the tokenizer's.
    np.testing.assert_array_equal(same.train, corpus.train)

    other = Tokenizer.from_file(str(tokenizer_file))
    other.add_special_tokens(["[END]"])
    other.save(str(tmp_path / "other.json"))
    given = replace(given, tokenizer=str(tmp_path / "other.json"))
    ended = data.load_corpus(replace(given, end_of_document="[END]"), 1000)
    assert ended.train[-1] == 300
    assert data.load_corpus(given, 1000).train[-1] == corpus.train[-1]
    assert trained == []


def test_a_cache_half_written_is_not_there(config, tmp_path, monkeypatch):
    def interrupted(documents, tokenizer, end_of_document):
        raise KeyboardInterrupt

    elsewhere = replace(config, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load_corpus(elsewhere, 300)
    assert list((tmp_path / "llama").iterdir()) == []
    assert len(data.load_corpus(elsewhere, 300).train) > 0


# Streamed datasets

TRAINING = make_documents(48, 24, seed=1)
VALIDATION = make_documents(40, 24, seed=2)


def write_shard(path, documents):
    """Writes documents and their addresses, in the format that the name says."""
    rows = [{"url": f"u{i}", "text": text} for i, text in enumerate(documents)]
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path, row_group_size=5)
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs the extra [hf]")


@pytest.fixture(scope="module")
def shards(request, datasets, tmp_path_factory):
    """A dataset of four training files and one to validate on."""
    kind = getattr(request, "param", "parquet")
    directory = tmp_path_factory.mktemp("dataset")
    for i in range(4):
        write_shard(directory / f"train-{i}.{kind}", TRAINING[12 * i :][:12])
    write_shard(directory / f"validation-0.{kind}", VALIDATION)
    return directory


@pytest.fixture(scope="module")
def stream_config(shards, tokenizer_file, tmp_path_factory):
    return DataConfig(
        data=(f"hf:{shards}",),
        tokenizer=str(tokenizer_file),
        cache_dir=tmp_path_factory.mktemp("cache"),
        sequence_length=16,
        batch_size=4,
        validation_batches=2,
        shuffle_windows=7,
    )


both_kinds = pytest.mark.parametrize("shards", ["parquet", "json.gz"], indirect=True)


def in_order(config):
    """A configuration with which the windows of a stream are not shuffled."""
    return replace(config, batch_size=1, shuffle_windows=1)


def take_windows(dataset, count):
    return np.concatenate(list(islice(dataset, count)))


def read_documents(dataset, count, tokenizer):
    """The first documents of batches whose windows are not shuffled."""
    stream = np.empty(0, np.uint16)
    for batch in dataset:
        stream = np.append(stream, batch)
        if (stream == tokenizer.token_to_id(END_OF_DOCUMENT)).sum() >= count:
            return split_at_ends(stream, tokenizer)[:count]


@both_kinds
def test_a_stream_keeps_every_token(stream_config, tokenizer):
    loaded = data.load_data(in_order(stream_config), 300, 0)
    expected = data.encode(TRAINING, tokenizer, END_OF_DOCUMENT)
    windows = take_windows(loaded.train, len(expected) // 17)
    assert windows.dtype == np.uint16
    np.testing.assert_array_equal(windows.ravel(), expected[: windows.size])
    assert read_documents(loaded.train, 3 * 48, tokenizer) == 3 * TRAINING


@both_kinds
@pytest.mark.parametrize("count", [2, 3, 4])  # Four files do not divide by three.
def test_a_document_is_read_by_one_process_in_a_pass(count, stream_config, tokenizer):
    config = replace(in_order(stream_config), batch_size=count)
    own = 48 // count
    parts = [
        read_documents(
            data.load_data(config, 300, 0, p, count).train, 2 * own, tokenizer
        )
        for p in range(count)
    ]
    for some in (slice(own), slice(own, None)):
        documents = [text for part in parts for text in part[some]]
        assert sorted(documents) == sorted(TRAINING)


@both_kinds
@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2), (2, 3)])
def test_a_stream_goes_on_from_a_state(index, count, stream_config, tokenizer):
    config = replace(stream_config, batch_size=4 * count)
    loaded = data.load_data(config, 300, 0, index, count)
    own_tokens = len(data.encode(TRAINING, tokenizer, END_OF_DOCUMENT)) // count
    steps = 2 * own_tokens // (4 * 17)  # Two passes.
    assert_resumes(loaded.train, steps, every=3)


@pytest.mark.parametrize("length", [1, 4, 200])
def test_a_stream_of_short_or_long_windows_goes_on(length, stream_config):
    config = replace(stream_config, sequence_length=length, validation_batches=1)
    assert_resumes(data.load_data(config, 300, 0).train, 15, every=2)


def test_a_state_is_small(stream_config):
    iterator = iter(data.load_data(stream_config, 300, 0).train)
    for _ in range(20):
        next(iterator)
    assert len(json.dumps(iterator.get_state())) < 2000


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_stream_is_shuffled_among_the_next_windows(seed, stream_config):
    plain = take_windows(data.load_data(in_order(stream_config), 300, 0).train, 28)
    shuffled = take_windows(data.load_data(stream_config, 300, seed).train, 7)
    again = take_windows(data.load_data(stream_config, 300, seed).train, 7)
    other = take_windows(data.load_data(stream_config, 300, 1).train, 7)
    for start in range(0, 28, 7):
        some = slice(start, start + 7)
        assert sorted_rows(shuffled[some]) == sorted_rows(plain[some])
    np.testing.assert_array_equal(shuffled, again)
    assert (shuffled != plain).any()
    assert (shuffled != other).any()


def test_the_next_pass_is_shuffled_differently(stream_config, tokenizer):
    pairs, odd = divmod(len(data.encode(TRAINING, tokenizer, END_OF_DOCUMENT)), 2)
    assert not odd
    # A pass is shuffled as a whole.
    config = replace(
        stream_config, sequence_length=1, batch_size=1, shuffle_windows=pairs
    )
    windows = take_windows(data.load_data(config, 300, 0).train, 2 * pairs)
    first, second = np.split(windows, 2)
    assert sorted_rows(first) == sorted_rows(second)
    assert (first != second).any()


def test_validation_is_on_the_first_windows(stream_config, tokenizer, capsys):
    loaded = data.load_data(stream_config, 300, 0)
    expected = data.encode(VALIDATION, tokenizer, END_OF_DOCUMENT)[: 2 * 4 * 17]
    np.testing.assert_array_equal(loaded.validation, expected.reshape(2, 4, 17))
    assert "validation on the first 8 windows of validation." in capsys.readouterr().out
    parts = [data.load_data(stream_config, 300, 0, p, 2).validation for p in range(2)]
    assert "Corpus" in (output := capsys.readouterr().out)
    assert output.count("Corpus") == 1
    for i in range(2):
        shares = np.concatenate([part[i] for part in parts])
        assert sorted_rows(shares) == sorted_rows(loaded.validation[i])


def test_validation_on_training_documents_is_said(stream_config, capsys):
    data.load_data(replace(stream_config, validation_split="train"), 300, 0)
    assert "windows of train, which are trained on too." in capsys.readouterr().out


def test_another_column_with_gaps(datasets, stream_config, tmp_path, tokenizer):
    rows = [{"body": "one"}, {"body": None}, {"body": "two"}]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows * 20)
        (tmp_path / f"{split}.jsonl").write_text(text)
    config = replace(stream_config, data=(f"hf:{tmp_path}",), text_column="body")
    loaded = data.load_data(in_order(config), 300, 0)
    assert read_documents(loaded.train, 3, tokenizer) == ["one", "", "two"]


def test_a_tokenizer_for_a_stream_is_trained_once(stream_config, tmp_path, trained):
    config = replace(stream_config, tokenizer="", cache_dir=tmp_path)
    first = data.load_data(config, 300, 0).tokenizer
    again = data.load_data(config, 300, 0).tokenizer
    assert first.to_str() == again.to_str()
    expected = data.train_tokenizer(TRAINING, 300, END_OF_DOCUMENT)
    assert first.to_str() == expected.to_str()
    assert again.encode(END_OF_DOCUMENT).ids == expected.encode(END_OF_DOCUMENT).ids
    data.load_data(config, 310, 0)
    data.load_data(replace(config, text_column="url", validation_batches=1), 300, 0)
    assert trained == [300, 300, 310, 300]


def test_a_tokenizer_is_trained_on_the_first_documents(
    stream_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "_TOKENIZER_DOCUMENTS", 5)
    config = replace(stream_config, tokenizer="", cache_dir=tmp_path)
    trained = data.load_data(config, 300, 0).tokenizer
    expected = data.train_tokenizer(TRAINING[:5], 300, END_OF_DOCUMENT)
    assert trained.to_str() == expected.to_str()


def test_a_name_and_a_configuration_are_passed_on(
    datasets, stream_config, shards, monkeypatch
):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return original(str(shards), **settings)

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("hf:allenai/c4:en", "hf:owner/name"):
        data.load_data(replace(stream_config, data=(source,)), 300, 0)
    streaming = {"streaming": True}
    assert asked == [
        (("allenai/c4", "en"), streaming),
        (("owner/name", None), streaming),
    ]


def test_a_tokenizer_from_the_hub(monkeypatch, tokenizer_file):
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return Tokenizer.from_file(str(tokenizer_file))

    hub = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setattr(data, "Tokenizer", hub)
    assert data.load_tokenizer("t5-base").encode_special_tokens
    assert asked == ["t5-base"]


def test_a_program_ends_while_it_reads(datasets, tokenizer_file, tmp_path):
    write_shard(tmp_path / "train.parquet", make_documents(3000, 100))
    write_shard(tmp_path / "validation.parquet", VALIDATION)
    script = f"""
from pathlib import Path
from examples.llama.config import DataConfig
from examples.llama.data import load_data
config = DataConfig(
    data=("hf:{tmp_path}",), tokenizer="{tokenizer_file}", cache_dir=Path("unused"),
    sequence_length=16, batch_size=4, validation_batches=2, shuffle_windows=3000
)
iterator = iter(load_data(config, 300, 0).train)
print(next(iterator).shape)
"""
    root = Path(data.__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        cwd=root,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("(4, 17)\n")
    assert "Error" not in ended.stderr


# Errors


def test_no_such_file(config, tmp_path):
    with pytest.raises(InputError, match=r"data: there is no .*missing"):
        data.load_data(replace(config, data=(str(tmp_path / "missing"),)), 300, 0)


def test_a_named_file_that_is_not_text(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"data: cannot read .*binary \(not UTF-8"):
        data.read_documents((tmp_path / "binary",))


def test_a_named_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret").write_text("text")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read .*secret \(Permission denied"):
        data.read_documents((tmp_path / "secret",))


def test_a_directory_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"data: no text in .*; give --data"):
        data.read_documents((tmp_path,))


def test_a_cache_directory_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(InputError, match=r"cache_dir: cannot make .*inside"):
        data.load_data(replace(config, cache_dir=inside), 300, 0)


def test_a_cache_directory_that_cannot_be_written(config, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match=r"cache_dir: cannot write to .*Permission"):
        data.load_data(replace(config, cache_dir=tmp_path), 300, 0)


def test_a_single_document():
    with pytest.raises(InputError, match="data: one document only"):
        data.split_documents(["text"], 0.1)


def test_a_corpus_too_small_for_a_window():
    with pytest.raises(InputError, match="training documents hold 4 tokens, too few"):
        data.cut_windows(np.arange(4), 4, "training")


def test_a_corpus_too_small_for_a_batch(config, corpus):
    with pytest.raises(InputError, match="fill 6 windows, too few for a batch of 8"):
        data.train_batches(numbered(corpus, 200), config, 0)


def test_too_few_validation_windows(config, corpus):
    with pytest.raises(InputError, match="fill 6 windows, too few for 2 batches of 8"):
        data.validation_batches(numbered(corpus, 200), config)


def test_a_batch_that_does_not_divide_among_processes(config):
    with pytest.raises(InputError, match=r"batch_size \(8\) does not divide among 3"):
        data.load_data(config, 300, 0, 1, 3)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_vocabulary_too_small_for_bytes(name, request):
    config = replace(request.getfixturevalue(name), tokenizer="")
    with pytest.raises(InputError, match=r"vocab_size is 256: .* at least 257 tokens"):
        data.load_data(config, 256, 0)


@pytest.mark.parametrize("end", ["", "a", "the"])
def test_an_end_of_document_that_is_text(end, config, tmp_path):
    config = replace(config, end_of_document=end, cache_dir=tmp_path)
    with pytest.raises(InputError, match=f"end_of_document is '{end}': .* such as <"):
        data.load_data(config, 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_an_end_of_document_that_the_tokenizer_lacks(name, request, tokenizer_file):
    config = request.getfixturevalue(name)
    config = replace(config, tokenizer=str(tokenizer_file), end_of_document="</s>")
    message = r"end_of_document: '</s>' is not .*--end-of-document .*<\|endoftext\|>$"
    with pytest.raises(InputError, match=message):
        data.load_data(config, 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_tokenizer_with_more_tokens_than_the_model(name, request, tokenizer_file):
    config = replace(request.getfixturevalue(name), tokenizer=str(tokenizer_file))
    message = (
        "tokenizer.json has 300 tokens and the model's vocab_size is 299; pass "
        "--vocab-size 300, or 384"
    )
    with pytest.raises(InputError, match=message):
        data.load_data(config, 299, 0)


def test_a_file_that_is_not_a_tokenizer(config, tmp_path):
    (tmp_path / "file.json").write_text("{}")
    config = replace(config, tokenizer=str(tmp_path / "file.json"))
    with pytest.raises(InputError, match=r"tokenizer: .*file.json is not a tokenizer"):
        data.load_data(config, 300, 0)


def test_a_tokenizer_that_is_nowhere(config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"tokenizer: there is no file nobody/nothing, and none .* hub \(.*\)$"
    with pytest.raises(InputError, match=message):
        data.load_data(replace(config, tokenizer="nobody/nothing"), 300, 0)


def test_datasets_is_not_installed(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"data: hf:.* needs .* pip install '\.\[hf\]"):
        data.load_data(replace(config, data=("hf:allenai/c4:en",)), 300, 0)


def test_a_dataset_beside_files(stream_config, text_files):
    both = (*stream_config.data, str(text_files))
    with pytest.raises(InputError, match="data: a Hugging Face dataset is given alone"):
        data.load_data(replace(stream_config, data=both), 300, 0)


def test_a_dataset_that_is_nowhere(datasets, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"data: cannot load hf:nobody/none \(Couldn't"
    ):
        data.load_data(replace(config, data=("hf:nobody/none",)), 300, 0)


def test_a_directory_without_a_dataset(datasets, config, tmp_path):
    with pytest.raises(InputError, match=r"cannot load hf:.* \(The directory at "):
        data.load_data(replace(config, data=(f"hf:{tmp_path}",)), 300, 0)


def test_a_configuration_that_a_dataset_lacks(stream_config):
    (source,) = stream_config.data
    with pytest.raises(InputError, match=r"cannot load .*:de \(.*'de' not found"):
        data.load_data(replace(stream_config, data=(f"{source}:de",)), 300, 0)


@pytest.mark.parametrize("setting", ["train_split", "validation_split"])
def test_a_split_that_a_dataset_lacks(setting, stream_config):
    option = "--" + setting.replace("_", "-")
    message = f"{setting}: .* no split 'dev'; pass {option} .*: train, validation$"
    with pytest.raises(InputError, match=message):
        data.load_data(replace(stream_config, **{setting: "dev"}), 300, 0)


def test_a_column_that_a_dataset_lacks(stream_config):
    message = "text_column: .* no column 'body' .*pass --text-column .*: url, text$"
    with pytest.raises(InputError, match=message):
        data.load_data(replace(stream_config, text_column="body"), 300, 0)


def test_a_column_that_is_not_text(datasets, stream_config, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": 3}\n')
    config = replace(stream_config, data=(f"hf:{tmp_path}",), validation_split="train")
    with pytest.raises(InputError, match=r"text_column: .* no column 'text' of text"):
        data.load_data(config, 300, 0)


def test_a_dataset_that_cannot_be_read(datasets, stream_config, tmp_path):
    (tmp_path / "train.jsonl").write_text("this is not JSON\n")
    config = replace(stream_config, data=(f"hf:{tmp_path}",))
    with pytest.raises(InputError, match=r"data: cannot (load|read) hf:"):
        data.load_data(config, 300, 0)


def test_too_few_documents_for_the_processes(datasets, stream_config, tmp_path):
    write_shard(tmp_path / "train.json.gz", TRAINING[:2])
    write_shard(tmp_path / "validation.json.gz", VALIDATION)
    config = replace(stream_config, data=(f"hf:{tmp_path}",), batch_size=3)
    with pytest.raises(InputError, match="data: too few documents in train for 3 proc"):
        data.load_data(config, 300, 0, 2, 3)


def test_too_few_windows_to_validate_on(stream_config):
    config = replace(stream_config, validation_batches=1000)
    message = r"validation_split: .*fill \d+ windows, too few for 1000 batches of 4"
    with pytest.raises(InputError, match=message):
        data.load_data(config, 300, 0)
