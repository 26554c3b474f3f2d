"""The masked autoencoder as a task, and the recipes that it is trained by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

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
from examples.training.checkpoint import load_params, require_weights
from examples.training.config import TrainConfig
from examples.training.experiment import Experiment
from examples.training.optimizers import OptimizerConfig
from examples.training.task import Data, LoadData, LoadModels, LossAlone, Params


@dataclass(frozen=True)
class MAETask(LossAlone):
    """Predict the pixels that are hidden."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    name: ClassVar[str] = "mae"
    unit: ClassVar[str] = "pictures"
    metrics: ClassVar[Mapping[str, Callable[[float], float]]] = {}
    # Heads and the features inside the feed-forward layers are split over tensor.
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
    def units(self) -> int:
        """Pictures in a step."""
        return self.data.batch_size

    @property
    def layers(self) -> Mapping[str, int]:
        """The blocks of the encoder and those of the decoder are stacked."""
        return {
            "encoder": self.model.num_layers,
            "decoder": self.model.decoder_num_layers,
        }

    @property
    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """Sizes that must be divisible by each axis of the mesh."""
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
        """Describes a batch."""
        side = self.model.image_size
        return f"{self.data.batch_size} pictures of {side} x {side} pixels"

    def default_learning_rate(self, optimizer: str) -> float | None:
        """Returns the best rate of a sweep with the tiny model, else None."""
        tiny = replace(MODELS["tiny"], unroll=self.model.unroll)
        if replace(tiny, decoder_unroll=self.model.decoder_unroll) != self.model:
            return None
        return {"adamw": 2e-3}.get(optimizer)

    def init(self, seed: int) -> Params:
        """Draws the initial weights."""
        model = MaskedAutoencoder(self.model, nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Computes the mean squared error over the hidden patches.

        Args:
            params: the weights.
            batch: ``image``, ``[B, S, S, 3]``, uint8; and ``seed``, ``[B]``, uint32,
                which decides the mask of each.

        Returns:
            A float32 scalar.
        """
        model = nnx.merge(make_graphdef(self.model), params)
        return model(batch["image"], mask_noise(batch["seed"], self.model.patches))

    def check_source(self, source: Path) -> None:
        """Checks another run of the same model."""
        require_weights(source, jax.eval_shape(lambda: self.init(0)))

    def start_from(self, source: Path, seed: int) -> Params:
        """Loads the weights of that run."""
        return load_params(source, jax.eval_shape(lambda: self.init(0)))

    def load(
        self, seed: int, process: int, processes: int, source: Path | None = None
    ) -> Data:
        """Loads glyphs, files, or a Hugging Face dataset."""
        return load_data(self.data, self.model.image_size, seed, process, processes)

    def batch_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a batch."""
        count, side = self.data.batch_size, self.model.image_size
        return {
            "image": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8),
            "seed": jax.ShapeDtypeStruct((count,), jnp.uint32),
        }

    def flops(self) -> float:
        """Counts the operations of a step."""
        return float(self.data.batch_size * flops_per_image(self.model))

    @partial(jax.jit, static_argnums=0)
    def reconstruct(
        self, params: Params, batch: Mapping[str, jax.Array]
    ) -> Reconstruction:
        """Reconstructs the pictures of a batch, as ``loss`` takes it."""
        model = nnx.merge(make_graphdef(self.model), params)
        noise = mask_noise(batch["seed"], self.model.patches)
        return model.reconstruct(batch["image"], noise)

    def show(self, models: LoadModels, data: LoadData, directory: Path) -> list[Path]:
        """Draws each model's reconstruction of the same eight pictures.

        Models with another picture size, patch size or mask ratio are left out.
        """
        batch, made = choose(data().validation, 8), {}
        for name, (task, params) in models().items():
            if task.model.masks_like(self.model):
                made[name] = task.reconstruct(params, batch)
            else:
                print(f"Not drawn, because its pictures or masks differ: {name}.")
        path = directory / "reconstructions.png"
        draw(made, path)
        return [path]

    def unrolled(self, layers: Mapping[str, int]) -> Self:
        """Sets the unroll factors of the scans over the blocks."""
        model = replace(
            self.model, unroll=layers["encoder"], decoder_unroll=layers["decoder"]
        )
        return replace(self, model=model)


def with_model(config: TrainConfig[MAETask], name: str) -> TrainConfig[MAETask]:
    """Sets the architecture."""
    return replace(config, task=replace(config.task, model=MODELS[name]))


# 50 epochs of 1 281 167 pictures; a learning rate of 1.5e-4 x batch / 256.
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
    "demo: a tiny model on the glyphs of the fonts that matplotlib ships. paper: the "
    "paper's ViT-B on ImageNet-1k, 50 epochs in batches of 4096, learning rate 2.4e-3, "
    "decay 0.05, betas 0.9 and 0.95.",
    MODELS,
    with_model,
)
