"""Compiled programs, parsed from their HLO text."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "opaque": 0}

_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Array(NamedTuple):
    """The type of an array in a program."""

    dtype: str
    dimensions: tuple[int, ...]
    layout: str
    """Dimensions from fastest to slowest varying, then tiles and memory space."""

    @property
    def is_integer(self) -> bool:
        """Whether the elements are integers, signed or unsigned."""
        return self.dtype[0] in "su"

    @property
    def size(self) -> int:
        """The size in bytes, without padding."""
        return math.prod(self.dimensions) * self._item_size

    @property
    def in_memory(self) -> int:
        """The size in the device's main memory, with the padding of its tiles.

        Zero if it is elsewhere, as in the vector memory of a TPU.
        """
        order, _, rest = self.layout.partition(":")
        if re.search(r"S\([1-9]", rest):
            return 0
        sizes = list(self.dimensions)
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile:
            fastest = [int(i) for i in order.split(",") if i]
            lengths = [int(length) for length in tile[1].split(",")]
            for axis, length in zip(fastest, reversed(lengths), strict=False):
                sizes[axis] += -sizes[axis] % length
        return math.prod(sizes) * self._item_size

    @property
    def _item_size(self) -> int:
        if self.dtype not in _BYTES:
            raise ValueError(f"unknown dtype in a program: {self.dtype}")
        return _BYTES[self.dtype]


def arrays(text: str) -> list[Array]:
    """Parse the types of arrays, such as ``(bf16[8,128]{1,0}, s32[])``."""
    return [
        Array(dtype, tuple(int(d) for d in dimensions.split(",") if d), layout)
        for dtype, dimensions, layout in _SHAPE.findall(text)
    ]


@dataclass(frozen=True)
class Instruction:
    """An instruction of a program."""

    name: str
    operation: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    """The text after the operands."""
    is_root: bool

    @property
    def number(self) -> int | None:
        """The integer in parentheses: a parameter's index, or a constant."""
        found = re.match(r"(\d+)\)", self.attributes)
        return int(found[1]) if found else None

    def called(self, how: str) -> list[str]:
        """Return the computations named in an attribute, such as ``body``."""
        return re.findall(rf"\b(?:{how})=%([^\s,)}}]+)", self.attributes)


Computation = Mapping[str, Instruction]
"""Instructions by name, in the order of execution."""


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: Mapping[str, Computation] = field(repr=False)
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yield each executed instruction, its computation and how often it executes.

        A fusion is one instruction.
        """
        return self._visit(self.entry, 1)

    def _visit(
        self, name: str, times: int
    ) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield instruction, computation, times
            match instruction.operation:
                case "while":
                    (body,) = instruction.called("body")
                    trips = self._trips(instruction)
                    yield from self._visit(body, times * trips)
                case "call":
                    (called,) = instruction.called("to_apply")
                    yield from self._visit(called, times)
                case "conditional":
                    raise NotImplementedError("counting the branches of a conditional")

    def _trips(self, loop: Instruction) -> int:
        """Return the trip count of a loop from zero to a constant, as in a scan."""
        (name,) = loop.called("condition")
        condition = self.computations[name].values()
        constants = [each for each in condition if each.operation == "constant"]
        is_count = any(
            each.operation == "compare" and "direction=LT" in each.attributes
            for each in condition
        )
        if not (is_count and len(constants) == 1 and constants[0].result[0].is_integer):
            raise NotImplementedError(f"counting the iterations of {loop.name}")
        number = constants[0].number
        assert number is not None
        return number


def parse(text: str) -> Program:
    """Parse a compiled program from its HLO text."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, instructions = "", {}
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if start:
            instructions = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
            continue
        found = re.match(r"\s*(ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$", line)
        if found:
            root, name, result, operation, rest = found.groups()
            operands, _, attributes = rest.partition(")")
            if operation in ("constant", "parameter"):
                attributes = rest
            instructions[name] = Instruction(
                name,
                operation,
                tuple(arrays(result)),
                tuple(re.findall(r"%([^\s,)]+)", operands)),
                attributes,
                bool(root),
            )
    return Program(computations, entry)
