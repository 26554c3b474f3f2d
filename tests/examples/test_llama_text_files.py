"""Text files of the Llama example, from documents to batches."""

import sysconfig
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import grain
from tokenizers import Tokenizer

from examples.llama.config import END_OF_DOCUMENT, DataConfig
from examples.llama.data.text_files import (
    cut_document,
    cut_windows,
    load_corpus,
    pack,
    read_documents,
    split_documents,
    train_batches,
    validation_batches,
)
from examples.training.checks import InputError
from tests.examples.data_fixtures import (
    assert_resumes,
    make_documents,
    record_training,
    short_turns,
    sorted_rows,
    split_at_ends,
    write_text_files,
)


@pytest.fixture(scope="module", autouse=True)
def threads_take_turns_often():
    with short_turns():
        yield


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    return write_text_files(tmp_path_factory.mktemp("documents"))


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
    return load_corpus(config, 300)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def trained(monkeypatch):
    return record_training(monkeypatch, "text_files")


def numbered(corpus, tokens):
    """Replace the tokens of a corpus with their positions."""
    return replace(corpus, train=np.arange(tokens), validation=np.arange(tokens))


# Documents


def test_validation_shares_no_document_with_training():
    documents = [f"document {i}" for i in range(50)]
    training, validation = split_documents(documents, 0.1)
    assert len(validation) == 5
    assert sorted(training + validation) == sorted(documents)
    assert split_documents(documents[::-1], 0.1) == (training, validation)
    assert validation != documents[:5]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_gets_a_document(fraction):
    training, validation = split_documents(["a", "b", "c"], fraction)
    assert min(len(training), len(validation)) == 1


def test_duplicate_and_empty_documents_are_dropped(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other"), ("d", " \n")):
        (tmp_path / name).write_text(text)
    assert read_documents((tmp_path,)) == ["same", "other"]


def test_the_standard_library_is_read_without_its_tests():
    documents = set(read_documents(()))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert (stdlib / "json" / "decoder.py").read_bytes().decode() in documents
    tests = [*stdlib.glob("test/test_j*.py"), *stdlib.glob("idlelib/idle_test/t*.py")]
    assert not documents.intersection(file.read_bytes().decode() for file in tests)


def test_a_directory_may_contain_other_files(tmp_path, capsys):
    (tmp_path / "text").write_text("some text")
    for i in range(5):
        (tmp_path / f"image{i}").write_bytes(b"\xff\xd8\xff")
    assert read_documents((tmp_path,)) == ["some text"]
    named = ", ".join(str(tmp_path / f"image{i}") for i in range(3))
    expected = f"Skipped 5 files that are not readable UTF-8 text: {named} and 2 more."
    assert expected in capsys.readouterr().out


def test_a_file_name_that_is_not_utf8(tmp_path, capsys):
    (tmp_path / "text").write_text("some text")
    try:
        (tmp_path / "\udcff").write_bytes(b"\xff")
    except OSError:
        pytest.skip("the file system does not allow such names")
    assert read_documents((tmp_path,)) == ["some text"]
    printed = capsys.readouterr().out.encode().decode()
    assert "Skipped 1 files" in printed
    assert r"\udcff." in printed


def test_hidden_files_in_a_directory_are_ignored(tmp_path, capsys):
    directory = tmp_path / ".corpus"
    for name in ("text", ".notes", ".git/config", "below/.git/refs/main", "below/text"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    assert read_documents((directory,)) == ["below/text", "text"]
    assert "Ignored 3 hidden files: " in (printed := capsys.readouterr().out)
    assert f"{directory}/.git/config" in printed
    assert read_documents((directory / ".notes",)) == [".notes"]


def test_an_empty_name(config):
    with pytest.raises(InputError, match=r"data: '' is not a file; omit --data"):
        load_corpus(replace(config, data=("",)), 300)


ROWS = '{"text": "some text"}\n'


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "below/a.JSONL.GZ", "a.parquet", "a.csv", "a.arrow", "a.json.gz"],
)
def test_a_directory_of_data_files(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for file in (name, "README.md", "LICENSE", "dataset_infos.json", ".gitattributes"):
        (tmp_path / file).write_text(ROWS)
    message = f"data: .*data files .*{name}; pass --data hf:{tmp_path}, .*--text-co"
    with pytest.raises(InputError, match=message):
        read_documents((tmp_path,))


def test_json_files_are_data_if_there_is_no_other_text(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(name)
    with pytest.raises(
        InputError, match=r"data files .*a.json, .*b.json; pass --data hf:"
    ):
        read_documents((tmp_path,))
    (tmp_path / "text").write_text("text")
    assert read_documents((tmp_path,)) == ["a.json", "b.json", "text"]


def test_data_files_among_text_files_are_ignored(tmp_path, capsys):
    for name in ("table.csv", "train.jsonl", "notes.txt", "settings.json"):
        (tmp_path / name).write_text(name)
    assert read_documents((tmp_path,)) == ["notes.txt", "settings.json"]
    printed = capsys.readouterr().out
    assert f"Ignored 2 data files among the text files: {tmp_path}/ta" in printed
    assert f"{tmp_path}/train.jsonl. To train on them instead, " in printed


def test_a_named_data_file(tmp_path):
    for name in ("train.jsonl", "notes.txt"):
        (tmp_path / name).write_text(ROWS)
    message = r"data: .*data files .*train.jsonl; make a directory .* hf:DIRECTORY"
    with pytest.raises(InputError, match=message):
        read_documents((tmp_path / "notes.txt", tmp_path / "train.jsonl"))


def test_a_named_file_that_is_not_text(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"data: cannot read .*binary \(not UTF-8"):
        read_documents((tmp_path / "binary",))


def test_a_named_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret").write_text("text")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read .*secret \(Permission denied"):
        read_documents((tmp_path / "secret",))


def test_a_directory_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"data: no text in .*; pass text files as"):
        read_documents((tmp_path,))


# A single document


PARAGRAPHS = [f"{i}, {text}" for i, text in enumerate(make_documents(3000, 120))]


def test_a_single_file_is_cut_at_blank_lines(config, tmp_path, capsys):
    text = "\n\n".join(PARAGRAPHS)
    assert len(text) > 2_000_000
    (tmp_path / "book.txt").write_text(text)
    corpus = load_corpus(replace(config, data=(str(tmp_path / "book.txt"),)), 300)
    cut = (
        f"Cut the only document, of {len(text):,} characters, into "
        f"{sum(corpus.documents)} distinct pieces, at blank lines"
    )
    assert cut in capsys.readouterr().out
    assert corpus.documents[1] == round(0.1 * sum(corpus.documents))
    training, validation = (
        split_at_ends(stream, corpus.tokenizer)
        for stream in (corpus.train, corpus.validation)
    )
    pieces = cut_document(text)
    assert sorted(training + validation) == sorted(pieces)
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert not {*training} & {*validation}


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("\n\n".join(PARAGRAPHS[:300]), "\n\n"),
        ("\r\n \r\n".join(PARAGRAPHS[:300]), "\r\n \r\n"),
        ("\n".join(PARAGRAPHS[:300]), "\n"),
        (" ".join(PARAGRAPHS[:300]).replace("\n", " "), ""),
        ("\n\n".join(PARAGRAPHS[:4]), "\n\n"),
    ],
)
def test_a_document_is_cut_at_the_best_boundaries(text, end):
    pieces = cut_document(text)
    assert "".join(pieces) == text
    assert all(piece.endswith(end) for piece in pieces[:-1])
    shortest = max(1000, len(text) // 100)
    assert all(shortest <= len(piece) < 3 * shortest for piece in pieces)
    assert 50 <= len(pieces) <= 100 or len(text) < 100_000


LINES = 2 * ("a" * 999 + "\n")


def test_duplicate_pieces_are_dropped():
    assert cut_document(10 * LINES + "end") == [LINES, LINES + "end"]


def test_several_files_are_not_cut(config, tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).write_text("\n\n".join([name, *PARAGRAPHS[:50]]))
    corpus = load_corpus(replace(config, data=(str(tmp_path),)), 300)
    assert corpus.documents == (1, 1)
    assert "Cut the only document" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["a" * 2999, 10 * LINES])
def test_a_single_document_too_short_to_be_cut(text, config, tmp_path):
    (tmp_path / "file").write_text(text)
    message = r"data: only one document, of [\d,]+ characters \(not c.* 3,000 charact"
    with pytest.raises(InputError, match=message):
        load_corpus(replace(config, data=(str(tmp_path),)), 300)


# Windows and batches


def test_packing_keeps_every_token(tokenizer):
    documents = [f"document {i} " * i for i in range(1, 70)]
    stream = pack(documents, tokenizer, END_OF_DOCUMENT)
    assert split_at_ends(stream, tokenizer) == documents
    assert stream[-1] == tokenizer.token_to_id(END_OF_DOCUMENT)
    assert stream.dtype == np.uint16


@pytest.mark.parametrize("tokens", [5, 20, 21, 24, 1000])
def test_windows_drop_only_the_tail(tokens):
    stream = np.arange(tokens)
    windows = cut_windows(stream, 4, "training")
    kept = np.concatenate([windows[0], windows[1:, 1:].ravel()])
    np.testing.assert_array_equal(kept, stream[: len(kept)])
    assert 0 <= tokens - len(kept) < 4


def test_the_seed_determines_the_order_of_the_windows(config, corpus):
    windows = cut_windows(corpus.train, 32, "training")
    shuffled = grain.MapDataset.source(windows).shuffle(3).repeat()
    expected = shuffled.batch(8)
    batches = train_batches(corpus, config, seed=3)
    steps = 3 * len(windows) // 8
    for step, batch in enumerate(islice(batches, steps)):
        np.testing.assert_array_equal(batch, expected[step])
    assert batch.shape == (8, 33)
    assert batch.dtype == np.uint16
    other = next(iter(train_batches(corpus, config, seed=4)))
    assert (other != expected[0]).any()


def test_an_epoch_takes_each_window_once_in_a_new_order(config, corpus):
    short = replace(config, sequence_length=4)
    stream = numbered(corpus, 8 * 4 * 5 + 1)
    batches = iter(train_batches(stream, short, seed=0))
    epochs = [np.concatenate([next(batches) for _ in range(5)]) for _ in range(2)]
    for windows in epochs:
        assert sorted(windows[:, 0].tolist()) == list(range(0, 160, 4))
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_batches_of_a_single_process(count, config, corpus):
    whole = islice(train_batches(corpus, config, 5), 60)
    parts = [train_batches(corpus, config, 5, p, count) for p in range(count)]
    for batch, *shares in zip(whole, *parts):
        assert {share.shape for share in shares} == {(8 // count, 33)}
        assert sorted_rows(np.concatenate(shares)) == sorted_rows(batch)


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2)])
def test_batches_resume_from_a_state(index, count, config, corpus):
    short = replace(config, sequence_length=4)
    stream = numbered(corpus, 8 * 4 * 5 + 12)  # An epoch ends within a batch.
    assert_resumes(train_batches(stream, short, 0, index, count), 18)


def test_validation_windows_span_the_stream(config, corpus):
    chosen = validation_batches(numbered(corpus, 32 * 100 + 1), config)
    assert chosen.shape == (2, 8, 33)
    windows = chosen.reshape(16, 33)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 3200
    assert len(np.unique(windows[:, 0])) == 16


def test_a_corpus_too_small_for_a_window():
    with pytest.raises(InputError, match="training documents have 4 tokens, too few"):
        cut_windows(np.arange(4), 4, "training")


def test_a_corpus_too_small_for_a_batch(config, corpus):
    with pytest.raises(InputError, match="fill 6 windows, too few for a batch of 8"):
        train_batches(numbered(corpus, 200), config, 0)


def test_too_few_validation_windows(config, corpus):
    with pytest.raises(InputError, match="fill 6 windows, too few for 2 batches of 8"):
        validation_batches(numbered(corpus, 200), config)


# Cache


def test_the_cache_is_used_only_for_the_same_corpus_and_settings(
    text_files, config, corpus, tmp_path, trained
):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in text_files.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    again = load_corpus(replace(config, data=(str(copy),)), 300)
    assert trained == []
    np.testing.assert_array_equal(again.train, corpus.train)
    np.testing.assert_array_equal(again.validation, corpus.validation)
    assert isinstance(again.train, np.memmap)
    assert again.tokenizer.encode(END_OF_DOCUMENT).ids == (
        corpus.tokenizer.encode(END_OF_DOCUMENT).ids
    )

    assert load_corpus(config, 310).tokenizer.get_vocab_size() == 310
    (copy / "0.txt").write_text("something else entirely")
    changed = load_corpus(replace(config, data=(str(copy),)), 300)
    half = load_corpus(replace(config, validation_fraction=0.5), 300)
    ended = load_corpus(replace(config, end_of_document="[END]"), 300)
    assert trained == [310, 300, 300, 300]
    assert len(changed.train) + len(changed.validation) != (
        len(corpus.train) + len(corpus.validation)
    )
    assert len(half.validation) > 2 * len(corpus.validation)
    assert ended.train[-1] == ended.tokenizer.token_to_id("[END]")


def test_the_cache_distinguishes_given_tokenizers(
    config, corpus, tokenizer_file, tmp_path, trained
):
    given = replace(config, tokenizer=str(tokenizer_file), cache_dir=tmp_path / "new")
    same = load_corpus(given, 1000)  # More than the tokenizer has.
    np.testing.assert_array_equal(same.train, corpus.train)

    other = Tokenizer.from_file(str(tokenizer_file))
    other.add_special_tokens(["[END]"])
    other.save(str(tmp_path / "other.json"))
    given = replace(given, tokenizer=str(tmp_path / "other.json"))
    ended = load_corpus(replace(given, end_of_document="[END]"), 1000)
    assert ended.train[-1] == 300
    assert load_corpus(given, 1000).train[-1] == corpus.train[-1]
    assert trained == []


def test_a_partially_written_cache_is_removed(config, tmp_path, monkeypatch):
    def interrupted(documents, tokenizer, end_of_document):
        raise KeyboardInterrupt

    elsewhere = replace(config, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("examples.llama.data.text_files.pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_corpus(elsewhere, 300)
    assert list((tmp_path / "llama").iterdir()) == []
    assert len(load_corpus(elsewhere, 300).train) > 0
