"""What runs on the devices: the first state, and the programs lowered and compiled."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama.config import TrainConfig
from examples.llama.optimizer import make_optimizer
from examples.llama.sharding import shardings
from examples.llama.step import (
    TrainState,
    init_state,
    make_aligned_fraction,
    make_evaluate,
    make_graphdef,
    make_train_step,
)


class Programs(NamedTuple):
    """What runs on the devices, lowered or compiled."""

    train_step: Any
    evaluate: Any
    aligned_fraction: Any


def state_like(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Makes the shapes, dtypes and shardings of a run's state."""
    like = jax.eval_shape(lambda: init_state(config.model, tx, config.seed))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        like,
        shardings(like, mesh),
    )


def make_state(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Makes the state that a run begins with, each part of it on its device."""

    def init() -> TrainState:
        return init_state(config.model, tx, config.seed)

    layout = shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=layout)()


def lower_train_step(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh, batch: Any
) -> jax.stages.Lowered:
    """Lowers the training step for a mesh, whose devices need not be here.

    Args:
        config: the run.
        tx: its optimizer.
        mesh: its mesh.
        batch: tokens, or their shape, dtype and sharding.
    """
    like = state_like(config, tx, mesh)
    graphdef = make_graphdef(config.model)
    layout = jax.tree.map(lambda leaf: leaf.sharding, like)
    with jax.set_mesh(mesh):
        return jax.jit(
            make_train_step(graphdef, tx, config.accumulate),
            donate_argnums=0,
            out_shardings=(layout, NamedSharding(mesh, P())),
        ).lower(like, batch)


def lower_programs(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch: Any,
    validation: Any,
) -> Programs:
    """Lowers all that a run computes.

    Args:
        config: the run.
        tx: its optimizer.
        mesh: its mesh.
        batch: tokens, or their shape, dtype and sharding.
        validation: likewise, all batches to evaluate on.
    """
    like = state_like(config, tx, mesh)
    graphdef = make_graphdef(config.model)
    evaluate = make_evaluate(graphdef, config.accumulate)
    aligned_fraction = make_aligned_fraction(
        graphdef, _undecayed(config), config.accumulate
    )
    with jax.set_mesh(mesh):
        return Programs(
            train_step=lower_train_step(config, tx, mesh, batch),
            evaluate=jax.jit(evaluate).lower(like.params, validation),
            aligned_fraction=jax.jit(aligned_fraction).lower(like, batch),
        )


def compile_programs(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch: jax.Array,
    validation: jax.Array,
) -> Programs:
    """Compiles all, ahead of the loop and off its clock."""
    lowered = lower_programs(config, tx, mesh, batch, validation)
    return Programs(*[program.compile() for program in lowered])


def _undecayed(config: TrainConfig) -> optax.GradientTransformation:
    """Makes the optimizer, with the same state, for the signs of its update.

    Decay does not come from the gradient, and a learning rate of zero leaves no sign.
    """
    return make_optimizer(
        replace(
            config.optimizer, weight_decay=0.0, warmup_fraction=0.0, final_fraction=1.0
        ),
        config.steps,
    )
