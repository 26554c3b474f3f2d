"""Flatten trees into the arrays that caution acts on, and rebuild them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cautious._rule import Leaf
from optax_cautious._settings import ARRAY_LIKE

Mask = Any | Callable[[optax.Updates], Any]
Stacked = Any | Callable[[optax.Updates], Any]

_STATIC_ARGS = (
    "Under optax.inject_hyperparams name {name} in static_args, or Optax turns it into "
    "a hyperparameter."
)


class Pairs(NamedTuple):
    """The arrays of an update that caution acts on, with their gradients."""

    leaves: list[Leaf]
    #: For each array of the update, whether it is among `leaves`.
    kept: list[bool]
    #: All arrays of the update.
    updates: list[Any]
    treedef: Any

    def unflatten(self, new: Iterable[jax.Array]) -> optax.Updates:
        """Rebuild the update's tree with new arrays in place of `leaves`."""
        # Not by jax.tree.map: a custom node may refuse to hold anything but arrays.
        new = iter(new)
        return self.treedef.unflatten(
            next(new) if keep else u
            for u, keep in zip(self.updates, self.kept, strict=True)
        )

    def like(self, tree: optax.Updates) -> list[Any]:
        """List the leaves of a tree like the update that correspond to `leaves`."""
        both = zip(jax.tree.leaves(tree), self.kept, strict=True)
        return [leaf for leaf, keep in both if keep]


def pair(
    updates: optax.Updates, grad: optax.Updates, *, mask: Mask, stacked: Stacked
) -> Pairs:
    """Pair the arrays of `updates` that `mask` keeps with their gradients.

    Where `updates` holds None (Equinox) or MaskedNode (optax.masked, optax.partition)
    the gradient may hold anything, since those wrappers do not mask extra arguments.
    """
    arrays, treedef = jax.tree.flatten(updates)
    kept, depths = _kept(mask, updates), _depths(stacked, updates)
    grads = _gradients(updates, grad)
    leaves = []
    for i, (u, g) in enumerate(zip(arrays, grads, strict=True)):
        if not kept[i]:
            continue
        problem = _problem(u, g, depths[i])
        if problem:
            paths = jax.tree_util.tree_flatten_with_path(updates)[0]
            raise ValueError(problem.format(name=_name(paths[i][0])))
        leaves.append(Leaf(_inexact(u), _inexact(g), depths[i]))
    return Pairs(leaves, kept, arrays, treedef)


def _inexact(x: Any) -> jax.Array:
    """Return an array, converting integers to float32 as multiplication would."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _gradients(updates: optax.Updates, grad: optax.Updates) -> list[Any]:
    """List the subtree of `grad` at each array of `updates`."""
    treedef: Any  # JAX's stub of the type has no methods.
    entries, treedef = jax.tree.flatten(updates, is_leaf=_is_absent)
    try:
        subtrees = treedef.flatten_up_to(grad)
    except ValueError as error:
        raise ValueError(_describe_mismatch(updates, grad)) from error
    both = zip(entries, subtrees, strict=True)
    return [subtree for entry, subtree in both if not _is_absent(entry)]


def _kept(mask: Mask, updates: optax.Updates) -> list[bool]:
    """List for each array of `updates` whether `mask` keeps it."""
    n = len(jax.tree.leaves(updates))
    if mask is None:
        return [True] * n
    tree = mask(updates) if _is_callable(mask) else mask
    # optax.inject_hyperparams calls a function with the step instead of the updates.
    is_traced = isinstance(tree, jax.core.Tracer)
    if isinstance(tree, ARRAY_LIKE) and not is_traced and not _is_leaf(updates):
        raise ValueError(
            f"mask is {tree!r}, a single bool for a tree of arrays. Pass a tree of "
            "bools, or a function of the updates that returns one. "
            + _STATIC_ARGS.format(name="the mask")
        )
    try:
        return [_as_bool(keep) for keep in _broadcast(tree, updates)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            "mask must be a tree of bools with the structure of the updates, or a "
            f"prefix of it, or a function that returns one: {error}"
            + _hint_of_a_part(updates)
        ) from error


def _depths(stacked: Stacked, updates: optax.Updates) -> list[int]:
    """List for each array of `updates` how many of its leading axes are stacked."""
    if stacked is None:
        return [0] * len(jax.tree.leaves(updates))
    tree = stacked(updates) if _is_callable(stacked) else stacked
    # optax.inject_hyperparams calls a function with the step instead of the updates.
    if isinstance(tree, int) and tree == 0 and not _is_leaf(updates):
        raise ValueError(
            "stacked is 0, a single number for a tree of arrays. Pass a tree of "
            "numbers, a function of the updates that returns one, or None if nothing "
            "is stacked. " + _STATIC_ARGS.format(name="stacked")
        )
    try:
        return [_as_depth(depth) for depth in _broadcast(tree, updates)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            "stacked must be a number of leading axes, or a tree of them with the "
            "structure of the updates, or a prefix of it, or a function that returns "
            f"one: {error}" + _hint_of_a_part(updates)
        ) from error


def _broadcast(prefix: Any, tree: optax.Updates) -> list[Any]:
    """List the value of a tree prefix at each leaf of a tree."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(prefix)
    pairs = zip(leaves, treedef.flatten_up_to(tree), strict=True)
    return [leaf for leaf, subtree in pairs for _ in jax.tree.leaves(subtree)]


def _is_leaf(tree: optax.Updates) -> bool:
    return jax.tree_util.all_leaves([tree])


def _hint_of_a_part(updates: optax.Updates) -> str:
    entries = jax.tree.leaves(updates, is_leaf=_is_absent)
    if not any(isinstance(entry, optax.MaskedNode) for entry in entries):
        return ""
    return " Inside optax.partition or optax.masked, pass a function of the updates."


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _is_callable(setting: Any) -> bool:
    # A tree may itself be callable, as an Equinox module is.
    return callable(setting) and all(map(callable, jax.tree.leaves(setting)))


def _as_bool(keep: Any) -> bool:
    if isinstance(keep, jax.core.Tracer):
        raise TypeError(
            "the mask is traced, but must be known at compile time. "
            + _STATIC_ARGS.format(name="the mask")
        )
    if not isinstance(keep, ARRAY_LIKE) or jnp.ndim(keep) or keep not in (0, 1):
        raise TypeError(f"got the leaf {keep!r}.")
    return bool(keep)


def _as_depth(depth: Any) -> int:
    if isinstance(depth, jax.Array):
        raise TypeError(
            f"got the array {depth!r}. " + _STATIC_ARGS.format(name="stacked")
        )
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 0:
        raise TypeError(
            f"got the leaf {depth!r}. " + _STATIC_ARGS.format(name="stacked")
        )
    return int(depth)


def _problem(u: Any, g: Any, depth: int) -> str | None:
    """Describe what is wrong with a leaf and what to do, as a template for its name."""
    same = (
        "Pass the gradient of the same parameters. A wrapper that reshapes the updates "
        "belongs outside: wrapper(provide_gradient(...))."
    )
    exempt = "Exempt the leaf with a mask."
    if not jax.tree_util.all_leaves([g]):
        return (
            f"The gradient at {{name}} is {_kind_of_node(g)}, but the update there is "
            f"an array. {same}"
        )
    for side, x in (("update", u), ("gradient", g)):
        if not isinstance(x, ARRAY_LIKE):
            return f"The {side} at {{name}} is {x!r}, not an array. {exempt}"
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.number):
            return (
                f"The {side} at {{name}} has dtype {dtype}, which has no sign. {exempt}"
            )
    u_dtype, g_dtype = jnp.result_type(u), jnp.result_type(g)
    u_shape, g_shape = jnp.shape(u), jnp.shape(g)
    if g_shape[1:] == u_shape and len(g_shape) == len(u_shape) + 1:
        return (
            f"The gradient at {{name}} has shape {g_shape}, one axis more than the "
            f"update's {u_shape}. If these are per-example gradients, apply caution "
            "after the link that aggregates them: optax.chain(optax.contrib."
            "differentially_private_aggregate(...), with_caution(...))."
        )
    if u_shape != g_shape:
        return (
            f"The gradient at {{name}} has shape {g_shape}, but the update there has "
            f"shape {u_shape}. {same}"
        )
    complexes = [jnp.issubdtype(d, jnp.complexfloating) for d in (u_dtype, g_dtype)]
    if complexes[0] != complexes[1]:
        return (
            f"The gradient at {{name}} has dtype {g_dtype}, but the update there has "
            f"dtype {u_dtype}: both must be real or both complex. {exempt}"
        )
    if depth > len(u_shape):
        return (
            f"stacked is {depth} at {{name}}, but the update there has shape "
            f"{u_shape}. Pass a tree of numbers, with 0 for leaves that stack nothing."
        )
    return None


def _describe_mismatch(updates: optax.Updates, grad: optax.Updates) -> str:
    ours, _ = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_absent)
    theirs, _ = jax.tree_util.tree_flatten_with_path(grad)
    present = [path for path, leaf in ours if not _is_absent(leaf)]
    absent = [path for path, leaf in ours if _is_absent(leaf)]
    found = [path for path, _ in theirs]

    missing = [path for path in present if path not in found]
    extra = [
        path
        for path in found
        if path not in present and not any(path[: len(a)] == a for a in absent)
    ]
    if missing:
        detail = f"it has no leaf at {_name(missing[0])}, where the update has one"
    elif extra:
        detail = f"it has a leaf at {_name(extra[0])}, where the update has none"
    else:
        detail = (
            f"its containers are {jax.tree.structure(grad)}, the update's are "
            f"{jax.tree.structure(updates)}"
        )
    return (
        f"The gradient's tree does not match the update's: {detail}. Pass the "
        "gradient of the same parameters."
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _kind_of_node(x: Any) -> str:
    return "None" if x is None else f"a {type(x).__name__}"
