"""The command that compiles a training step ahead of time for a TPU slice.

On this machine's CPU, it compiles the same step that ``train`` runs, and prints the
memory, traffic and shortest possible time of each device. Nothing is executed. It
requires the ``tpu`` extra.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.training.chips import chip_of
from examples.training.config import TrainConfig
from examples.training.engine import make_engine
from examples.training.hlo import parse
from examples.training.report import markdown_table
from examples.training.roofline import Roofline, matrix_flops, roofline
from examples.training.sharding import BATCH
from examples.training.task import count_parameters
from examples.training.traffic import Collective, collectives, memory_traffic
from examples.training.xla import CompilerOptions, topology_devices


@dataclass(frozen=True)
class Account:
    """The analysis of one device's program, with sizes in bytes."""

    parameters: float
    moments: float
    temporaries: float
    """Activations, gradients and gathered parameters."""
    peak: float
    accessed: float
    """Read from and written to memory in a step."""
    flops: float
    """FLOPs of the matrix products in a step, including recomputed ones."""
    collectives: Mapping[str, Collective]
    roofline: Roofline | None
    """None if the peak rates of the device are unknown."""


def account(
    config: TrainConfig[Any], topology: str, options: CompilerOptions | None = None
) -> Account:
    """Compile the training step for a slice, and analyze the program."""
    engine = make_engine(config, topology_devices(topology))
    traced = engine.trace_train_step(engine.batch_like)
    with jax.set_mesh(engine.mesh):
        step = traced.lower().compile(compiler_options=options)
    memory: Any = step.memory_analysis()
    program = parse(str(step.as_text()))
    chip = chip_of(engine.mesh.devices.flat[0])
    accessed = memory_traffic(program)
    flops = matrix_flops(traced.jaxpr.jaxpr) / engine.mesh.size
    sent = collectives(program)
    return Account(
        parameters=_bytes_per_device(engine.state_like.params),
        moments=_bytes_per_device(engine.state_like.opt_state),
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        accessed=accessed,
        flops=flops,
        collectives=sent,
        roofline=chip
        and roofline(
            chip,
            flops=flops,
            accessed=accessed,
            received=sum(kind.received for kind in sent.values()),
            model_flops=config.task.flops() / engine.mesh.size,
        ),
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


def compile_only(
    topology: str = "v5e:4x4",
    *,
    config: TrainConfig[Any],
) -> None:
    """Compile the training step for a TPU slice; print its memory and shortest time.

    Args:
        topology: TPU type and chip layout, as in v5e:4x4.
        config: the configuration of the run.
    """
    jax.config.update("jax_platforms", "cpu")  # Leave a local TPU free.
    # JAX cannot load cached programs for devices that are not attached.
    jax.config.update("jax_enable_compilation_cache", False)
    task = config.task
    print(
        f"Compiling a step of {task.describe()} with {config.optimizer.title}, "
        f"{count_parameters(task):,} parameters, for {topology}. This takes a few "
        "minutes.",
        flush=True,
    )
    found = account(config, topology)
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
    ]
    print("\n" + markdown_table(rows, (f"on each device of {topology}", "")))
    sent = [
        (
            name,
            f"{c.times}",
            f"{c.bytes / 1e9:.3f} GB",
            f"{c.received / 1e9:.3f} GB",
        )
        for name, c in sorted(found.collectives.items())
    ]
    header = ("in a step", "count", "size of results", "received")
    print("\n" + markdown_table(sent, header))
    print("\n" + _describe(found, config))


def _describe(found: Account, config: TrainConfig[Any]) -> str:
    """Describe what limits the speed of a step."""
    task, line = config.task, found.roofline
    received = sum(kind.received for kind in found.collectives.values())
    amounts = {
        "compute": f"{found.flops / 1e12:.2f} TFLOP",
        "memory": f"{found.accessed / 1e9:.1f} GB",
        "links": f"{received / 1e9:.1f} GB",
    }
    names = {
        "compute": "matrix products, recomputed ones included",
        "memory": "read from and written to memory",
        "links": "received from other devices",
    }
    if line is None:
        rows = [(names[name], amount) for name, amount in amounts.items()]
        return markdown_table(rows, ("in a step", "per device"))
    chip = line.chip
    peaks = {
        "compute": f"{chip.flops / 1e12:.0f} TFLOP/s",
        "memory": f"{chip.memory / 1e9:.0f} GB/s",
        "links": f"{chip.links / 1e9:.0f} GB/s",
    }
    table = markdown_table(
        [
            (names[name], amount, peaks[name], f"{1e3 * line.times[name]:.1f} ms")
            for name, amount in amounts.items()
        ],
        ("in a step", "per device", "peak rate", "shortest time"),
    )
    speed = task.units / line.shortest
    return (
        f"{table}\n\nPeak rates: {chip.source}. At these rates, and if all three "
        f"overlap perfectly, a step takes {1e3 * line.shortest:.1f} ms "
        f"({speed:,.0f} {task.unit} per second), limited by {line.limit}. The model's "
        f"{task.flops():.3g} FLOPs alone take {1e3 * line.model:.1f} ms, so the model "
        f"FLOPs utilization is at most {line.utilization:.0%}."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
