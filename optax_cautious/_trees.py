"""Pairing the leaves of an update with those of its gradient; masks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cautious._checks import ARRAY_LIKE

Mask = Any | Callable[[optax.Params], Any]


class Pairs(NamedTuple):
    """The leaves that an update and its gradient share, in order."""

    updates: list[jax.Array]
    grads: list[jax.Array]
    #: Puts a list as long as `updates` back into the update's tree.
    unflatten: Callable[[list[jax.Array]], optax.Updates]
    #: Lists what a tree like the update's holds at its arrays.
    flatten: Callable[[optax.Updates], list[Any]]


def pair(updates: optax.Updates, grad: optax.Updates) -> Pairs:
    """Pairs every array of `updates` with its gradient.

    Where `updates` holds None (Equinox) or MaskedNode (optax.masked, optax.partition)
    the gradient may hold anything: a caller's gradient is not masked along.
    """
    treedef: Any  # the type that JAX gives it has no methods
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(
        updates, is_leaf=_is_absent
    )
    try:
        subtrees = treedef.flatten_up_to(grad)
    except ValueError as error:
        raise ValueError(_describe_mismatch(updates, grad)) from error

    leaves = [leaf for _, leaf in paths_and_leaves]
    present = [i for i, leaf in enumerate(leaves) if not _is_absent(leaf)]
    pairs = [_checked(*paths_and_leaves[i], subtrees[i]) for i in present]

    def unflatten(new: list[jax.Array]) -> optax.Updates:
        replaced = dict(zip(present, new, strict=True))
        return treedef.unflatten(replaced.get(i, x) for i, x in enumerate(leaves))

    def flatten(tree: optax.Updates) -> list[Any]:
        leaves = treedef.flatten_up_to(tree)
        return [leaves[i] for i in present]

    return Pairs([u for u, _ in pairs], [g for _, g in pairs], unflatten, flatten)


def select(updates: optax.Updates, mask: Mask) -> optax.Updates:
    """Returns `updates` with MaskedNode in the place of what `mask` leaves out."""
    mask_tree = mask(updates) if _is_callable(mask) else mask
    try:
        return jax.tree.map(
            lambda keep, subtree: subtree if _as_bool(keep) else optax.MaskedNode(),
            mask_tree,
            updates,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "mask must be a tree of bools with the structure of the updates, or a "
            f"prefix of it, or a function that returns one: {error}"
        ) from error


def fill(selected: optax.Updates, updates: optax.Updates) -> optax.Updates:
    """Puts the leaves of `updates` where `selected` holds a MaskedNode."""
    return jax.tree.map(
        lambda new, old: old if isinstance(new, optax.MaskedNode) else new,
        selected,
        updates,
        is_leaf=_is_absent,
    )


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _is_callable(mask: Any) -> bool:
    # A tree of bools may itself be callable, as an Equinox module is.
    return callable(mask) and all(callable(leaf) for leaf in jax.tree.leaves(mask))


def _as_bool(keep: Any) -> bool:
    if isinstance(keep, jax.core.Tracer):
        raise TypeError("the mask is traced, but must be known when it is compiled.")
    if not isinstance(keep, ARRAY_LIKE) or jnp.ndim(keep) or keep not in (0, 1):
        raise TypeError(f"got the leaf {keep!r}.")
    return bool(keep)


def _checked(path: Any, u: Any, g: Any) -> tuple[jax.Array, jax.Array]:
    if not jax.tree_util.all_leaves([g]):
        raise ValueError(
            f"The gradient at {_name(path)} is {_kind_of_node(g)}, but the update "
            "there is an array. Pass the gradient of the same parameters."
        )
    for side, x in (("update", u), ("gradient", g)):
        if not isinstance(x, ARRAY_LIKE):
            raise ValueError(f"The {side} at {_name(path)} is {x!r}, not an array.")
    u_dtype, g_dtype = jnp.result_type(u), jnp.result_type(g)
    if not jnp.issubdtype(u_dtype, jnp.inexact):
        raise ValueError(
            f"The update at {_name(path)} has dtype {u_dtype}, but caution needs "
            "floating-point or complex numbers. Exempt the leaf with a mask."
        )
    if jnp.shape(u) != jnp.shape(g):
        raise ValueError(
            f"The gradient at {_name(path)} has shape {jnp.shape(g)}, but the update "
            f"there has shape {jnp.shape(u)}. Pass the gradient of the same parameters."
        )
    kinds = (jnp.floating, jnp.complexfloating)
    if not any(all(jnp.issubdtype(d, k) for d in (u_dtype, g_dtype)) for k in kinds):
        raise ValueError(
            f"The gradient at {_name(path)} has dtype {g_dtype}, but the update there "
            f"has dtype {u_dtype}: both must be real or both complex."
        )
    return jnp.asarray(u), jnp.asarray(g)


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
