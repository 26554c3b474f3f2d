"""The masked autoencoder of He et al. (arXiv:2111.06377), in Flax NNX.

Shapes: B images of S x S pixels are split into L patches of P values, V of which are
visible to the encoder. A residual stream has T tokens of D features; attention has N
heads of H features, and the feed-forward layer F hidden features.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.mae.config import ModelConfig
from examples.training.attention import attend
from examples.training.modules import BACK, INTO, linear
from examples.training.remat import Remat, rematerialize
from examples.training.sharding import BATCH, constrain

LAYER_NORM_EPSILON = 1e-12
PIXEL_EPSILON = 1e-6
PIXEL_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
PIXEL_STD = np.array([0.229, 0.224, 0.225], np.float32)
"""Mean and standard deviation of ImageNet's colour channels, for pixels in [0, 1]."""
_HIDDEN = 128
"""Grey level of masked patches."""

_linear = partial(
    linear, kernel_init=nnx.initializers.xavier_uniform(), use_bias=True, axes=None
)
_token_init = nnx.initializers.normal(0.02)


class Mask(NamedTuple):
    """The visible and masked patches of each image."""

    visible: jax.Array
    """Indices of the visible patches, ``[B, V]``, integers."""
    restore: jax.Array
    """Index of each patch in the sequence of visible patches followed by masked ones,
    ``[B, L]``, integers."""
    masked: jax.Array
    """Whether each patch is masked, ``[B, L]``, booleans."""


class Reconstruction(NamedTuple):
    """Original, masked and reconstructed images, each ``[B, S, S, 3]``, uint8."""

    original: jax.Array
    seen: jax.Array
    """The visible patches; masked ones are grey."""
    filled: jax.Array
    """The visible patches, and predictions of the masked ones."""


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Split images into patches, row by row.

    Args:
        images: ``[B, S, S, C]``.
        patch_size: pixels along each side of a patch.

    Returns:
        ``[B, L, P]`` of the same dtype, where P runs over rows, columns and channels.
    """
    batch, size, _, colours = images.shape
    grid = size // patch_size
    x = images.reshape(batch, grid, patch_size, grid, patch_size, colours)
    return x.swapaxes(2, 3).reshape(batch, grid**2, -1)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
    """Reassemble patches, ``[B, L, P]``, into images, ``[B, S, S, C]``."""
    batch, count, _ = patches.shape
    grid = round(count**0.5)
    x = patches.reshape(batch, grid, grid, patch_size, patch_size, -1)
    return x.swapaxes(2, 3).reshape(batch, grid * patch_size, grid * patch_size, -1)


def normalize(images: jax.Array) -> jax.Array:
    """Convert uint8 ``[..., 3]`` to float32, normalized with ImageNet's statistics."""
    return (images.astype(jnp.float32) / 255 - PIXEL_MEAN) / PIXEL_STD


def mask_noise(seeds: jax.Array, patches: int) -> jax.Array:
    """Draw the noise that determines each image's mask, from the image's own seed.

    Args:
        seeds: ``[B]``, uint32.
        patches: L.

    Returns:
        ``[B, L]``, float32, uniform from 0 to 1.
    """

    def draw(seed: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.key(seed), (patches,))

    return jax.vmap(draw)(seeds)


def random_mask(noise: jax.Array, visible: int) -> Mask:
    """Build the mask that keeps the patches with the smallest noise visible.

    Args:
        noise: ``[B, L]``, as drawn by ``mask_noise``.
        visible: V.
    """
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Mask(order[:, :visible], restore, restore >= visible)


def positions(grid: int, features: int) -> np.ndarray:
    """Compute the sine-cosine position embeddings of a grid.

    The first half of the features encodes the column, the second half the row. Each
    holds the sines, then the cosines, of the coordinate times ``10000 ** (-4 i / D)``.

    Args:
        grid: patches along each side.
        features: D, a multiple of 4.

    Returns:
        ``[1 + grid ** 2, D]``, float32; a row of zeros for the class token, then the
        patches row by row.
    """
    count = features // 4
    angles = np.outer(np.arange(grid), 10_000.0 ** (-np.arange(count) / count))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, D/2]
    columns, rows = np.tile(waves, (grid, 1)), np.repeat(waves, grid, axis=0)
    patches = np.concatenate([columns, rows], axis=1)
    return np.concatenate([np.zeros((1, features)), patches]).astype(np.float32)


class Attention(nnx.Module):
    """Bidirectional self-attention."""

    def __init__(self, size: int, heads: int, dtype: str, rngs: nnx.Rngs):
        """Create the four projections, each with a bias."""
        project = partial(_linear, size, size, dtype=dtype, rngs=rngs)
        self.query = project(axes=INTO)
        self.key = project(axes=INTO)
        self.value = project(axes=INTO)
        self.output = project(axes=BACK)
        self.num_heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        batch, length, _ = x.shape

        def heads(projection: nnx.Linear) -> jax.Array:
            y = projection(x).reshape(batch, length, self.num_heads, -1)
            return constrain(y, BATCH, None, "tensor", None)

        query, key, value = heads(self.query), heads(self.key), heads(self.value)
        attended = attend(query, key, value, causal=False, kernel="auto")
        return self.output(attended.reshape(batch, length, -1))


class FeedForward(nnx.Module):
    """``down(gelu(up(x)))``."""

    def __init__(self, size: int, inner: int, dtype: str, rngs: nnx.Rngs):
        """Create the two projections, each with a bias."""
        self.up = _linear(size, inner, dtype=dtype, rngs=rngs, axes=INTO)
        self.down = _linear(inner, size, dtype=dtype, rngs=rngs, axes=BACK)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, T, D]`` to ``[B, T, D]`` through ``[B, T, F]``."""
        inner = jax.nn.gelu(self.up(x), approximate=False)
        return self.down(constrain(inner, BATCH, None, "tensor"))


class Block(nnx.Module):
    """A pre-norm transformer block: attention and feed-forward."""

    def __init__(self, size: int, heads: int, inner: int, dtype: str, rngs: nnx.Rngs):
        """Create the two sublayers and their norms."""
        self.attention_norm = _layer_norm(size, dtype, rngs)
        self.attention = Attention(size, heads, dtype, rngs)
        self.feed_forward_norm = _layer_norm(size, dtype, rngs)
        self.feed_forward = FeedForward(size, inner, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        x = constrain(x + self.attention(self.attention_norm(x)), BATCH, None, None)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, BATCH, None, None)


class MaskedAutoencoder(nnx.Module):
    """An encoder of the visible patches and a lightweight decoder of all patches.

    The parameters of the encoder's blocks are stacked along a leading axis and scanned
    over, so that the block is compiled once regardless of depth. The same holds for the
    decoder's blocks.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Initialize kernels with Glorot uniform and biases with zeros."""
        dtype, size, small = (
            config.dtype,
            config.hidden_size,
            config.decoder_hidden_size,
        )
        # Embeddings are float32: the gradient of a token that is broadcast to many
        # positions is a sum of many terms.
        enter = partial(_linear, dtype=dtype, output_dtype=jnp.float32, rngs=rngs)
        self.patches = enter(config.patch_features, size)
        self.cls = nnx.Param(_token_init(rngs.params(), (size,)))
        self.encoder = _make_blocks(
            config.num_layers,
            (size, config.num_heads, config.intermediate_size, dtype),
            rngs,
        )
        self.norm = _layer_norm(size, dtype, rngs)
        self.decoder_embedding = enter(size, small)
        self.mask_token = nnx.Param(_token_init(rngs.params(), (small,)))
        self.decoder = _make_blocks(
            config.decoder_num_layers,
            (small, config.decoder_num_heads, config.decoder_intermediate_size, dtype),
            rngs,
        )
        self.decoder_norm = _layer_norm(small, dtype, rngs)
        self.prediction = enter(small, config.patch_features)
        self.config = config

    def __call__(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Compute the loss: the mean squared error over masked patches.

        Args:
            images: ``[B, S, S, 3]``, uint8.
            noise: determines the masks, ``[B, L]``, as drawn by ``mask_noise``.

        Returns:
            A float32 scalar.
        """
        config = self.config
        mask = random_mask(noise, config.visible)
        patches = patchify(normalize(images), config.patch_size)
        prediction = self.predict(patches, mask)
        if config.norm_pixels:
            mean, std = _moments(patches)
            patches = (patches - mean) / std
        errors = jnp.square(prediction - patches).mean(-1)  # [B, L]
        return errors.mean(where=mask.masked)

    def predict(self, patches: jax.Array, mask: Mask) -> jax.Array:
        """Predict all patches from the visible ones.

        Args:
            patches: ``[B, L, P]``, float32, of normalized images.
            mask: which patches are visible.

        Returns:
            Pixels, or normalized pixels, ``[B, L, P]``, float32; predictions for
            visible patches are meaningless.
        """
        return self.decode(self.encode(patches, mask), mask)

    def encode(self, patches: jax.Array, mask: Mask) -> jax.Array:
        """Encode the class token and the visible patches of ``[B, L, P]``.

        Returns:
            ``[B, 1 + V, D]``, normalized, in the compute dtype.
        """
        config = self.config
        places = jnp.asarray(_positions(config, config.hidden_size))
        x = jnp.take_along_axis(patches, mask.visible[..., None], axis=1)
        x = self.patches(constrain(x, BATCH, None, None)) + places[1:][mask.visible]
        cls = jnp.broadcast_to(self.cls[...], (len(x), 1, config.hidden_size))
        x = jnp.concatenate([cls, x], axis=1).astype(config.dtype)
        return self.norm(_run(self.encoder, x, config.remat, config.unroll))

    def decode(self, encoded: jax.Array, mask: Mask) -> jax.Array:
        """Predict all patches from encoded tokens, ``[B, 1 + V, D]``.

        Returns:
            ``[B, L, P]``, float32.
        """
        config = self.config
        y = self.decoder_embedding(encoded)
        batch, _, size = y.shape
        hidden = jnp.broadcast_to(
            self.mask_token[...], (batch, config.patches - config.visible, size)
        )
        y, cls = jnp.concatenate([y[:, 1:], hidden], axis=1), y[:, :1]
        y = jnp.take_along_axis(y, mask.restore[..., None], axis=1)
        y = jnp.concatenate([cls, y], axis=1) + _positions(config, size)
        y = constrain(y, BATCH, None, None).astype(config.dtype)
        y = _run(self.decoder, y, config.remat, config.decoder_unroll)
        return self.prediction(self.decoder_norm(y[:, 1:]))

    def reconstruct(self, images: jax.Array, noise: jax.Array) -> Reconstruction:
        """Reconstruct images from their visible patches.

        If the model predicts normalized pixels, they are denormalized with the true
        mean and standard deviation of each patch, which the model does not predict.

        Args:
            images: ``[B, S, S, 3]``, uint8.
            noise: determines the masks, ``[B, L]``.
        """
        config = self.config
        mask = random_mask(noise, config.visible)
        patches = patchify(normalize(images), config.patch_size)
        prediction = self.predict(patches, mask)
        if config.norm_pixels:
            mean, std = _moments(patches)
            prediction = prediction * std + mean
        pixels = unpatchify(prediction, config.patch_size) * PIXEL_STD + PIXEL_MEAN
        pixels = jnp.round(pixels * 255).clip(0, 255).astype(jnp.uint8)
        masked = jnp.broadcast_to(mask.masked[..., None], patches.shape)
        masked = unpatchify(masked, config.patch_size)
        return Reconstruction(
            original=images,
            seen=jnp.where(masked, jnp.uint8(_HIDDEN), images),
            filled=jnp.where(masked, pixels, images),
        )


def make_graphdef(config: ModelConfig) -> nnx.GraphDef[MaskedAutoencoder]:
    """Build the graph definition of the model, without parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: MaskedAutoencoder(config, nnx.Rngs(0))))


def flops_per_image(config: ModelConfig) -> int:
    """Count the FLOPs of a training step per image.

    A multiply-add counts as two, and the backward pass takes twice as many as the
    forward pass. Recomputation for remat does not count.
    """
    seen, all_tokens = config.visible + 1, config.patches + 1
    size, small = config.hidden_size, config.decoder_hidden_size

    def blocks(layers: int, tokens: int, size: int, inner: int) -> int:
        kernels = 4 * size**2 + 2 * size * inner
        return layers * tokens * (6 * kernels + 12 * tokens * size)

    return (
        6 * config.visible * config.patch_features * size
        + blocks(config.num_layers, seen, size, config.intermediate_size)
        + 6 * seen * size * small
        + blocks(
            config.decoder_num_layers,
            all_tokens,
            small,
            config.decoder_intermediate_size,
        )
        + 6 * config.patches * small * config.patch_features
    )


def _make_blocks(
    layers: int, arguments: tuple[int, int, int, str], rngs: nnx.Rngs
) -> Block:
    """Create blocks whose parameters are stacked along a leading axis."""
    return nnx.vmap(partial(Block, *arguments), axis_size=layers)(rngs.split(layers))


def _run(blocks: Block, x: jax.Array, remat: Remat, unroll: int) -> jax.Array:
    """Run stacked blocks in sequence on ``[B, T, D]``."""
    graphdef, layers = nnx.split(blocks)

    def run_block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return nnx.merge(graphdef, layer)(x), None

    x, _ = jax.lax.scan(rematerialize(run_block, remat), x, layers, unroll=unroll)
    return x


def _positions(config: ModelConfig, features: int) -> np.ndarray:
    return positions(config.image_size // config.patch_size, features)


def _moments(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the mean and standard deviation of each patch, ``[B, L, 1]``."""
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + PIXEL_EPSILON)


def _layer_norm(size: int, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Create a layer norm over the features."""
    return nnx.LayerNorm(
        size,
        epsilon=LAYER_NORM_EPSILON,
        dtype=jnp.dtype(dtype),
        # E[x^2] - E[x]^2 has rounding errors far larger than this epsilon.
        use_fast_variance=False,
        rngs=rngs,
    )
