"""The masked autoencoder as a training task, and its presets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from examples.mae.config import MODELS, DataConfig, ModelConfig
from examples.mae.data import load_data
from examples.mae.drawing import choose, draw
from examples.mae.model import (
    MaskedAutoencoder,
    Reconstruction,
    flops_per_image,
    make_graphdef,
    mask_noise,
)
from examples.training.checkpoint import load_params
from examples.training.config import TrainConfig
from examples.training.experiment import Experiment
from examples.training.optimizers import OptimizerConfig
from examples.training.task import Data, LoadData, LoadModels, LossAlone, Params
from examples.training.trained import require_same_model


@dataclass(frozen=True)
class MAETask(LossAlone):
    """Prediction of the pixels of masked patches."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    name: ClassVar[str] = "mae"
    unit: ClassVar[str] = "pictures"
    metrics: ClassVar[Mapping[str, Callable[[float], float]]] = {}
    # Attention heads and the hidden features of feed-forward layers are split over
    # tensor.
    layout: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "query": ("fsdp", "tensor"),
        "key": ("fsdp", "tensor"),
        "value": ("fsdp", "tensor"),
        "output": ("tensor", "fsdp"),
        "up": ("fsdp", "tensor"),
        "down": ("tensor", "fsdp"),
        "patches": (None, "fsdp"),
        "decoder_embedding": ("fsdp", None),
        "prediction": ("fsdp", None),
    }
    not_decayed: ClassVar[frozenset[str]] = frozenset(
        {"scale", "bias", "cls", "mask_token"}
    )
    free: ClassVar[frozenset[str]] = frozenset({"unroll", "decoder_unroll", "workers"})

    @property
    def architecture(self) -> Mapping[str, object]:
        """The settings of the model that its weights belong to."""
        return self.model.architecture

    @property
    def units(self) -> int:
        """Images per step."""
        return self.data.batch_size

    @property
    def layers(self) -> Mapping[str, int]:
        """Number of stacked blocks in the encoder and in the decoder."""
        return {
            "encoder": self.model.num_layers,
            "decoder": self.model.decoder_num_layers,
        }

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that each mesh axis must divide."""
        sizes = {
            f"{prefix}{name}": getattr(self.model, f"{prefix}{name}")
            for prefix in ("", "decoder_")
            for name in ("hidden_size", "num_heads", "intermediate_size")
        }
        over_fsdp = {k: v for k, v in sizes.items() if k.endswith("hidden_size")}
        return {
            "fsdp": over_fsdp,
            "tensor": {k: v for k, v in sizes.items() if k not in over_fsdp},
        }

    def describe(self) -> str:
        """Describe a batch."""
        side = self.model.image_size
        return f"{self.data.batch_size} images of {side} x {side} pixels"

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Return the tuned rate of the tiny model, or None for other models."""
        tiny = replace(MODELS["tiny"], unroll=self.model.unroll)
        if replace(tiny, decoder_unroll=self.model.decoder_unroll) != self.model:
            return None
        return {"adamw": 2e-3}.get(optimizer)

    def init(self, seed: int) -> Params:
        """Initialize the parameters."""
        model = MaskedAutoencoder(self.model, nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Compute the mean squared error over masked patches.

        Args:
            params: the parameters.
            batch: ``image``, ``[B, S, S, 3]``, uint8; and ``seed``, ``[B]``, uint32,
                which determines each image's mask.

        Returns:
            A float32 scalar.
        """
        model = nnx.merge(make_graphdef(self.model), params)
        return model(batch["image"], mask_noise(batch["seed"], self.model.patches))

    def check_source(self, source: Path) -> None:
        """Check that ``source`` is a run of the same model."""
        require_same_model(source, self)

    def start_from(self, source: Path, seed: int) -> Params:
        """Load the parameters of the run ``source``."""
        return load_params(source, jax.eval_shape(lambda: self.init(0)))

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Load glyphs, image files, or a Hugging Face dataset."""
        return load_data(self.data, self.model.image_size, seed, process, processes)

    def batch_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of a batch."""
        count, side = self.data.batch_size, self.model.image_size
        return {
            "image": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8),
            "seed": jax.ShapeDtypeStruct((count,), jnp.uint32),
        }

    def flops(self) -> float:
        """Count the FLOPs of a step."""
        return float(self.data.batch_size * flops_per_image(self.model))

    @partial(jax.jit, static_argnums=0)
    def reconstruct(
        self, params: Params, batch: Mapping[str, jax.Array]
    ) -> Reconstruction:
        """Reconstruct the images of a batch, in the format of ``loss``."""
        model = nnx.merge(make_graphdef(self.model), params)
        noise = mask_noise(batch["seed"], self.model.patches)
        return model.reconstruct(batch["image"], noise)

    def show(self, models: LoadModels, data: LoadData, directory: Path) -> list[Path]:
        """Draw each model's reconstruction of the same eight validation images.

        Models with a different image size, patch size or mask ratio are skipped.
        """
        batch, made = choose(data().validation, 8), {}
        for name, (task, params) in models().items():
            if task.model.masks_like(self.model):
                made[name] = task.reconstruct(params, batch)
            else:
                print(f"Not drawn, because its image size or masks differ: {name}.")
        path = directory / "reconstructions.png"
        draw(made, path)
        return [path]


def with_model(config: TrainConfig[MAETask], name: str) -> TrainConfig[MAETask]:
    """Return the configuration with the architecture ``MODELS[name]``."""
    return replace(config, task=replace(config.task, model=MODELS[name]))


# 50 epochs of 1 281 167 images; learning rate 1.5e-4 x batch / 256.
_BATCH = 4096
PRESETS: dict[str, TrainConfig[MAETask]] = {
    "demo": TrainConfig(
        MAETask(data=DataConfig(batch_size=32, validation_batches=16)),
        OptimizerConfig(b1=0.9, b2=0.95, weight_decay=0.05),
        steps=1200,
        log_every=50,
        eval_every=50,
        checkpoint_every=1200,
    ),
    "paper": TrainConfig(
        MAETask(
            MODELS["vit-b"],
            DataConfig(
                data=("hf:ILSVRC/imagenet-1k",),
                batch_size=_BATCH,
                validation_batches=4,
                crop_min=0.2,
                flip=True,
            ),
        ),
        OptimizerConfig(
            learning_rate=1.5e-4 * _BATCH / 256,
            b1=0.9,
            b2=0.95,
            weight_decay=0.05,
            max_grad_norm=None,
            warmup_fraction=0.05,
            final_fraction=0.0,
        ),
        steps=50 * 1_281_167 // _BATCH,
        log_every=10,
        eval_every=300,
        checkpoint_every=300,
    ),
}

EXPERIMENT = Experiment(
    MAETask,
    PRESETS,
    "demo: a tiny model on the glyphs of matplotlib's fonts. paper: the paper's ViT-B "
    "on ImageNet-1k, 50 epochs, batch size 4096, learning rate 2.4e-3, weight decay "
    "0.05, betas 0.9 and 0.95.",
    MODELS,
    with_model,
)
