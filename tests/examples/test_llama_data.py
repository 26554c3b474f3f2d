"""Data loading in the Llama example, from text files and from streamed datasets."""

import errno
import shutil
from dataclasses import replace

import numpy as np
import pytest

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from tokenizers import Tokenizer, models

from examples.llama.config import END_OF_DOCUMENT, DataConfig
from examples.llama.data.cache import cached
from examples.llama.data.load import load_data
from examples.llama.data.text_files import load_corpus, split_documents
from examples.llama.data.tokenizer import encode, load_tokenizer
from examples.training.checks import InputError
from tests.examples.data_fixtures import (
    VALIDATION,
    make_documents,
    save_tokenizer,
    sorted_rows,
    write_dataset,
    write_text_files,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = write_text_files(tmp_path_factory.mktemp("documents"))
    return DataConfig(
        data=(str(directory),),
        cache_dir=tmp_path_factory.mktemp("cache"),
        sequence_length=32,
        batch_size=8,
        validation_batches=2,
    )


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def stream_config(config, tokenizer_file, tmp_path_factory):
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    directory = write_dataset(tmp_path_factory.mktemp("dataset"))
    return replace(config, data=(f"hf:{directory}",), tokenizer=str(tokenizer_file))


def test_validation_does_not_depend_on_the_number_of_processes(config):
    whole = load_data(config, 300, 0).validation
    parts = [load_data(config, 300, 0, p, 4).validation for p in range(4)]
    assert whole.shape == (2, 8, 33)
    assert {part.shape for part in parts} == {(2, 2, 33)}
    for i in range(2):
        shares = np.concatenate([part[i] for part in parts])
        assert sorted_rows(shares) == sorted_rows(whole[i])


def test_only_the_first_process_summarizes_the_corpus(config, capsys):
    corpus = load_corpus(config, 300)
    load_data(config, 300, 0, 1, 2)
    assert "Corpus" not in capsys.readouterr().out
    loaded = load_data(config, 300, 0)
    tokens = f"{len(corpus.train):,} and {len(corpus.validation):,} tokens."
    expected = f"Corpus: 27 training and 3 validation documents, {tokens}\n"
    assert capsys.readouterr().out == expected
    assert loaded.files == {"tokenizer.json": corpus.tokenizer.to_str(pretty=True)}


# Fingerprint


def fingerprint(config, *arguments):
    return load_data(config, 300, *(arguments or [0])).fingerprint


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_the_fingerprint_depends_only_on_the_corpus(name, request, monkeypatch):
    config = request.getfixturevalue(name)
    expected = fingerprint(config)
    assert fingerprint(config, 1) == expected
    assert {fingerprint(config, 0, p, 4) for p in range(4)} == {expected}
    monkeypatch.setattr("tokenizers.__version__", "0.0.0")
    assert fingerprint(config) == expected


def test_the_fingerprint_of_text_files_depends_only_on_their_text(
    config, tokenizer_file, tmp_path
):
    (directory,) = config.data
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "0.txt").rename(tmp_path / "copy" / "renamed")
    expected = fingerprint(config)
    assert fingerprint(replace(config, data=(str(tmp_path / "copy"),))) == expected
    assert fingerprint(replace(config, tokenizer=str(tokenizer_file))) == expected
    assert fingerprint(replace(config, end_of_document="[END]")) == expected
    assert fingerprint(replace(config, validation_fraction=0.2)) != expected


@pytest.mark.parametrize("changed", [0, 1])
def test_the_fingerprint_of_text_files_changes_with_a_document(
    changed, config, tokenizer_file, tmp_path
):
    sides = split_documents(make_documents(30, 400), 0.1)
    others = [text for text in sides[0] + sides[1] if text != sides[changed][0]]
    # Find a replacement that leaves the documents of the other split unchanged.
    documents = next(
        documents
        for text in make_documents(1000, 400, seed=3)
        if split_documents(documents := [*others, text], 0.1)[1 - changed]
        == sides[1 - changed]
    )
    for i, text in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(text)
    config = replace(config, tokenizer=str(tokenizer_file))
    other = replace(config, data=(str(tmp_path),))
    assert fingerprint(other) != fingerprint(config)


@pytest.mark.parametrize("window", [0, -1])
def test_the_fingerprint_of_a_stream_changes_with_a_document(
    window, stream_config, tokenizer_file, tmp_path
):
    tokenizer = load_tokenizer(str(tokenizer_file))
    lengths = [len(encode([text], tokenizer, END_OF_DOCUMENT)) for text in VALIDATION]
    # Change the document in which the first or the last window ends.
    end = range(33, 2 * 8 * 33 + 1, 33)[window]
    changed = int(np.searchsorted(np.cumsum(lengths), end))
    documents = list(VALIDATION)
    documents[changed] = "another " + documents[changed]
    other = replace(
        stream_config, data=(f"hf:{write_dataset(tmp_path, validation=documents)}",)
    )
    assert fingerprint(other) != fingerprint(stream_config)


# Errors


def test_a_missing_file(config, tmp_path):
    with pytest.raises(InputError, match=r"data: .*missing does not exist"):
        load_data(replace(config, data=(str(tmp_path / "missing"),)), 300, 0)


def test_a_cache_directory_that_cannot_be_created(config, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(InputError, match=r"cache_dir: cannot create .*inside"):
        load_data(replace(config, cache_dir=inside), 300, 0)


def test_a_cache_directory_that_cannot_be_written(config, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("examples.llama.data.cache.tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=r"cache_dir: cannot write to .*Permission"):
        load_data(replace(config, cache_dir=tmp_path), 300, 0)


@pytest.mark.parametrize("room", [1000, 20_000])  # The tokenizer, or the tokens.
def test_a_cache_directory_on_a_full_disk(room, config, tmp_path):
    resource = pytest.importorskip("resource", reason="needed to limit file sizes")
    config = replace(config, cache_dir=tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    message = r"cache_dir: cannot write to .* \(.*\); free some space .*--cache-dir\.$"
    try:
        with pytest.raises(InputError, match=message):
            load_data(config, 300, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "llama").iterdir()) == []
    assert load_data(config, 300, 0).validation.shape == (2, 8, 33)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        # As raised by NumPy.
        (OSError("52224 requested and 16384 written"), "52224 requested and 16384 wr"),
    ],
)
def test_errors_while_filling_a_cache_directory(error, reason, tmp_path):
    def fill(directory):
        (directory / "part").write_text("some of it")
        raise error

    with pytest.raises(InputError, match=rf"cache_dir: .*llama \({reason}.*\); free"):
        cached(tmp_path, ["key"], fill)
    assert list((tmp_path / "llama").iterdir()) == []


def test_a_cache_directory_filled_by_another_process_meanwhile(tmp_path):
    def fill(directory):
        (directory / "part").write_text("first")
        cached(tmp_path, ["key"], lambda d: (d / "part").write_text("second"))

    directory = cached(tmp_path, ["key"], fill)
    assert (directory / "part").read_text() == "second"
    assert list((tmp_path / "llama").iterdir()) == [directory]


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_vocabulary_too_small_for_bytes(name, request):
    config = replace(request.getfixturevalue(name), tokenizer="")
    with pytest.raises(InputError, match=r"vocab_size must be at least 257, got 256"):
        load_data(config, 256, 0)


@pytest.mark.parametrize("end", ["", "a", "the"])
def test_an_end_of_document_that_is_text(end, config, tmp_path):
    config = replace(config, end_of_document=end, cache_dir=tmp_path)
    message = f"end_of_document must not be .*, got '{end}'; pass .* such as <"
    with pytest.raises(InputError, match=message):
        load_data(config, 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_an_end_of_document_missing_from_the_tokenizer(name, request, tokenizer_file):
    config = request.getfixturevalue(name)
    config = replace(config, tokenizer=str(tokenizer_file), end_of_document="</s>")
    message = r"end_of_document: '</s>' is not .*--end-of-document .*<\|endoftext\|>\)"
    with pytest.raises(InputError, match=message):
        load_data(config, 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_tokenizer_with_more_tokens_than_the_model(name, request, tokenizer_file):
    config = replace(request.getfixturevalue(name), tokenizer=str(tokenizer_file))
    message = (
        "tokenizer.json has 300 tokens, but the model's vocab_size is 299; pass "
        "--vocab-size 300, or 384"
    )
    with pytest.raises(InputError, match=message):
        load_data(config, 299, 0)


def test_a_file_that_is_not_a_tokenizer(config, tmp_path):
    (tmp_path / "file.json").write_text("{}")
    config = replace(config, tokenizer=str(tmp_path / "file.json"))
    with pytest.raises(InputError, match=r"tokenizer: .*file.json is not a valid tok"):
        load_data(config, 300, 0)


def test_a_missing_tokenizer(config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"tokenizer: nobody/nothing is neither a file nor .* Hub \(.*\)\.$"
    with pytest.raises(InputError, match=message):
        load_data(replace(config, tokenizer="nobody/nothing"), 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_tokenizer_is_checked_on_the_text(name, request, tmp_path, capsys):
    config = request.getfixturevalue(name)
    letters = "abcdefghijklmnopqrstuvwxyz"
    model = models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    tokenizer.save(str(tmp_path / "small.json"))
    config = replace(config, tokenizer=str(tmp_path / "small.json"), cache_dir=tmp_path)
    for _ in range(2):  # The second time, the tokens come from the cache.
        load_data(config, 300, 0)
        printed = capsys.readouterr().out
        assert printed.count("Warning: the tokenizer ") == 1
        assert "small.json has no token for " in printed

    few = Tokenizer(models.BPE({"e": 0}, []))
    few.add_special_tokens([END_OF_DOCUMENT])
    few.save(str(tmp_path / "few.json"))
    with pytest.raises(InputError, match=r"tokenizer: .*few.json has no token for"):
        load_data(replace(config, tokenizer=str(tmp_path / "few.json")), 300, 0)

    unigram = Tokenizer(models.Unigram([("e", -1.0)]))
    unigram.add_special_tokens([END_OF_DOCUMENT])
    unigram.save(str(tmp_path / "unigram.json"))
    with pytest.raises(InputError, match="tokenizer: cannot tokenize the text"):
        load_data(replace(config, tokenizer=str(tmp_path / "unigram.json")), 300, 0)


def test_a_dataset_beside_files(config, stream_config):
    both = (*stream_config.data, *config.data)
    with pytest.raises(InputError, match="data: a Hugging Face dataset cannot be comb"):
        load_data(replace(stream_config, data=both), 300, 0)
