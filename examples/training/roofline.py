"""The roofline of a training step: its shortest possible time on a chip."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

from examples.training.chips import Chip


class Roofline(NamedTuple):
    """The times that a step takes at each of the chip's peak rates, in seconds.

    No step is faster than the longest of them, which it reaches if computation, memory
    traffic and communication overlap perfectly.
    """

    chip: Chip
    compute: float
    """For the FLOPs of all matrix products, including recomputed ones."""
    memory: float
    """For the bytes read and written."""
    links: float
    """For the bytes received from other devices."""
    model: float
    """For the model's FLOPs alone, which do not include recomputed products."""

    @property
    def times(self) -> dict[str, float]:
        """The times of which the longest counts, by the part of the chip."""
        return {
            "compute": self.compute,
            "memory": self.memory,
            "links": self.links,
        }

    @property
    def shortest(self) -> float:
        """The shortest time of a step."""
        return max(self.times.values())

    @property
    def limit(self) -> str:
        """The part of the chip that determines the shortest time."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def utilization(self) -> float:
        """The upper bound of the model FLOPs utilization."""
        return self.model / self.shortest


def roofline(
    chip: Chip, *, flops: float, accessed: float, received: float, model_flops: float
) -> Roofline:
    """Compute the roofline of a step from the counts of one device.

    Args:
        chip: the peak rates of the device.
        flops: FLOPs of all matrix products.
        accessed: bytes read and written.
        received: bytes received from other devices.
        model_flops: FLOPs that the model requires.
    """
    return Roofline(
        chip,
        compute=flops / chip.flops,
        memory=accessed / chip.memory,
        links=received / chip.links,
        model=model_flops / chip.flops,
    )


def matrix_flops(jaxpr: Jaxpr) -> float:
    """Count the FLOPs of the matrix products in a program, on all devices together.

    Products inside a loop count once per iteration. Of a conditional, the most
    expensive branch counts, so blocks of attention that a causal mask skips count as
    well: with splash attention over more than 1024 tokens, the count is too high by up
    to half of the attention's FLOPs.

    Raises:
        NotImplementedError: if the program has products in a loop without a trip count,
            convolutions, or an attention kernel other than XLA's and splash.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if not (equation.outvars or equation.effects):  # Dead code.
            continue
        match equation.primitive.name:
            case "dot_general":
                total += _flops_of_dot(equation)
            case "while" | "conv_general_dilated" as name:
                if name != "while" or any(map(matrix_flops, _inner(params))):
                    raise NotImplementedError(f"cannot count the products in a {name}")
            case "scan":
                total += params["length"] * matrix_flops(params["jaxpr"].jaxpr)
            case "cond":
                branches = (matrix_flops(branch.jaxpr) for branch in params["branches"])
                total += max(branches)
            case "pallas_call":
                calls = math.prod(params["grid_mapping"].grid)
                total += calls * matrix_flops(params["jaxpr"])
            case "shard_map":
                shape: Mapping[str, int] = params["mesh"].shape
                devices = math.prod(shape[axis] for axis in params["newly_manual_axes"])
                total += devices * matrix_flops(params["jaxpr"])
            case name if "attention" in name or name.startswith("ragged_dot"):
                raise NotImplementedError(f"cannot count the products in {name}")
            case _:
                total += sum(map(matrix_flops, _inner(params)))
    return total


def _flops_of_dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each
