"""The data of the Llama example, of text files and of streamed datasets."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.llama.checks import InputError
from examples.llama.config import END_OF_DOCUMENT, DataConfig
from examples.llama.data import load_data
from examples.llama.text_files import load_corpus, split_documents
from examples.llama.tokenizer import encode, load_tokenizer
from tests.examples.llama_data_fixtures import (
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


def test_validation_is_the_same_on_more_processes(config):
    whole = load_data(config, 300, 0).validation
    parts = [load_data(config, 300, 0, p, 4).validation for p in range(4)]
    assert whole.shape == (2, 8, 33)
    assert {part.shape for part in parts} == {(2, 2, 33)}
    for i in range(2):
        shares = np.concatenate([part[i] for part in parts])
        assert sorted_rows(shares) == sorted_rows(whole[i])


def test_the_corpus_is_summarized_once(config, capsys):
    corpus = load_corpus(config, 300)
    load_data(config, 300, 0, 1, 2)
    assert "Corpus" not in capsys.readouterr().out
    loaded = load_data(config, 300, 0)
    tokens = f"{len(corpus.train):,} and {len(corpus.validation):,} tokens."
    expected = f"Corpus: 27 training and 3 validation documents, {tokens}\n"
    assert capsys.readouterr().out == expected
    assert loaded.tokenizer.get_vocab_size() == 300


# Fingerprint


def fingerprint(config, *arguments):
    return load_data(config, 300, *(arguments or [0])).fingerprint


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_the_fingerprint_is_that_of_the_corpus(name, request, monkeypatch):
    config = request.getfixturevalue(name)
    expected = fingerprint(config)
    assert fingerprint(config, 1) == expected
    assert {fingerprint(config, 0, p, 4) for p in range(4)} == {expected}
    monkeypatch.setattr("tokenizers.__version__", "0.0.0")
    assert fingerprint(config) == expected


def test_the_fingerprint_of_text_files_is_of_their_text(
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
    # Of the documents that could replace it, one that leaves the other side as it is.
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
    # The document in which the first window ends, or the last.
    end = range(33, 2 * 8 * 33 + 1, 33)[window]
    changed = int(np.searchsorted(np.cumsum(lengths), end))
    documents = list(VALIDATION)
    documents[changed] = "another " + documents[changed]
    other = replace(
        stream_config, data=(f"hf:{write_dataset(tmp_path, validation=documents)}",)
    )
    assert fingerprint(other) != fingerprint(stream_config)


# Errors


def test_no_such_file(config, tmp_path):
    with pytest.raises(InputError, match=r"data: there is no .*missing"):
        load_data(replace(config, data=(str(tmp_path / "missing"),)), 300, 0)


def test_a_cache_directory_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(InputError, match=r"cache_dir: cannot make .*inside"):
        load_data(replace(config, cache_dir=inside), 300, 0)


def test_a_cache_directory_that_cannot_be_written(config, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("examples.llama.disk_cache.tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=r"cache_dir: cannot write to .*Permission"):
        load_data(replace(config, cache_dir=tmp_path), 300, 0)


def test_a_batch_that_does_not_divide_among_processes(config):
    with pytest.raises(InputError, match=r"batch_size \(8\) does not divide among 3"):
        load_data(config, 300, 0, 1, 3)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_vocabulary_too_small_for_bytes(name, request):
    config = replace(request.getfixturevalue(name), tokenizer="")
    with pytest.raises(InputError, match=r"vocab_size is 256: .* at least 257 tokens"):
        load_data(config, 256, 0)


@pytest.mark.parametrize("end", ["", "a", "the"])
def test_an_end_of_document_that_is_text(end, config, tmp_path):
    config = replace(config, end_of_document=end, cache_dir=tmp_path)
    with pytest.raises(InputError, match=f"end_of_document is '{end}': .* such as <"):
        load_data(config, 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_an_end_of_document_that_the_tokenizer_lacks(name, request, tokenizer_file):
    config = request.getfixturevalue(name)
    config = replace(config, tokenizer=str(tokenizer_file), end_of_document="</s>")
    message = r"end_of_document: '</s>' is not .*--end-of-document .*<\|endoftext\|>$"
    with pytest.raises(InputError, match=message):
        load_data(config, 300, 0)


@pytest.mark.parametrize("name", ["config", "stream_config"])
def test_a_tokenizer_with_more_tokens_than_the_model(name, request, tokenizer_file):
    config = replace(request.getfixturevalue(name), tokenizer=str(tokenizer_file))
    message = (
        "tokenizer.json has 300 tokens and the model's vocab_size is 299; pass "
        "--vocab-size 300, or 384"
    )
    with pytest.raises(InputError, match=message):
        load_data(config, 299, 0)


def test_a_file_that_is_not_a_tokenizer(config, tmp_path):
    (tmp_path / "file.json").write_text("{}")
    config = replace(config, tokenizer=str(tmp_path / "file.json"))
    with pytest.raises(InputError, match=r"tokenizer: .*file.json is not a tokenizer"):
        load_data(config, 300, 0)


def test_a_tokenizer_that_is_nowhere(config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"tokenizer: there is no file nobody/nothing, and none .* hub \(.*\)$"
    with pytest.raises(InputError, match=message):
        load_data(replace(config, tokenizer="nobody/nothing"), 300, 0)


def test_a_dataset_beside_files(config, stream_config):
    both = (*stream_config.data, *config.data)
    with pytest.raises(InputError, match="data: a Hugging Face dataset is given alone"):
        load_data(replace(stream_config, data=both), 300, 0)
