"""The Llama example: model, data, training, and the comparison of two optimizers."""

import csv
import itertools
import math
import random
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

for _module in ("grain", "matplotlib", "tokenizers", "tqdm", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from PIL import Image

from examples.llama import compare, data, train
from examples.llama.config import (
    END_OF_DOCUMENT,
    DataConfig,
    InputError,
    ModelConfig,
    RecipeConfig,
    TrainConfig,
    run_command,
)
from examples.llama.model import (
    Attention,
    Llama,
    count_parameters,
    rotary_embedding,
)
from examples.llama.optimizer import make_optimizer
from examples.llama.train import Evaluation, History

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)


@pytest.fixture(scope="module", autouse=True)
def little_optimization():
    """These programs run for less time than it takes to optimize them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    """A directory of thirty documents made of a few words."""
    directory = tmp_path_factory.mktemp("documents")
    generator = random.Random(0)
    words = [
        "the ",
        "optimizer ",
        "moves ",
        "a ",
        "weight ",
        "along ",
        "its ",
        "gradient",
    ]
    for i in range(30):
        text = f"document {i}\n" + "".join(generator.choices(words, k=400))
        (directory / f"{i}.txt").write_text(text)
    return directory


@pytest.fixture(scope="module")
def config(text_files, tmp_path_factory):
    return TrainConfig(
        model=replace(MODEL, num_layers=1),
        data=DataConfig(
            data=(text_files,),
            cache_dir=tmp_path_factory.mktemp("cache"),
            sequence_length=32,
            batch_size=8,
            validation_batches=2,
        ),
        steps=30,
        eval_every=12,
    )


@pytest.fixture(scope="module")
def corpus(config):
    return data.load_corpus(config.data, config.model.vocab_size)


@pytest.fixture(scope="module")
def histories(config, corpus):
    return train.train(["adamw", "cautious_adamw"], 1e-2, config, corpus)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


loss_fn = jax.jit(train.loss_fn, static_argnums=0)
grad_fn = jax.jit(jax.value_and_grad(train.loss_fn, argnums=1), static_argnums=0)


@nnx.jit
def call(module, x):
    return module(x)


def random_tokens(batch=3, length=17):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, MODEL.vocab_size)


# Model


def test_a_token_is_not_seen_before_its_turn():
    model = Llama(MODEL, nnx.Rngs(0))
    tokens = random_tokens()
    changed = tokens.at[:, 9].add(1)
    before, after = call(model, tokens), call(model, changed)
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert np.abs(before[:, 9:] - after[:, 9:]).max(axis=(0, 2)).min() > 1e-4


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 8, 64]))
@settings(max_examples=20)
def test_rotated_products_depend_on_the_distance_only(seed, head_dim):
    query, key = np.random.default_rng(seed).normal(size=(2, head_dim))
    everywhere = np.ones((1, 12, 1, 1), np.float32)
    q = np.asarray(rotary_embedding(jnp.asarray(everywhere * query), 100.0))[0, :, 0]
    k = np.asarray(rotary_embedding(jnp.asarray(everywhere * key), 100.0))[0, :, 0]
    scores = q @ k.T
    tolerance = 1e-5 * float(np.linalg.norm(query) * np.linalg.norm(key))
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=tolerance)
    np.testing.assert_allclose(q[0], query, rtol=1e-6)
    lengths = np.linalg.norm(q, axis=-1)
    assert lengths == pytest.approx([np.linalg.norm(query)] * 12, rel=1e-5)
    assert np.ptp(scores[0]) > 100 * tolerance


def test_rotary_frequencies():
    x = jnp.ones((1, 4, 1, 4))
    angles = 3 * np.array([1.0, 100.0 ** (-2 / 4)])
    cos, sin = np.cos(angles), np.sin(angles)
    expected = np.concatenate([cos - sin, cos + sin])
    np.testing.assert_allclose(rotary_embedding(x, 100.0)[0, 3, 0], expected, rtol=1e-6)


def test_grouped_queries_are_heads_that_share_keys_and_values():
    grouped = Attention(MODEL, nnx.Rngs(0))
    full = Attention(replace(MODEL, num_kv_heads=MODEL.num_heads), nnx.Rngs(1))
    full.query.kernel[...] = grouped.query.kernel[...]
    full.output.kernel[...] = grouped.output.kernel[...]
    for ours, theirs in ((grouped.key, full.key), (grouped.value, full.value)):
        heads = ours.kernel[...].reshape(MODEL.hidden_size, 2, MODEL.head_dim)
        theirs.kernel[...] = jnp.repeat(heads, 2, axis=1).reshape(theirs.kernel.shape)
    x = jax.random.normal(jax.random.key(0), (2, 11, MODEL.hidden_size))
    np.testing.assert_allclose(call(grouped, x), call(full, x), rtol=1e-5, atol=1e-7)


def test_attention_in_numpy():
    attention = Attention(replace(MODEL, num_kv_heads=4), nnx.Rngs(0))
    for projection in (attention.query, attention.key):
        projection.kernel[...] *= 30  # Far from uniform attention.
    x = jax.random.normal(jax.random.key(0), (1, 5, MODEL.hidden_size))

    def heads(projection):
        return (x @ projection.kernel[...]).reshape(1, 5, 4, 8)

    q = np.asarray(rotary_embedding(heads(attention.query), 10_000.0))[0]
    k = np.asarray(rotary_embedding(heads(attention.key), 10_000.0))[0]
    v = np.asarray(heads(attention.value))[0]
    expected = np.zeros((5, 4, 8))
    for head, t in itertools.product(range(4), range(5)):
        scores = k[: t + 1, head] @ q[t, head] / math.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected[t, head] = weights / weights.sum() @ v[: t + 1, head]
    expected = expected.reshape(5, 32) @ np.asarray(attention.output.kernel[...])
    np.testing.assert_allclose(call(attention, x)[0], expected, rtol=1e-4, atol=1e-6)


def test_rms_norm_in_numpy():
    norm = Llama(MODEL, nnx.Rngs(0)).norm
    assert norm.scale is not None
    norm.scale[...] = jnp.linspace(-1.0, 2.0, MODEL.hidden_size)
    x = np.random.default_rng(0).normal(1.0, 1e-3, (2, 5, MODEL.hidden_size))
    x[1] *= 1e-3  # Where the epsilon counts.
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    expected *= np.linspace(-1, 2, MODEL.hidden_size)
    np.testing.assert_allclose(call(norm, x.astype(np.float32)), expected, rtol=1e-5)


def test_feed_forward_in_numpy():
    layer = Llama(MODEL, nnx.Rngs(0)).blocks[0].feed_forward
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32) * 20
    gate, up = x @ layer.gate.kernel[...], x @ layer.up.kernel[...]
    expected = (gate / (1 + np.exp(-gate)) * up) @ layer.down.kernel[...]
    np.testing.assert_allclose(call(layer, x), expected, rtol=1e-4, atol=1e-6)


def test_sublayers_add_to_a_stream_that_is_normalized_before_each():
    model = Llama(MODEL, nnx.Rngs(0))
    tokens = random_tokens()
    x = model.embedding.embedding[...][tokens]
    for block in model.blocks:
        x = x + call(block.attention, call(block.attention_norm, x))
        x = x + call(block.feed_forward, call(block.feed_forward_norm, x))
    expected = call(model.norm, x) @ model.logits.kernel[...]
    assert len(model.blocks) == MODEL.num_layers
    np.testing.assert_allclose(call(model, tokens), expected, rtol=1e-4, atol=1e-6)


def test_number_of_parameters():
    params = nnx.state(Llama(MODEL, nnx.Rngs(0)), nnx.Param)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    feed_forward = 3 * 32 * 48
    block = attention + feed_forward + 2 * 32
    expected = 300 * 32 + 2 * block + 32 + 32 * 300
    assert optax.tree.size(params) == expected
    assert count_parameters(MODEL) == expected
    assert optax.tree.size(nnx.state(Llama(MODEL, nnx.Rngs(0)))) == expected


def test_bfloat16_computes_only():
    model = Llama(replace(MODEL, dtype="bfloat16"), nnx.Rngs(0))
    reference = Llama(MODEL, nnx.Rngs(0))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    assert dtypes == {jnp.dtype("float32")}
    logits = call(model, random_tokens())
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - call(reference, random_tokens())).max()
    assert 0 < difference < 0.05
    assert (logits != logits.astype(jnp.bfloat16)).any()


def test_an_untrained_model_guesses():
    graphdef, params = nnx.split(Llama(MODEL, nnx.Rngs(0)), nnx.Param)
    loss = loss_fn(graphdef, params, random_tokens(8, 64))
    assert abs(loss - math.log(MODEL.vocab_size)) < 0.05


def test_loss_in_numpy():
    graphdef, params = nnx.split(Llama(MODEL, nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    tokens = random_tokens()
    logits = np.asarray(call(nnx.merge(graphdef, params), tokens[:, :-1]), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(shares, np.asarray(tokens)[:, 1:, None], -1)
    loss = loss_fn(graphdef, params, tokens.astype(jnp.uint16))
    np.testing.assert_allclose(loss, -np.log(right).mean(), rtol=1e-5)


# Data


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


@given(st.text())
@settings(max_examples=100)
def test_tokens_give_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_document_cannot_end_itself(tokenizer):
    text = f"before {END_OF_DOCUMENT} after"
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id(END_OF_DOCUMENT) not in ids
    assert tokenizer.decode(ids) == text


def test_packing_keeps_every_token(tokenizer):
    documents = [f"document {i} " * i for i in range(1, 70)]
    stream = data.pack(documents, tokenizer)
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    ends = np.flatnonzero(stream == end)
    parts = [part[:-1].tolist() for part in np.split(stream, ends + 1)[:-1]]
    assert [tokenizer.decode(part) for part in parts] == documents
    assert stream[-1] == end


@pytest.mark.parametrize("tokens", [5, 20, 21, 24, 1000])
def test_windows_lose_no_token_but_the_tail(tokens):
    stream = np.arange(tokens)
    windows = data.cut_windows(stream, 4, "training")
    kept = np.concatenate([windows[0], windows[1:, 1:].ravel()])
    np.testing.assert_array_equal(kept, stream[: len(kept)])
    assert 0 <= tokens - len(kept) < 4


def test_a_seed_gives_the_order_of_the_data(config, corpus):
    first, again = (data.train_batches(corpus, config.data, seed=3) for _ in range(2))
    other = data.train_batches(corpus, config.data, seed=4)
    for step in (0, 5, 1000):
        np.testing.assert_array_equal(first[step], again[step])
        assert (first[step] != other[step]).any()
    assert first[0].shape == (8, 33)


def test_a_pass_takes_each_window_once_and_the_next_in_another_order(config, corpus):
    stream = np.arange(8 * 4 * 5 + 1)
    numbered = replace(corpus, train=stream, validation=stream)
    short = replace(config.data, sequence_length=4)
    batches = data.train_batches(numbered, short, seed=0)
    passes = [np.concatenate([batches[i + k] for k in range(5)]) for i in (0, 5)]
    for windows in passes:
        assert sorted(windows[:, 0].tolist()) == list(range(0, 160, 4))
    assert (passes[0] != passes[1]).any()


def test_validation_windows_span_the_stream(config, corpus):
    stream = np.arange(32 * 100 + 1)
    numbered = replace(corpus, train=stream, validation=stream)
    chosen = data.validation_batches(numbered, config.data)
    assert chosen.shape == (2, 8, 33)
    windows = chosen.reshape(16, 33)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 3200
    assert len(np.unique(windows[:, 0])) == 16


def test_the_cache_serves_the_same_and_nothing_else(
    text_files, config, corpus, tmp_path, monkeypatch
):
    trained = []

    def train_tokenizer(documents, vocab_size):
        trained.append(vocab_size)
        return original(documents, vocab_size)

    original = data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", train_tokenizer)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in text_files.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    again = data.load_corpus(replace(config.data, data=(copy,)), 300)
    assert trained == []
    np.testing.assert_array_equal(again.train, corpus.train)
    np.testing.assert_array_equal(again.validation, corpus.validation)
    assert again.tokenizer.encode(END_OF_DOCUMENT).ids == (
        corpus.tokenizer.encode(END_OF_DOCUMENT).ids
    )

    assert data.load_corpus(config.data, 310).tokenizer.get_vocab_size() == 310
    (copy / "0.txt").write_text("something else entirely")
    changed = data.load_corpus(replace(config.data, data=(copy,)), 300)
    half = data.load_corpus(replace(config.data, validation_fraction=0.5), 300)
    assert trained == [310, 300, 300]
    assert len(changed.train) + len(changed.validation) != (
        len(corpus.train) + len(corpus.validation)
    )
    assert len(half.validation) > 2 * len(corpus.validation)


def test_a_cache_half_written_is_not_there(config, tmp_path, monkeypatch):
    def interrupted(documents, tokenizer):
        raise KeyboardInterrupt

    settings = replace(config.data, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load_corpus(settings, 300)
    assert list((tmp_path / "llama").iterdir()) == []
    assert len(data.load_corpus(settings, 300).train) > 0


# Optimizer


def test_the_learning_rate_warms_up_and_decays():
    recipe = RecipeConfig(warmup_fraction=0.25, final_fraction=0.2)
    tx = make_optimizer("lion", 0.5, recipe, steps=20)
    params = jnp.zeros(3)
    state, rates = tx.init(params), []
    for _ in range(21):
        updates, state = tx.update(jnp.ones(3), state, params)
        rates.append(-float(updates[0]))
    np.testing.assert_allclose(rates[:6], np.linspace(0, 0.5, 6), rtol=1e-5)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(16) / 15))
    np.testing.assert_allclose(rates[5:], 0.5 * (0.2 + 0.8 * cosine), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "cautious_name"), [("adamw", "cautious_adamw"), ("lion", "cautious_lion")]
)
def test_cautious_differs_from_its_base_where_signs_disagree(name, cautious_name):
    recipe = RecipeConfig(b1=0.8, b2=0.9, weight_decay=0.1, warmup_fraction=0)
    base = make_optimizer(name, 0.1, recipe, 9)
    cautious = make_optimizer(cautious_name, 0.1, recipe, 9)
    params = jnp.ones(2)
    states = base.init(params), cautious.init(params)
    for grads, agrees in ((jnp.ones(2), True), (jnp.array([-0.01, 1.0]), False)):
        ours, base_state = base.update(grads, states[0], params)
        theirs, cautious_state = cautious.update(grads, states[1], params)
        states = base_state, cautious_state
        assert bool(jnp.allclose(ours, theirs, rtol=1e-6)) == agrees
    rate = 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 9)))
    assert theirs[0] == pytest.approx(-rate * 0.1)  # Of the update, the decay is left.


def test_the_embedding_may_be_exempt_from_caution(config):
    params = nnx.state(Llama(config.model, nnx.Rngs(0)), nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    turned = jax.tree.map(lambda g: -0.01 * g, grads)

    def second_update(name: str, **kwargs) -> Any:
        recipe = RecipeConfig(warmup_fraction=0.0, **kwargs)
        tx = make_optimizer(name, 0.1, recipe, 9)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(turned, state, params)[0]

    base = second_update("adamw")
    cautious = second_update("cautious_adamw")
    exempt = second_update("cautious_adamw", exempt_embedding=True)
    assert not jnp.any(cautious["embedding"]["embedding"][...])
    np.testing.assert_array_equal(
        exempt["embedding"]["embedding"][...], base["embedding"]["embedding"][...]
    )
    assert not jnp.any(exempt["logits"]["kernel"][...])
    assert jnp.all(base["logits"]["kernel"][...] != 0)


@pytest.mark.parametrize(("name", "b2"), [("adamw", 0.999), ("lion", 0.99)])
def test_usual_second_decay(name, b2):
    by_default = make_optimizer(name, 0.1, RecipeConfig(warmup_fraction=0), 9)
    given_b2 = make_optimizer(name, 0.1, RecipeConfig(b2=b2, warmup_fraction=0), 9)
    other = make_optimizer(name, 0.1, RecipeConfig(b2=0.5, warmup_fraction=0), 9)

    def state_after_two(tx):
        state = tx.init(jnp.ones(2))
        for grads in (jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0])):
            _, state = tx.update(grads, state, jnp.ones(2))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])

    np.testing.assert_array_equal(
        state_after_two(by_default), state_after_two(given_b2)
    )
    assert (state_after_two(by_default) != state_after_two(other)).any()


# Training


def test_the_same_seed_gives_the_same_losses(config, corpus, histories):
    (again,) = train.train(["cautious_adamw"], 1e-2, config, corpus)
    assert again.losses == histories[1].losses
    assert again.evaluations == histories[1].evaluations


def test_both_runs_start_alike_and_part(histories):
    base, cautious = histories
    assert (base.name, cautious.name) == ("adamw", "cautious_adamw")
    assert base.losses[0] == cautious.losses[0]
    assert base.losses[-1] != cautious.losses[-1]


def test_a_seed_gives_the_initial_weights(config):
    def weights(seed):
        _, state = train.init_state(replace(config, seed=seed), optax.identity())
        return state.params["embedding"]["embedding"][...]

    np.testing.assert_array_equal(weights(0), weights(0))
    assert (weights(0) != weights(1)).all()


def test_training_lowers_the_loss(histories):
    for history in histories:
        assert history.losses[0] == pytest.approx(math.log(300), abs=0.1)
        assert np.mean(history.losses[-5:]) < history.losses[0] - 1.5
        first, *_, last = history.evaluations
        assert last.loss < first.loss


def test_what_a_run_records(config, histories):
    for history in histories:
        assert len(history.losses) == config.steps
        assert [e.step for e in history.evaluations] == [12, 24, 30]
        assert all(0 < e.aligned_fraction < 1 for e in history.evaluations)
        assert len(history.seconds) == 3
        assert history.seconds_per_step > 0
        assert history.diverged_at is None


def test_perplexity():
    assert Evaluation(1, math.log(5.0), 0.5).perplexity == pytest.approx(5.0)
    assert Evaluation(1, 1e4, 0.5).perplexity == math.inf


def test_seconds_leave_out_the_first_stretch():
    assert History("adamw", 1.0, seconds=[9.0, 1.0, 2.0, 4.0]).seconds_per_step == 2
    assert History("adamw", 1.0, seconds=[9.0]).seconds_per_step == 9


def test_evaluation_is_the_mean_over_all_windows(config, corpus):
    graphdef, state = train.init_state(config, optax.identity())
    batches = data.validation_batches(corpus, config.data)
    expected = loss_fn(graphdef, state.params, jnp.concatenate(batches))
    loss = train.evaluate(graphdef, state.params, batches)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_step_is_the_optimizers(config, corpus):
    graphdef, state = train.init_state(config, optax.sgd(0.5))
    tokens = data.train_batches(corpus, config.data, seed=0)[0]
    new, loss = jax.jit(train.make_train_step(graphdef, optax.sgd(0.5)))(state, tokens)

    expected, grads = grad_fn(graphdef, state.params, tokens)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    for ours, theirs in zip(
        jax.tree.leaves(new.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_aligned_fraction_counts_parameters(config, corpus):
    tokens = data.train_batches(corpus, config.data, seed=0)[0]
    graphdef, state = train.init_state(config, optax.sgd(1.0))
    leaves = jax.tree.leaves(grad_fn(graphdef, state.params, tokens)[1])
    nonzero = sum(int(jnp.count_nonzero(leaf)) for leaf in leaves)

    def fraction(rate):
        measure = train.make_aligned_fraction(graphdef, optax.sgd(rate))
        return jax.jit(measure)(state, tokens)

    # Tokens absent from the batch have no gradient in the embedding.
    assert nonzero < sum(leaf.size for leaf in leaves)
    expected = nonzero / sum(leaf.size for leaf in leaves)
    assert fraction(1.0) == pytest.approx(expected, rel=1e-5)
    assert fraction(-1.0) == 0


def test_aligned_fraction_is_not_that_of_the_decay_or_a_zero_rate(config, corpus):
    recipe = RecipeConfig(weight_decay=100.0, final_fraction=0.0)
    short = replace(config, steps=3, eval_every=3, recipe=recipe)
    (history,) = train.train(["lion"], 1e-6, short, corpus)
    # The decay, a hundred times the rest of the update, would agree in half the cases.
    tokens = data.train_batches(corpus, config.data, seed=0)[3]
    graphdef, state = train.init_state(config, optax.identity())
    grads = jax.tree.leaves(grad_fn(graphdef, state.params, tokens)[1])
    nonzero = sum(int(jnp.count_nonzero(leaf)) for leaf in grads)
    share = history.aligned_fraction * sum(leaf.size for leaf in grads) / nonzero
    assert 0.75 < share < 1


def test_a_run_that_diverges_stops_and_the_other_goes_on(
    config, corpus, monkeypatch, capsys, tmp_path
):
    def broken(name, *arguments):
        if name != "lion":
            return make_optimizer(name, *arguments)
        breaks = optax.scale_by_schedule(lambda count: jnp.where(count < 4, 1, jnp.nan))
        return optax.chain(make_optimizer(name, *arguments), breaks)

    monkeypatch.setattr(train, "make_optimizer", broken)
    base, cautious = train.train(["lion", "cautious_lion"], 1e-3, config, corpus)
    assert base.diverged_at == 6  # Broken by the update of step 5.
    assert base.evaluations == []
    assert len(base.losses) == 12
    assert cautious.diverged_at is None
    assert len(cautious.losses) == config.steps
    assert "Lion diverged at a learning rate of 0.001" in capsys.readouterr().out

    pair = compare.Pair(base, cautious)
    text = compare.summary([pair], config)
    assert "diverged at step 6" in text
    assert "no comparison, Lion diverged" in text
    assert "diverged" in compare.summary([compare.Pair(cautious, base)], config)
    compare.write([pair, pair], config, tmp_path)
    compare.write([compare.Pair(base, base)], config, tmp_path)


# Comparison


def curve(*points, name="adamw", learning_rate=1.0):
    evaluations = [Evaluation(step, loss, 0.5) for step, loss in points]
    return History(
        name, learning_rate, losses=[1.0], evaluations=evaluations, seconds=[1.0, 2.0]
    )


def test_the_step_at_which_a_loss_is_reached():
    evaluations = curve((10, 4.0), (20, 3.0), (30, 3.5), (40, 2.0)).evaluations
    assert compare.first_step_at(evaluations, 3.25) == 17.5
    assert compare.first_step_at(evaluations, 3.0) == 20
    assert compare.first_step_at(evaluations, 2.75) == 35
    assert compare.first_step_at(evaluations, 9.0) == 10
    assert compare.first_step_at(evaluations, 1.99) is None
    assert compare.first_step_at([], 1.0) is None


def test_ratio_of_steps():
    base = curve((10, 4.0), (20, 3.0))
    faster = compare.Pair(base, curve((10, 3.5), (20, 2.5), name="cautious_adamw"))
    assert (faster.reached_at, faster.ratio) == (15, 20 / 15)
    assert "reached AdamW's final validation loss of 3.0000 at step 15 of 20: " in (
        compare.verdict(faster)
    )
    cells = [line.split("|")[5:7] for line in compare.table([faster]).splitlines()]
    assert [cell.strip() for cell in cells[2] + cells[3]] == ["", "", "15", "1.33"]

    slower = compare.Pair(base, curve((10, 4.0), (20, 3.1), name="cautious_adamw"))
    assert (slower.reached_at, slower.ratio) == (None, None)
    assert "AdamW is ahead" in compare.verdict(slower)
    assert "not reached" in compare.table([slower])


def test_best_against_best(config):
    def pairs(*losses):
        return [
            compare.Pair(
                curve((10, 9.0), (20, base), learning_rate=rate),
                curve(
                    (10, 8.0), (20, cautious), name="cautious_adamw", learning_rate=rate
                ),
            )
            for rate, base, cautious in losses
        ]

    text = compare.summary(pairs((1e-3, 4.0, 3.0), (2e-3, 5.0, 2.0)), config)
    (line,) = (line for line in text.splitlines() if "Best against best" in line)
    assert "At 0.001 and 0.002" in line
    assert "validation loss of 4.0000 at step 17 of 20: a ratio of 1.20" in line
    assert "Best" not in compare.summary(pairs((1e-3, 4.0, 3.0)), config)
    assert text.startswith(f"{count_parameters(config.model):,} parameters, ")


def test_several_learning_rates(config, tmp_path):
    pairs = [
        compare.Pair(
            curve((10, 4.0), (20, 3.0 + rate), learning_rate=rate),
            curve((10, 3.5), (20, 2.5), name="cautious_adamw", learning_rate=rate),
        )
        for rate in (1e-3, 2e-3)
    ]
    compare.write(pairs, config, tmp_path)
    with (tmp_path / "comparison.csv").open() as file:
        rows = [
            (row["learning_rate"], row["optimizer"]) for row in csv.DictReader(file)
        ]
    names = ("adamw", "cautious_adamw")
    assert rows == [(rate, name) for rate in ("0.001", "0.002") for name in names]
    table = (tmp_path / "comparison.md").read_text()
    assert table.count("| 0.001 ") == table.count("| 0.002 ") == 2
    compare.plot(pairs[:1], tmp_path / "one.png")
    both, one = (Image.open(tmp_path / f"{n}.png") for n in ("comparison", "one"))
    assert both.width > 1.5 * one.width


def test_compare_from_end_to_end(config, tmp_path, capsys):
    short = replace(config, steps=10, eval_every=4)
    (pair,) = compare.compare("lion", (1e-3, 1e-3), tmp_path / "new", short)

    with (tmp_path / "new" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for history, part in ((pair.base, rows[:10]), (pair.cautious, rows[10:])):
        assert {row["optimizer"] for row in part} == {history.name}
        assert {float(row["learning_rate"]) for row in part} == {1e-3}
        assert [float(row["train_loss"]) for row in part] == history.losses
        evaluated = [row for row in part if row["validation_loss"]]
        keys = ("step", "validation_loss", "aligned_fraction")
        assert [
            tuple(float(row[key]) for key in keys) for row in evaluated
        ] == history.evaluations
        assert [row["step"] for row in evaluated] == ["4", "8", "10"]

    text = (tmp_path / "new" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    header, rule, *lines = [line for line in text.splitlines() if line[:1] == "|"]
    assert "step at Lion's final loss" in header
    assert set(rule) == {"|", "-", " "}
    for line, history in zip(lines, (pair.base, pair.cautious), strict=True):
        assert len(line) == len(header)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        loss = history.evaluations[-1].loss
        assert float(cells[0]) == 1e-3
        assert float(cells[2]) == pytest.approx(loss, abs=1e-4)
        assert float(cells[3]) == pytest.approx(math.exp(loss), abs=1e-2)
        assert float(cells[6]) == pytest.approx(history.seconds_per_step, abs=1e-3)
        assert float(cells[7]) == pytest.approx(history.aligned_fraction, abs=1e-3)

    image = Image.open(tmp_path / "new" / "comparison.png").convert("RGB")
    assert len(image.getcolors(maxcolors=2**24) or ()) > 10


def test_one_run_from_the_command_line(config, monkeypatch, capsys):
    command = f"""train --optimizer lion --learning-rate 1e-3 --steps 5 --eval-every 5
        --data {config.data.data[0]} --cache-dir {config.data.cache_dir}
        --vocab-size 300 --hidden-size 32 --num-layers 1 --sequence-length 32
        --batch-size 8 --validation-batches 2"""
    monkeypatch.setattr("sys.argv", command.split())
    run_command(train.train_one)
    output = capsys.readouterr().out
    assert "step     5   validation loss 5." in output


# Errors


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ModelConfig, {"vocab_size": 256}, "vocab_size is 256: .* at least 257"),
        (ModelConfig, {"num_heads": 5}, r"num_heads \(5\) does not divide hidden_size"),
        (ModelConfig, {"num_kv_heads": 3}, r"num_kv_heads \(3\) does not divide"),
        (ModelConfig, {"hidden_size": 12}, "hidden_size / num_heads is 3"),
        (ModelConfig, {"num_layers": 0}, "num_layers is 0"),
        (ModelConfig, {"num_heads": 0}, "num_heads is 0"),
        (ModelConfig, {"intermediate_size": -1}, "intermediate_size is -1"),
        (ModelConfig, {"rope_theta": 0.0}, "rope_theta is 0"),
        (ModelConfig, {"dtype": "int8"}, "dtype is 'int8': choose one of float32, bf"),
        (DataConfig, {"sequence_length": 0}, "sequence_length is 0"),
        (DataConfig, {"batch_size": 0}, "batch_size is 0"),
        (DataConfig, {"validation_batches": 0}, "validation_batches is 0"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction is 1"),
        (DataConfig, {"validation_fraction": math.nan}, "validation_fraction is nan"),
        (RecipeConfig, {"b1": 1.0}, "b1 is 1.0"),
        (RecipeConfig, {"b2": -0.1}, "b2 is -0.1"),
        (RecipeConfig, {"weight_decay": -1.0}, "weight_decay is -1"),
        (RecipeConfig, {"warmup_fraction": 1.0}, "warmup_fraction is 1"),
        (RecipeConfig, {"final_fraction": 1.1}, "final_fraction is 1.1"),
        (TrainConfig, {"steps": 0}, "steps is 0"),
        (TrainConfig, {"eval_every": 0}, "eval_every is 0"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
    ],
)
def test_a_setting_out_of_range(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf])
def test_a_learning_rate_out_of_range(rate, config, tmp_path):
    with pytest.raises(InputError, match=f"learning_rates is {rate}"):
        compare.compare("adamw", (1e-3, rate), tmp_path, config)
    with pytest.raises(InputError, match=f"learning_rate is {rate}"):
        train.train_one("adamw", rate, config)


def test_an_unknown_optimizer(config, tmp_path):
    unknown: Any = "sgd"
    with pytest.raises(InputError, match="'sgd': choose one of adamw, lion"):
        compare.compare(unknown, (1e-3,), tmp_path, config)
    with pytest.raises(InputError, match="'sgd': choose one of adamw, cautious_adamw"):
        train.train_one(unknown, None, config)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"data: there is no .*missing"):
        data.read_documents((tmp_path / "missing",))


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


def test_a_directory_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(
        InputError, match=r"output_dir: cannot make .*inside \(Not a dir"
    ):
        compare.compare("adamw", (1e-3,), inside, config)
    with pytest.raises(InputError, match=r"cache_dir: cannot make .*inside"):
        data.load_corpus(replace(config.data, cache_dir=inside), 300)


def test_a_single_document():
    with pytest.raises(InputError, match="data: one document only"):
        data.split_documents(["text"], 0.1)


def test_a_corpus_too_small_for_a_window():
    with pytest.raises(InputError, match="training documents hold 4 tokens, too few"):
        data.cut_windows(np.arange(4), 4, "training")


def test_too_few_validation_windows(config, corpus):
    small = replace(corpus, validation=np.arange(200))
    with pytest.raises(InputError, match="fill 6 windows, too few for 2 batches of 8"):
        data.validation_batches(small, config.data)


def test_a_command_that_cannot_run_says_why(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", "--num-heads", "3"])
    with pytest.raises(SystemExit) as raised:
        run_command(compare.compare)
    assert raised.value.code == 2
    assert "num_heads (3) does not divide" in capsys.readouterr().err

    monkeypatch.setattr("sys.argv", ["compare", "--learning-rates", "0"])
    with pytest.raises(SystemExit, match=r"^error: learning_rates is 0.0"):
        run_command(compare.compare)
