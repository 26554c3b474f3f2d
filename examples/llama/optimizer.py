"""From an optimizer's name and settings to an optax transformation."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import optax_cautious
from examples.llama.checks import InputError, require
from examples.llama.config import OptimizerConfig, base_name

_Constructor = Callable[..., optax.GradientTransformation]

_OPTIMIZERS: dict[str, _Constructor] = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": optax.sgd,
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
    "nadamw": optax.nadamw,
    "amsgrad": optax.amsgrad,
    "adabelief": optax.adabelief,
    "adan": optax.adan,
    "lamb": optax.lamb,
    "adopt": optax.contrib.adopt,
    "ademamix": optax.contrib.ademamix,
}
_CAUTIOUS: dict[str, _Constructor] = {
    "adamw": optax_cautious.cautious_adamw,
    "lion": optax_cautious.cautious_lion,
    "sgd": optax_cautious.cautious_sgd,
    "muon": optax_cautious.cautious_muon,
    "adafactor": optax_cautious.cautious_adafactor,
}
"""Those that have a cautious form of their own; the others are wrapped."""

# What an optimizer calls an option, where it is not by the option's name. Muon leaves
# the scales of norms to Adam.
_OPTION_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "sgd": {"b1": ("momentum",)},
    "muon": {"b1": ("beta", "adam_b1"), "b2": ("adam_b2",)},
    "adafactor": {"b1": ("momentum",)},
}
# Without momentum, SGD has nothing to be cautious about. Muon's updates are scaled to
# the size of AdamW's, which is what moves the parameters outside the blocks.
_OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "muon": {"consistent_rms": 0.2},
}


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes an optimizer whose learning rate warms up and decays along a cosine.

    With ``u`` the update of the optimizer proper at a learning rate of 1, cautious or
    not, and the learning rate ``lr`` of the step::

        p <- p + lr * (u - weight_decay * p)

    where the norms and the embedding do not decay. For AdamW this is ``optax.adamw``.
    The optimizer sees gradients clipped by their global norm.

    Args:
        config: its name and its settings.
        steps: length of the schedule.

    Raises:
        InputError: for a setting that the optimizer does not have.
    """
    parts = [
        per_layer(*_direction(config)),
        # The update is to be added by now, so decay is negative.
        optax.add_decayed_weights(-config.weight_decay, mask=_decays),
        optax.scale_by_schedule(make_schedule(config, steps)),
    ]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*parts)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the learning rate: linear warm-up, then a cosine down to a share of it."""
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak,
        warmup_steps=int(config.warmup_fraction * steps),
        decay_steps=steps,
        end_value=config.final_fraction * config.peak,
    )


class PerLayerState(NamedTuple):
    """The states for the blocks, stacked along the layers, and for all else."""

    blocks: optax.OptState
    rest: optax.OptState


def per_layer(
    tx: optax.GradientTransformation, rest_tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Shows an optimizer the parameters of each layer as leaves of their own.

    The model stacks the parameters of its blocks for a scan. An optimizer takes such a
    stack for one leaf, and what goes by the leaf, like caution's aligned fraction and
    LAMB's trust ratio, would be one for all layers. ``jax.vmap`` over the stack undoes
    that, and moves nothing in memory.

    Args:
        tx: the transformation for the blocks.
        rest_tx: the one for all else.

    Returns:
        A transformation of trees whose child ``"blocks"`` has a leading axis of layers
        in each leaf.
    """

    def state_axes(blocks: Any) -> Any:
        # A step count is one for all layers. As a vector of them, it would make Adam's
        # bias correction an array as large as the parameters.
        layer = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], blocks))
        return jax.tree.map(
            lambda leaf: 0 if leaf.ndim else None, jax.eval_shape(tx.init, layer)
        )

    def init(params: Any) -> PerLayerState:
        blocks, rest = _split(params)
        init_blocks = jax.vmap(tx.init, out_axes=state_axes(blocks))
        return PerLayerState(init_blocks(blocks), rest_tx.init(rest))

    def update(updates: Any, state: PerLayerState, params: Any) -> Any:
        block_grads, rest_grads = _split(updates)
        blocks, rest = _split(params)
        axes = state_axes(blocks)
        block_updates, block_state = jax.vmap(
            tx.update, in_axes=(0, axes, 0), out_axes=(0, axes)
        )(block_grads, state.blocks, blocks)
        rest_updates, rest_state = rest_tx.update(rest_grads, state.rest, rest)
        both = {**rest_updates, "blocks": block_updates}
        return both, PerLayerState(block_state, rest_state)

    return optax.GradientTransformation(init, update)


def _split(tree: Any) -> tuple[Any, Any]:
    """Takes the blocks out of the parameters."""
    rest = {name: child for name, child in tree.items() if name != "blocks"}
    return tree["blocks"], rest


def _direction(
    config: OptimizerConfig,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Makes the optimizer at a learning rate of 1, for the blocks and for all else."""
    caution = config.caution
    rest: str = config.optimizer
    if base_name(rest) == "muon":  # For the matrices of blocks only.
        rest = rest.replace("muon", "adamw")
    mask = {"mask": _all_but_embedding} if config.exempt_embedding else {}
    return (
        _make(config.optimizer, config, caution),
        _make(rest, config, {**caution, **mask}),
    )


def _make(
    name: str, config: OptimizerConfig, caution: dict[str, Any]
) -> optax.GradientTransformation:
    base = base_name(name)
    parameters = inspect.signature(_OPTIMIZERS[base]).parameters
    options: dict[str, Any] = dict(_OPTIONS.get(base, {}))
    if "weight_decay" in parameters:
        options["weight_decay"] = 0.0
    for option in ("b1", "b2", "eps"):
        value = getattr(config, option)
        if value is None:
            continue
        for own_name in _OPTION_NAMES.get(base, {}).get(option, (option,)):
            require(own_name in parameters, f"{option}: {name} has no such setting")
            options[own_name] = value
    if name == base:
        return _OPTIMIZERS[base](1.0, **options)
    try:
        return _make_cautious(base, options, caution)
    except ValueError as error:  # Of an option of caution, which it names.
        raise InputError(str(error)) from error


def _make_cautious(
    base: str, options: dict[str, Any], caution: dict[str, Any]
) -> optax.GradientTransformation:
    if base in _CAUTIOUS:
        if "mask" in caution:
            caution = {**caution, "caution_mask": caution["mask"]}
            del caution["mask"]
        return _CAUTIOUS[base](1.0, **options, **caution)
    return optax_cautious.with_caution(_OPTIMIZERS[base](1.0, **options), **caution)


def _decays(params: Any) -> Any:
    """Marks every leaf but the norms and the embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not {"scale", "embedding"} & _names(path), params
    )


def _all_but_embedding(params: Any) -> Any:
    """Marks every leaf but the table of the embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "embedding" not in _names(path), params
    )


def _names(path: Any) -> set[Any]:
    return {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
