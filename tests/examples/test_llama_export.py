"""Export of a trained Llama to Hugging Face's format, and parity with transformers."""

import json
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

for _module in (
    "grain",
    "orbax.checkpoint",
    "safetensors",
    "tokenizers",
    "tqdm",
    "tyro",
):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import grain
from safetensors.numpy import load_file
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import decoders as tokenizer_decoders

from examples.llama import export, generate
from examples.llama.config import DataConfig, ModelConfig
from examples.llama.data.tokenizer import encode, train_tokenizer
from examples.llama.generate import Run, Sampling
from examples.llama.model import make_graphdef
from examples.llama.task import LlamaTask
from examples.llama.transformers_files import to_tensors
from examples.training.checkpoint import Checkpoints
from examples.training.checks import InputError
from examples.training.config import TrainConfig, to_json
from examples.training.safetensors_files import save_tensors, split_tensors
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
    rope_theta=500.0,
    unroll=1,
)
TASK = LlamaTask(MODEL, DataConfig(sequence_length=48, batch_size=8))
SHAPES = {
    "model.embed_tokens.weight": (300, 32),
    "model.layers.{}.input_layernorm.weight": (32,),
    "model.layers.{}.self_attn.q_proj.weight": (32, 32),
    "model.layers.{}.self_attn.k_proj.weight": (16, 32),
    "model.layers.{}.self_attn.v_proj.weight": (16, 32),
    "model.layers.{}.self_attn.o_proj.weight": (32, 32),
    "model.layers.{}.post_attention_layernorm.weight": (32,),
    "model.layers.{}.mlp.gate_proj.weight": (48, 32),
    "model.layers.{}.mlp.up_proj.weight": (48, 32),
    "model.layers.{}.mlp.down_proj.weight": (32, 48),
    "model.norm.weight": (32,),
    "lm_head.weight": (300, 32),
}
TEXTS = [
    "the optimizer moves",
    "def  f(x):\n\treturn  'x' # none \n",
    "caf\u00e9 \u6f22\u5b57 \U0001f600",
    " ",
    "it 's n't . , !",
]


pytestmark = pytest.mark.usefixtures("little_optimization")


def random_params(model, seed=0):
    """Draw parameters far from the initial ones, so that each of them matters.

    Attention is not uniform, norms scale, and the inputs of the first norm are so small
    that its epsilon matters.
    """
    generator = np.random.default_rng(seed)
    centers = {"scale": 1.0}
    deviations = {"embedding": 0.003}

    def values(path, leaf):
        name = path[-1].key
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        return centers.get(name, 0.0) + deviations.get(name, 0.2) * noise

    like = jax.eval_shape(lambda: LlamaTask(model).init(0))
    return jax.tree_util.tree_map_with_path(values, like)


def make_documents():
    generator = random.Random(0)
    words = ["the", "optimizer", "moves", "a", "weight", "along", "its", "gradient"]
    return [" ".join(generator.choices(words, k=50)) for _ in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        make_documents(), MODEL.vocab_size, TASK.data.end_of_document
    )


def make_run(tokenizer, task=TASK):
    end = tokenizer.token_to_id(task.data.end_of_document)
    return Run(task, tokenizer, end, 7, random_params(task.model))


@pytest.fixture(scope="module")
def run(tokenizer):
    return make_run(tokenizer)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    export.save_run(run, directory)
    return directory


# Files


def test_names_shapes_and_values(run, exported):
    tensors = load_file(exported / "model.safetensors")
    expected = {
        name.format(layer): shape for name, shape in SHAPES.items() for layer in (0, 1)
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}
    blocks = run.params["blocks"]
    for name, value in {
        "model.embed_tokens.weight": run.params["embedding"]["embedding"],
        "model.layers.1.input_layernorm.weight": blocks["attention_norm"]["scale"][1],
        "model.layers.1.self_attn.k_proj.weight": (
            blocks["attention"]["key"]["kernel"][1].T
        ),
        "model.layers.0.mlp.down_proj.weight": (
            blocks["feed_forward"]["down"]["kernel"][0].T
        ),
        "lm_head.weight": run.params["logits"]["kernel"].T,
    }.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_configuration_files(exported):
    files = {path.name for path in exported.iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-6
    assert config["head_dim"] == 8
    assert config["max_position_embeddings"] == 48
    assert config["eos_token_id"] == 0
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|endoftext|>"


def test_large_models_are_split_into_several_files(run, tmp_path):
    tensors = to_tensors(run.params)
    limit = 20_000
    save_tensors(tensors, tmp_path, limit)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files[0] == f"model-00001-of-{count:05}.safetensors"
    assert files[-1] == f"model-{count:05}-of-{count:05}.safetensors"
    shards = {file: load_file(tmp_path / file) for file in files}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    assert sum(map(len, shards.values())) == len(tensors)
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(shards[file][name], tensors[name])
    for shard in shards.values():
        assert len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= limit


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1, 1, 1], [[0, 1, 2]]),
        ([2, 1, 1, 2], [[0, 1], [2, 3]]),
        ([4, 1, 4], [[0], [1], [2]]),
        ([1, 2, 1], [[0, 1], [2]]),
    ],
)
def test_split_tensors(sizes, expected):
    tensors = {str(i): np.zeros(size, np.int8) for i, size in enumerate(sizes)}
    shards = split_tensors(tensors, 3)
    assert [[int(name) for name in shard] for shard in shards] == expected


def test_the_command(run, tokenizer, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(to_json(TrainConfig(TASK)))
    tokenizer.save(str(run_dir / "tokenizer.json"))
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=2)
    for step, seed in ((3, 1), (7, 0)):
        params = jax.tree.map(jnp.asarray, random_params(MODEL, seed))
        state = TrainState(params, optax.adam(0.1).init(params))
        batches = iter(grain.MapDataset.source([0]).to_iter_dataset())
        checkpoints.save(step, state, batches, 5.0)
    checkpoints.close()

    out = tmp_path / "new" / "out"
    command = ["--run-dir", str(run_dir), "--output-dir", str(out)]
    run_command("export", command)
    assert "step 7" in capsys.readouterr().out
    tensors = load_file(out / "model.safetensors")
    for name, tensor in to_tensors(run.params).items():
        np.testing.assert_array_equal(tensors[name], tensor)
    with pytest.raises(SystemExit, match=r"^error: output_dir: .*out is not empty"):
        run_command("export", command)

    command[-1] = str(tmp_path / "earlier")
    run_command("export", [*command, "--step", "3"])
    earlier = load_file(tmp_path / "earlier" / "model.safetensors")
    assert (earlier["model.norm.weight"] != tensors["model.norm.weight"]).any()


def test_exporting_a_missing_run(tmp_path):
    with pytest.raises(InputError, match=r"run_dir: .* contains no run"):
        export.export(Source(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Parity with transformers


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch", reason="needs the extra [parity]")
    return pytest.importorskip("transformers", reason="needs the extra [parity]")


def load_model(transformers, directory, attention="eager"):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model) is transformers.LlamaForCausalLM
    return model


def torch_tokens(tokens):
    import torch

    return torch.tensor(np.asarray(tokens), dtype=torch.int64)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_logits_of_transformers(
    transformers, tokenizer, num_kv_heads, attention, tmp_path
):
    model = replace(MODEL, num_kv_heads=num_kv_heads)
    run = make_run(tokenizer, replace(TASK, model=model))
    export.save_run(run, tmp_path)
    theirs = load_model(transformers, tmp_path, attention)
    ours = jax.jit(nnx.merge(make_graphdef(model), run.params).__call__)
    for length in (1, 9, 48, 128):
        tokens = jax.random.randint(jax.random.key(length), (2, length), 0, 300)
        expected = theirs(torch_tokens(tokens)).logits.detach().numpy()
        logits = ours(tokens)
        assert np.ptp(expected) > 4
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_logits_of_a_model_in_several_files(transformers, run, exported, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(exported / name)
    save_tensors(to_tensors(run.params), tmp_path, 20_000)
    whole = load_model(transformers, exported)
    divided = load_model(transformers, tmp_path)
    tokens = torch_tokens([[1, 2, 3]])
    assert (whole(tokens).logits == divided(tokens).logits).all()


def test_greedy_text_of_transformers(transformers, run, exported):
    theirs = load_model(transformers, exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    encoded = tokenizer("the weight", return_tensors="pt")
    prompt = generate.encode_prompt("the weight", run)
    np.testing.assert_array_equal(encoded.input_ids[0], prompt)
    count = 48 - len(prompt)
    expected = theirs.generate(**encoded, do_sample=False, max_new_tokens=count)[0]
    drawn = generate.generate_tokens(
        MODEL,
        run.params,
        jnp.asarray(prompt),
        jax.random.key(0),
        end=run.end,
        count=count,
        sampling=Sampling(temperature=0),
    )[0]
    assert len(expected) == 48
    assert len(set(drawn.tolist())) > 10
    np.testing.assert_array_equal(expected[len(prompt) :], drawn)
    (text,) = generate.continue_prompt(run, "the weight", count, Sampling(0))
    assert tokenizer.decode(expected, skip_special_tokens=True) == text


def test_transformers_stops_at_the_same_token(transformers, run, tmp_path):
    # Take a token of the greedy continuation as the end of a document.
    prompt = generate.encode_prompt("the weight", run)
    options = {"count": 12, "sampling": Sampling(temperature=0)}
    args = MODEL, run.params, jnp.asarray(prompt), jax.random.key(0)
    free = generate.generate_tokens(*args, end=-1, **options)[0].tolist()
    end = free[7]
    first = free.index(end)
    export.save_run(run._replace(end=end), tmp_path)
    theirs = load_model(transformers, tmp_path)
    expected = theirs.generate(
        torch_tokens(prompt[None]), do_sample=False, max_new_tokens=12
    )[0, len(prompt) :]
    np.testing.assert_array_equal(expected, free[: first + 1])


def unigram():
    """Train a Unigram tokenizer that adds a special token to each text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizer_decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_documents(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_tokens_of_transformers(transformers, tokenizer, kind, tmp_path):
    if kind == "unigram":
        tokenizer = unigram()
        task = replace(TASK, data=replace(TASK.data, end_of_document="</s>"))
    else:
        task = TASK
    run = make_run(tokenizer, task)
    export.save_run(run, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.bos_token_id == run.end
    for text in TEXTS:
        tokens = encode([text], tokenizer, task.data.end_of_document)[:-1].tolist()
        assert theirs(text).input_ids == tokens
        decoded = theirs.decode(tokens, skip_special_tokens=True)
        assert decoded == tokenizer.decode(tokens)
        assert decoded == text or kind == "unigram"
