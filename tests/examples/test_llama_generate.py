"""Text generation with a trained Llama: the cache, sampling, and loading of runs."""

import json
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

for _module in ("grain", "orbax.checkpoint", "tokenizers", "tqdm", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import grain
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.llama import generate
from examples.llama.config import DataConfig, ModelConfig
from examples.llama.data.tokenizer import load_tokenizer, train_tokenizer
from examples.llama.generate import Run, Sampling
from examples.llama.model import make_cache, make_graphdef
from examples.llama.task import LlamaTask
from examples.training.checkpoint import Checkpoints, restore_params, saved_steps
from examples.training.checks import InputError
from examples.training.config import TrainConfig
from examples.training.config import to_json as config_to_json
from examples.training.sharding import make_mesh, shardings
from examples.training.step import TrainState
from examples.training.trained import Source
from tests.examples.training_fixtures import run_command

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    unroll=1,
)
TASK = LlamaTask(MODEL, DataConfig(sequence_length=48, batch_size=8))
CONFIG = TrainConfig(TASK)
PROMPT = jnp.arange(5, 12)
NO_END = -1
LOSSES = {2: 5.0, 4: 4.0, 6: 4.5}
"""Validation losses of the run's checkpoints, by step."""


pytestmark = pytest.mark.usefixtures("little_optimization")


def random_params(model, seed=0):
    """Draw parameters so large that attention and predictions are far from uniform."""
    generator = np.random.default_rng(seed)

    def values(path, leaf):
        noise = 0.3 * generator.normal(size=leaf.shape).astype(np.float32)
        return 1 + noise if path[-1].key == "scale" else noise

    like = jax.eval_shape(lambda: LlamaTask(model).init(0))
    return jax.tree_util.tree_map_with_path(values, like)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    generator = random.Random(0)
    words = ["the", "optimizer", "moves", "a", "weight", "along", "its", "gradient"]
    documents = [" ".join(generator.choices(words, k=50)) for _ in range(9)]
    return train_tokenizer(documents, MODEL.vocab_size, TASK.data.end_of_document)


@pytest.fixture(scope="module")
def run(params, tokenizer):
    end = tokenizer.token_to_id(TASK.data.end_of_document)
    return Run(TASK, tokenizer, end, 6, params)


@pytest.fixture(scope="module")
def run_dir(tokenizer, tmp_path_factory):
    """Write a run on eight devices with three checkpoints."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.json").write_text(config_to_json(CONFIG))
    tokenizer.save(str(directory / "tokenizer.json"))
    records = [{"step": step, "loss": 5.0} for step in range(1, 7)]
    for step, loss in LOSSES.items():
        records[step - 1]["validation_loss"] = loss
    lines = [json.dumps(record) + "\n" for record in records]
    (directory / "metrics.jsonl").write_text("".join(lines))

    batches = iter(grain.MapDataset.source([0]).to_iter_dataset())
    checkpoints = Checkpoints(directory / "checkpoints", keep=3)
    for step, loss in LOSSES.items():
        params = random_params(MODEL, step)
        state = TrainState(params, optax.adam(0.1).init(params))
        state = jax.device_put(state, shardings(state, TASK, make_mesh(CONFIG)))
        checkpoints.save(step, state, batches, loss)
    checkpoints.close()
    return directory


@pytest.fixture
def greedy(params):
    """Decode 20 tokens after the prompt greedily."""
    sampling = Sampling(temperature=0)
    return np.asarray(tokens_after(params, count=20, sampling=sampling)[0])


keep_top_k = jax.jit(generate.keep_top_k, static_argnums=1)
keep_top_p = jax.jit(generate.keep_top_p)


def tokens_after(params, prompt=PROMPT, seed=0, end=NO_END, **options):
    key = jax.random.key(seed)
    return generate.generate_tokens(MODEL, params, prompt, key, end=end, **options)


# Cache


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype", "atol"),
    [(1, "float32", 2e-5), (4, "float32", 2e-5), (2, "bfloat16", 0.2)],
)
def test_decoding_with_a_cache_matches_the_full_model(num_kv_heads, dtype, atol):
    config = replace(MODEL, num_kv_heads=num_kv_heads, dtype=dtype)
    params = random_params(config)
    graphdef = make_graphdef(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocab_size)
    expected = jax.jit(lambda: nnx.merge(graphdef, params)(tokens))()

    @jax.jit
    def decode(tokens, cache):
        return nnx.merge(graphdef, params).decode(tokens, cache)

    cache = make_cache(config, 2, 15)
    parts = []
    for part in (tokens[:, :5], tokens[:, 5:8], *jnp.split(tokens[:, 8:], 4, axis=1)):
        logits, cache = decode(part, cache)
        parts.append(logits)
    logits = jnp.concatenate(parts, axis=1)
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=atol)
    np.testing.assert_array_equal(cache.length, 12)


def test_greedy_decoding_matches_the_full_model(params, greedy):
    model = jax.jit(lambda tokens: nnx.merge(make_graphdef(MODEL), params)(tokens))
    length = len(PROMPT)
    tokens = np.zeros((1, length + 20), np.int32)  # No token sees those after it.
    tokens[0, :length] = PROMPT
    for i in range(20):
        tokens[0, length + i] = model(tokens)[0, length + i - 1].argmax()
    np.testing.assert_array_equal(greedy, tokens[0, length:])
    assert len(set(greedy.tolist())) > 10


def test_a_prompt_and_a_continuation_of_one_token(params):
    sampling = Sampling(temperature=0)
    tokens = tokens_after(params, jnp.array([7]), count=1, sampling=sampling)
    logits = nnx.merge(make_graphdef(MODEL), params)(jnp.array([[7]]))
    assert tokens == logits[0, 0].argmax()


def test_tokens_and_samples_are_drawn_independently(params):
    zeros = jax.tree.map(np.zeros_like, params)  # All tokens are equally likely.
    tokens = tokens_after(zeros, count=20, samples=4)
    rows = [tuple(row) for row in tokens.tolist()]
    assert min(len(set(row)) for row in rows) > 12
    assert len(set(rows)) == 4


# End


def test_a_text_stops_at_the_end_of_the_document(params):
    free = np.asarray(tokens_after(params, count=20, samples=4))
    end = free[0, 7]
    tokens = tokens_after(params, count=20, samples=4, end=end.item())
    for row, before in zip(np.asarray(tokens), free):
        where = np.flatnonzero(before == end)
        last = where[0] if where.size else 20
        np.testing.assert_array_equal(row[:last], before[:last])
        np.testing.assert_array_equal(row[last:], end)
    assert len({tuple(row) for row in free.tolist()}) == 4


def test_decoding_stops_when_all_texts_have_ended(params, monkeypatch):
    drawn = []

    def draw(logits, sampling, key):
        jax.debug.callback(lambda: drawn.append(None))
        return jnp.full(len(logits), 9)

    monkeypatch.setattr(generate, "draw", draw)
    for end, count in ((9, 1), (8, 23)):
        tokens = tokens_after(params, count=23, samples=2, end=end)
        jax.effects_barrier()
        assert (tokens == 9).all()
        assert len(drawn) == count
        drawn.clear()


# Sampling

ROWS = st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=12, max_size=12)
"""Logits of twelve tokens, possibly with ties."""


@given(ROWS, st.integers(1, 15))
def test_top_k(row, k):
    logits = np.array([row, row[::-1]], np.float32)
    kept = keep_top_k(logits, k)
    last = sorted(row)[-min(k, len(row))]
    np.testing.assert_array_equal(kept, np.where(logits >= last, logits, -np.inf))


@given(ROWS, st.floats(1e-3, 0.999))
def test_top_p(row, p):
    logits = np.array([row, row[::-1]], np.float32)
    kept = np.asarray(keep_top_p(logits, p))
    np.testing.assert_array_equal(kept[0], kept[1, ::-1])
    is_kept = kept[0] > -np.inf
    np.testing.assert_array_equal(kept[0][is_kept], logits[0][is_kept])
    last = logits[0][is_kept].min()
    np.testing.assert_array_equal(is_kept, logits[0] >= last)
    probabilities = np.exp(logits[0].astype(float))
    probabilities /= probabilities.sum()
    assert probabilities[is_kept].sum() > p - 1e-5
    assert probabilities[logits[0] > last].sum() < p + 1e-5


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(top_k=None), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        # Among the three most likely, the top two have 7/9 and the top one only 4/9.
        (Sampling(top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_p=0.1), [0, 1, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_sampling_frequencies(sampling, expected):
    count = 4000
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    logits = jnp.broadcast_to(logits, (count, 4)) + 3
    drawn = generate.draw(logits, sampling, jax.random.key(0))
    frequencies = np.bincount(drawn, minlength=4) / count
    expected = np.array(expected)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(frequencies - expected) <= 4 * deviation).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be .* at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be .*, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite .*, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be .*, got 1.1"),
        ({"top_p": float("nan")}, "top_p must be .*, got nan"),
    ],
)
def test_a_setting_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        Sampling(**arguments)


# Text


def test_the_same_seed_writes_the_same_text(run):
    texts = [
        generate.continue_prompt(run, "the weight", 30, samples=2, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4
    assert all(text.startswith("the weight") for text in texts[0] + texts[2])


def test_a_text_is_the_prompt_and_its_continuation(run):
    sampling = Sampling(temperature=0)
    (text,) = generate.continue_prompt(run, "the weight", 12, sampling)
    prompt = generate.encode_prompt("the weight", run)
    tokens = tokens_after(
        run.params, jnp.asarray(prompt), count=12, sampling=sampling, end=run.end
    )
    continuation = [token for token in tokens[0].tolist() if token != run.end]
    assert text == "the weight" + run.tokenizer.decode(continuation)


def test_an_empty_prompt_starts_a_new_document(run):
    np.testing.assert_array_equal(generate.encode_prompt("", run), [run.end])
    (text,) = generate.continue_prompt(run, "", 10)
    assert text
    assert TASK.data.end_of_document not in text


def test_a_prompt_cannot_end_its_document(run):
    tokens = generate.encode_prompt("the <|endoftext|>", run)
    assert run.end not in tokens
    assert run.tokenizer.decode(tokens.tolist()) == "the <|endoftext|>"


def test_default_number_of_tokens(run, monkeypatch):
    counts = []

    def generate_tokens(*args, count, samples, **options):
        counts.append(count)
        return jnp.zeros((samples, count), jnp.int32)

    monkeypatch.setattr(generate, "generate_tokens", generate_tokens)
    longer = replace(TASK, data=replace(TASK.data, sequence_length=1024))
    prompt = len(generate.encode_prompt("the weight", run))
    generate.continue_prompt(run, "the weight")
    generate.continue_prompt(run, "the weight", 48 - prompt)
    generate.continue_prompt(run._replace(task=longer), "the weight")
    generate.continue_prompt(run._replace(task=longer), "the weight", 500)
    assert counts == [48 - prompt, 48 - prompt, 200, 500]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": "", "tokens": 48},
            r"tokens \(48\) and the 1 of the prompt exceed the sequences of 48 .*"
            "pass --tokens 47",
        ),
        ({"prompt": "", "tokens": 0}, "tokens must be positive, got 0"),
        ({"prompt": "\0" * 48}, "prompt has 48 tokens, .* of 48; shorten it"),
        ({"prompt": "", "samples": 0}, "samples must be positive, got 0"),
        ({"prompt": "", "seed": -1}, "seed must be .*, got -1"),
        ({"prompt": "", "seed": 2**32}, "seed must be .*, got 4294967296"),
    ],
)
def test_invalid_arguments(run, arguments, message):
    with pytest.raises(InputError, match=message):
        generate.continue_prompt(run, **arguments)


# Runs


@pytest.mark.parametrize(
    ("options", "step"), [({}, 6), ({"best": True}, 4), ({"step": 2}, 2)]
)
def test_loading_a_checkpoint(run_dir, options, step):
    loaded = generate.load_run(Source(run_dir, **options))
    assert loaded.step == step
    assert loaded.task == TASK
    assert loaded.end == 0
    expected = random_params(MODEL, step)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    for leaf, there in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(expected)):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, there)


def test_a_partially_written_checkpoint_is_ignored(run_dir, tmp_path):
    assert saved_steps(run_dir / "checkpoints") == [2, 4, 6]
    (tmp_path / "8.orbax-checkpoint-tmp").mkdir()
    assert saved_steps(tmp_path) == []
    assert saved_steps(tmp_path / "missing") == []


def test_a_damaged_checkpoint(params, tmp_path):
    directory = tmp_path / "checkpoints"
    (directory / "3" / "state").mkdir(parents=True)
    (directory / "3" / "state" / "_METADATA").write_text("{")
    message = r"^run_dir: the checkpoint of step 3 in .* is damaged"
    with pytest.raises(InputError, match=message):
        restore_params("run_dir", directory, 3, params)


def copy_run(run_dir, target, *names):
    """Link some of the files of a run into another directory."""
    for name in names:
        (target / name).symlink_to(run_dir / name)


def test_a_directory_without_a_run(run_dir, tmp_path):
    with pytest.raises(InputError, match=r"run_dir: .*missing contains no run"):
        generate.load_run(Source(tmp_path / "missing"))
    copy_run(run_dir, tmp_path, "config.json")
    with pytest.raises(InputError, match=r"run_dir: there is no checkpoint in .*check"):
        generate.load_run(Source(tmp_path))
    copy_run(run_dir, tmp_path, "checkpoints")
    with pytest.raises(InputError, match=r"run_dir: .*tokenizer\.json does not exist"):
        generate.load_run(Source(tmp_path))
    with pytest.raises(InputError, match=r"best: the log in .* choose a --step"):
        generate.load_run(Source(tmp_path, best=True))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a valid tokenizer"):
        generate.load_run(Source(tmp_path))
    other = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"has no token '<\|endoftext\|>'"):
        generate.load_run(Source(tmp_path))


def test_a_missing_checkpoint(run_dir):
    with pytest.raises(InputError, match=r"of step 3 in .*choose one of 2, 4, 6"):
        generate.load_run(Source(run_dir, step=3))
    with pytest.raises(InputError, match="step and best: pass only one of them"):
        generate.load_run(Source(run_dir, step=4, best=True))


def test_the_command(run_dir, capsys):
    command = ["--run-dir", str(run_dir), "--prompt", "the weight", "--seed", "3"]
    options = ["--tokens", "12", "--top-k", "20", "--samples", "2", "--best"]
    run_command("generate", command + options)
    output = capsys.readouterr().out
    first, second = output.removeprefix("--- 1 of 2 ---\n").split("\n--- 2 of 2 ---\n")
    loaded = generate.load_run(Source(run_dir, best=True))
    loaded = loaded._replace(tokenizer=load_tokenizer(str(run_dir / "tokenizer.json")))
    expected = generate.continue_prompt(
        loaded, "the weight", 12, Sampling(top_k=20), samples=2, seed=3
    )
    assert [first, second] == [expected[0], expected[1] + "\n"]

    run_command("generate", [*command, "--tokens", "3"])
    assert capsys.readouterr().out.startswith("the weight")


def test_invalid_options_are_reported(run_dir, capsys):
    command = ["--run-dir", str(run_dir)]
    with pytest.raises(SystemExit, match=r"^error: tokens \(60\) and the 1 of the pr"):
        run_command("generate", [*command, "--tokens", "60"])
    with pytest.raises(SystemExit) as raised:
        run_command("generate", [*command, "--temperature", "-1"])
    assert raised.value.code == 2
    assert "temperature must be" in capsys.readouterr().err
