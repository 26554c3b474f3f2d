"""Fixtures for the tests of the masked autoencoder's commands."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from examples.mae.__main__ import COMMANDS
from examples.mae.config import ModelConfig
from examples.mae.task import EXPERIMENT, MAETask
from examples.training import command_line
from examples.training.checkpoint import Checkpoints
from examples.training.config import TrainConfig, to_json
from examples.training.step import TrainState

# All feature sizes differ.
MODEL = ModelConfig(
    image_size=20,
    patch_size=4,
    mask_ratio=0.7,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    intermediate_size=40,
    decoder_hidden_size=24,
    decoder_num_layers=2,
    decoder_num_heads=3,
    decoder_intermediate_size=36,
    unroll=1,
    decoder_unroll=1,
)


def random_params(model, seed=0):
    """Draw parameters that all matter: attention is not uniform, and norms scale."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = float(path[-1].key == "scale")
        return rng.normal(center, 0.2, leaf.shape).astype(np.float32)

    like = jax.eval_shape(lambda: MAETask(model).init(0))
    return jax.tree_util.tree_map_with_path(draw, like)


def random_images(count, size):
    shape = count, size, size, 3
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def write_pictures(directory, count, size):
    for i, image in enumerate(random_images(count, size)):
        Image.fromarray(image).save(directory / f"{i}.png")


def write_run(directory, task, losses):
    """Write a run with a checkpoint for each step in ``losses``.

    Args:
        directory: the directory of the run.
        task: the task.
        losses: validation losses by step. The parameters at a step are
            ``random_params`` with the step as seed.
    """
    directory.mkdir()
    (directory / "config.json").write_text(to_json(TrainConfig(task)))
    if task.data.data:
        (directory / "data.sha256").write_text(task.load(0, 0, 1).fingerprint + "\n")
    log = [
        {"step": step, "loss": 1.0, "validation_loss": losses.get(step)}
        for step in range(1, max(losses) + 1)
    ]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    checkpoints = Checkpoints(directory / "checkpoints", keep=len(losses))
    for step, loss in losses.items():
        params = jax.tree.map(jnp.asarray, random_params(task.model, step))
        state = TrainState(params, optax.sgd(0.1).init(params))
        data = grain.MapDataset.source([0]).to_iter_dataset()
        checkpoints.save(step, state, iter(data), loss)
    checkpoints.close()


def run_command(name, *arguments):
    """Run a command of the program in this process."""
    arguments = [name, *map(str, arguments)]
    return command_line.main("python -m examples.mae", EXPERIMENT, COMMANDS, arguments)
