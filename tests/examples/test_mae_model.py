"""The masked autoencoder's model: patches, masks, encoder, decoder and loss."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

for _module in ("grain", "matplotlib", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.mae.config import MODELS, ModelConfig
from examples.mae.model import (
    PIXEL_MEAN,
    PIXEL_STD,
    MaskedAutoencoder,
    flops_per_image,
    mask_noise,
    normalize,
    patchify,
    positions,
    random_mask,
    unpatchify,
)
from examples.mae.task import MAETask
from examples.training.checks import InputError
from examples.training.task import count_parameters
from tests.examples import mae_fixtures as fixtures

MODEL = ModelConfig(
    image_size=16,
    patch_size=4,
    mask_ratio=0.7,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    decoder_hidden_size=24,
    decoder_num_layers=2,
    decoder_num_heads=2,
    decoder_intermediate_size=40,
    unroll=1,
    decoder_unroll=1,
)


pytestmark = pytest.mark.usefixtures("little_optimization")


@nnx.jit
def call(module, *arguments):
    return module(*arguments)


@nnx.jit(static_argnames="config")
def init(config):
    return MaskedAutoencoder(config, nnx.Rngs(0))


def make_model(config):
    """Create a model whose biases are not zero."""
    model = init(config)
    generator = np.random.default_rng(0)

    def move(leaf):
        return jnp.asarray(leaf + 0.1 * generator.normal(size=leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map(move, jax.device_get(nnx.state(model))))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(MODEL)


def random_images(count=3, size=16, seed=0):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.integers(0, 256, (count, size, size, 3), np.uint8))


def random_noise(count=3, patches=16):
    return mask_noise(jnp.arange(count, dtype=jnp.uint32), patches)


loss_and_grad = nnx.jit(nnx.value_and_grad(lambda model, *a: model(*a)))


def patches_of(images, config=MODEL):
    return patchify(normalize(images), config.patch_size)


# Patches


def test_patches_are_in_row_major_order():
    images = random_images()
    patches = patchify(images, 4)
    assert patches.shape == (3, 16, 48)
    for row, column in itertools.product(range(4), range(4)):
        square = images[:, 4 * row :, 4 * column :][:, :4, :4]
        expected = square.reshape(3, 48)  # Row, column, colour.
        np.testing.assert_array_equal(patches[:, 4 * row + column], expected)
    np.testing.assert_array_equal(unpatchify(patches, 4), images)


def test_the_patch_projection_is_a_convolution(model):
    images = random_images()
    kernel = model.patches.kernel[...].reshape(4, 4, 3, 32)
    expected = jax.lax.conv_general_dilated(
        normalize(images),
        kernel,
        (4, 4),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(3, 16, 32)
    ours = call(model.patches, patches_of(images))
    np.testing.assert_allclose(
        ours - model.patches.bias[...], expected, rtol=1e-4, atol=1e-5
    )


def test_pixels_are_normalized_with_imagenet_statistics():
    images = random_images()
    expected = (np.asarray(images) / 255 - PIXEL_MEAN) / PIXEL_STD
    assert normalize(images).dtype == jnp.float32
    np.testing.assert_allclose(normalize(images), expected, rtol=1e-5, atol=1e-6)


# Masks


@given(st.sampled_from([1, 4, 15]), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_the_patches_with_the_smallest_noise_are_visible(visible, seed):
    noise = np.random.default_rng(seed).random((3, 16), np.float32)
    mask = jax.jit(random_mask, static_argnums=1)(noise, visible)
    np.testing.assert_array_equal(mask.masked.sum(1), [16 - visible] * 3)
    for i in range(3):
        order = np.argsort(noise[i], kind="stable")
        np.testing.assert_array_equal(mask.visible[i], order[:visible])
        np.testing.assert_array_equal(order[mask.restore[i]], np.arange(16))
        shown = np.flatnonzero(~mask.masked[i])
        np.testing.assert_array_equal(shown, np.sort(order[:visible]))


def test_number_of_visible_patches():
    assert MODEL.visible == 4  # 0.3 x 16 = 4.8, rounded down.
    assert MODELS["tiny"].visible == 16
    assert MODELS["vit-b"].visible == 49
    assert MODELS["vit-h"].visible == 64


def test_the_noise_of_an_image_depends_only_on_its_seed():
    seeds = jnp.array([5, 2**32 - 1, 7, 5], jnp.uint32)
    noise = mask_noise(seeds, 64)
    np.testing.assert_array_equal(noise[0], noise[3])
    np.testing.assert_array_equal(mask_noise(seeds[1:2], 64), noise[1:2])
    np.testing.assert_array_equal(
        noise[2], jax.random.uniform(jax.random.key(7), (64,))
    )
    assert (noise[0] != noise[2]).any()
    assert 0 <= noise.min() < noise.max() < 1


# Positions


def test_positions_match_numpy():
    made = positions(3, 8)
    assert made.shape == (10, 8)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[0], np.zeros(8))
    for row, column in itertools.product(range(3), range(3)):
        expected = [
            wave(place * frequency)
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for frequency in (1.0, 0.01)
        ]
        np.testing.assert_allclose(made[1 + 3 * row + column], expected, rtol=1e-6)


# Encoder and decoder


def test_the_encoder_does_not_see_masked_patches(model):
    mask = random_mask(random_noise(), MODEL.visible)
    patches = patches_of(random_images())

    @nnx.jit
    def gradient(model, patches):
        return jax.grad(lambda x: jnp.square(model.encode(x, mask)).sum())(patches)

    @nnx.jit
    def gradient_of_prediction(model, patches):
        return jax.grad(lambda x: jnp.square(model.predict(x, mask)).sum())(patches)

    for function in (gradient, gradient_of_prediction):
        grads = np.abs(function(model, patches)).max(-1)
        assert (grads[mask.masked] == 0).all()
        assert (grads[~mask.masked] > 0).all()


def test_the_encoder_is_equivariant_to_the_order_of_visible_patches(model):
    noise = random_noise()
    mask = random_mask(noise, MODEL.visible)
    patches = patches_of(random_images())
    backwards = mask._replace(visible=mask.visible[:, ::-1])
    encode = nnx.jit(lambda model, mask: model.encode(patches, mask))
    ours, theirs = encode(model, mask), encode(model, backwards)
    np.testing.assert_allclose(theirs[:, 0], ours[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs[:, :0:-1], ours[:, 1:], rtol=1e-4, atol=1e-5)


def test_the_encoder_matches_its_parts(model):
    images, noise = random_images(), random_noise()
    mask = random_mask(noise, MODEL.visible)
    patches = patches_of(images)
    encoded = nnx.jit(lambda model: model.encode(patches, mask))(model)
    assert encoded.shape == (3, 1 + MODEL.visible, 32)

    places = positions(4, 32)
    tokens = call(model.patches, patches) + places[1:]
    for i in range(3):
        seen = [tokens[i, j] for j in np.argsort(noise[i])[: MODEL.visible]]
        x = jnp.stack([model.cls[...], *seen])[None]
        for layer in range(2):
            x = call(layer_of(model.encoder, layer), x)
        np.testing.assert_allclose(
            encoded[i], call(model.norm, x)[0], rtol=1e-4, atol=1e-5
        )


def test_the_decoder_restores_the_order_of_tokens(model):
    noise = random_noise()
    mask = random_mask(noise, MODEL.visible)
    encoded = jax.random.normal(jax.random.key(3), (3, 1 + MODEL.visible, 32))
    prediction = nnx.jit(lambda model: model.decode(encoded, mask))(model)
    assert prediction.shape == (3, 16, 48)
    assert prediction.dtype == jnp.float32

    places = positions(4, 24)
    tokens = call(model.decoder_embedding, encoded)
    for i in range(3):
        seen = np.argsort(noise[i])[: MODEL.visible].tolist()
        x = [tokens[i, 0]] + [
            tokens[i, 1 + seen.index(j)] if j in seen else model.mask_token[...]
            for j in range(16)
        ]
        x = (jnp.stack(x) + places)[None]
        for layer in range(2):
            x = call(layer_of(model.decoder, layer), x)
        expected = call(model.prediction, call(model.decoder_norm, x))[0, 1:]
        np.testing.assert_allclose(prediction[i], expected, rtol=1e-4, atol=1e-5)


def layer_of(blocks, layer):
    """Extract one block from the stack."""
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))


def test_a_block_normalizes_before_each_residual_sublayer(model):
    block = layer_of(model.encoder, 1)
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    y = x + call(block.attention, call(block.attention_norm, x))
    y = y + call(block.feed_forward, call(block.feed_forward_norm, y))
    np.testing.assert_allclose(call(block, x), y, rtol=1e-5, atol=1e-6)


def test_attention_matches_numpy(model):
    attention = layer_of(model.encoder, 0).attention
    x = np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)

    def heads(projection):
        y = x[0] @ np.asarray(projection.kernel[...]) + np.asarray(projection.bias[...])
        return y.reshape(5, 4, 8)

    q, k, v = map(heads, (attention.query, attention.key, attention.value))
    expected = np.zeros((5, 4, 8))
    for head, t in itertools.product(range(4), range(5)):
        scores = k[:, head] @ q[t, head] / math.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected[t, head] = weights / weights.sum() @ v[:, head]
    output = attention.output
    expected = expected.reshape(5, 32) @ np.asarray(output.kernel[...])
    expected += np.asarray(output.bias[...])
    np.testing.assert_allclose(call(attention, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_feed_forward_matches_numpy(model):
    layer = layer_of(model.decoder, 1).feed_forward
    x = np.random.default_rng(0).normal(size=(2, 3, 24)).astype(np.float32) * 3
    inner = x @ np.asarray(layer.up.kernel[...]) + np.asarray(layer.up.bias[...])
    inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
    expected = inner @ np.asarray(layer.down.kernel[...])
    expected += np.asarray(layer.down.bias[...])
    np.testing.assert_allclose(call(layer, x), expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_matches_numpy(model):
    x = np.random.default_rng(0).normal(1.0, 1e-4, (2, 5, 32)).astype(np.float32)
    y = x.astype(np.float64)
    expected = (y - y.mean(-1, keepdims=True)) / np.sqrt(
        y.var(-1, keepdims=True) + 1e-12
    )
    expected = expected * model.norm.scale[...] + model.norm.bias[...]
    np.testing.assert_allclose(call(model.norm, x), expected, rtol=1e-2, atol=1e-2)


# Loss


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_the_loss_matches_numpy(norm_pixels):
    config = replace(MODEL, norm_pixels=norm_pixels)
    model = make_model(config)
    images, noise = random_images(), random_noise()
    mask = random_mask(noise, config.visible)
    targets = np.asarray(patches_of(images), np.float64)
    prediction = nnx.jit(lambda m: m.predict(patches_of(images), mask))(model)
    if norm_pixels:
        mean = targets.mean(-1, keepdims=True)
        variance = np.square(targets - mean).sum(-1, keepdims=True) / 47
        targets = (targets - mean) / np.sqrt(variance + 1e-6)
    errors = np.square(np.asarray(prediction) - targets)[np.asarray(mask.masked)]
    assert errors.shape == (3 * 12, 48)
    loss = call(model, images, noise)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)


def test_the_loss_covers_only_masked_patches(model):
    images, noise = random_images(), random_noise()
    masked = random_mask(noise, MODEL.visible).masked
    whole = jnp.broadcast_to(masked[..., None], (3, 16, 48))
    changed = jnp.where(unpatchify(whole, 4), random_images(seed=1), images)

    @nnx.jit
    def error(model, targets):
        prediction = model.predict(patches_of(images), random_mask(noise, 4))
        return jnp.square(prediction - patches_of(targets)).mean(-1)

    # Masked patches affect the loss only as targets, not through predictions.
    before, after = error(model, images), error(model, changed)
    np.testing.assert_array_equal(before[~masked], after[~masked])
    np.testing.assert_allclose(
        call(model, images, noise), before[masked].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        call(model, changed, noise), after[masked].mean(), rtol=1e-5
    )


def test_the_mean_loss_of_equal_parts_is_that_of_the_batch(model):
    images, noise = random_images(6), random_noise(6)
    parts = [call(model, images[i::2], noise[i::2]) for i in range(2)]
    np.testing.assert_allclose(call(model, images, noise), np.mean(parts), rtol=1e-6)


def test_gradients_of_constant_images_are_finite():
    model = init(replace(MODEL, norm_pixels=True))
    images = jnp.zeros((3, 16, 16, 3), jnp.uint8).at[1].set(255)
    loss, grads = loss_and_grad(model, images, random_noise())
    assert np.isfinite(loss)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()


def test_every_parameter_has_a_gradient(model):
    _, grads = loss_and_grad(model, random_images(), random_noise())
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
        # The softmax is invariant to the key bias: it shifts all scores of a query.
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            assert np.abs(leaf).max() > 1e-7, path


@pytest.mark.parametrize(
    "option",
    [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2, "decoder_unroll": 2}],
    ids=["remat", "dots", "unroll"],
)
def test_remat_and_unroll_change_nothing(option, model):
    other = make_model(replace(MODEL, **option))
    batch = random_images(), random_noise()
    loss, grads = loss_and_grad(model, *batch)
    other_loss, other_grads = loss_and_grad(other, *batch)
    assert other_loss == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bfloat16_leaves_parameters_loss_and_gradients_in_float32(model):
    other = make_model(replace(MODEL, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(other))} == {
        jnp.dtype("float32")
    }
    batch = random_images(), random_noise()
    loss, grads = loss_and_grad(other, *batch)
    expected_loss, _ = loss_and_grad(model, *batch)
    assert loss.dtype == jnp.float32
    assert loss != expected_loss
    assert loss == pytest.approx(float(expected_loss), rel=0.01)
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()


# Parameters


def test_parameters_of_blocks_are_stacked():
    params = nnx.to_pure_dict(nnx.state(init(MODEL), nnx.Param))
    assert set(params) == {
        "patches",
        "cls",
        "encoder",
        "norm",
        "decoder_embedding",
        "mask_token",
        "decoder",
        "decoder_norm",
        "prediction",
    }
    for name, features in (("encoder", 32), ("decoder", 24)):
        blocks = params[name]
        assert set(blocks) == {
            "attention_norm",
            "attention",
            "feed_forward_norm",
            "feed_forward",
        }
        assert set(blocks["attention"]) == {"query", "key", "value", "output"}
        assert set(blocks["feed_forward"]) == {"up", "down"}
        assert blocks["attention"]["query"]["kernel"].shape == (2, features, features)
        for leaf in jax.tree.leaves(blocks):
            assert leaf.shape[0] == 2
            if leaf.ndim == 3:
                assert (leaf[0] != leaf[1]).all()


def test_initial_values():
    params = nnx.to_pure_dict(nnx.state(init(MODEL), nnx.Param))
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if name.endswith("['kernel']"):
            bound = math.sqrt(6 / sum(leaf.shape[-2:]))
            assert 0.95 * bound < np.abs(leaf).max() <= bound
        elif name.endswith("['scale']"):
            assert (leaf == 1).all()
        elif name.endswith("['bias']"):
            assert (leaf == 0).all()
        else:  # A token.
            assert leaf.std() == pytest.approx(0.02, rel=0.3)


def test_number_of_parameters():
    def block(size, inner):
        return 4 * size * (size + 1) + 2 * size * inner + inner + size + 4 * size

    expected = (
        49 * 32
        + 32
        + 2 * block(32, 48)
        + 2 * 32
        + 33 * 24
        + 24
        + 2 * block(24, 40)
        + 2 * 24
        + 25 * 48
    )
    assert count_parameters(MAETask(MODEL)) == expected
    state = nnx.state(init(MODEL))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit-b", 111_655_680), ("vit-l", 329_239_296), ("vit-h", 656_613_964)],
)
def test_number_of_parameters_of_the_paper_models(name, parameters):
    assert count_parameters(MAETask(MODELS[name])) == parameters


def test_number_of_flops():
    assert flops_per_image(MODEL) == 3 * 2 * (
        4 * 48 * 32
        + 2 * 5 * (4 * 32**2 + 2 * 32 * 48 + 2 * 5 * 32)
        + 5 * 32 * 24
        + 2 * 17 * (4 * 24**2 + 2 * 24 * 40 + 2 * 17 * 24)
        + 16 * 24 * 48
    )


# Reconstructions


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_a_reconstruction_keeps_visible_patches(norm_pixels):
    model = make_model(replace(MODEL, norm_pixels=norm_pixels))
    images, noise = random_images(), random_noise()
    shown = nnx.jit(lambda m: m.reconstruct(images, noise))(model)
    masked = random_mask(noise, MODEL.visible).masked
    for picture in shown:
        assert picture.shape == (3, 16, 16, 3)
        assert picture.dtype == jnp.uint8
    np.testing.assert_array_equal(shown.original, images)
    seen, filled = patchify(shown.seen, 4), patchify(shown.filled, 4)
    original = patchify(images, 4)
    np.testing.assert_array_equal(seen[~masked], original[~masked])
    np.testing.assert_array_equal(filled[~masked], original[~masked])
    assert (seen[masked] == 128).all()

    patches = np.asarray(patches_of(images))
    mask = random_mask(noise, MODEL.visible)
    expected = np.asarray(nnx.jit(lambda m: m.predict(patches_of(images), mask))(model))
    if norm_pixels:
        deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
        expected = expected * deviation + patches.mean(-1, keepdims=True)
    expected = expected.reshape(3, 16, 16, 3) * PIXEL_STD + PIXEL_MEAN
    expected = (expected.reshape(3, 16, 48) * 255).clip(0, 255)
    np.testing.assert_allclose(filled[masked], expected[masked], atol=0.51)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"decoder_num_layers": -1}, "decoder_num_layers must be positive, got -1"),
        ({"patch_size": 5}, r"patch_size \(5\) must divide image_size \(32\)"),
        ({"mask_ratio": 1.0}, "mask_ratio must be strictly between 0 and 1"),
        ({"mask_ratio": 0.0}, "mask_ratio must be strictly .*, got 0.0"),
        ({"mask_ratio": 0.99}, "mask_ratio .*, but 0.99 leaves 0 of 64 visible"),
        ({"patch_size": 32}, "mask_ratio .*, but 0.75 leaves 0 of 1 visible"),
        ({"num_heads": 3}, r"num_heads \(3\) must divide hidden_size \(128\)"),
        (
            {"decoder_num_heads": 3},
            r"decoder_num_heads \(3\) must divide decoder_hidden_size \(64\)",
        ),
        (
            {"hidden_size": 6, "num_heads": 2},
            "hidden_size must be a multiple of 4, got 6",
        ),
        (
            {"decoder_hidden_size": 10, "decoder_num_heads": 5},
            "decoder_hidden_size must be a multiple of 4, got 10",
        ),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        ModelConfig(**settings)


# The weights of another run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 8, "norm_pixels": True}, "--num-heads 4 --no-norm-pixels"),
        ({"decoder_num_heads": 4}, "--decoder-num-heads 3"),
        ({"hidden_size": 64}, "different model"),
        ({"mask_ratio": 0.5, "image_size": 24, "unroll": 3}, None),
    ],
)
def test_a_run_starts_from_the_weights_of_the_same_model(settings, message, tmp_path):
    """The shapes of the weights do not depend on the number of heads."""
    source = tmp_path / "run"
    fixtures.write_run(source, MAETask(fixtures.MODEL), {1: 0.5})
    task = MAETask(replace(fixtures.MODEL, **settings))
    if message is None:
        task.check_source(source)
        return
    with pytest.raises(InputError, match=message):
        task.check_source(source)
