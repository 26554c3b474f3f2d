"""Fine-tuning on sentence tasks: data, scores, pretrained models, and whole runs."""

import ast
import csv
import itertools
import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for _module in ("grain", "orbax.checkpoint", "sklearn", "tokenizers", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import safetensors.flax
from safetensors.numpy import load_file, save_file
from sklearn.metrics import f1_score, matthews_corrcoef

from examples.glue import standard_library
from examples.glue.__main__ import COMMANDS
from examples.glue.config import DataConfig, HeadConfig
from examples.glue.data import (
    LABELS_NAME,
    label_names,
    make_examples,
    read_labels,
    truncate,
)
from examples.glue.scores import scores
from examples.glue.standard_library import Row, docstring_rows, package_rows
from examples.glue.tables import read_rows
from examples.glue.task import EXPERIMENT, PRESETS, ClassificationTask
from examples.llama.config import DataConfig as LlamaDataConfig
from examples.llama.export import export
from examples.llama.pretrained import open_pretrained, read_vocabulary
from examples.llama.task import LlamaTask
from examples.training import command_line, compare, history, log, step
from examples.training.checks import InputError
from examples.training.config import TrainConfig, to_json
from examples.training.history import Run, Side
from examples.training.optimizers import OptimizerConfig
from examples.training.trained import Source, load_trained
from tests.examples.training_fixtures import (
    MODEL,
    run_command,
    train,
    write_documents,
)

pytestmark = pytest.mark.usefixtures("little_optimization")

WORDS = ["the", "optimizer", "moves", "a", "weight", "along", "its", "gradient"]


@pytest.fixture(scope="module")
def pretrained(little_optimization, tmp_path_factory):
    """Train two Llamas from different seeds."""
    documents = write_documents(tmp_path_factory.mktemp("documents"))
    data = LlamaDataConfig(
        data=(str(documents),),
        cache_dir=tmp_path_factory.mktemp("cache"),
        sequence_length=16,
        batch_size=8,
        validation_batches=2,
    )
    config = TrainConfig(
        LlamaTask(MODEL, data),
        OptimizerConfig(learning_rate=1e-2),
        steps=2,
        log_every=2,
        eval_every=2,
        checkpoint_every=2,
        mesh=(1, 1, 1),
    )
    runs = [tmp_path_factory.mktemp("runs") / f"run{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        train(replace(config, seed=seed), run)
    return runs


def write_table(path, rows, header=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def some_rows(count=60):
    """Yield texts that begin with one of three words, which is their label."""
    generator = np.random.default_rng(0)
    for i in range(count):
        first = WORDS[i % 3]
        yield f"{first} {' '.join(generator.choice(WORDS, 6))} {i}", first


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table") / "rows.csv", some_rows())


def glue_config(pretrained, table, **data):
    return TrainConfig(
        ClassificationTask(
            MODEL,
            HeadConfig(3),
            DataConfig(data=(str(table),), sequence_length=16, batch_size=8, **data),
        ),
        OptimizerConfig(learning_rate=1e-2),
        steps=4,
        log_every=2,
        eval_every=2,
        checkpoint_every=4,
        mesh=(1, 1, 1),
        from_run=pretrained[0],
    )


@pytest.fixture(scope="module")
def fine_tuned(pretrained, table, tmp_path_factory):
    """Fine-tune; return the run's directory and its records."""
    directory = tmp_path_factory.mktemp("runs") / "fine-tuned"
    return directory, train(glue_config(pretrained, table), directory)


@pytest.fixture(scope="module")
def exported_once(pretrained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / "exported"
    export(Source(pretrained[0]), directory)
    return directory


@pytest.fixture
def exported(exported_once, tmp_path):
    """Return a copy of an exported Llama, which the test may change."""
    return shutil.copytree(exported_once, tmp_path / "exported")


@pytest.fixture(scope="module")
def vocabulary(pretrained):
    found = open_pretrained(pretrained[0])
    return read_vocabulary(
        "from", found.tokenizer, found.start_of_document, found.model.vocab_size
    )


def run_glue(name, *arguments):
    arguments = [name, *map(str, arguments)]
    return command_line.main("python -m examples.glue", EXPERIMENT, COMMANDS, arguments)


# The tasks built from the standard library


def test_no_module_is_in_both_splits(monkeypatch):
    sides = []
    split = standard_library._split

    def recording(modules, fraction):
        sides.append(split(modules, fraction))
        return sides[-1]

    monkeypatch.setattr(standard_library, "_split", recording)
    monkeypatch.setattr(standard_library, "_MOST", 10**6)
    rows = package_rows.__wrapped__(0.2)  # Bypass the cache.
    assert len(sides) == 8
    for train_modules, validation_modules in sides:
        assert train_modules
        assert validation_modules
        assert not {*train_modules.values()} & {*validation_modules.values()}
    for side in rows:
        counts = {label: 0 for label in standard_library._PACKAGES}
        for row in side:
            counts[row.label] += 1
        assert min(counts.values()) >= 10
    train_texts, validation_texts = ({row.texts for row in side} for side in rows)
    assert not train_texts & validation_texts
    assert not any(
        re.search(r"^\s*(import|from) ", row.texts[0], re.MULTILINE)
        for side in rows
        for row in side
    )


def test_a_snippet_of_two_packages_is_in_one_split(monkeypatch):
    """The second package quotes all of the first."""
    own = {
        package: [
            "\n".join([f"{package}{i} = {j}" for j in range(4)]) for i in range(5)
        ]
        for package in ("first", "second")
    }
    modules = {
        "first": own["first"],
        "second": ["\n".join([text, *own["first"]]) for text in own["second"]],
    }
    monkeypatch.setattr(standard_library, "_PACKAGES", ("first", "second"))
    monkeypatch.setattr(
        standard_library, "_modules", lambda package: dict(enumerate(modules[package]))
    )
    texts = [row.texts[0] for side in package_rows.__wrapped__(0.2) for row in side]
    assert sorted(texts) == sorted(own["first"] + own["second"])


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    packages = (*standard_library._PACKAGES, "absent")
    monkeypatch.setattr(standard_library, "_PACKAGES", packages)
    with pytest.raises(InputError, match="this Python lacks its package absent"):
        package_rows.__wrapped__(0.2)


def test_half_of_the_docstrings_are_swapped():
    rows = docstring_rows(0.2)
    for i in (0, 1):
        train_texts, validation_texts = ({r.texts[i] for r in side} for side in rows)
        assert not train_texts & validation_texts
    for side in rows:
        own = {row.texts for row in side if row.label == "own"}
        other = {row.texts for row in side if row.label != "own"}
        assert len(own) == len(other) > 100
        assert not own & other
        # Neither a docstring nor a function alone reveals the label.
        for i in (0, 1):
            assert {texts[i] for texts in own} == {texts[i] for texts in other}
        for docstring, code in own:
            (function,) = ast.parse(code).body
            assert ast.get_docstring(function) != docstring


# Examples


def test_examples_are_tokenized_as_in_pretraining(vocabulary):
    config = DataConfig(sequence_length=16)
    (a,), (b,) = vocabulary.tokenize(["the weight"]), vocabulary.tokenize(["moves"])
    end = vocabulary.start
    long = "the weight " * 9
    texts = [("the weight", "moves"), ("moves", ""), (long, "moves")]
    rows = [Row(pair, label) for pair, label in zip(texts, "100")]
    examples, truncated = make_examples(rows, ["0", "1"], vocabulary, config)
    line = [end, *a, end, *b]
    assert len(line) <= 16
    assert truncated == 1
    assert examples["last"][2] == 15
    np.testing.assert_array_equal(examples["tokens"][0, : len(line)], line)
    assert examples["last"][0] == len(line) - 1
    assert (examples["tokens"][0, len(line) :] == end).all()
    assert examples["last"][1] == len(b)
    assert examples["label"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "room", "kept"),
    [
        ([3], 5, [3]),
        ([7], 5, [5]),
        ([3, 4], 7, [3, 4]),
        ([3, 9], 7, [3, 4]),
        ([9, 3], 7, [4, 3]),
        ([9, 9], 7, [3, 4]),
        ([0, 9], 7, [0, 7]),
    ],
)
def test_the_longer_text_is_truncated(sizes, room, kept):
    parts = [np.zeros(size) for size in sizes]
    assert truncate(parts, room) == kept


def test_numeric_labels_are_in_numeric_order():
    rows = [Row(("",), label) for label in ("10", "9", "-1", "9")]
    assert label_names(rows, [], HeadConfig(3)) == ["-1", "9", "10"]
    assert label_names(rows, [], HeadConfig(1)) == []


def test_a_repeated_text_is_in_one_split(pretrained, tmp_path):
    """Whatever its label."""
    repeated = [(f"text {i % 20}", f"{i % 3}") for i in range(200)]
    path = write_table(tmp_path / "rows.csv", repeated)
    rows = read_rows(glue_config(pretrained, path).task.data)
    assert [len({row.texts for row in side}) for side in rows] == [16, 4]
    assert sum(map(len, rows)) == 200


def test_processes_share_each_batch(pretrained, table):
    task = glue_config(pretrained, table).task

    def batches(process, processes):
        data = task.load(0, process, processes, pretrained[0])
        return [*itertools.islice(data.train, 9)], data.validation

    (whole, validation), *parts = (batches(*of) for of in ((0, 1), (0, 2), (1, 2)))
    for i, batch in enumerate(whole):
        for name, expected in batch.items():
            found = [train[i][name] for train, _ in parts]
            assert [len(rows) for rows in found] == [4, 4]
            interleaved = np.stack(found, axis=1).reshape(expected.shape)
            np.testing.assert_array_equal(interleaved, expected)
    for name, expected in validation.items():
        found = [part[name] for _, part in parts]
        interleaved = np.stack(found, axis=2).reshape(expected.shape)
        np.testing.assert_array_equal(interleaved, expected)


def test_the_loss_is_the_mean_over_all_examples(pretrained, table):
    config = glue_config(pretrained, table)
    task = config.task
    data = task.load(0, 0, 1, config.from_run)
    params = task.start_from(config.from_run, 0)
    count = int((data.validation["weight"] > 0).sum())
    assert count % 8  # The last batch is padded.
    for parts in (1, 2):
        loss, outputs = jax.jit(step.make_evaluate(task, parts))(
            params, data.validation
        )
        valid = np.asarray(outputs["weight"]) > 0
        assert valid.sum() == count
        logits = np.asarray(outputs["logits"], np.float64)[valid]
        label = np.asarray(outputs["label"])[valid]
        normalized = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -normalized[np.arange(count), label].mean()
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_tokens_after_the_last_one_have_no_effect(pretrained, table):
    config = glue_config(pretrained, table)
    task = config.task
    batch = next(iter(task.load(0, 0, 1, config.from_run).train))
    params = task.start_from(config.from_run, 0)
    _, outputs = task.evaluate(params, batch)
    position = np.arange(16)
    after = position > batch["last"][:, None]
    assert after.any()
    changed = {**batch, "tokens": np.where(after, 7, batch["tokens"])}
    _, other = task.evaluate(params, changed)
    np.testing.assert_array_equal(outputs["logits"], other["logits"])


# Scores


def test_scores():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([0, 1, 0, 1, 1])
    found = scores(("accuracy", "f1", "matthews"), logits, labels)
    chosen = [0, 1, 1, 0, 1]
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 / 3) == f1_score(labels, chosen)
    assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, chosen))
    numbers = np.array([[1.0], [2.0], [4.0]])
    found = scores(("pearson", "spearman"), numbers, np.array([1.0, 5.0, 6.0]))
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 5, 6])[0, 1])


def test_a_correlation_with_a_constant_is_zero():
    constant = np.zeros((3, 1))
    found = scores(("pearson", "spearman"), constant, np.array([1.0, 2.0, 3.0]))
    assert found == {"pearson": 0.0, "spearman": 0.0}


# Pretrained models


def test_the_body_is_pretrained_and_the_head_is_new(pretrained, table):
    task = glue_config(pretrained, table).task
    body = load_trained(Source(pretrained[0]), LlamaTask).params
    first, second = (task.start_from(pretrained[0], seed) for seed in (0, 1))
    assert first.keys() == {*body} - {"logits"} | {"score"}
    for name in {*body} - {"logits"}:
        jax.tree.map(np.testing.assert_array_equal, first[name], body[name])
        jax.tree.map(np.testing.assert_array_equal, second[name], body[name])
    assert (first["score"]["kernel"] != second["score"]["kernel"]).all()


def test_fine_tuning_from_hugging_faces_format(
    pretrained, exported, table, fine_tuned, tmp_path
):
    found, run = open_pretrained(exported), open_pretrained(pretrained[0])
    assert replace(found.model, unroll=run.model.unroll) == run.model
    assert found.end_of_document == run.end_of_document
    jax.tree.map(np.testing.assert_array_equal, found.load_params(), run.load_params())
    _, records = fine_tuned
    assert train(glue_config([exported], table), tmp_path / "run") == records


def test_pretraining_continues_from_hugging_faces_format(
    pretrained, exported, tmp_path
):
    config = load_trained(Source(pretrained[0]), LlamaTask).config
    task = config.task
    with pytest.raises(InputError, match=r"from: .* pass --tokenizer .*tokenizer.json"):
        task.check_source(exported)
    data = replace(task.data, tokenizer=str(exported / "tokenizer.json"))
    again = replace(config, task=replace(task, data=data), from_run=exported, seed=3)
    train(again, tmp_path / "run")
    params = again.task.start_from(exported, 0)
    body = load_trained(Source(pretrained[0]), LlamaTask).params
    jax.tree.map(np.testing.assert_array_equal, params, body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "differs from the supported Llama in model_type"),
        ({"attention_bias": True}, "from the supported Llama in attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "scales its rotary frequencies"),
        ({"head_dim": 16}, "head_dim in .* must be hidden_size / num_attention_heads"),
        ({"hidden_size": None}, "does not describe a Llama"),
        ({"quantization_config": {"load_in_8bit": True}}, "in quantization_config"),
        ({"rope_parameters": {"type": "linear"}}, "scales its rotary frequencies"),
        ({"rope_parameters": {"factor": 4.0}}, "scales its rotary frequencies"),
        ({"rope_scaling": "linear"}, "does not describe a Llama"),
        ({"eos_token_id": None}, "eos_token_id in .* is None, which is not a token"),
        ({"eos_token_id": 10_000}, "eos_token_id in .* is 10000, which is not a token"),
        ({"eos_token_id": []}, "does not describe a Llama"),
        ({"bos_token_id": "<s>"}, "bos_token_id in .* is <s>, which is not a token"),
    ],
)
def test_unsupported_models_are_refused(changes, message, exported):
    path = exported / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=f"from: .*{message}"):
        open_pretrained(exported)


def test_missing_or_mismatched_tensors_are_refused(pretrained, exported):
    path = exported / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"has no tensor model.layers.2"):
        open_pretrained(exported).load_params()
    path.write_text(json.dumps({**config, "vocab_size": 305}))
    with pytest.raises(InputError, match=r"embed_tokens.weight in .* \(304, 32\)"):
        open_pretrained(exported).load_params()
    path.write_text(json.dumps(config))
    tensors = load_file(exported / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for changes, message in (
        ({f"{name}.bias": np.zeros(32, np.float32)}, f"unexpected .* {name}.bias"),
        ({f"{name}.weight": np.zeros((32, 32), np.int8)}, "has dtype int8, which is"),
    ):
        save_file({**tensors, **changes}, exported / "model.safetensors")
        with pytest.raises(InputError, match=message):
            open_pretrained(exported).load_params()
    (exported / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors does not exist"):
        open_pretrained(exported).load_params()
    for text in ("{", "[]", "{}"):
        (exported / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match=r"index.json lists no files"):
            open_pretrained(exported).load_params()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_as_transformers_writes_them(tied, dtype, pretrained, exported):
    """Several files, bfloat16, tied embeddings, and different constants."""
    expected = open_pretrained(pretrained[0]).load_params()
    path = exported / "config.json"
    config = json.loads(path.read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    config |= {"rms_norm_eps": 1e-3, "tie_word_embeddings": tied}
    path.write_text(json.dumps(config))
    tensors = {
        name: jnp.asarray(x, dtype)
        for name, x in load_file(exported / "model.safetensors").items()
        if not (tied and name == "lm_head.weight")
    }
    (exported / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in {*files.values()}:
        own = {name: tensors[name] for name in names if files[name] == file}
        safetensors.flax.save_file(own, exported / file)
    index = exported / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    found = open_pretrained(exported)
    assert (found.model.rope_theta, found.model.rms_epsilon) == (500.0, 1e-3)
    params = found.load_params()
    if tied:
        expected["logits"] = {"kernel": expected["embedding"]["embedding"].T}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            x, np.asarray(jnp.asarray(y, dtype), np.float32)
        ),
        params,
        expected,
    )


# Bad input


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            ("texts", "label"),
            some_rows,
            "text_columns: .* no column 'text' of text",
        ),
        (
            ("text", "labels"),
            some_rows,
            "label_column: .* no column 'label' of lab",
        ),
        (("text", "label"), lambda: [], "has no rows"),
        (("text", "label"), lambda: [("a", "b")], "has only one distinct text"),
        (
            ("text", "label"),
            lambda: [(f"text {i}", f"{i % 4}") for i in range(40)],
            r"num_labels is 3, but .* 4 labels \(0, 1, 2, 3\); pass --num-labels 4",
        ),
        (
            ("text", "label"),
            lambda: list(some_rows(9)),
            "training examples are too few for a batch of 8",
        ),
        (
            ("text", "label"),
            lambda: [("hello", " world", "1"), *some_rows()],
            "line 2 of .* has more cells than the header; quote or replace each ','",
        ),
        (
            ("label", "text"),
            lambda: [*(row[::-1] for row in some_rows(9)), ("1", "hello", " world")],
            "line 11 of .* has more cells than the header; quote or replace each ','",
        ),
    ],
)
def test_unsuitable_tables_are_refused(header, rows, message, pretrained, tmp_path):
    path = write_table(tmp_path / "rows.csv", rows(), header)
    config = glue_config(pretrained, path)
    with pytest.raises(InputError, match=message):
        config.task.load(0, 0, 1, config.from_run)


def test_unknown_labels_are_refused(vocabulary):
    train, validation = ([Row(("a",), label) for label in s] for s in ("ab", "abc"))
    message = "only the validation data have the label 'c'; .* --validation-fraction"
    for count in (2, 3):  # Whichever number is given.
        with pytest.raises(InputError, match=message):
            label_names(train, validation, HeadConfig(count))
    with pytest.raises(InputError, match=r"'c' is not a number; .* pass --num-labels"):
        make_examples([Row(("a",), "c")], [], vocabulary, DataConfig())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.xlsx", "the suffix of .*rows.xlsx is not one of .csv"),
        ("absent.csv", "absent.csv does not exist"),
        ("", "is a directory; pass a file, or a dataset as --data hf:NAME"),
    ],
)
def test_files_that_are_not_tables_are_refused(name, message, pretrained, tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    config = glue_config(pretrained, tmp_path / name)
    with pytest.raises(InputError, match=f"data: .*{message}"):
        config.task.load(0, 0, 1, config.from_run)


@pytest.mark.parametrize("text", ["{", "[]", '{"labels": []}'])
def test_damaged_labels_are_reported(text, tmp_path):
    (tmp_path / LABELS_NAME).write_text(text)
    with pytest.raises(InputError, match=r"from: .*labels.json is damaged; restore it"):
        read_labels("from", tmp_path)


@pytest.mark.parametrize(
    ("labels", "metrics", "message"),
    [
        (1, ("accuracy",), "accuracy cannot be computed for numbers"),
        (2, ("pearson",), "pearson cannot be computed for classes"),
        (3, ("f1",), "f1 requires num_labels to be 2, got 3"),
    ],
)
def test_metrics_that_do_not_suit_the_head_are_refused(labels, metrics, message):
    with pytest.raises(InputError, match=message):
        ClassificationTask(head=HeadConfig(labels), data=DataConfig(metrics=metrics))


def test_a_body_of_another_width_is_refused(pretrained, table, tmp_path):
    config = glue_config(pretrained, table)
    wide = replace(MODEL, hidden_size=64, num_layers=3)
    config = replace(config, task=replace(config.task, model=wide))
    with pytest.raises(
        InputError,
        match="has another architecture; pass --hidden-size 32 --num-layers 2",
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_pretrained_model_is_refused(pretrained, table, tmp_path):
    config = replace(glue_config(pretrained, table), from_run=None)
    with pytest.raises(InputError, match="from: fine-tuning needs a pretrained Llama"):
        train(config, tmp_path / "run")
    config = replace(config, from_run=tmp_path)
    with pytest.raises(InputError, match="contains neither checkpoints of a run nor "):
        train(config, tmp_path / "run")


# Data in other formats


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_in_any_format(suffix, pretrained, table, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    path = tmp_path / f"rows.{suffix}"
    whole = datasets.Dataset.from_dict(
        dict(zip(("text", "label"), map(list, zip(*some_rows()))))
    )
    write = {
        "csv": whole.to_csv,
        "tsv": lambda path: whole.to_csv(path, sep="\t"),
        "jsonl": whole.to_json,
        "parquet": whole.to_parquet,
    }[suffix]
    write(path)
    config = glue_config(pretrained, path)
    data = config.task.load(0, 0, 1, config.from_run)
    expected = glue_config(pretrained, table).task.load(0, 0, 1, pretrained[0])
    assert data.fingerprint == expected.fingerprint


@pytest.mark.parametrize("name", ["mrpc", "stsb", "mnli"])
def test_a_local_copy_of_glue(name, pretrained, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    preset = PRESETS[name]
    columns = preset.task.data.text_columns
    for split in ("train", preset.task.data.validation_split):
        rows = list(some_rows(24))
        labels = [i % max(preset.task.head.num_labels, 2) for i in range(24)]
        if name == "stsb":
            labels = [label + 0.5 for label in labels]
        datasets.Dataset.from_dict(
            {**{column: [text for text, _ in rows] for column in columns}}
            | {"label": labels, "idx": list(range(24))}
        ).to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: "
        + name
        + "\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {split}.parquet\n"
            for split in ("train", preset.task.data.validation_split)
        )
        + "---\n"
    )
    task = replace(
        preset.task,
        model=MODEL,
        data=replace(
            preset.task.data,
            data=(f"hf:{tmp_path}:{name}",),
            sequence_length=16,
            batch_size=8,
        ),
    )
    config = replace(
        preset,
        task=task,
        optimizer=replace(preset.optimizer, learning_rate=1e-3),
        steps=2,
        eval_every=2,
        checkpoint_every=2,
        mesh=(1, 1, 1),
        from_run=pretrained[0],
    )
    records = train(config, tmp_path / "run")
    assert records[-1]["scores"].keys() == {*preset.task.data.metrics}


def test_the_steps_of_glue_presets_match_their_epochs():
    assert PRESETS["mrpc"].steps == 5 * 115
    assert PRESETS["mnli"].steps == 3 * 12272
    assert PRESETS["stsb"].task.head.num_labels == 1


# Runs


def test_fine_tuning_learns_the_first_word(pretrained, table, tmp_path):
    config = replace(
        glue_config(pretrained, table),
        steps=120,
        log_every=120,
        eval_every=120,
        checkpoint_every=120,
    )
    records = train(config, tmp_path / "run")
    assert records[-1]["scores"]["accuracy"] > 0.9


def test_a_run_on_a_mesh_resumes_exactly(pretrained, table, fine_tuned, tmp_path):
    config, (_, alone) = glue_config(pretrained, table), fine_tuned
    on_mesh = replace(config, mesh=(2, 2, 2))
    whole = train(on_mesh, tmp_path / "whole")
    assert [r["loss"] for r in whole] == pytest.approx(
        [r["loss"] for r in alone], rel=1e-4
    )
    first = train(on_mesh, tmp_path / "run", stop=lambda step: step == 3)
    assert len(first) == 3
    # Resuming does not need the pretrained model.
    gone = pretrained[0].with_name("gone")
    pretrained[0].rename(gone)
    try:
        assert train(on_mesh, tmp_path / "run") == whole
    finally:
        gone.rename(pretrained[0])


def test_fine_tuning_from_a_fine_tuned_model(pretrained, table, fine_tuned, tmp_path):
    first, _ = fine_tuned
    before = load_trained(Source(first), ClassificationTask).params
    again = replace(glue_config(pretrained, table), from_run=first, seed=1)
    params = again.task.start_from(first, 1)
    jax.tree.map(np.testing.assert_array_equal, params["blocks"], before["blocks"])
    assert (params["score"]["kernel"] != before["score"]["kernel"]).all()
    # The head is new, so that the labels may be others.
    words = [(text, label.upper()) for text, label in some_rows()]
    other = write_table(tmp_path / "other.csv", words)
    data = replace(again.task.data, data=(str(other),))
    again = replace(again, task=replace(again.task, data=data))
    assert train(again, tmp_path / "second")[-1]["step"] == 4
    labels = [(run / "labels.json").read_text() for run in (first, tmp_path / "second")]
    assert labels[0] != labels[1]


def test_a_comparison_resumes_without_the_pretrained_model(
    pretrained, table, fine_tuned, tmp_path
):
    config, (_, whole) = glue_config(pretrained, table), fine_tuned
    run = Run(Side("adamw", True), (), 0)
    train(config, tmp_path / run.name, stop=lambda step: step == 2)
    gone = pretrained[0].with_name("gone")
    pretrained[0].rename(gone)
    try:
        compare.require_trainable({run: config}, tmp_path)
        assert compare.run_all({run: config}, (), tmp_path, together=True)
        # Nor does a finished run without checkpoints need it.
        shutil.rmtree(tmp_path / run.name / "checkpoints")
        compare.require_trainable({run: config}, tmp_path)
        assert compare.run_all({run: config}, (), tmp_path, together=True)
    finally:
        gone.rename(pretrained[0])
    losses = [record["loss"] for record in log.read(tmp_path / run.name)]
    assert losses == [record["loss"] for record in whole]


def test_tables_are_read_verbatim(vocabulary, pretrained, tmp_path):
    path = tmp_path / "rows.csv"
    rows = [("null", "None"), ("12", "1"), ('"quoted", and', "NA"), ("x", "")]
    write_table(path, [*rows, *((f"{i}", "1") for i in range(5))])
    config = glue_config(pretrained, path).task.data
    read = [row for side in read_rows(config) for row in side]
    assert {(row.texts[0], row.label) for row in read} >= {*rows[:3]}
    assert len(read) == 8
    tabs = tmp_path / "rows.tsv"
    lines = [f'"{i}\t{i % 2}' for i in range(9)]
    tabs.write_text("\n".join(["text\tlabel", *lines]))
    read = [r for side in read_rows(replace(config, data=(str(tabs),))) for r in side]
    assert {row.texts[0] for row in read} == {f'"{i}' for i in range(9)}


def test_a_byte_order_mark_is_not_part_of_a_column_name(pretrained, tmp_path):
    """Excel writes one."""
    path = tmp_path / "rows.csv"
    lines = ["text,label", *(f"{i},{i % 2}" for i in range(9))]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    rows = read_rows(glue_config(pretrained, path).task.data)
    assert {row.texts[0] for side in rows for row in side} == {*"012345678"}


def test_a_run_that_diverged_has_no_scores(pretrained, table, tmp_path):
    config = replace(glue_config(pretrained, table), eval_every=1, checkpoint_every=4)
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    run_glue(
        "compare",
        *("--config-file", file, "--output-dir", tmp_path / "out", "--seeds", 0, 1),
        *("--optimizers", "sgd", "--sweep", "learning_rate=1e-2,1e30"),
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert "diverged at step" in report
    differences = [line for line in report.splitlines() if "cautious SGD - SGD" in line]
    assert len(differences) == 1
    assert "learning rate 0.01" in differences[0]


def test_paths_are_shortened_for_display():
    def run(path):
        point = (("from_run", path), ("learning_rate", "0.1"))
        return history.History(
            history.Run(history.Side("adamw", False), point, 0), (), (), ()
        )

    def short(*paths):
        return [
            dict(h.run.point)["from_run"]
            for h in history.short_paths([run(path) for path in paths])
        ]

    assert short("/a/b/c", "/a/b/d") == ["c", "d"]
    assert short("mine", "outputs/mine") == ["mine", "outputs/mine"]
    assert short("/a/b", "c/d") == ["/a/b", "c/d"]
    assert short("a/x", "b/x") == ["a/x", "b/x"]
    assert short("a/x", "a/x/") == ["a/x", "a/x/"]


def test_two_pretrained_models_are_compared(pretrained, table, tmp_path):
    config = glue_config(pretrained, table)
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    out = tmp_path / "out"
    run_glue(
        "compare",
        *("--config-file", file, "--output-dir", out, "--seeds", 0, 1),
        *("--sweep", f"from={pretrained[0]},{pretrained[1]}"),
    )
    report = (out / "report.md").read_text()
    rows = [line for line in report.splitlines() if "| accuracy" in line]
    assert "accuracy" in report.splitlines()[2]
    differences = [row for row in rows if " - " in row]
    # Caution for each pretrained model, and pretraining for each optimizer.
    assert len(differences) == 4
    assert sum("cautious AdamW - AdamW" in row for row in differences) == 2
    assert all(re.search(r"[+-]\d\.\d{4} to [+-]\d\.\d{4}", row) for row in differences)


def test_the_accuracy_is_logged_and_shown(pretrained, table, tmp_path, capsys):
    config = glue_config(pretrained, table)
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    run_dir = tmp_path / "run"
    run_glue("train", "--config-file", file, "--run-dir", run_dir)
    accuracy = log.read(run_dir)[-1]["scores"]["accuracy"]
    assert f"accuracy {accuracy:.4f}" in capsys.readouterr().out
    run = history.Run(history.Side("adamw", True), (), 0)
    assert history.read_history(run, run_dir).scores == {"accuracy": accuracy}
    assert ("scores/accuracy", accuracy) in list(log.scalars(log.read(run_dir)[-1]))


def test_generating_from_a_classifier_is_refused(pretrained, table, tmp_path):
    train(glue_config(pretrained, table), tmp_path / "run")
    with pytest.raises(SystemExit, match="is not the configuration of a run"):
        run_command("generate", ["--run-dir", tmp_path / "run"])


def test_all_pretrained_models_are_checked_before_the_first_run(
    pretrained, exported, table, tmp_path
):
    file = tmp_path / "config.json"
    file.write_text(to_json(glue_config(pretrained, table)))
    out = tmp_path / "out"
    killed = shutil.copytree(pretrained[0], tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints" / "2")
    (exported / "model.safetensors").unlink()
    for source, message in (
        (tmp_path / "absent", "contains neither checkpoints of a run nor a config.js"),
        (killed, "from: there is no checkpoint in "),
        (exported, "from: .*model.safetensors does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_glue(
                "compare",
                *("--config-file", file, "--output-dir", out),
                *("--sweep", f"from={pretrained[0]},{source}"),
            )
        assert not list(out.iterdir())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(pretrained):
    found = open_pretrained(pretrained[0])
    size = found.model.vocab_size
    with pytest.raises(InputError, match=f"has {size} tokens, .* vocab_size is 300"):
        read_vocabulary("from", found.tokenizer, found.start_of_document, 300)
    with pytest.raises(InputError, match="has no token '<s>'"):
        read_vocabulary("from", found.tokenizer, "<s>", size)


def test_skipped_validation_examples_are_reported(pretrained, table, capsys):
    config = glue_config(pretrained, table, validation_batches=1)
    data = config.task.load(0, 0, 1, config.from_run)
    assert data.validation["label"].shape == (1, 8)
    assert "Skipped 4 other validation examples." in capsys.readouterr().out
