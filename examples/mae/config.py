"""Model and data settings."""

from dataclasses import dataclass
from typing import Literal, get_args

from examples.training.checks import (
    require,
    require_between,
    require_choice,
    require_positive,
    require_utf8,
)
from examples.training.remat import Remat


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and how it is computed."""

    image_size: int = 32
    """Pixels along each side of the square images."""
    patch_size: int = 4
    """Pixels along each side of the square patches."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder."""
    hidden_size: int = 128
    """Features of the encoder's residual stream."""
    num_layers: int = 3
    """Transformer blocks in the encoder."""
    num_heads: int = 4
    """Attention heads in the encoder."""
    intermediate_size: int = 512
    """Hidden features of the encoder's feed-forward layers."""
    decoder_hidden_size: int = 64
    """Features of the decoder's residual stream."""
    decoder_num_layers: int = 2
    """Transformer blocks in the decoder."""
    decoder_num_heads: int = 2
    """Attention heads in the decoder."""
    decoder_intermediate_size: int = 256
    """Hidden features of the decoder's feed-forward layers."""
    norm_pixels: bool = False
    """Predict the pixels of each patch normalized by their mean and standard deviation,
    as the paper does for representation learning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, predictions and loss are always float32."""
    remat: Remat = "none"
    """What each block keeps for the backward pass: everything, the outputs of
    projections and attention, or only its input. The remaining activations are computed
    again, which takes up to a third more computation."""
    unroll: int = 3
    """Encoder blocks per iteration of the scan over them. Higher values take longer to
    compile."""
    decoder_unroll: int = 2
    """Decoder blocks per iteration of the scan over them."""

    @property
    def architecture(self) -> dict[str, object]:
        """The settings that the weights belong to.

        The images, the masks and how the model is computed may change.
        """
        free = {"image_size", "mask_ratio", "dtype", "remat"}
        free |= {"unroll", "decoder_unroll"}
        return {name: x for name, x in vars(self).items() if name not in free}

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """Visible patches per image."""
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def patch_features(self) -> int:
        """Values per patch: its pixels times three channels."""
        return 3 * self.patch_size**2

    def masks_like(self, other: "ModelConfig") -> bool:
        """Return whether the image size, patch size and mask ratio are the same."""
        names = ("image_size", "patch_size", "mask_ratio")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __post_init__(self) -> None:
        """Validate the settings."""
        for name in (
            "image_size",
            "patch_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
            "decoder_hidden_size",
            "decoder_num_layers",
            "decoder_num_heads",
            "decoder_intermediate_size",
            "unroll",
            "decoder_unroll",
        ):
            require_positive(name, getattr(self, name))
        require(
            self.image_size % self.patch_size == 0,
            f"patch_size ({self.patch_size}) must divide image_size "
            f"({self.image_size}).",
        )
        require_between("mask_ratio", self.mask_ratio, 0, 1)
        require(
            0 < self.visible < self.patches,
            "mask_ratio must leave at least one patch visible and one masked, but "
            f"{self.mask_ratio} leaves {self.visible} of {self.patches} visible; "
            "choose another mask_ratio or a smaller patch_size.",
        )
        for prefix in ("", "decoder_"):
            size = getattr(self, f"{prefix}hidden_size")
            heads = getattr(self, f"{prefix}num_heads")
            require(
                size % heads == 0,
                f"{prefix}num_heads ({heads}) must divide {prefix}hidden_size "
                f"({size}).",
            )
            require(
                size % 4 == 0,
                f"{prefix}hidden_size must be a multiple of 4, got {size}: position "
                "embeddings hold the sine and cosine of the row and the column.",
            )
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))
        require_choice("remat", self.remat, get_args(Remat))


@dataclass(frozen=True)
class DataConfig:
    """The images and their preprocessing."""

    data: tuple[str, ...] = ()
    """Image files or directories of images; or a single Hugging Face dataset to stream,
    hf:NAME or hf:NAME:CONFIG, such as hf:ILSVRC/imagenet-1k, where NAME may be a local
    directory. Empty: all glyphs of the fonts that ship with matplotlib."""
    image_column: str = "image"
    """Image column of a Hugging Face dataset."""
    train_split: str = "train"
    """Training split of a Hugging Face dataset."""
    validation_split: str = "validation"
    """Validation split of a Hugging Face dataset."""
    validation_fraction: float = 0.1
    """Fraction of the images held out for validation; for glyphs, the fraction of the
    characters."""
    shuffle_images: int = 1000
    """Number of images over which each process shuffles a streamed dataset."""
    workers: int = 0
    """Worker processes that read and prepare images. 0: threads of the main process,
    which a Hugging Face dataset always uses."""
    crop_min: float | None = None
    """Train on random crops that cover at least this fraction of the image area. By
    default, train on the largest centered square, as in validation."""
    flip: bool = False
    """Flip training images horizontally with probability 0.5."""
    batch_size: int = 128
    """Images per training step, over all devices."""
    validation_batches: int = 8
    """Batches in each evaluation, always the same ones."""

    def __post_init__(self) -> None:
        """Validate the settings."""
        for name in ("batch_size", "validation_batches", "shuffle_images"):
            require_positive(name, getattr(self, name))
        require_between("validation_fraction", self.validation_fraction, 0, 1)
        require(self.workers >= 0, f"workers must be at least 0, got {self.workers}.")
        require(
            self.crop_min is None or 0 < self.crop_min <= 1,
            f"crop_min must lie in (0, 1], got {self.crop_min}.",
        )
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                require_utf8(name, str(text))


def _vit(
    hidden_size: int, num_layers: int, num_heads: int, patch_size: int = 16
) -> ModelConfig:
    return ModelConfig(
        image_size=224,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=4 * hidden_size,
        decoder_hidden_size=512,
        decoder_num_layers=8,
        decoder_num_heads=16,
        decoder_intermediate_size=2048,
        norm_pixels=True,
        dtype="bfloat16",
        unroll=1,
        decoder_unroll=1,
    )


MODELS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "vit-b": _vit(768, 12, 12),
    "vit-l": _vit(1024, 24, 16),
    "vit-h": _vit(1280, 32, 16, patch_size=14),
}
"""The tiny model for glyphs and the models of the paper."""
