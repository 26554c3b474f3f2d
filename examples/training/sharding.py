"""Where every array is: the mesh, and the rules for parameters and activations.

The mesh has three axes. A batch is split over ``data`` and ``fsdp``. Parameters, and
what an optimizer keeps of their shape, are split over ``fsdp`` and ``tensor`` as the
task says, and gathered over ``fsdp`` where they are used. XLA adds the communication.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.training.checks import InputError, require
from examples.training.config import TrainConfig
from examples.training.task import Task

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The axes over which the examples of a batch are split."""


def make_mesh(config: TrainConfig[Any], devices: Any = None) -> Mesh:
    """Arranges devices as the configuration says.

    Args:
        config: the configuration, which is checked against the mesh.
        devices: the devices to choose from; all there are unless given.

    Raises:
        InputError: for more devices than there are, and for a batch or a size of the
            model that the mesh does not divide.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    shape = config.mesh or (1, len(devices), 1)
    count = math.prod(shape)
    require(
        count <= len(devices),
        f"mesh: {' x '.join(map(str, shape))} are {count} devices, and there are "
        f"{len(devices)}",
    )
    require(
        count == len(devices) or jax.process_count() == 1,
        f"mesh: {' x '.join(map(str, shape))} are {count} devices, and the processes "
        f"have {len(devices)}: use them all",
    )
    data, fsdp, tensor = shape
    examples = config.task.data.batch_size // config.accumulate
    require(
        examples % (data * fsdp) == 0,
        f"batch_size: {examples} examples at a time (batch_size / accumulate) do not "
        f"divide among the {data} x {fsdp} devices of the mesh's axes data and fsdp; "
        "choose a multiple, or another --mesh",
    )
    for axis, parts in (("fsdp", fsdp), ("tensor", tensor)):
        for name, size in config.task.divided[axis].items():
            require(
                size % parts == 0,
                f"mesh: the axis {axis} ({parts}) does not divide {name} ({size}); "
                f"choose another --mesh or --{name.replace('_', '-')}",
            )
    chosen = devices[:count].tolist()
    try:
        mesh = jax.make_mesh(
            shape, AXES, devices=chosen, axis_types=(AxisType.Auto,) * 3
        )
    except NotImplementedError as error:  # For some shapes on some slices.
        raise InputError(
            f"mesh: {' x '.join(map(str, shape))} does not fit the slice ({error}); "
            "choose another"
        ) from error
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    require(
        bool((hosts == hosts[:, :, :1]).all()),
        f"mesh: the axis tensor ({tensor}) reaches over several hosts here, and each "
        "host reads examples of its own; choose a smaller one",
    )
    return mesh


def specs(tree: Any, task: Task) -> Any:
    """Finds how each leaf of parameters or of an optimizer's state is laid out.

    A leaf with the path of a parameter and its number of axes is laid out like it. All
    others, scalars and the scales of the norms among them, are on every device.

    Args:
        tree: arrays, or their shapes.
        task: what they belong to.

    Returns:
        A tree of the same structure with a ``PartitionSpec`` for each leaf.
    """

    def spec(path: Any, leaf: Any) -> P:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        # The axis of the scan.
        layers = [None] if names & task.layers.keys() else []
        for holder, axes in task.layout.items():
            if holder in names and leaf.ndim == len(layers) + len(axes):
                return P(*layers, *axes)
        return P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, task: Task, mesh: Mesh) -> Any:
    """Does as ``specs``, with a ``NamedSharding`` for each leaf."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(tree, task),
        is_leaf=lambda x: isinstance(x, P),
    )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Lays an array out over the axes of the mesh in use; without one, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def constrain_as_params(tree: Any, task: Task) -> Any:
    """Lays gradients out as the parameters are."""
    return jax.tree.map(
        lambda leaf, spec: constrain(leaf, *spec), tree, specs(tree, task)
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """Gathers a matrix over ``fsdp``, and scatters the sum of its gradients likewise.

    The transpose of a plain constraint would lay the gradient out as the gathered
    matrix: all of it on every device.

    Args:
        kernel: a matrix that is split over ``fsdp`` along one axis.
        axes: the axes of the mesh it is split over afterwards.
    """
    return constrain(kernel, *axes)


def _gather_forward(
    kernel: jax.Array, axes: tuple[str | None, str | None]
) -> tuple[jax.Array, None]:
    return constrain(kernel, *axes), None


def _gather_backward(
    axes: tuple[str | None, str | None], _: None, grad: jax.Array
) -> tuple[jax.Array]:
    return (constrain(grad, *[axis or "fsdp" for axis in axes]),)


gather.defvjp(_gather_forward, _gather_backward)
