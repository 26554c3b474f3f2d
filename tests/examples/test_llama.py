"""The model of the Llama example and its training computations."""

import itertools
import math
from dataclasses import replace

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

from examples.llama.config import MODELS, DataConfig, ModelConfig
from examples.llama.model import (
    Attention,
    Llama,
    make_graphdef,
    rotary_embedding,
)
from examples.llama.task import LlamaTask
from examples.training import step
from examples.training.task import count_parameters

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    unroll=1,
)


pytestmark = pytest.mark.usefixtures("little_optimization")


loss_fn = jax.jit(LlamaTask.loss, static_argnums=0)
grad_fn = jax.jit(jax.value_and_grad(LlamaTask.loss, argnums=1), static_argnums=0)


@nnx.jit
def call(module, x):
    return module(x)


@nnx.jit
def call_without_cache(module, x):
    return module(x, None)[0]


def random_tokens(batch=3, length=17):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, MODEL.vocab_size)


TASK = LlamaTask(MODEL, DataConfig())


def initial_state():
    return step.init_state(TASK, optax.identity(), 0)


def block_of(model, layer):
    """Return one block of the stack."""
    graphdef, blocks = nnx.split(model.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], blocks))


# Model


def test_attention_is_causal():
    model = Llama(MODEL, nnx.Rngs(0))
    tokens = random_tokens()
    changed = tokens.at[:, 9].add(1)
    before, after = call(model, tokens), call(model, changed)
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert np.abs(before[:, 9:] - after[:, 9:]).max(axis=(0, 2)).min() > 1e-4


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 8, 64]))
@settings(max_examples=20)
def test_rotated_products_depend_only_on_the_distance(seed, head_dim):
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
    np.testing.assert_allclose(
        call_without_cache(grouped, x),
        call_without_cache(full, x),
        rtol=1e-5,
        atol=1e-7,
    )


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
    np.testing.assert_allclose(
        call_without_cache(attention, x)[0], expected, rtol=1e-4, atol=1e-6
    )


def test_rms_norm_in_numpy():
    norm = Llama(MODEL, nnx.Rngs(0)).norm
    assert norm.scale is not None
    norm.scale[...] = jnp.linspace(-1.0, 2.0, MODEL.hidden_size)
    x = np.random.default_rng(0).normal(1.0, 1e-3, (2, 5, MODEL.hidden_size))
    x[1] *= 1e-3  # Small enough for the epsilon to matter.
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    expected *= np.linspace(-1, 2, MODEL.hidden_size)
    np.testing.assert_allclose(call(norm, x.astype(np.float32)), expected, rtol=1e-5)


def test_feed_forward_in_numpy():
    layer = block_of(Llama(MODEL, nnx.Rngs(0)), 1).feed_forward
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32) * 20
    gate, up = x @ layer.gate.kernel[...], x @ layer.up.kernel[...]
    expected = (gate / (1 + np.exp(-gate)) * up) @ layer.down.kernel[...]
    np.testing.assert_allclose(call(layer, x), expected, rtol=1e-4, atol=1e-6)


def test_sublayers_add_to_the_residual_stream_after_a_norm():
    model = Llama(MODEL, nnx.Rngs(0))
    tokens = random_tokens()
    x = model.embedding.embedding[...][tokens]
    for layer in range(MODEL.num_layers):
        block = block_of(model, layer)
        x = x + call_without_cache(block.attention, call(block.attention_norm, x))
        x = x + call(block.feed_forward, call(block.feed_forward_norm, x))
    expected = call(model.norm, x) @ model.logits.kernel[...]
    np.testing.assert_allclose(call(model, tokens), expected, rtol=1e-4, atol=1e-6)


def test_number_of_parameters():
    params = nnx.state(Llama(MODEL, nnx.Rngs(0)), nnx.Param)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    feed_forward = 3 * 32 * 48
    block = attention + feed_forward + 2 * 32
    expected = 300 * 32 + 2 * block + 32 + 32 * 300
    assert optax.tree.size(params) == expected
    assert count_parameters(TASK) == expected
    assert optax.tree.size(nnx.state(Llama(MODEL, nnx.Rngs(0)))) == expected


def test_bfloat16_affects_only_the_computation():
    model = Llama(replace(MODEL, dtype="bfloat16"), nnx.Rngs(0))
    reference = Llama(MODEL, nnx.Rngs(0))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    assert dtypes == {jnp.dtype("float32")}
    logits = call(model, random_tokens())
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - call(reference, random_tokens())).max()
    assert 0 < difference < 0.05
    assert (logits != logits.astype(jnp.bfloat16)).any()


def test_the_initial_loss_is_that_of_a_uniform_guess():
    params, _ = initial_state()
    loss = loss_fn(TASK, params, random_tokens(8, 64))
    assert abs(loss - math.log(MODEL.vocab_size)) < 0.05


def test_loss_in_numpy():
    params, _ = initial_state()
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    tokens = random_tokens()
    logits = np.asarray(
        call(nnx.merge(make_graphdef(MODEL), params), tokens[:, :-1]), np.float64
    )
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(shares, np.asarray(tokens)[:, 1:, None], -1)
    loss = loss_fn(TASK, params, tokens.astype(jnp.uint16))
    np.testing.assert_allclose(loss, -np.log(right).mean(), rtol=1e-5)


def test_every_block_has_its_own_weights():
    blocks = nnx.state(Llama(MODEL, nnx.Rngs(0)).blocks)
    for leaf in jax.tree.leaves(blocks):
        assert leaf.shape[0] == MODEL.num_layers
        if leaf.ndim == 3:
            assert (leaf[0] != leaf[1]).all()
            assert leaf.std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "option", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}]
)
def test_compute_settings_do_not_change_the_results(option):
    tokens = random_tokens()
    params, _ = initial_state()
    other = replace(TASK, model=replace(MODEL, **option))
    loss, grads = grad_fn(TASK, params, tokens)
    other_loss, other_grads = grad_fn(other, params, tokens)
    assert other_loss == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("60m", 58_073_600), ("1b", 1_339_082_752), ("7b", 6_738_415_616)],
)
def test_parameter_counts_of_the_papers_models(name, parameters):
    assert count_parameters(LlamaTask(MODELS[name])) == parameters


# Step


@pytest.mark.parametrize("parts", [1, 2])
def test_evaluation_is_the_mean_over_all_batches(parts):
    params, _ = initial_state()
    batches = random_tokens(12).reshape(3, 4, 17)
    expected = loss_fn(TASK, params, batches.reshape(12, 17))
    loss = jax.jit(step.make_evaluate(TASK, parts))(params, batches).loss
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_applies_the_optimizer(parts):
    state = initial_state()
    state = state._replace(opt_state=optax.sgd(0.5).init(state.params))
    tokens = random_tokens(4)
    train_step = jax.jit(step.make_train_step(TASK, optax.sgd(0.5), parts))
    new, measured = train_step(state, tokens)

    expected, grads = grad_fn(TASK, state.params, tokens)
    assert measured.loss == pytest.approx(float(expected), rel=1e-6)
    norm = math.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
    assert measured.grad_norm == pytest.approx(norm, rel=1e-5)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    for ours, theirs in zip(jax.tree.leaves(new.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_each_part_takes_sequences_from_the_whole_batch():
    parts = step.cut(jnp.arange(12).reshape(6, 2), 3)
    np.testing.assert_array_equal(parts[:, :, 0] // 2, [[0, 3], [1, 4], [2, 5]])


def test_aligned_fraction_counts_parameters():
    tokens = random_tokens()
    state = initial_state()
    leaves = jax.tree.leaves(grad_fn(TASK, state.params, tokens)[1])
    nonzero = sum(int(jnp.count_nonzero(leaf)) for leaf in leaves)

    def fraction(rate):
        measure = step.make_aligned_fraction(TASK, optax.sgd(rate))
        opt_state = optax.sgd(rate).init(state.params)
        found = jax.jit(measure)(state._replace(opt_state=opt_state), tokens)
        counts = {
            name: fractions.mean() * leaf.size
            for (name, fractions), leaf in zip(found.parts.items(), leaves, strict=True)
        }
        total = sum(counts.values()) / sum(leaf.size for leaf in leaves)
        assert found.whole == pytest.approx(float(total), rel=1e-5)
        assert found.parts["blocks.attention.key.kernel"].shape == (MODEL.num_layers,)
        return found.whole

    # Tokens absent from the batch have no gradient in the embedding.
    assert nonzero < sum(leaf.size for leaf in leaves)
    expected = nonzero / sum(leaf.size for leaf in leaves)
    assert fraction(1.0) == pytest.approx(expected, rel=1e-5)
    assert fraction(-1.0) == 0
