"""Export of an autoencoder to Hugging Face's format, and parity with transformers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

for _module in ("grain", "matplotlib", "orbax.checkpoint", "safetensors", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from PIL import Image
from safetensors.numpy import load_file

from examples.mae import export
from examples.mae.config import MODELS
from examples.mae.model import (
    make_graphdef,
    mask_noise,
    normalize,
    patchify,
    positions,
    random_mask,
)
from examples.mae.pictures import prepare
from examples.mae.task import MAETask
from examples.training.checks import InputError
from examples.training.trained import Source
from tests.examples.mae_fixtures import (
    MODEL,
    random_images,
    random_params,
    run_command,
    write_run,
)

BLOCK = {
    "layernorm_before.weight": "D",
    "layernorm_before.bias": "D",
    "attention.attention.query.weight": "DD",
    "attention.attention.query.bias": "D",
    "attention.attention.key.weight": "DD",
    "attention.attention.key.bias": "D",
    "attention.attention.value.weight": "DD",
    "attention.attention.value.bias": "D",
    "attention.output.dense.weight": "DD",
    "attention.output.dense.bias": "D",
    "layernorm_after.weight": "D",
    "layernorm_after.bias": "D",
    "intermediate.dense.weight": "FD",
    "intermediate.dense.bias": "F",
    "output.dense.weight": "DF",
    "output.dense.bias": "D",
}
SHAPES = {
    "vit.embeddings.cls_token": (1, 1, 32),
    "vit.embeddings.position_embeddings": (1, 26, 32),
    "vit.embeddings.patch_embeddings.projection.weight": (32, 3, 4, 4),
    "vit.embeddings.patch_embeddings.projection.bias": (32,),
    "vit.layernorm.weight": (32,),
    "vit.layernorm.bias": (32,),
    "decoder.decoder_embed.weight": (24, 32),
    "decoder.decoder_embed.bias": (24,),
    "decoder.mask_token": (1, 1, 24),
    "decoder.decoder_pos_embed": (1, 26, 24),
    "decoder.decoder_norm.weight": (24,),
    "decoder.decoder_norm.bias": (24,),
    "decoder.decoder_pred.weight": (48, 24),
    "decoder.decoder_pred.bias": (48,),
}
for prefix, layers, sizes in (
    ("vit.encoder.layer", 3, {"D": 32, "F": 40}),
    ("decoder.decoder_layers", 2, {"D": 24, "F": 36}),
):
    for layer in range(layers):
        for name, axes in BLOCK.items():
            SHAPES[f"{prefix}.{layer}.{name}"] = tuple(sizes[axis] for axis in axes)


pytestmark = pytest.mark.usefixtures("little_optimization")


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def exported(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    export.save_model(MODEL, params, directory)
    return directory


# Files


def test_names_and_shapes(exported):
    tensors = load_file(exported / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}


def test_every_parameter_is_exported_once(params, exported):
    tensors = load_file(exported / "model.safetensors")
    for name, features in (
        ("vit.embeddings.position_embeddings", 32),
        ("decoder.decoder_pos_embed", 24),
    ):
        np.testing.assert_array_equal(tensors.pop(name)[0], positions(5, features))
    ours, theirs = (
        np.sort(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))
        for tree in (params, tensors)
    )
    np.testing.assert_array_equal(theirs, ours)


def test_parameters_are_exported_under_the_right_names(params, exported):
    tensors = load_file(exported / "model.safetensors")
    encoder, decoder = params["encoder"], params["decoder"]
    for name, value in {
        "vit.embeddings.cls_token": params["cls"][None, None],
        "vit.layernorm.weight": params["norm"]["scale"],
        "vit.layernorm.bias": params["norm"]["bias"],
        "vit.encoder.layer.2.attention.attention.key.weight": (
            encoder["attention"]["key"]["kernel"][2].T
        ),
        "vit.encoder.layer.1.attention.output.dense.bias": (
            encoder["attention"]["output"]["bias"][1]
        ),
        "decoder.decoder_layers.0.layernorm_after.weight": (
            decoder["feed_forward_norm"]["scale"][0]
        ),
        "decoder.decoder_layers.1.output.dense.weight": (
            decoder["feed_forward"]["down"]["kernel"][1].T
        ),
        "decoder.mask_token": params["mask_token"][None, None],
        "decoder.decoder_pred.weight": params["prediction"]["kernel"].T,
    }.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_the_patch_projection_becomes_a_convolution(params, exported):
    tensors = load_file(exported / "model.safetensors")
    kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    images = np.asarray(normalize(random_images(2, 20)))
    convolved = jax.lax.conv_general_dilated(
        images.transpose(0, 3, 1, 2), kernel, (4, 4), "VALID"
    )
    projected = np.asarray(patchify(images, 4)) @ params["patches"]["kernel"]
    convolved = convolved.reshape(2, 32, 25).swapaxes(1, 2)
    np.testing.assert_allclose(projected, convolved, rtol=0, atol=1e-5)


def test_exported_files(exported):
    files = {path.name for path in exported.iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    assert config["layer_norm_eps"] == 1e-12
    assert config["decoder_num_attention_heads"] == 3
    assert config["mask_ratio"] == 0.7
    assert config["norm_pix_loss"] is False
    assert export.to_config(MODELS["vit-b"])["norm_pix_loss"] is True
    pictures = json.loads((exported / "preprocessor_config.json").read_text())
    assert pictures["size"] == {"height": 20, "width": 20}
    assert pictures["image_mean"] == [0.485, 0.456, 0.406]
    assert pictures["image_std"] == [0.229, 0.224, 0.225]


def test_export_command(tmp_path, capsys):
    losses = {2: 0.5, 3: 0.3, 7: 0.4}
    write_run(tmp_path / "run", MAETask(MODEL), losses)
    for step, choice in ((7, []), (2, ["--step", 2]), (3, ["--best"])):
        out = tmp_path / "new" / str(step)
        command = "export", "--run-dir", tmp_path / "run", "--output-dir", out, *choice
        run_command(*command)
        assert f"the model of step {step} to {out}." in capsys.readouterr().out
        tensors = load_file(out / "model.safetensors")
        expected = export.to_tensors(MODEL, random_params(MODEL, step))
        assert set(tensors) == set(expected)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(tensors[name], tensor)
    with pytest.raises(SystemExit, match=r"^error: output_dir: .*3 is not empty; cho"):
        run_command(*command)


def test_a_directory_without_a_run_is_not_exported(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"^run_dir: .* contains no run"):
        export.export(Source(tmp_path), out)
    assert not out.exists()


# Parity with transformers


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch", reason="needs the extra [parity]")
    return pytest.importorskip("transformers", reason="needs the extra [parity]")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm_pixels", [False, True])
def test_loss_and_prediction_match_transformers(
    transformers, norm_pixels, attention, params, tmp_path
):
    import torch

    config = replace(MODEL, norm_pixels=norm_pixels)
    export.save_model(config, params, tmp_path)
    theirs, info = transformers.AutoModelForPreTraining.from_pretrained(
        tmp_path, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs) is transformers.ViTMAEForPreTraining

    images = jnp.asarray(random_images(6, 20))
    noise = mask_noise(jnp.arange(6, dtype=jnp.uint32), config.patches)
    pixels = np.asarray(normalize(images).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels), noise=torch.tensor(np.asarray(noise)))

    ours = nnx.merge(make_graphdef(config), params)
    mask = random_mask(noise, config.visible)
    np.testing.assert_array_equal(expected.mask, mask.masked)
    prediction = jax.jit(ours.predict)(patchify(normalize(images), 4), mask)
    assert np.ptp(expected.logits.numpy()) > 4
    np.testing.assert_allclose(prediction, expected.logits, rtol=0, atol=1e-4)
    loss = jax.jit(ours.__call__)(images, noise)
    np.testing.assert_allclose(loss, expected.loss, rtol=0, atol=1e-4)


def test_the_image_processor_matches_transformers(transformers, exported):
    # The fast processor resizes with torchvision, which differs.
    processor = transformers.AutoImageProcessor.from_pretrained(
        exported, use_fast=False
    )
    for size in (20, 50):
        (pixels,) = random_images(1, size)
        image = Image.fromarray(pixels)
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        ours = normalize(jnp.asarray(prepare(image, 20)))
        np.testing.assert_allclose(theirs.transpose(1, 2, 0), ours, rtol=0, atol=1e-5)
