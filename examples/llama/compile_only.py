"""What a training step would take on a TPU slice, by the TPU's own compiler.

``python -m examples.llama.compile_only --topology v5e:4x4 --preset paper --model 1b``
compiles the very step of ``examples.llama.train`` on this machine's CPU, and prints
what each device would hold, move and send. Nothing is run. It needs the ``tpu`` extra.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama import log
from examples.llama.checks import InputError
from examples.llama.command_line import Start, run_training_command
from examples.llama.config import TrainConfig, title
from examples.llama.model import count_parameters
from examples.llama.optimizer import make_optimizer
from examples.llama.programs import lower_programs, lower_train_step, state_like
from examples.llama.report import markdown_table
from examples.llama.sharding import BATCH, make_mesh

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

EACH_BYTE_ONCE: dict[str, str | bool] = {"xla_vf_vmem_max_outstanding_prefetches": "0"}
"""Else the compiler moves some arrays into the chip's vector memory ahead of their use,
and counts what it writes there and reads again."""


class Collective(NamedTuple):
    """All operations of one kind that a step does."""

    times: int
    bytes: float
    """Of the results on one device."""


@dataclass(frozen=True)
class Account:
    """What the compiler says of one device; sizes in bytes."""

    parameters: float
    moments: float
    temporaries: float
    """Activations, gradients and gathered parameters."""
    peak: float
    accessed: float
    """Read and written in a step, or in a part of it if there are several, without what
    is moved ahead of its use."""
    collectives: Mapping[str, Collective]


def topology_devices(topology: str) -> list[Any]:
    """Makes the devices of a slice that is not here, such as v5e:4x4.

    Raises:
        InputError: without the compiler, and for a slice that it does not know.
    """
    # Without these libtpu looks for the chips of this machine and for its metadata.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.partition(":")[0])
    try:
        description = topologies.get_topology_desc(topology, "tpu")
    except Exception as error:
        raise InputError(
            f"topology: cannot compile for {topology!r}: {error}. Give a kind of TPU "
            "and the arrangement of its chips, as in v5e:4x4 or v5p:2x2x2. The "
            "compiler is in the package libtpu: pip install '.[examples,tpu]'"
        ) from error
    return list(description.devices)


def abstract_batch(config: TrainConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Makes the shape, dtype and sharding of a batch."""
    shape = config.data.batch_size, config.data.sequence_length + 1
    return jax.ShapeDtypeStruct(
        shape, jnp.uint16, sharding=NamedSharding(mesh, P(BATCH))
    )


def account(config: TrainConfig, topology: str) -> Account:
    """Compiles the training step for a slice, and reads what the compiler says."""
    mesh = make_mesh(config, topology_devices(topology))
    tx = make_optimizer(config.optimizer, config.steps)
    step = lower_train_step(config, tx, mesh, abstract_batch(config, mesh)).compile()
    memory: Any = step.memory_analysis()
    like = state_like(config, tx, mesh)
    return Account(
        parameters=_bytes_per_device(like.params),
        moments=_bytes_per_device(like.opt_state),
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        accessed=_accessed(config, tx, mesh),
        collectives=collectives(str(step.as_text())),
    )


def evaluation_peaks(config: TrainConfig, topology: str) -> dict[str, float]:
    """Compiles what runs between the steps; returns the peak memory of each, in bytes.

    The optimizer's state is on the devices meanwhile, whether a program takes it or
    not.
    """
    mesh = make_mesh(config, topology_devices(topology))
    tx = make_optimizer(config.optimizer, config.steps)
    batch = abstract_batch(config, mesh)
    validation = jax.ShapeDtypeStruct(
        (config.data.validation_batches, *batch.shape),
        batch.dtype,
        sharding=NamedSharding(mesh, P(None, BATCH)),
    )
    programs = lower_programs(config, tx, mesh, batch, validation)
    moments = _bytes_per_device(state_like(config, tx, mesh).opt_state)

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


def _accessed(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> float:
    """Returns the bytes that a step accesses.

    The compiler counts the body of a loop once, however often it runs. The same step
    with two blocks in each iteration tells how much a block is. A short loop it may
    take apart, so a few blocks are counted one by one.
    """

    def unrolled(blocks: int) -> float:
        there = replace(config, model=replace(config.model, unroll=blocks))
        step = lower_train_step(there, tx, mesh, abstract_batch(there, mesh))
        analysis: Any = step.compile(compiler_options=EACH_BYTE_ONCE).cost_analysis()
        return float(analysis["bytes accessed"])

    layers = config.model.num_layers
    if layers < 8:
        return unrolled(layers)
    one, two = unrolled(1), unrolled(2)
    # An odd block is outside of the loop.
    return one + (layers - 1) * (two - one) / (1 + layers % 2)


def collectives(text: str) -> dict[str, Collective]:
    """Counts the collective operations of a compiled program, loops multiplied out.

    Args:
        text: the program in XLA's notation.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if start:
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    # By channel, as one that runs beside other operations is written in several parts.
    found: dict[str, tuple[str, int, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            result, operation = _operation(line)
            if operation in _COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                found[key] = operation, times, times * _size(result)
            inner = times
            if operation == "while":
                inner *= _trips(computations[_called(line, "condition")[0]])
            for called in _called(line, "body|calls|to_apply"):
                visit(called, inner)

    visit(entry, 1)
    kinds = {kind for kind, _, _ in found.values()}
    return {
        kind: Collective(
            times=sum(times for k, times, _ in found.values() if k == kind),
            bytes=sum(size for k, _, size in found.values() if k == kind),
        )
        for kind in kinds
    }


def _operation(line: str) -> tuple[str, str]:
    """Splits ``%name = result operation(...)``."""
    definition = line.partition(" = ")[2]
    operation = re.search(r" ([a-z-]+?)(?:-start)?\(", definition)
    if operation is None:
        return "", ""
    return definition[: operation.start()], operation[1]


def _called(line: str, how: str) -> list[str]:
    return re.findall(rf"(?:{how})=%([^\s,)}}]+)", line)


def _trips(condition: list[str]) -> int:
    """Returns the number that the counter of a scan is compared with."""
    (number,) = re.findall(r"constant\((\d+)\)", "\n".join(condition))
    return int(number)


def _size(shapes: str) -> int:
    """Adds up the bytes of shapes such as bf16[8,128]."""
    total = 0
    for dtype, dimensions in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
        elements = math.prod(map(int, filter(None, dimensions.split(","))))
        total += elements * _BYTES[dtype]
    return total


def compile_only(
    topology: str = "v5e:4x4",
    start: Start = Start(),  # noqa: B008 (frozen)
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> None:
    """Compile the training step for a TPU slice, and print what it takes there.

    Args:
        topology: kind of TPU and arrangement of its chips, as in v5e:4x4.
        start: where the settings start from.
        config: the run.
    """
    del start  # It has become the defaults of the configuration.
    jax.config.update("jax_platforms", "cpu")  # A TPU of this machine stays free.
    tokens = config.data.batch_size * config.data.sequence_length
    flops = log.flops_per_token(config.model, config.data.sequence_length) * tokens
    print(
        f"Compiling a step of {config.data.batch_size} x {config.data.sequence_length} "
        f"tokens with {title(config.optimizer.optimizer)}, "
        f"{count_parameters(config.model):,} parameters, for {topology}: it takes a "
        "few minutes.",
        flush=True,
    )
    found = account(config, topology)
    part = "" if config.accumulate == 1 else f", of one of {config.accumulate} parts"
    rows = [
        ("parameters", _gib(found.parameters)),
        ("optimizer's state", _gib(found.moments)),
        ("activations, gradients, gathered parameters", _gib(found.temporaries)),
        ("all of these", _gib(found.parameters + found.moments + found.temporaries)),
        ("peak, by the compiler", _gib(found.peak)),
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
    print("\n" + markdown_table(sent, ("in a step", "times", "results")))
    print(f"\nThe model's FLOPs in a step, of all devices: {flops:.3g}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    run_training_command(compile_only)
