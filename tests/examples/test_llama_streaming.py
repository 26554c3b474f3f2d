"""Streamed datasets of the Llama example."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.llama.config import END_OF_DOCUMENT, DataConfig
from examples.llama.data.load import load_data
from examples.llama.data.streaming import open_splits, stream_tokenizer
from examples.llama.data.tokenizer import encode, load_tokenizer, train_tokenizer
from examples.training.checks import InputError
from tests.examples.data_fixtures import (
    TRAINING,
    VALIDATION,
    assert_resumes,
    make_documents,
    record_training,
    save_tokenizer,
    short_turns,
    sorted_rows,
    split_at_ends,
    write_dataset,
    write_shard,
)


@pytest.fixture(scope="module", autouse=True)
def threads_take_turns_often():
    with short_turns():
        yield


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return load_tokenizer(str(tokenizer_file))


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs the extra [hf]")


@pytest.fixture(scope="module")
def shards(request, datasets, tmp_path_factory):
    kind = getattr(request, "param", "parquet")
    return write_dataset(tmp_path_factory.mktemp("dataset"), kind)


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


@pytest.fixture
def trained(monkeypatch):
    return record_training(monkeypatch, "streaming")


both_kinds = pytest.mark.parametrize("shards", ["parquet", "json.gz"], indirect=True)


def in_order(config):
    """Change the settings so that the windows of a stream are not shuffled."""
    return replace(config, batch_size=1, shuffle_windows=1)


def take_windows(dataset, count):
    return np.concatenate(list(islice(dataset, count)))


def read_documents(dataset, count, tokenizer):
    """Read the first documents from batches of unshuffled windows."""
    stream = np.empty(0, np.uint16)
    for batch in dataset:
        stream = np.append(stream, batch)
        if (stream == tokenizer.token_to_id(END_OF_DOCUMENT)).sum() >= count:
            return split_at_ends(stream, tokenizer)[:count]


@both_kinds
def test_a_stream_keeps_every_token(stream_config, tokenizer):
    loaded = load_data(in_order(stream_config), 300, 0)
    expected = encode(TRAINING, tokenizer, END_OF_DOCUMENT)
    windows = take_windows(loaded.train, len(expected) // 17)
    assert windows.dtype == np.uint16
    np.testing.assert_array_equal(windows.ravel(), expected[: windows.size])
    assert read_documents(loaded.train, 3 * 48, tokenizer) == 3 * TRAINING


@both_kinds
@pytest.mark.parametrize("count", [2, 3, 4])  # Three does not divide the four files.
def test_one_process_reads_each_document_per_epoch(count, stream_config, tokenizer):
    config = replace(in_order(stream_config), batch_size=count)
    own = 48 // count
    parts = [
        read_documents(load_data(config, 300, 0, p, count).train, 2 * own, tokenizer)
        for p in range(count)
    ]
    for some in (slice(own), slice(own, None)):
        documents = [text for part in parts for text in part[some]]
        assert sorted(documents) == sorted(TRAINING)


@both_kinds
@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2), (2, 3)])
def test_a_stream_resumes_from_a_state(index, count, stream_config, tokenizer):
    config = replace(stream_config, batch_size=4 * count)
    loaded = load_data(config, 300, 0, index, count)
    own_tokens = len(encode(TRAINING, tokenizer, END_OF_DOCUMENT)) // count
    steps = 2 * own_tokens // (4 * 17)  # Two epochs.
    assert_resumes(loaded.train, steps, every=3)


@pytest.mark.parametrize("length", [1, 4, 200])
def test_a_stream_of_short_or_long_windows_resumes(length, stream_config):
    config = replace(stream_config, sequence_length=length, validation_batches=1)
    assert_resumes(load_data(config, 300, 0).train, 15, every=2)


def test_a_state_is_small(stream_config):
    iterator = iter(load_data(stream_config, 300, 0).train)
    for _ in range(20):
        next(iterator)
    assert len(json.dumps(iterator.get_state())) < 2000


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_stream_is_shuffled_in_blocks_of_windows(seed, stream_config):
    plain = take_windows(load_data(in_order(stream_config), 300, 0).train, 28)
    shuffled = take_windows(load_data(stream_config, 300, seed).train, 7)
    again = take_windows(load_data(stream_config, 300, seed).train, 7)
    other = take_windows(load_data(stream_config, 300, 1).train, 7)
    for start in range(0, 28, 7):
        some = slice(start, start + 7)
        assert sorted_rows(shuffled[some]) == sorted_rows(plain[some])
    np.testing.assert_array_equal(shuffled, again)
    assert (shuffled != plain).any()
    assert (shuffled != other).any()


def test_each_epoch_is_shuffled_differently(stream_config, tokenizer):
    pairs, odd = divmod(len(encode(TRAINING, tokenizer, END_OF_DOCUMENT)), 2)
    assert not odd
    # The shuffle block is the whole epoch.
    config = replace(
        stream_config, sequence_length=1, batch_size=1, shuffle_windows=pairs
    )
    windows = take_windows(load_data(config, 300, 0).train, 2 * pairs)
    first, second = np.split(windows, 2)
    assert sorted_rows(first) == sorted_rows(second)
    assert (first != second).any()


def test_validation_uses_the_first_windows(stream_config, tokenizer, capsys):
    loaded = load_data(stream_config, 300, 0)
    expected = encode(VALIDATION, tokenizer, END_OF_DOCUMENT)[: 2 * 4 * 17]
    np.testing.assert_array_equal(loaded.validation, expected.reshape(2, 4, 17))
    assert "validation on the first 8 windows of validation." in capsys.readouterr().out
    parts = [load_data(stream_config, 300, 0, p, 2).validation for p in range(2)]
    assert "Corpus" in (output := capsys.readouterr().out)
    assert output.count("Corpus") == 1
    for i in range(2):
        shares = np.concatenate([part[i] for part in parts])
        assert sorted_rows(shares) == sorted_rows(loaded.validation[i])


def test_validation_on_training_documents_is_reported(stream_config, capsys):
    load_data(replace(stream_config, validation_split="train"), 300, 0)
    assert "windows of train, which are also trained on." in capsys.readouterr().out


def test_a_text_column_with_missing_values(
    datasets, stream_config, tmp_path, tokenizer
):
    rows = [{"body": "one"}, {"body": None}, {"body": "two"}]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows * 20)
        (tmp_path / f"{split}.jsonl").write_text(text)
    config = replace(stream_config, data=(f"hf:{tmp_path}",), text_column="body")
    loaded = load_data(in_order(config), 300, 0)
    assert read_documents(loaded.train, 3, tokenizer) == ["one", "", "two"]


def test_a_tokenizer_for_a_stream_is_trained_once(stream_config, tmp_path, trained):
    config = replace(stream_config, tokenizer="", cache_dir=tmp_path)
    first = load_data(config, 300, 0).files
    train, _ = open_splits(config)
    again = stream_tokenizer(train, config, 300)
    expected = train_tokenizer(TRAINING, 300, END_OF_DOCUMENT)
    assert first == {"tokenizer.json": expected.to_str(pretty=True)}
    assert again.to_str() == expected.to_str()
    assert again.encode(END_OF_DOCUMENT).ids == expected.encode(END_OF_DOCUMENT).ids
    load_data(config, 310, 0)
    load_data(replace(config, text_column="url", validation_batches=1), 300, 0)
    assert trained == [300, 310, 300]


def test_a_tokenizer_is_trained_on_the_first_documents(
    stream_config, tmp_path, monkeypatch
):
    monkeypatch.setattr("examples.llama.data.streaming._TOKENIZER_DOCUMENTS", 5)
    config = replace(stream_config, tokenizer="", cache_dir=tmp_path)
    loaded = load_data(config, 300, 0)
    expected = train_tokenizer(TRAINING[:5], 300, END_OF_DOCUMENT)
    assert loaded.files == {"tokenizer.json": expected.to_str(pretty=True)}


def test_the_dataset_name_and_configuration_are_passed_on(
    datasets, stream_config, shards, monkeypatch
):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return original(str(shards), **settings)

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("hf:allenai/c4:en", "hf:owner/name"):
        load_data(replace(stream_config, data=(source,)), 300, 0)
    streaming = {"streaming": True}
    assert asked == [
        (("allenai/c4", "en"), streaming),
        (("owner/name", None), streaming),
    ]


def test_a_program_can_exit_while_it_prefetches(datasets, tokenizer_file, tmp_path):
    write_shard(tmp_path / "train.parquet", make_documents(3000, 100))
    write_shard(tmp_path / "validation.parquet", VALIDATION)
    script = f"""
from pathlib import Path
from examples.llama.config import DataConfig
from examples.llama.data.load import load_data
config = DataConfig(
    data=("hf:{tmp_path}",), tokenizer="{tokenizer_file}", cache_dir=Path("unused"),
    sequence_length=16, batch_size=4, validation_batches=2, shuffle_windows=3000
)
iterator = iter(load_data(config, 300, 0).train)
print(next(iterator).shape)
"""
    root = Path(__file__).parents[2]
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


def test_without_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"data: hf:.* needs .* pip install '\.\[hf\]"):
        load_data(DataConfig(data=("hf:allenai/c4:en",)), 300, 0)


def test_a_missing_dataset(stream_config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"data: cannot load hf:nobody/none \(Couldn't"
    ):
        load_data(replace(stream_config, data=("hf:nobody/none",)), 300, 0)


def test_a_directory_without_a_dataset(stream_config, tmp_path):
    with pytest.raises(InputError, match=r"cannot load hf:.* \(The directory at "):
        load_data(replace(stream_config, data=(f"hf:{tmp_path}",)), 300, 0)


def test_files_that_accompany_data_files_are_not_documents(stream_config, tmp_path):
    write_dataset(tmp_path, "json.gz")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / name).write_text("some text")
    with pytest.raises(InputError, match=f"pass --data hf:{tmp_path}, and --text-col"):
        load_data(replace(stream_config, data=(str(tmp_path),)), 300, 0)
    # The suggestion in the message works.
    loaded = load_data(replace(stream_config, data=(f"hf:{tmp_path}",)), 300, 0)
    expected = load_data(stream_config, 300, 0)
    np.testing.assert_array_equal(loaded.validation, expected.validation)


def test_a_dataset_of_one_file(stream_config, shards):
    (file,) = shards.glob("validation*")
    message = r"data: hf:.* is one file, .* make a directory with a file train\.\* and "
    with pytest.raises(InputError, match=message):
        load_data(replace(stream_config, data=(f"hf:{file}",)), 300, 0)


@pytest.mark.parametrize("tokenizer", ["", "given"])
def test_documents_that_cannot_be_read(
    tokenizer, stream_config, tokenizer_file, tmp_path, monkeypatch
):
    def texts(dataset, read):
        yield "some text"
        raise ConnectionError("the network is down")

    monkeypatch.setattr("examples.llama.data.streaming.read_rows", texts)
    given = str(tokenizer_file) if tokenizer else ""
    config = replace(stream_config, tokenizer=given, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"data: cannot read hf:.* \(the network is"):
        load_data(config, 300, 0)


def test_a_missing_dataset_configuration(stream_config):
    (source,) = stream_config.data
    with pytest.raises(InputError, match=r"cannot load .*:de \(.*'de' not found"):
        load_data(replace(stream_config, data=(f"{source}:de",)), 300, 0)


@pytest.mark.parametrize("setting", ["train_split", "validation_split"])
def test_a_missing_split(setting, stream_config):
    option = "--" + setting.replace("_", "-")
    message = f"{setting}: .* no split 'dev'; pass {option} .*: train, validation\\.$"
    with pytest.raises(InputError, match=message):
        load_data(replace(stream_config, **{setting: "dev"}), 300, 0)


def test_a_missing_column(stream_config):
    message = "text_column: .* no column 'body' .*pass --text-column .*: url, text\\.$"
    with pytest.raises(InputError, match=message):
        load_data(replace(stream_config, text_column="body"), 300, 0)


def test_a_column_that_is_not_text(datasets, stream_config, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": 3}\n')
    config = replace(stream_config, data=(f"hf:{tmp_path}",), validation_split="train")
    with pytest.raises(InputError, match=r"text_column: .* no column 'text' of text"):
        load_data(config, 300, 0)


def test_a_dataset_that_cannot_be_read(datasets, stream_config, tmp_path):
    (tmp_path / "train.jsonl").write_text("this is not JSON\n")
    config = replace(stream_config, data=(f"hf:{tmp_path}",))
    with pytest.raises(InputError, match=r"data: cannot (load|read) hf:"):
        load_data(config, 300, 0)


def test_too_few_documents_for_the_processes(datasets, stream_config, tmp_path):
    write_shard(tmp_path / "train.json.gz", TRAINING[:2])
    write_shard(tmp_path / "validation.json.gz", VALIDATION)
    config = replace(stream_config, data=(f"hf:{tmp_path}",), batch_size=3)
    with pytest.raises(InputError, match=r"data: hf:.* too few training rows for 3 pr"):
        load_data(config, 300, 0, 2, 3)


def test_too_few_validation_windows(stream_config):
    config = replace(stream_config, validation_batches=1000)
    message = r"validation_split: .*fill \d+ windows, too few for 1000 batches of 4"
    with pytest.raises(InputError, match=message):
        load_data(config, 300, 0)
