"""Where every array is: the mesh, and the rules for parameters and activations.

The mesh has three axes. A batch is split over ``data`` and ``fsdp``. Parameters, and
what an optimizer keeps of their shape, are split over ``fsdp`` and ``tensor``, and
gathered over ``fsdp`` where they are used. Heads, the features inside the feed-forward
layer and the vocabulary are split over ``tensor``. XLA adds the communication.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama.checks import InputError, require
from examples.llama.config import TrainConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The axes over which the sequences of a batch are split."""

# The axes of each kind of parameter, by the name of what holds it.
_PARAMETERS = {
    "embedding": ("tensor", "fsdp"),  # [V, D]
    "query": ("fsdp", "tensor"),  # [D, N H]
    "key": ("fsdp", "tensor"),  # [D, K H]
    "value": ("fsdp", "tensor"),  # [D, K H]
    "output": ("tensor", "fsdp"),  # [N H, D]
    "gate": ("fsdp", "tensor"),  # [D, F]
    "up": ("fsdp", "tensor"),  # [D, F]
    "down": ("tensor", "fsdp"),  # [F, D]
    "logits": ("fsdp", "tensor"),  # [D, V]
}


def make_mesh(config: TrainConfig, devices: Any = None) -> Mesh:
    """Arranges devices as the configuration says.

    Args:
        config: the configuration, which is checked against the mesh.
        devices: the devices to choose from; all there are unless given.

    Raises:
        InputError: for more devices than there are, and for a batch, heads, features
            or a vocabulary that the mesh does not divide.
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
    sequences = config.data.batch_size // config.accumulate
    require(
        sequences % (data * fsdp) == 0,
        f"batch_size: {sequences} sequences at a time (batch_size / accumulate) do not "
        f"divide among the {data} x {fsdp} devices of the mesh's axes data and fsdp; "
        "choose a multiple, or another --mesh",
    )
    model = config.model
    for axis, size, names in (
        ("fsdp", fsdp, ("hidden_size",)),
        (
            "tensor",
            tensor,
            ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"),
        ),
    ):
        for name in names:
            require(
                getattr(model, name) % size == 0,
                f"mesh: the axis {axis} ({size}) does not divide {name} "
                f"({getattr(model, name)}); choose another --mesh or "
                f"--{name.replace('_', '-')}",
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
        "host reads sequences of its own; choose a smaller one",
    )
    return mesh


def specs(tree: Any) -> Any:
    """Finds how each leaf of parameters or of an optimizer's state is laid out.

    A leaf with the path of a parameter and its number of axes is laid out like it. All
    others, scalars and the scales of the norms among them, are on every device.

    Args:
        tree: arrays, or their shapes.

    Returns:
        A tree of the same structure with a ``PartitionSpec`` for each leaf.
    """

    def spec(path: Any, leaf: Any) -> P:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        layers = [None] if "blocks" in names else []  # The axis of the scan.
        for holder, axes in _PARAMETERS.items():
            if holder in names and leaf.ndim == len(layers) + len(axes):
                return P(*layers, *axes)
        return P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Does as ``specs``, with a ``NamedSharding`` for each leaf."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(tree),
        is_leaf=lambda x: isinstance(x, P),
    )


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Lays an array out over the axes of the mesh in use; without one, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def constrain_as_params(tree: Any) -> Any:
    """Lays gradients out as the parameters are."""
    return jax.tree.map(lambda leaf, spec: constrain(leaf, *spec), tree, specs(tree))


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
