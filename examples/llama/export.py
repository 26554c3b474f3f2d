"""The command that writes a trained model in the format of Hugging Face.

``python -m examples.llama export --run-dir DIR --output-dir OUT`` writes a directory
from which ``transformers`` loads a ``LlamaForCausalLM`` and its tokenizer, and other
programs that read this format do too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.llama.generate import Run, load_run
from examples.llama.model import RMS_EPSILON
from examples.llama.task import LlamaTask
from examples.training.checks import make_directory
from examples.training.safetensors_files import (
    require_empty,
    save_json,
    save_tensors,
)
from examples.training.task import Params
from examples.training.trained import Source

# The names of a block's parameters here, and those of transformers.
_BLOCK = {
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


def to_tensors(params: Params) -> dict[str, np.ndarray]:
    """Converts parameters to the names and layouts of transformers.

    Both rotate feature ``i`` of a head with feature ``i + H/2``, so that the features
    stay in their order.

    Args:
        params: in the host's memory; kernels are ``[inputs, outputs]``, and those of
            all blocks are stacked.

    Returns:
        Views of them; weights are ``[outputs, inputs]``, and every block has its own.
    """
    tensors = {"model.embed_tokens.weight": params["embedding"]["embedding"]}
    blocks = {here: _weight(params["blocks"], here) for here in _BLOCK}
    for layer in range(len(blocks["attention_norm"])):
        for here, there in _BLOCK.items():
            tensors[f"model.layers.{layer}.{there}.weight"] = blocks[here][layer].T
    tensors["model.norm.weight"] = params["norm"]["scale"]
    tensors["lm_head.weight"] = params["logits"]["kernel"].T
    return tensors


def _weight(params: Params, name: str) -> Any:
    """Finds a kernel or the scale of a norm by the names of what holds it."""
    for part in name.split("."):
        params = params[part]
    (weight,) = params.values()
    return weight


def to_config(task: LlamaTask, end: int) -> dict[str, Any]:
    """Makes the content of transformers' config.json.

    Args:
        task: the model and its data.
        end: the token that ends a document, and so comes before the next one, too.
    """
    model = task.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_EPSILON,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": task.data.sequence_length,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


def to_tokenizer_config(task: LlamaTask) -> dict[str, Any]:
    """Makes the content of transformers' tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": task.data.end_of_document,
        "eos_token": task.data.end_of_document,
        "model_max_length": task.data.sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def to_tokenizer(text: str) -> dict[str, Any]:
    """Makes the content of transformers' tokenizer.json.

    Args:
        text: the tokenizer.json of the run.

    Returns:
        The same without what adds special tokens around a text, as T5's does: there
        were none around the texts of the training. A text that spells out a special
        token becomes that token, as everywhere in transformers.
    """
    tokenizer: dict[str, Any] = json.loads(text)
    return {**tokenizer, "post_processor": None}


def save_run(run: Run, directory: Path) -> None:
    """Writes a model and its tokenizer to a directory."""
    save_tensors(to_tensors(run.params), directory)
    save_json(to_config(run.task, run.end), directory / "config.json")
    save_json(to_tokenizer(run.tokenizer.to_str()), directory / "tokenizer.json")
    save_json(to_tokenizer_config(run.task), directory / "tokenizer_config.json")


def export(source: Source, output_dir: Path) -> None:
    """Write a model in the format of Hugging Face.

    Args:
        source: where the parameters come from.
        output_dir: where the files go; a new directory, or an empty one.
    """
    require_empty(output_dir)
    run = load_run(source)
    make_directory("output_dir", output_dir)
    save_run(run, output_dir)
    print(f"Wrote the model of step {run.step} to {output_dir}.")
