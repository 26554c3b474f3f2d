"""Conversion of Llamas from and to Hugging Face's format."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.llama.config import TOKENIZER_NAME, ModelConfig
from examples.llama.data.tokenizer import load_tokenizer
from examples.training.checks import InputError, read_text, require
from examples.training.safetensors_files import (
    load_tensors,
    save_json,
    tensor_files,
)
from examples.training.task import Params


class Pretrained(NamedTuple):
    """A pretrained model, its tokenizer and the tokens that delimit documents."""

    model: ModelConfig
    load_params: Callable[[], Params]
    """Loads the parameters into host memory; a model without an output layer has no
    ``logits``."""
    tokenizer: Path
    """The tokenizer.json."""
    start_of_document: str
    """The special token before each document."""
    end_of_document: str
    """The special token at the end of each document, possibly the same."""


BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Our names of a block's parameters, mapped to those of transformers."""


def weight_name(layer: int, name: str) -> str:
    """Format the name of a block's weight in ``LlamaModel``."""
    return f"layers.{layer}.{name}.weight"


def to_tensors(params: Params) -> dict[str, np.ndarray]:
    """Convert parameters to the names and layouts of transformers.

    Both implementations pair feature ``i`` of a head with feature ``i + H/2`` in the
    rotary embedding, so the features keep their order.

    Args:
        params: parameters in host memory; kernels are ``[inputs, outputs]``, stacked
            over the blocks.

    Returns:
        Views of the parameters by name, separate for each block; weights are
        ``[outputs, inputs]``.
    """
    tensors = {"model.embed_tokens.weight": params["embedding"]["embedding"]}
    blocks = {here: _weight(params["blocks"], here) for here in BLOCK}
    for layer in range(len(blocks["attention_norm"])):
        for here, there in BLOCK.items():
            tensors[f"model.{weight_name(layer, there)}"] = blocks[here][layer].T
    tensors["model.norm.weight"] = params["norm"]["scale"]
    if "logits" in params:
        tensors["lm_head.weight"] = params["logits"]["kernel"].T
    return tensors


def _weight(params: Params, name: str) -> Any:
    """Return the kernel of a projection or the scale of a norm by its dotted name."""
    for part in name.split("."):
        params = params[part]
    (weight,) = params.values()
    return weight


def to_config(model: ModelConfig, length: int, end: int) -> dict[str, Any]:
    """Build transformers' config.json, without the entries that depend on the head.

    Args:
        model: the architecture.
        length: the training sequence length, in tokens.
        end: the end-of-document token, which therefore also precedes each document.
    """
    return {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_epsilon,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": length,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


def to_tokenizer_config(end_of_document: str, length: int) -> dict[str, Any]:
    """Build transformers' tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_document,
        "eos_token": end_of_document,
        "model_max_length": length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def to_tokenizer(text: str) -> dict[str, Any]:
    """Build transformers' tokenizer.json.

    Args:
        text: the tokenizer.json of the run.

    Returns:
        The same tokenizer without its post-processor, which may add special tokens to
        a text, as T5's does: the training texts had none. Text that spells out a
        special token is encoded as that token, as always in transformers.
    """
    tokenizer: dict[str, Any] = json.loads(text)
    return {**tokenizer, "post_processor": None}


def save_tokenizer(
    text: str, end_of_document: str, length: int, directory: Path
) -> None:
    """Save a tokenizer and its settings.

    Args:
        text: the tokenizer.json of the run.
        end_of_document: the special token at the end of each document.
        length: the training sequence length, in tokens.
        directory: the directory to write to.
    """
    save_json(to_tokenizer(text), directory / "tokenizer.json")
    config = to_tokenizer_config(end_of_document, length)
    save_json(config, directory / "tokenizer_config.json")


def open_huggingface(source: Path) -> Pretrained:
    """Open a model in a directory in Hugging Face's format.

    Raises:
        InputError: if there is no such model, or its architecture is not supported.
    """
    path = source / "config.json"
    require(
        path.is_file(),
        f"from: {source} contains neither checkpoints of a run nor a config.json; pass "
        "the directory of a run or of a Llama in Hugging Face's format.",
    )
    try:
        config = json.loads(read_text("from", path))
        model = _model(config, path)
        end, start = config["eos_token_id"], config.get("bos_token_id")
        # eos_token_id may be a list, as in chat models; the first ends a document.
        end = end[0] if isinstance(end, list) else end
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"from: {path} does not describe a Llama ({error!r})."
        ) from error

    tensor_files("from", source)  # They must exist.

    def load_params() -> Params:
        params = _from_tensors(load_tensors("from", source), model, source)
        if config.get("tie_word_embeddings") and "logits" not in params:
            params["logits"] = {"kernel": params["embedding"]["embedding"].T}
        return params

    tokenizer = source / TOKENIZER_NAME
    require(tokenizer.is_file(), f"from: {tokenizer} does not exist.")
    loaded = load_tokenizer(str(tokenizer))
    tokens = []
    for name, token in (("bos", end if start is None else start), ("eos", end)):
        text = loaded.id_to_token(token) if isinstance(token, int) else None
        if text is None:
            raise InputError(
                f"from: {name}_token_id in {path} is {token}, which is not a token of "
                f"{tokenizer}."
            )
        tokens.append(text)
    return Pretrained(model, load_params, tokenizer, *tokens)


def _model(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """Convert transformers' config.json to our settings."""
    expected = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }
    found = {name: config.get(name, value) for name, value in expected.items()}
    require(
        found == expected,
        f"from: the model of {path} differs from the supported Llama in "
        f"{', '.join(name for name in expected if found[name] != expected[name])}.",
    )
    # Older versions of transformers write rope_theta and rope_scaling instead of
    # rope_parameters.
    rope = {
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    theta = float(rope.pop("rope_theta"))
    kinds = {rope.pop(name, "default") for name in ("rope_type", "type")}
    rotated = rope.pop("partial_rotary_factor", 1.0)
    require(
        kinds == {"default"} and rotated == 1 and not rope,
        f"from: the model of {path} scales its rotary frequencies, which is not "
        "supported.",
    )
    model = ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        rope_theta=theta,
        rms_epsilon=float(config.get("rms_norm_eps", 1e-6)),
    )
    require(
        config.get("head_dim") in (None, model.head_dim),
        f"from: head_dim in {path} must be hidden_size / num_attention_heads.",
    )
    return model


def _from_tensors(
    tensors: Mapping[str, np.ndarray], model: ModelConfig, source: Path
) -> Params:
    """Convert tensors of transformers to parameters; the inverse of ``to_tensors``."""
    # Checkpoints of a model without a head have no prefix.
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    left = {name: x for name, x in tensors.items() if "rotary_emb" not in name}

    def take(name: str, *shape: int) -> np.ndarray:
        require(name in left, f"from: {source} has no tensor {name}.")
        tensor = left.pop(name)
        require(
            tensor.shape == shape,
            f"from: the tensor {name} in {source} has the shape {tensor.shape}, "
            f"expected {shape}.",
        )
        return tensor

    features, inner = model.hidden_size, model.intermediate_size
    kv = model.num_kv_heads * model.head_dim
    outputs = {"key": kv, "value": kv, "gate": inner, "up": inner}
    params: Params = {
        "embedding": {
            "embedding": take(
                f"{prefix}embed_tokens.weight", model.vocab_size, features
            )
        },
        "norm": {"scale": take(f"{prefix}norm.weight", features)},
        "blocks": {},
    }
    for here, there in BLOCK.items():
        *holders, last = here.split(".")
        is_norm = last.endswith("norm")
        inputs = inner if last == "down" else features
        shape = (features,) if is_norm else (outputs.get(last, features), inputs)
        layers = [
            take(f"{prefix}{weight_name(layer, there)}", *shape).T
            for layer in range(model.num_layers)
        ]
        holder = params["blocks"]
        for name in holders:
            holder = holder.setdefault(name, {})
        holder[last] = {"scale" if is_norm else "kernel": np.stack(layers)}
    if "lm_head.weight" in tensors:
        kernel = take("lm_head.weight", model.vocab_size, features).T
        params["logits"] = {"kernel": kernel}
    left.pop("score.weight", None)  # The head of a classifier.
    require(
        not left,
        f"from: {source} has unexpected tensors: {', '.join(sorted(left)[:3])}.",
    )
    return params
