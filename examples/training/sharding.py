"""Sharding: the device mesh, and the layout of parameters and activations.

The mesh has three axes. Batches are split over ``data`` and ``fsdp``. Parameters, and
optimizer state of their shape, are split over ``fsdp`` and ``tensor`` as the task
specifies, and gathered over ``fsdp`` where they are used. XLA adds the communication.
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
"""Mesh axes over which the examples of a batch are split."""


def make_mesh(config: TrainConfig[Any], devices: Any = None) -> Mesh:
    """Build the device mesh and check that the configuration fits it.

    Args:
        config: the configuration.
        devices: the devices to choose from; defaults to all devices.

    Raises:
        InputError: if the mesh needs more devices than there are, or does not divide
            the batch or a dimension of the model.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    shape = config.mesh or (1, len(devices), 1)
    count = math.prod(shape)
    require(
        count <= len(devices),
        f"mesh: {' x '.join(map(str, shape))} needs {count} devices, but there are "
        f"only {len(devices)}.",
    )
    require(
        count == len(devices) or jax.process_count() == 1,
        f"mesh: {' x '.join(map(str, shape))} uses {count} devices, but the processes "
        f"have {len(devices)}; use all of them.",
    )
    data, fsdp, tensor = shape
    examples = config.task.data.batch_size // config.accumulate
    require(
        examples % (data * fsdp) == 0,
        f"batch_size: {examples} examples at a time (batch_size / accumulate) cannot "
        f"be split over the {data} x {fsdp} devices of the mesh axes data and fsdp; "
        "choose a multiple, or another --mesh.",
    )
    for axis, parts in (("fsdp", fsdp), ("tensor", tensor)):
        for name, size in config.task.divided.get(axis, {}).items():
            require(
                size % parts == 0,
                f"mesh: the {axis} axis ({parts}) must divide {name} ({size}); choose "
                f"another --mesh or --{name.replace('_', '-')}.",
            )
    chosen = devices[:count].tolist()
    try:
        mesh = jax.make_mesh(
            shape, AXES, devices=chosen, axis_types=(AxisType.Auto,) * 3
        )
    except NotImplementedError as error:  # For some shapes on some slices.
        raise InputError(
            f"mesh: {' x '.join(map(str, shape))} does not fit the slice ({error}); "
            "choose another."
        ) from error
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    require(
        bool((hosts == hosts[:, :, :1]).all()),
        f"mesh: the tensor axis ({tensor}) spans several hosts, but each host reads "
        "different examples; choose a smaller one.",
    )
    return mesh


def specs(tree: Any, task: Task) -> Any:
    """Return the ``PartitionSpec`` of each leaf of parameters or optimizer state.

    A leaf with the path of a parameter and its number of axes is laid out like that
    parameter. All other leaves, such as scalars and norm scales, are replicated.

    Args:
        tree: arrays, or their shapes.
        task: the task they belong to.

    Returns:
        A tree of the same structure with a ``PartitionSpec`` per leaf.
    """

    def spec(path: Any, leaf: Any) -> P:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        # The scan axis.
        layers = [None] if names & task.layers.keys() else []
        for holder, axes in task.layout.items():
            if holder in names and leaf.ndim == len(layers) + len(axes):
                return P(*layers, *axes)
        return P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, task: Task, mesh: Mesh) -> Any:
    """Like ``specs``, but with a ``NamedSharding`` per leaf."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(tree, task),
        is_leaf=lambda x: isinstance(x, P),
    )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Shard an array over axes of the current mesh; without a mesh, do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def constrain_as_params(tree: Any, task: Task) -> Any:
    """Shard gradients like the parameters."""
    return jax.tree.map(
        lambda leaf, spec: constrain(leaf, *spec), tree, specs(tree, task)
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """Gather a matrix over ``fsdp``, and reduce-scatter its gradient over ``fsdp``.

    The transpose of a plain sharding constraint would lay out the gradient like the
    gathered matrix, replicated over ``fsdp``.

    Args:
        kernel: a matrix that is split over ``fsdp`` along one axis.
        axes: the mesh axes over which the gathered matrix remains split.
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
