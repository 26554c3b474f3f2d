"""Ahead-of-time compilation: devices of a TPU slice, collectives of a program."""

import math
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies

from examples.training.checks import InputError

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
"""Compiler options that count each byte once. By default the compiler prefetches some
arrays into the chip's vector memory and counts those bytes again."""


class Collective(NamedTuple):
    """The collective operations of one kind in a step."""

    times: int
    bytes: float
    """Size of the results on one device."""


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


def collectives(text: str) -> dict[str, Collective]:
    """Count the collective operations that a compiled program executes.

    Operations in a loop count once per iteration.

    Args:
        text: the program as HLO text.
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
    # Keyed by channel, because an asynchronous collective has several instructions.
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
    """Split ``%name = result operation(...)`` into result and operation."""
    definition = line.partition(" = ")[2]
    operation = re.search(r" ([a-z-]+?)(?:-start)?\(", definition)
    if operation is None:
        return "", ""
    return definition[: operation.start()], operation[1]


def _called(line: str, how: str) -> list[str]:
    return re.findall(rf"(?:{how})=%([^\s,)}}]+)", line)


def _trips(condition: list[str]) -> int:
    """Return the trip count of a scan."""
    (number,) = re.findall(r"constant\((\d+)\)", "\n".join(condition))
    return int(number)


def _size(shapes: str) -> int:
    """Compute the bytes of shapes such as bf16[8,128]."""
    total = 0
    for dtype, dimensions in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
        elements = math.prod(map(int, filter(None, dimensions.split(","))))
        total += elements * _BYTES[dtype]
    return total
