"""The optimizers: a table with one row for each, their settings and schedules."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import jax
import optax
import tyro

import optax_cautious
from examples.training.checks import (
    InputError,
    require,
    require_choice,
    require_positive,
)

_Constructor = Callable[..., optax.GradientTransformation]


@dataclass(frozen=True)
class Optimizer:
    """A row of the table."""

    title: str
    """Its name in tables and figures."""
    base: _Constructor
    """Without caution."""
    cautious: _Constructor | None = None
    """With caution; None for one that ``with_caution`` wraps."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its own names for settings, where they differ."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that are always set."""
    unit_steps: bool = True
    """Whether each step moves a parameter by about the learning rate."""


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("AdamW", optax.adamw, optax_cautious.cautious_adamw),
    "lion": Optimizer("Lion", optax.lion, optax_cautious.cautious_lion),
    # Without momentum, SGD and Adafactor follow the gradient's sign already.
    "sgd": Optimizer(
        "SGD",
        optax.sgd,
        optax_cautious.cautious_sgd,
        names={"b1": ("momentum",)},
        fixed={"momentum": 0.9},
        unit_steps=False,
    ),
    # Its updates are scaled to the size of AdamW's, which moves what is outside the
    # layers; the scales of norms it leaves to Adam.
    "muon": Optimizer(
        "Muon",
        optax.contrib.muon,
        optax_cautious.cautious_muon,
        names={"b1": ("beta", "adam_b1"), "b2": ("adam_b2",)},
        fixed={"consistent_rms": 0.2},
    ),
    "adafactor": Optimizer(
        "Adafactor",
        optax.adafactor,
        optax_cautious.cautious_adafactor,
        names={"b1": ("momentum",)},
        fixed={"momentum": 0.9},
        unit_steps=False,
    ),
    "nadamw": Optimizer("NAdamW", optax.nadamw),
    "amsgrad": Optimizer("AMSGrad", optax.amsgrad),
    "adabelief": Optimizer("AdaBelief", optax.adabelief),
    "adan": Optimizer("Adan", optax.adan),
    "lamb": Optimizer("LAMB", optax.lamb, unit_steps=False),
    "adopt": Optimizer("ADOPT", optax.contrib.adopt),
    "ademamix": Optimizer("AdEMAMix", optax.contrib.ademamix),
}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = tyro.extras.literal_type_from_choices(OPTIMIZERS)

ScheduleName = Literal["cosine", "linear", "constant", "warmup-stable-decay"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, caution, and the schedule of the learning rate.

    Where a value is not given, it is the optimizer's own.
    """

    optimizer: OptimizerName = "adamw"
    """The optimizer."""
    caution: bool = True
    """Move a parameter only where the optimizer's update agrees with the gradient."""
    learning_rate: float | None = None
    """The peak of the schedule. Not given: the best of a sweep, where there was one for
    this model and optimizer."""
    b1: float | None = None
    """Decay of the momentum; for Lion, the momentum's share in the update."""
    b2: float | None = None
    """Decay of the second moment; for Lion, of the momentum."""
    eps: float | None = None
    """What is added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; never masked by caution."""
    max_grad_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    schedule: ScheduleName = "cosine"
    """The learning rate after the warm-up: down a cosine or a line to its final value,
    constant, or constant and then down a line."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the learning rate grows from zero."""
    decay_fraction: float = 0.2
    """For warmup-stable-decay: share of the steps in which it falls at the end."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of its peak; not for constant."""
    opposed_weight: float = 0.0
    """Caution: weight of the coordinates whose update opposes the gradient."""
    min_fraction: float = 1e-3
    """Caution: the aligned fraction below which the update is not scaled up further."""
    renormalize: Literal["clamp", "plus_one"] | None = "clamp"
    """Caution: how the update is scaled up; None: not at all."""
    neutral: Literal["hold", "follow", "ignore"] = "hold"
    """Caution: what happens where the update or the gradient is exactly zero."""
    alignment: Literal["element", "leaf", "tree"] = "element"
    """Caution: the unit whose agreement is judged: each element, each leaf, or each
    tree (a layer, or everything outside the layers)."""
    caution_on: Literal["update", "momentum"] = "update"
    """Caution, of Muon: whether it masks the orthogonalized momentum, or the momentum
    before it is orthogonalized."""
    cautious_decay: bool = False
    """Decay a weight only where that does not oppose its update. Works with caution and
    without it."""
    exempt: tuple[str, ...] = ()
    """Caution: parameters, or what holds them, that are left to the optimizer without
    it, by their names, as in ``--exempt embedding``."""

    @property
    def title(self) -> str:
        """The optimizer's name for tables and figures."""
        return title(self.optimizer, self.caution)

    @property
    def rule(self) -> dict[str, Any]:
        """The options of caution, by the names that `optax_cautious` gives them."""
        return {name: getattr(self, name) for name in RULE}

    def without_caution(self) -> Self:
        """Returns the optimizer alone: no caution, and nothing that would set it."""
        options: dict[str, Any] = {
            f.name: f.default for f in fields(self) if f.name in OF_CAUTION
        }
        return replace(self, caution=False, **options)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("learning_rate", "max_grad_norm", "eps"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("b1", "b2", "warmup_fraction"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < 1,
                f"{name} is {value}: it has to be at least 0 and below 1",
            )
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}: it has to be at least 0",
        )
        for name in ("decay_fraction", "final_fraction"):
            value = getattr(self, name)
            require(
                0 <= value <= 1, f"{name} is {value}: it has to lie between 0 and 1"
            )
        require(
            self.schedule != "warmup-stable-decay"
            or self.warmup_fraction + self.decay_fraction <= 1,
            f"decay_fraction is {self.decay_fraction}: with a warmup_fraction of "
            f"{self.warmup_fraction} they exceed the whole run",
        )
        require(
            self.caution_on == "update" or self.optimizer == "muon",
            f"caution_on is {self.caution_on}: only Muon orthogonalizes its momentum; "
            "give --optimizer muon",
        )
        given = [
            f.name
            for f in fields(self)
            if f.name in OF_CAUTION and getattr(self, f.name) != f.default
        ]
        require(
            self.caution or not given,
            f"{', '.join(given)}: only caution has these settings; give --caution",
        )


RULE = ("opposed_weight", "min_fraction", "renormalize", "neutral", "alignment")
"""Settings of caution by the names that `optax_cautious` gives them."""

OF_CAUTION = (*RULE, "caution_on", "exempt")
"""Settings that only a cautious optimizer has."""


def title(optimizer: str, caution: bool) -> str:
    """Returns an optimizer's name for tables and figures."""
    return "cautious " * caution + OPTIMIZERS[optimizer].title


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    stacked: Iterable[str] = (),
    not_decayed: frozenset[str] = frozenset(),
) -> optax.GradientTransformation:
    """Makes an optimizer that clips, steps and decays.

    With ``u`` the update of the optimizer proper at a learning rate of 1, cautious or
    not, and the learning rate ``lr`` of the step::

        p <- p + lr * (u - weight_decay * p)

    For AdamW this is ``optax.adamw``. The optimizer sees gradients clipped by their
    global norm.

    Args:
        config: its name and its settings.
        schedule: the learning rate of each step.
        stacked: children of the parameters that stack layers.
        not_decayed: names of parameters that do not decay, or of what holds them.

    Raises:
        InputError: for a setting that the optimizer does not have.
    """

    def decays(params: Any) -> Any:
        return _where(params, lambda names: not not_decayed & names)

    decay: optax.GradientTransformation
    if config.cautious_decay:
        decay = optax_cautious.add_cautious_decayed_weights(
            config.weight_decay, decays, direction="descent"
        )
    else:
        # The update is to be added by now, so decay is negative.
        decay = optax.add_decayed_weights(-config.weight_decay, mask=decays)
    # The names within a stack do not say which stack it is.
    of_stacks = {
        name: config.without_caution() if name in config.exempt else config
        for name in stacked
    }
    parts = [
        per_layer(
            {name: _direction(of_stack) for name, of_stack in of_stacks.items()},
            _direction_of_the_rest(config),
        ),
        decay,
        optax.scale_by_schedule(schedule),
    ]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*parts)


def make_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Makes the learning rate: a linear warm-up, and what follows it.

    Args:
        config: the schedule's name and its fractions.
        peak: the highest learning rate.
        steps: length of the schedule.
    """
    warmup, end = int(config.warmup_fraction * steps), config.final_fraction * peak
    if config.schedule == "cosine":
        return optax.schedules.warmup_cosine_decay_schedule(
            0.0, peak, warmup, decay_steps=steps, end_value=end
        )
    rises = optax.linear_schedule(0.0, peak, max(warmup, 1))
    start = shared_steps(config, steps)
    start = warmup if start is None else start
    falls = optax.linear_schedule(peak, end, steps - start, start - warmup)
    return optax.join_schedules([rises, falls], [warmup])


def shared_steps(config: OptimizerConfig, steps: int) -> int | None:
    """Returns how many steps a longer run shares, but for the warm-up.

    That is up to where the learning rate falls; None where it depends on the length
    from the beginning.
    """
    if config.schedule == "constant":
        return steps
    if config.schedule == "warmup-stable-decay":
        return steps - int(config.decay_fraction * steps)
    return None


class PerLayerState(NamedTuple):
    """The states for the children that stack layers, stacked likewise, and the rest."""

    stacks: dict[str, optax.OptState]
    rest: optax.OptState


def per_layer(
    txs: Mapping[str, optax.GradientTransformation],
    rest_tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Shows an optimizer the parameters of each layer as leaves of their own.

    A model stacks the parameters of its layers for a scan. An optimizer takes such a
    stack for one leaf, and what goes by the leaf, like caution's aligned fraction and
    LAMB's trust ratio, would be one for all layers. ``jax.vmap`` over the stack undoes
    that, and moves nothing in memory.

    Args:
        txs: for each child of the parameters that has a leading axis of layers in each
            leaf, the transformation of a layer.
        rest_tx: the one for all else.
    """

    def state_axes(tx: optax.GradientTransformation, stack: Any) -> Any:
        # A step count is one for all layers. As a vector of them, it would make Adam's
        # bias correction an array as large as the parameters.
        layer = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], stack))
        return jax.tree.map(
            lambda leaf: 0 if leaf.ndim else None, jax.eval_shape(tx.init, layer)
        )

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        stacks = {name: tree[name] for name in txs}
        return stacks, {k: child for k, child in tree.items() if k not in stacks}

    def init(params: Any) -> PerLayerState:
        stacks, rest = split(params)
        states = {
            name: jax.vmap(tx.init, out_axes=state_axes(tx, stacks[name]))(stacks[name])
            for name, tx in txs.items()
        }
        return PerLayerState(states, rest_tx.init(rest))

    def update(updates: Any, state: PerLayerState, params: Any) -> Any:
        grads, rest_grads = split(updates)
        stacks, rest = split(params)
        out, rest_state = rest_tx.update(rest_grads, state.rest, rest)
        out, states = dict(out), {}
        for name, tx in txs.items():
            axes = state_axes(tx, stacks[name])
            out[name], states[name] = jax.vmap(
                tx.update, in_axes=(0, axes, 0), out_axes=(0, axes)
            )(grads[name], state.stacks[name], stacks[name])
        return out, PerLayerState(states, rest_state)

    return optax.GradientTransformation(init, update)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Makes the optimizer without decay, at a learning rate of 1."""
    name = config.optimizer
    row = OPTIMIZERS[name]
    parameters = inspect.signature(row.base).parameters
    options: dict[str, Any] = dict(row.fixed)
    if "weight_decay" in parameters:
        options["weight_decay"] = 0.0
    for setting in ("b1", "b2", "eps"):
        value = getattr(config, setting)
        if value is None:
            continue
        for own_name in row.names.get(setting, (setting,)):
            require(own_name in parameters, f"{setting}: {name} has no such setting")
            options[own_name] = value
    if not config.caution:
        return row.base(1.0, **options)
    mask = _not_exempt(config.exempt) if config.exempt else None
    if name == "muon":
        options["caution_on"] = config.caution_on
    try:
        if row.cautious is not None:
            return row.cautious(1.0, **options, **config.rule, caution_mask=mask)
        base = row.base(1.0, **options)
        return optax_cautious.with_caution(base, **config.rule, mask=mask)
    except ValueError as error:  # Of an option of caution, which it names.
        raise InputError(str(error)) from error


def _direction_of_the_rest(config: OptimizerConfig) -> optax.GradientTransformation:
    """Makes the optimizer for everything outside the layers: AdamW in place of Muon."""
    if config.optimizer == "muon":
        config = replace(config, optimizer="adamw", caution_on="update")
    return _direction(config)


def _not_exempt(exempt: tuple[str, ...]) -> Callable[[Any], Any]:
    return lambda params: _where(params, lambda names: not names & set(exempt))


def _where(params: Any, holds: Callable[[set[str]], bool]) -> Any:
    """Returns a tree of bools: whether a predicate holds of the names on each path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: holds({str(getattr(key, "key", key)) for key in path}), params
    )
