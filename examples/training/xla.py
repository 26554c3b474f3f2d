"""The TPU compiler: devices of a slice that is not attached, and options."""

import os
from typing import Any

from jax.experimental import topologies

from examples.training.checks import InputError

CompilerOptions = dict[str, str | bool]

WITHOUT_PREFETCHES: CompilerOptions = {"xla_vf_vmem_max_outstanding_prefetches": "0"}
"""Compiler options to compare programs. By default, the compiler prefetches arrays into
the chip's vector memory: its own analysis counts those bytes twice, and which arrays it
chooses differs between similar programs."""


def topology_devices(topology: str) -> list[Any]:
    """Return the devices of a TPU slice, such as v5e:4x4, to compile for.

    Raises:
        InputError: if the compiler is not installed or does not know the slice.
    """
    # Without these, libtpu looks for TPU chips and metadata of this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.partition(":")[0])
    try:
        description = topologies.get_topology_desc(topology, "tpu")
    except Exception as error:
        raise InputError(
            f"topology: cannot compile for {topology!r}: {error}. Pass a TPU type and "
            "a chip layout, such as v5e:4x4 or v5p:2x2x2. The compiler is part of the "
            "libtpu package: pip install '.[examples,tpu]'."
        ) from error
    return list(description.devices)
