"""What a compiled program moves: memory traffic, and bytes between devices."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from examples.training.hlo import Array, Computation, Instruction, Program

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_MOVES_NOTHING = {
    "parameter",
    "constant",
    "iota",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "after-all",
    "async-update",
    "partition-id",
    "replica-id",
}
"""Operations that pass arrays on, or whose computations are counted instead."""

_SLICES = ("dynamic-slice", "dynamic-slice-start", "slice", "slice-start", "gather")


class Collective(NamedTuple):
    """The collective operations of one kind in a step."""

    times: int
    bytes: float
    """Size of the results on one device."""
    received: float
    """Bytes that one device receives, at least."""


def collectives(program: Program) -> dict[str, Collective]:
    """Count the collective operations that a program executes, by kind.

    Operations in a loop count once per iteration.
    """
    counts: dict[str, Collective] = {}
    for instruction, _, times in program.executed():
        for kind, size, received in _sent(program, instruction):
            before = counts.get(kind, Collective(0, 0, 0))
            counts[kind] = Collective(
                before.times + times,
                before.bytes + times * size,
                before.received + times * received,
            )
    return counts


def _sent(
    program: Program, instruction: Instruction
) -> Iterator[tuple[str, float, float]]:
    """Yield kind, size of the results, and bytes received of each collective."""
    if instruction.operation != "fusion":
        inside: Iterable[Instruction] = [instruction]
        called = ""
    else:
        (called,) = instruction.called("calls")
        inside = program.computations[called].values()
        # The TPU compiler repeats an asynchronous collective in each fusion that it
        # overlaps with, and in the one that ends it.
        if called.startswith("async_collective_fusion") or _ends(instruction):
            return
    for each in inside:
        kind = each.operation.removesuffix("-start")
        if kind in _COLLECTIVES:
            size = float(_size(_results(each)))
            # A fusion of an all-reduce with the slice that the device keeps.
            if called.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size / _group_size(each.attributes)
            yield kind, size, size * _received(kind, each.attributes)


def memory_traffic(program: Program) -> float:
    """Count the bytes that one device reads from and writes to its main memory.

    A kernel reads its operands and writes its results once. Of an array that is sliced
    or updated in place, only that part counts. Arrays in vector memory do not count;
    padding does. Instructions in a loop count once per iteration.
    """
    total = 0.0
    for instruction, computation, times in program.executed():
        if not _moves_nothing(instruction):
            read = _read(program, instruction, computation)
            total += times * (read + _written(program, instruction, computation))
    return total


def _received(kind: str, attributes: str) -> float:
    """Return the bytes that each device receives per byte of the result, at least."""
    if kind == "collective-permute":
        return 1.0
    devices = _group_size(attributes)
    if kind == "reduce-scatter":
        return devices - 1.0
    share = (devices - 1) / devices
    return 2 * share if kind == "all-reduce" else share


def _group_size(attributes: str) -> int:
    """Return the number of devices that take part in a collective operation."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if numbered := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(numbered[1])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\][^{]*\{((?:'\w+',? ?)+)\}", attributes
    )
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    raise ValueError(f"unknown devices of a collective operation: {attributes}")


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """Return the results, without the operands that a ``-start`` returns as well."""
    operation, count = instruction.operation, len(instruction.operands)
    if operation == "copy-start":
        return instruction.result[:1]
    if operation.endswith("-start") and operation != "all-reduce-start":
        return instruction.result[count : 2 * count]
    return instruction.result


def _moves_nothing(instruction: Instruction) -> bool:
    operation = instruction.operation
    allocates = operation == "custom-call" and not instruction.operands
    return allocates or _ends(instruction) or operation in _MOVES_NOTHING


def _ends(instruction: Instruction) -> bool:
    """Return whether an instruction ends an operation that counts where it starts."""
    return (
        instruction.operation.endswith("-done")
        or "async-collective-done" in instruction.name
    )


def _read(
    program: Program, instruction: Instruction, computation: Computation
) -> float:
    return sum(
        sum(array.in_memory for array in computation[operand].result)
        * _read_share(program, instruction, index, computation)
        for index, operand in enumerate(instruction.operands)
    )


def _read_share(
    program: Program, instruction: Instruction, index: int, computation: Computation
) -> float:
    """Return which part of an operand an instruction reads, from zero to one."""
    operation = instruction.operation
    if operation == "tuple" or (operation == "dynamic-update-slice" and index == 0):
        return 0.0
    if operation in _SLICES and index == 0:
        whole = _size(computation[instruction.operands[0]].result)
        return min(1.0, _size(_results(instruction)) / whole)
    if operation == "bitcast":
        return _share_of_users(program, instruction.name, computation)
    if operation == "fusion":
        inner = program.computations[instruction.called("calls")[0]]
        parameter = next(
            each.name
            for each in inner.values()
            if each.operation == "parameter" and each.number == index
        )
        return _share_of_users(program, parameter, inner)
    return 1.0


def _share_of_users(program: Program, value: str, computation: Computation) -> float:
    shares = (
        _read_share(program, user, index, computation)
        for user in computation.values()
        for index, operand in enumerate(user.operands)
        if operand == value
    )
    return min(1.0, sum(shares))


def _written(
    program: Program, instruction: Instruction, computation: Computation
) -> float:
    results = _results(instruction)
    operation = instruction.operation
    if operation == "fusion":
        inner = program.computations[instruction.called("calls")[0]]
        (root,) = (each for each in inner.values() if each.is_root)
        names = root.operands if root.operation == "tuple" else [root.name]
        values = [inner[name] for name in names for _ in inner[name].result]
        return sum(
            array.in_memory * _written_share(program, value, inner)
            for array, value in zip(results, values, strict=True)
        )
    share = 1.0
    if operation == "dynamic-update-slice":
        share = _updated_share(instruction, computation)
    return share * sum(array.in_memory for array in results)


def _written_share(
    program: Program, instruction: Instruction, computation: Computation
) -> float:
    """Return which part of a fusion's result is written, from zero to one."""
    operation = instruction.operation
    if operation == "parameter":
        return 0.0
    if operation == "bitcast":
        operand = computation[instruction.operands[0]]
        return _written_share(program, operand, computation)
    if operation == "dynamic-update-slice" and _is_parameter(
        instruction.operands[0], computation
    ):
        return _updated_share(instruction, computation)
    if operation == "fusion" and len(instruction.result) == 1:
        inner = program.computations[instruction.called("calls")[0]]
        (root,) = (each for each in inner.values() if each.is_root)
        return _written_share(program, root, inner)
    return 1.0


def _is_parameter(name: str, computation: Computation) -> bool:
    """Return whether a value is an operand of the fusion, and not created in it."""
    instruction = computation[name]
    if instruction.operation == "bitcast":
        return _is_parameter(instruction.operands[0], computation)
    return instruction.operation == "parameter"


def _updated_share(instruction: Instruction, computation: Computation) -> float:
    update = computation[instruction.operands[1]].result
    return _size(update) / _size(instruction.result)


def _size(results: tuple[Array, ...]) -> int:
    return sum(array.size for array in results)
