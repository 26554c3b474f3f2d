"""Memory traffic of an optimizer step on a GPU, by XLA's GPU compiler.

``python -m benchmarks.gpu`` compiles each optimizer's step ahead of time for an H100,
on this machine's CPU, and prints the bytes that the kernels of the program read and
write, in units of one array of all parameters. Nothing is executed. It needs JAX 0.12
or later and its CUDA plugin, but neither a GPU nor NVIDIA's libraries: ``make
costs-gpu``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from tqdm import tqdm

from benchmarks.steps import (
    LLAMAS,
    OPTIMIZERS,
    Shape,
    count,
    make_optimizer,
    markdown_table,
    optimizer_step,
)
from benchmarks.tpu import compile_step
from examples.training.hlo import parse
from examples.training.traffic import memory_traffic

# From xla/backends/gpu/target_config/specs/h100_sxm.txtpb in github.com/openxla/xla.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

CASES: list[tuple[str, list[Shape]]] = [
    ("one leaf of 67M", [(8192, 8192)]),
    ("three leaves of 67M", [(8192, 8192)] * 3),
    ("a Llama of 58M", LLAMAS["58M"]),
]


class Account(NamedTuple):
    """The analysis of a step; sizes in arrays of all parameters."""

    moved: float
    """Read and written by the kernels."""
    temporaries: float
    """Memory besides arguments and results."""
    kernels: int


def make_mesh() -> Mesh:
    """Build a mesh of one H100, which does not have to be attached."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x1"
    )
    return Mesh(np.array(topology.devices), ("fsdp",))


def account(name: str, shapes: Sequence[Shape], mesh: Mesh) -> Account:
    """Compile and analyze a step with float32 parameters and moments."""
    tx = make_optimizer(name)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    compiled = compile_step(
        optimizer_step(tx), mesh, (params, state), params, options=None
    )
    memory: Any = compiled.memory_analysis()
    program = parse(str(compiled.as_text()))
    array = 4 * count(shapes)
    return Account(
        moved=memory_traffic(program) / array,
        temporaries=memory.temp_size_in_bytes / array,
        kernels=sum(i.operation == "fusion" for i, _, _ in program.executed()),
    )


def main() -> None:
    """Print the memory traffic of each optimizer's step on an H100."""
    jax.config.update("jax_platforms", "cpu")  # Do not look for a GPU.
    mesh = make_mesh()
    with tqdm(total=len(CASES) * len(OPTIMIZERS), unit="program") as bar:
        for title, shapes in CASES:
            rows = []
            for name in OPTIMIZERS:
                bar.set_description(f"Compiling {name}")
                if "stacked" not in name:
                    a = account(name, shapes, mesh)
                    rows.append(
                        (name, f"{a.moved:.2f}", f"{a.temporaries:.2f}", f"{a.kernels}")
                    )
                bar.update()
            header = (f"H100, {title}", "arrays moved", "temporaries", "kernels")
            tqdm.write(markdown_table(rows, header) + "\n")


if __name__ == "__main__":
    main()
