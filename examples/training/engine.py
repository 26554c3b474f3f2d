"""The initial state and the compiled programs of a run."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.training.checks import require
from examples.training.config import TrainConfig
from examples.training.optimizers import make_optimizer, make_schedule
from examples.training.sharding import BATCH, make_mesh, shardings
from examples.training.step import (
    TrainState,
    by_name,
    init_state,
    make_aligned_fraction,
    make_evaluate,
    make_train_step,
)
from examples.training.task import Batch, Params


class Programs(NamedTuple):
    """The programs of a run, lowered or compiled."""

    train_step: Any
    evaluate: Any
    aligned_fraction: Any


@dataclass(frozen=True)
class Engine:
    """A run's configuration and mesh, with the optimizer and programs they define.

    Programs can be lowered for devices that are not attached.
    """

    config: TrainConfig[Any]
    mesh: Mesh

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return _make_tx(self.config)

    @cached_property
    def state_like(self) -> TrainState:
        """The shapes, dtypes and shardings of the state."""
        like = jax.eval_shape(self._init)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            like,
            shardings(like, self.config.task, self.mesh),
        )

    @property
    def batch_like(self) -> Batch:
        """The shapes, dtypes and shardings of a batch."""
        sharding = NamedSharding(self.mesh, P(BATCH))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.config.task.batch_like(),
        )

    def make_state(self, params: Params | None = None) -> TrainState:
        """Create the initial state of a run, sharded over the mesh.

        Args:
            params: the initial weights, in host memory; defaults to random weights.
        """
        if params is None:
            return jax.jit(self._init, out_shardings=self._layout)()
        layout = self._layout
        params = jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(
                x.shape, sharding, x.__getitem__
            ),
            params,
            layout.params,
        )
        init = jax.jit(self.tx.init, out_shardings=layout.opt_state)
        return TrainState(params, init(params))

    def put_batch(self, rows: Batch) -> Batch:
        """Assemble a batch, sharded over the mesh, from the rows of each process."""
        return self._put(rows, P(BATCH))

    def put_validation(self, rows: Batch) -> Batch:
        """Like ``put_batch``, for all validation batches, ``[batches, rows, ...]``."""
        return self._put(rows, P(None, BATCH))

    def trace_train_step(self, batch: Batch) -> jax.stages.Traced:
        """Trace the training step.

        Args:
            batch: arrays, or their shapes, dtypes and shardings.
        """
        step = make_train_step(self.config.task, self.tx, self.config.accumulate)
        everywhere = NamedSharding(self.mesh, P())
        with jax.set_mesh(self.mesh):
            return jax.jit(
                step, donate_argnums=0, out_shardings=(self._layout, everywhere)
            ).trace(self.state_like, batch)

    def lower_train_step(self, batch: Batch) -> jax.stages.Lowered:
        """Lower the training step; the arguments are those of ``trace_train_step``."""
        with jax.set_mesh(self.mesh):
            return self.trace_train_step(batch).lower()

    def lower(self, batch: Batch, validation: Batch) -> Programs:
        """Lower all programs of a run.

        Args:
            batch: arrays, or their shapes, dtypes and shardings.
            validation: all validation batches, in the same form.
        """
        task, parts = self.config.task, self.config.accumulate
        evaluate = make_evaluate(task, parts)
        aligned_fraction = make_aligned_fraction(task, _measured(self.config), parts)
        like = self.state_like
        with jax.set_mesh(self.mesh):
            return Programs(
                train_step=self.lower_train_step(batch),
                evaluate=jax.jit(
                    evaluate, out_shardings=NamedSharding(self.mesh, P())
                ).lower(like.params, validation),
                aligned_fraction=jax.jit(aligned_fraction).lower(like, batch),
            )

    def compile(self, batch: Batch, validation: Batch) -> Programs:
        """Compile all programs ahead of the timed training loop.

        Runs that differ only in seed or initial weights share the programs.
        """
        config = replace(self.config, seed=0, from_run=None)
        leaves, tree = jax.tree.flatten((batch, validation))
        like = tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves
        )
        return _compile(Engine(config, self.mesh), tree, like)

    @property
    def _layout(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_like)

    def _init(self) -> TrainState:
        return init_state(self.config.task, self.tx, self.config.seed)

    def _put(self, rows: Batch, spec: P) -> Batch:
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), rows
        )


@lru_cache(maxsize=4)
def _compile(
    engine: Engine, tree: jax.tree_util.PyTreeDef, like: tuple[Any, ...]
) -> Programs:
    """Compile programs, caching the last few.

    Args:
        engine: the engine, without settings that do not affect the programs.
        tree: the structure of a batch and the validation batches.
        like: shapes, dtypes and shardings of their leaves.
    """
    lowered = engine.lower(*jax.tree.unflatten(tree, like))
    return Programs(*[program.compile() for program in lowered])


def make_engine(config: TrainConfig[Any], devices: Any = None) -> Engine:
    """Build the engine of a run.

    Args:
        config: the configuration of the run.
        devices: the devices to choose from; defaults to all devices.

    Raises:
        InputError: if the settings do not fit each other or the devices.
    """
    require(
        config.optimizer.weight_decay > 0 or not config.optimizer.cautious_decay,
        "cautious_decay has no effect without weight decay; pass --weight-decay.",
    )
    if config.optimizer.exempt:
        _require_parameters(config)
    engine = Engine(config, make_mesh(config, devices))
    engine.tx  # noqa: B018 (raises here if its settings are invalid)
    return engine


def _require_parameters(config: TrainConfig[Any]) -> None:
    """Check that the parameters exempt from caution exist."""
    names = by_name(jax.eval_shape(lambda: config.task.init(0)))
    known = {part for name in names for part in name.split(".")}
    for name in config.optimizer.exempt:
        require(
            name in known,
            f"exempt: there is no parameter {name!r}; choose from "
            f"{', '.join(sorted(known))}.",
        )


def _make_tx(config: TrainConfig[Any]) -> optax.GradientTransformation:
    schedule = make_schedule(config.optimizer, config.learning_rate, config.steps)
    task = config.task
    return make_optimizer(config.optimizer, schedule, task.layers, task.not_decayed)


def _measured(config: TrainConfig[Any]) -> optax.GradientTransformation:
    """Build the optimizer for measuring the aligned fraction.

    It has the same state, but no caution, which would change the measured update, no
    decay, which does not come from the gradient, and a constant learning rate, as one
    of zero would erase the signs.
    """
    optimizer = replace(
        config.optimizer.without_caution(),
        weight_decay=0.0,
        schedule="constant",
        warmup_fraction=0.0,
    )
    return _make_tx(replace(config, optimizer=optimizer))
