"""The command that compiles a training step ahead of time for a TPU slice.

On this machine's CPU, it compiles the same step that ``train`` runs, and prints the
memory and traffic of each device. Nothing is executed. It requires the ``tpu`` extra.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.training.config import TrainConfig
from examples.training.engine import Engine, make_engine
from examples.training.report import markdown_table
from examples.training.sharding import BATCH
from examples.training.task import count_parameters
from examples.training.xla import (
    EACH_BYTE_ONCE,
    Collective,
    collectives,
    topology_devices,
)


@dataclass(frozen=True)
class Account:
    """The compiler's account of one device, with sizes in bytes."""

    parameters: float
    moments: float
    temporaries: float
    """Activations, gradients and gathered parameters."""
    peak: float
    accessed: float
    """Read and written in a step, or in one of its accumulated parts, without
    prefetches."""
    collectives: Mapping[str, Collective]


def account(config: TrainConfig[Any], topology: str) -> Account:
    """Compile the training step for a slice, and collect the compiler's account."""
    engine = make_engine(config, topology_devices(topology))
    step = engine.lower_train_step(engine.batch_like).compile()
    memory: Any = step.memory_analysis()
    return Account(
        parameters=_bytes_per_device(engine.state_like.params),
        moments=_bytes_per_device(engine.state_like.opt_state),
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        accessed=_accessed(engine),
        collectives=collectives(str(step.as_text())),
    )


def evaluation_peaks(config: TrainConfig[Any], topology: str) -> dict[str, float]:
    """Compile the evaluations, and return the peak memory of each in bytes.

    This includes the optimizer state, which stays on the devices even if a program does
    not use it.
    """
    engine = make_engine(config, topology_devices(topology))
    batch = engine.batch_like
    sharding = NamedSharding(engine.mesh, P(None, BATCH))
    validation = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (config.task.data.validation_batches, *x.shape), x.dtype, sharding=sharding
        ),
        batch,
    )
    programs = engine.lower(batch, validation)
    moments = _bytes_per_device(engine.state_like.opt_state)

    def peak(program: jax.stages.Lowered) -> float:
        memory: Any = program.compile().memory_analysis()
        return float(memory.peak_memory_in_bytes)

    return {
        "validation loss": peak(programs.evaluate) + moments,
        "aligned fraction": peak(programs.aligned_fraction),
    }


def _bytes_per_device(tree: Any) -> int:
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _accessed(engine: Engine) -> float:
    """Compute the bytes that a step accesses.

    The compiler counts the body of a loop once, however often it runs. Compiling the
    step with two layers per iteration shows the cost of one layer. The compiler may
    unroll a short loop, so a small number of layers is unrolled completely.
    """
    task = engine.config.task

    def accessed(layers: Mapping[str, int]) -> float:
        there = replace(engine.config, task=task.unrolled(layers))
        lowered = replace(engine, config=there).lower_train_step(engine.batch_like)
        analysis: Any = lowered.compile(compiler_options=EACH_BYTE_ONCE).cost_analysis()
        return float(analysis["bytes accessed"])

    once = {name: 1 if depth >= 8 else depth for name, depth in task.layers.items()}
    one = accessed(once)
    total = one
    for name, unrolled in once.items():
        depth = task.layers[name]
        if unrolled < depth:
            two = accessed({**once, name: 2})
            # With an odd number of layers, one is outside the loop.
            total += (depth - 1) * (two - one) / (1 + depth % 2)
    return total


def compile_only(
    topology: str = "v5e:4x4",
    *,
    config: TrainConfig[Any],
) -> None:
    """Compile the training step for a TPU slice, and print its memory and traffic.

    Args:
        topology: TPU type and chip layout, as in v5e:4x4.
        config: the configuration of the run.
    """
    jax.config.update("jax_platforms", "cpu")  # Leave a local TPU free.
    task = config.task
    print(
        f"Compiling a step of {task.describe()} with {config.optimizer.title}, "
        f"{count_parameters(task):,} parameters, for {topology}. This takes a few "
        "minutes.",
        flush=True,
    )
    found = account(config, topology)
    part = "" if config.accumulate == 1 else f", of one of {config.accumulate} parts"
    rows = [
        ("parameters", _gib(found.parameters)),
        ("optimizer's state", _gib(found.moments)),
        ("activations, gradients, gathered parameters", _gib(found.temporaries)),
        ("total", _gib(found.parameters + found.moments + found.temporaries)),
        ("peak reported by the compiler", _gib(found.peak)),
        *(
            (f"peak for the {what}", _gib(peak))
            for what, peak in evaluation_peaks(config, topology).items()
        ),
        (f"read and written in a step{part}", f"{found.accessed / 1e9:.1f} GB"),
    ]
    print("\n" + markdown_table(rows, (f"on each device of {topology}", "")))
    sent = [
        (name, f"{c.times}", f"{c.bytes / 1e9:.3f} GB")
        for name, c in sorted(found.collectives.items())
    ]
    print("\n" + markdown_table(sent, ("in a step", "count", "size of results")))
    print(f"\nModel FLOPs per step, over all devices: {task.flops():.3g}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
