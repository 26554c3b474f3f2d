"""The settings of the model and of its data, their defaults, and their checks."""

from dataclasses import dataclass
from typing import Literal

from examples.training.checks import (
    require,
    require_between,
    require_choice,
    require_positive,
    require_utf8,
)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, and how it is computed."""

    image_size: int = 32
    """Pixels along each side of the square pictures."""
    patch_size: int = 4
    """Pixels along each side of the square patches that a picture is cut into."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    hidden_size: int = 128
    """Features of the encoder's residual stream."""
    num_layers: int = 3
    """Transformer blocks of the encoder."""
    num_heads: int = 4
    """Heads of the encoder's attention."""
    intermediate_size: int = 512
    """Features inside the encoder's feed-forward layer."""
    decoder_hidden_size: int = 64
    """Features of the decoder's residual stream."""
    decoder_num_layers: int = 2
    """Transformer blocks of the decoder."""
    decoder_num_heads: int = 2
    """Heads of the decoder's attention."""
    decoder_intermediate_size: int = 256
    """Features inside the decoder's feed-forward layer."""
    norm_pixels: bool = False
    """Normalize the pixels of each patch by their mean and standard
    deviation before predicting them, as the paper does to learn features."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type computed in. Parameters, predictions and loss are float32 always."""
    remat: bool = False
    """Keep only the input of each block for the backward pass, and compute the rest of
    it again. Saves most of the activations' memory for a third more computation."""
    unroll: int = 3
    """Encoder blocks in each iteration of the loop over them. More take longer to
    compile."""
    decoder_unroll: int = 2
    """Decoder blocks in each iteration of the loop over them."""

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """Patches of a picture that the encoder sees."""
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def patch_features(self) -> int:
        """Numbers in a patch: its pixels times three colours."""
        return 3 * self.patch_size**2

    def masks_like(self, other: "ModelConfig") -> bool:
        """Returns whether another model has the same pictures, patches and masks."""
        names = ("image_size", "patch_size", "mask_ratio")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __post_init__(self) -> None:
        """Checks the values."""
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
            f"patch_size ({self.patch_size}) does not divide image_size "
            f"({self.image_size}): choose an image_size that is a multiple of it",
        )
        require_between("mask_ratio", self.mask_ratio, 0, 1)
        require(
            0 < self.visible < self.patches,
            f"mask_ratio is {self.mask_ratio}: of {self.patches} patches it leaves "
            f"{self.visible} visible, and there have to be some of both kinds; choose "
            "another, or a smaller patch_size",
        )
        for prefix in ("", "decoder_"):
            size = getattr(self, f"{prefix}hidden_size")
            heads = getattr(self, f"{prefix}num_heads")
            require(
                size % heads == 0,
                f"{prefix}num_heads ({heads}) does not divide {prefix}hidden_size "
                f"({size}): choose a {prefix}hidden_size that is a multiple of it",
            )
            require(
                size % 4 == 0,
                f"{prefix}hidden_size is {size}: choose a multiple of 4, as a position "
                "is the sine and the cosine of its row and of its column",
            )
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class DataConfig:
    """The pictures, and how they are prepared."""

    data: tuple[str, ...] = ()
    """Pictures, or directories of them. Or one Hugging Face dataset, streamed: hf:NAME
    or hf:NAME:CONFIG, as in hf:ILSVRC/imagenet-1k; NAME may be a local directory.
    Empty: every glyph of the fonts that matplotlib ships."""
    image_column: str = "image"
    """Column of a Hugging Face dataset that holds the pictures."""
    train_split: str = "train"
    """Split of a Hugging Face dataset to train on."""
    validation_split: str = "validation"
    """Split of a Hugging Face dataset to validate on."""
    validation_fraction: float = 0.1
    """Share of the pictures kept out of training; of glyphs, share of the
    characters."""
    shuffle_images: int = 1000
    """Pictures of a streamed dataset among which each process draws the next."""
    workers: int = 0
    """Processes that read and prepare pictures. 0: threads of this process do, as they
    always do with a Hugging Face dataset."""
    crop_min: float | None = None
    """Train on random parts of the pictures, of at least this share of their area.
    Not given: on the largest square in their middle, as in validation."""
    flip: bool = False
    """Mirror every other training picture, at random."""
    batch_size: int = 128
    """Pictures in a training step, over all devices."""
    validation_batches: int = 8
    """Batches on which the validation loss is measured, the same at each evaluation."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("batch_size", "validation_batches", "shuffle_images"):
            require_positive(name, getattr(self, name))
        require_between("validation_fraction", self.validation_fraction, 0, 1)
        require(
            self.workers >= 0, f"workers is {self.workers}: it has to be at least 0"
        )
        require(
            self.crop_min is None or 0 < self.crop_min <= 1,
            f"crop_min is {self.crop_min}: it has to be above 0 and at most 1",
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
"""The tiny model for glyphs, and the models of the paper."""
