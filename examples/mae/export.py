"""The command that exports a trained model in Hugging Face's format.

``python -m examples.mae export --run-dir DIR --output-dir OUT`` writes a directory from
which ``transformers`` loads a ``ViTMAEForPreTraining`` and its image processor. The
processor squeezes images into a square, whereas training crops the centered square.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from examples.mae.config import ModelConfig
from examples.mae.model import LAYER_NORM_EPSILON, PIXEL_MEAN, PIXEL_STD, positions
from examples.mae.task import MAETask
from examples.training.checks import make_directory
from examples.training.safetensors_files import (
    require_empty,
    save_json,
    save_tensors,
)
from examples.training.task import Params
from examples.training.trained import Source, load_trained

_BICUBIC = 3
"""Pillow's code for bicubic resampling."""

# Names of modules here and in transformers.
_MODULES = {
    "patches": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "decoder_embedding": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "prediction": "decoder.decoder_pred",
}
_STACKS = {"encoder": "vit.encoder.layer", "decoder": "decoder.decoder_layers"}
_BLOCK = {
    "attention_norm": "layernorm_before",
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.output": "attention.output.dense",
    "feed_forward_norm": "layernorm_after",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
}


def to_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Convert parameters to the names and layouts of transformers.

    Args:
        config: the model.
        params: in host memory; kernels are ``[inputs, outputs]``, stacked over blocks.

    Returns:
        Weights, ``[outputs, inputs]``, separate for each block. The patch projection
        becomes a convolution, ``[D, 3, p, p]``. The fixed position embeddings are
        included.
    """
    modules = {there: params[here] for here, there in _MODULES.items()}
    for stack, prefix in _STACKS.items():
        blocks = flatten_dict(params[stack], is_leaf=_is_module, sep=".")
        for layer in range(len(blocks["attention_norm"]["scale"])):
            for here, there in _BLOCK.items():
                own = {name: values[layer] for name, values in blocks[here].items()}
                modules[f"{prefix}.{layer}.{there}"] = own
    tensors = {
        "vit.embeddings.cls_token": params["cls"][None, None],
        "decoder.mask_token": params["mask_token"][None, None],
    }
    side = config.image_size // config.patch_size
    for name, features in (
        ("vit.embeddings.position_embeddings", config.hidden_size),
        ("decoder.decoder_pos_embed", config.decoder_hidden_size),
    ):
        tensors[name] = positions(side, features)[None]
    for name, module in modules.items():
        weight = module["scale"] if "scale" in module else module["kernel"].T
        tensors |= {f"{name}.weight": weight, f"{name}.bias": module["bias"]}
    # A patch is flattened over rows, columns and channels.
    convolution = f"{_MODULES['patches']}.weight"
    shape = -1, config.patch_size, config.patch_size, 3
    tensors[convolution] = tensors[convolution].reshape(shape).transpose(0, 3, 1, 2)
    return tensors


def _is_module(path: tuple[str, ...], value: Mapping[str, Any]) -> bool:
    """Return whether these are the parameters of a projection or a norm."""
    del path
    return "bias" in value


def to_config(model: ModelConfig) -> dict[str, Any]:
    """Build the content of transformers' config.json."""
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pixels,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "decoder_hidden_size": model.decoder_hidden_size,
        "decoder_num_hidden_layers": model.decoder_num_layers,
        "decoder_num_attention_heads": model.decoder_num_heads,
        "decoder_intermediate_size": model.decoder_intermediate_size,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


def to_preprocessor_config(model: ModelConfig) -> dict[str, Any]:
    """Build the content of transformers' preprocessor_config.json."""
    mean, deviation = (
        [round(value, 6) for value in values.tolist()]
        for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": model.image_size, "width": model.image_size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
    }


def save_model(config: ModelConfig, params: Params, directory: Path) -> None:
    """Write a model and its preprocessor configuration to a directory."""
    save_tensors(to_tensors(config, params), directory)
    save_json(to_config(config), directory / "config.json")
    prepared = to_preprocessor_config(config)
    save_json(prepared, directory / "preprocessor_config.json")


def export(source: Source, output_dir: Path) -> None:
    """Export a trained model in Hugging Face's format, as a ViTMAEForPreTraining.

    Args:
        source: the checkpoint to export.
        output_dir: the directory to write to, new or empty.
    """
    require_empty(output_dir)
    config, step, params = load_trained(source, MAETask)
    make_directory("output_dir", output_dir)
    save_model(config.task.model, params, output_dir)
    print(f"Wrote the model of step {step} to {output_dir}.")
