"""Memory traffic of an optimizer step on a TPU, as reported by the TPU compiler.

``python -m benchmarks.tpu`` compiles each optimizer's step ahead of time for a TPU
slice, on this machine's CPU, and prints the bytes that the step accesses according to
the compiler, in units of one array of all parameters. Nothing is executed. It needs the
``tpu`` and ``examples`` extras.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled
from tqdm import tqdm

from benchmarks.steps import (
    OPTIMIZERS,
    Shape,
    count,
    make_optimizer,
    markdown_table,
    optimizer_step,
)
from examples.training.xla import WITHOUT_PREFETCHES, CompilerOptions

DType = Literal["float32", "bfloat16"]

# 256 MB per device on 2x2 chips: smaller leaves may stay in vector memory.
LARGE: list[Shape] = [(8192, 32_768)]
THREE: list[Shape] = LARGE * 3
# The stacked matrices of six scanned layers, each sharded over the chips.
STACK: list[Shape] = [(6, 8192, 8192)]
# Norms and biases of a large model, with some of its matrices.
MIXED: list[Shape] = [*LARGE * 2, *[(4096,)] * 200, *[(512, 512)] * 50]
STACKED = ["cautious_adamw(stacked=1)"]


class Account(NamedTuple):
    """The compiler's analysis of a step; sizes in arrays of all parameters."""

    moved: float
    """Bytes accessed."""
    temporaries: float
    """Peak memory without arguments and results."""
    all_reduces: int
    all_gathers: int


def make_mesh(topology: str) -> Mesh:
    """Build a mesh with one axis over the chips of a slice, such as v5e:2x2."""
    # Otherwise libtpu looks for local chips and queries the metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.partition(":")[0])
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    devices = topologies.get_topology_desc(topology, "tpu").devices
    return Mesh(np.array(devices), ("fsdp",))


def shard(tree: Any, mesh: Mesh) -> Any:
    """Shard the large arrays in a tree of shapes and dtypes along one axis.

    It is the first axis whose size is divisible by the number of chips.
    """

    def sharded(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P()
        if x.size >= 2**16:
            axis = next(i for i, n in enumerate(x.shape) if n % mesh.size == 0)
            spec = P(*[None] * axis, "fsdp")
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(sharded, tree)


def compile_step(
    step: Callable[..., Any],
    mesh: Mesh,
    donated: Sequence[Any],
    *others: Any,
    options: CompilerOptions | None = WITHOUT_PREFETCHES,
) -> Compiled:
    """Compile a step whose results reuse the buffers of its donated arguments."""
    arguments = shard((*donated, *others), mesh)
    jitted = jax.jit(step, donate_argnums=tuple(range(len(donated))))
    return jitted.lower(*arguments).compile(compiler_options=options)


def bytes_accessed(compiled: Compiled) -> float:
    """Return the bytes that one device reads and writes."""
    analysis: Any = compiled.cost_analysis()
    return float(analysis["bytes accessed"])


def count_operations(compiled: Compiled, operation: str) -> int:
    """Count the occurrences of an operation, asynchronous ones included."""
    return len(re.findall(rf" {operation}(?:-start)?\(", str(compiled.as_text())))


def account(name: str, shapes: Sequence[Shape], dtype: DType, mesh: Mesh) -> Account:
    """Compile and analyze a step with parameters and moments of one dtype."""
    tx = make_optimizer(name)
    params = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    compiled = compile_step(optimizer_step(tx), mesh, (params, state), params)
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    extra = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results
    array = count(shapes) * jnp.dtype(dtype).itemsize / mesh.size
    return Account(
        moved=bytes_accessed(compiled) / array,
        temporaries=extra / array,
        all_reduces=count_operations(compiled, "all-reduce"),
        all_gathers=count_operations(compiled, "all-gather"),
    )


def main(topologies: tuple[str, ...] = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")) -> None:
    """Print the memory traffic of each optimizer's step on each kind of TPU.

    Args:
        topologies: kind and arrangement of the chips, such as v5e:2x2.
    """
    jax.config.update("jax_platforms", "cpu")  # Do not claim this machine's TPU.
    # JAX cannot load cached programs for devices that are not attached.
    jax.config.update("jax_enable_compilation_cache", False)
    all_but_stacked = [name for name in OPTIMIZERS if name not in STACKED]
    cases: list[tuple[str, list[Shape], DType, str]] = [
        ("one large leaf", LARGE, "float32", topologies[0]),
        ("one large leaf", LARGE, "bfloat16", topologies[0]),
        ("three large leaves", THREE, "float32", topologies[0]),
        ("2 large leaves and 250 small", MIXED, "float32", topologies[0]),
        ("a stack of six layers", STACK, "float32", topologies[0]),
        *(("one large leaf", LARGE, "float32", t) for t in topologies[1:]),
    ]
    with tqdm(
        total=(len(cases) - 1) * len(all_but_stacked) + len(STACKED), unit="program"
    ) as bar:
        for leaves, shapes, dtype, topology in cases:
            mesh = make_mesh(topology)
            rows = []
            for name in STACKED if shapes is STACK else all_but_stacked:
                bar.set_description(f"Compiling {name} for {topology}")
                a = account(name, shapes, dtype, mesh)
                rows.append(
                    (
                        name,
                        f"{a.moved:.2f}",
                        f"{a.temporaries:.2f}",
                        str(a.all_reduces),
                        str(a.all_gathers),
                    )
                )
                bar.update()
            title = f"{topology}, {leaves}, {dtype}"
            header = (
                title,
                "arrays moved",
                "temporaries",
                "all-reduces",
                "all-gathers",
            )
            tqdm.write(markdown_table(rows, header) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
