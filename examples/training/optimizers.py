"""The optimizers: a table with a row for each, settings and schedules."""

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
    """Name in tables and figures."""
    base: _Constructor
    """Constructor without caution."""
    cautious: _Constructor | None = None
    """Constructor with caution; None to wrap the base in ``with_caution``."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The optimizer's own names for settings, where they differ."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that are always set."""
    unit_steps: bool = True
    """Whether each step moves a parameter by about the learning rate."""


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("AdamW", optax.adamw, optax_cautious.cautious_adamw),
    "lion": Optimizer("Lion", optax.lion, optax_cautious.cautious_lion),
    # Without momentum, SGD and Adafactor already follow the gradient's sign.
    "sgd": Optimizer(
        "SGD",
        optax.sgd,
        optax_cautious.cautious_sgd,
        names={"b1": ("momentum",)},
        fixed={"momentum": 0.9},
        unit_steps=False,
    ),
    # Its updates are scaled to the size of AdamW's, which updates everything outside
    # the layers. Within the layers, Muon leaves norm scales to Adam.
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
    """The optimizer, caution, and the learning-rate schedule.

    Values that are not given are the optimizer's own defaults.
    """

    optimizer: OptimizerName = "adamw"
    """Name of the optimizer."""
    caution: bool = True
    """Update parameters only where the update agrees with the gradient."""
    learning_rate: float | None = None
    """Peak learning rate. Defaults to the best of a sweep, if there was one for this
    model and optimizer; otherwise required."""
    b1: float | None = None
    """Decay of the momentum; for Lion, weight of the momentum in the update."""
    b2: float | None = None
    """Decay of the second moment; for Lion, of the momentum."""
    eps: float | None = None
    """Constant added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay, except for parameters that the task exempts, such as
    norms. Never masked by caution."""
    max_grad_norm: float | None = 1.0
    """Maximum global norm of the gradient; larger gradients are clipped."""
    schedule: ScheduleName = "cosine"
    """Learning-rate schedule after the warm-up: cosine or linear decay to the final
    value, constant, or constant followed by linear decay."""
    warmup_fraction: float = 0.1
    """Fraction of the steps in which the learning rate rises from zero to its peak."""
    decay_fraction: float = 0.2
    """For warmup-stable-decay: fraction of the steps spent on the final decay."""
    final_fraction: float = 0.1
    """Final learning rate as a fraction of the peak; unused with constant."""
    opposed_weight: float = 0.0
    """Caution: weight of coordinates whose update opposes the gradient."""
    min_fraction: float = 1e-3
    """Caution: aligned fraction below which the update is not scaled up further."""
    renormalize: Literal["clamp", "plus_one"] | None = "clamp"
    """Caution: how to scale up the update. None: do not scale it."""
    neutral: Literal["hold", "follow", "ignore"] = "hold"
    """Caution: what to do where the update or the gradient is exactly zero."""
    alignment: Literal["element", "leaf", "tree"] = "element"
    """Caution: what is compared with the gradient: each element, each leaf, or each
    tree (a layer, or everything outside the layers; without ``per_layer``, the whole
    model)."""
    caution_on: Literal["update", "momentum"] = "update"
    """Caution, Muon only: mask the orthogonalized momentum (update), or the momentum
    before orthogonalization (momentum)."""
    per_layer: bool = True
    """Apply the optimizer, and caution, to each layer separately. Otherwise, they see
    a stack of layers as one leaf, as in Optax."""
    cautious_decay: bool = False
    """Decay weights only where the decay does not oppose the update. Works with and
    without caution."""
    exempt: tuple[str, ...] = ()
    """Caution: names of parameters, or of modules, to update without caution, as in
    ``--exempt embedding``."""

    @property
    def title(self) -> str:
        """The optimizer's name in tables and figures."""
        return title(self.optimizer, self.caution)

    @property
    def rule(self) -> dict[str, Any]:
        """The options of caution, by their names in `optax_cautious`."""
        return {name: getattr(self, name) for name in RULE}

    def without_caution(self) -> Self:
        """Return the configuration without caution and without its settings."""
        options: dict[str, Any] = {
            f.name: f.default for f in fields(self) if f.name in OF_CAUTION
        }
        return replace(self, caution=False, **options)

    def __post_init__(self) -> None:
        """Validate the settings."""
        require_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("learning_rate", "max_grad_norm", "eps"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("b1", "b2", "warmup_fraction"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < 1,
                f"{name} must be at least 0 and below 1, got {value}.",
            )
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay must be at least 0, got {self.weight_decay}.",
        )
        for name in ("decay_fraction", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must be between 0 and 1, got {value}.")
        require(
            self.schedule != "warmup-stable-decay"
            or self.warmup_fraction + self.decay_fraction <= 1,
            f"decay_fraction ({self.decay_fraction}) and warmup_fraction "
            f"({self.warmup_fraction}) must not sum to more than 1.",
        )
        require(
            self.caution_on == "update" or self.optimizer == "muon",
            f"caution_on {self.caution_on!r} requires Muon, which orthogonalizes its "
            "momentum; pass --optimizer muon.",
        )
        require(
            self.per_layer or self.optimizer != "muon",
            "Muon needs the matrices of single layers; pass --per-layer.",
        )
        given = [
            f.name
            for f in fields(self)
            if f.name in OF_CAUTION and getattr(self, f.name) != f.default
        ]
        require(
            self.caution or not given,
            f"{', '.join(given)} can only be set with caution; pass --caution.",
        )


RULE = ("opposed_weight", "min_fraction", "renormalize", "neutral", "alignment")
"""Settings of caution, by their names in `optax_cautious`."""

OF_CAUTION = (*RULE, "caution_on", "exempt")
"""Settings that only cautious optimizers have."""


def title(optimizer: str, caution: bool) -> str:
    """Return an optimizer's name for tables and figures."""
    return "cautious " * caution + OPTIMIZERS[optimizer].title


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    stacked: Iterable[str] = (),
    not_decayed: frozenset[str] = frozenset(),
) -> optax.GradientTransformation:
    """Build an optimizer with gradient clipping, weight decay and a schedule.

    With ``u`` the update of the optimizer itself at a learning rate of 1, cautious or
    not, and ``lr`` the learning rate of the step::

        p <- p + lr * (u - weight_decay * p)

    For AdamW this is ``optax.adamw``. The optimizer sees gradients clipped by their
    global norm.

    Args:
        config: the name and the settings of the optimizer.
        schedule: the learning rate of each step.
        stacked: top-level names of parameters that stack layers.
        not_decayed: names of parameters, or of modules, exempt from weight decay.

    Raises:
        InputError: if the optimizer does not have one of the settings.
    """

    def decays(params: Any) -> Any:
        return _where(params, lambda names: not not_decayed & names)

    decay: optax.GradientTransformation
    if config.cautious_decay:
        decay = optax_cautious.add_cautious_decayed_weights(
            config.weight_decay, decays, direction="descent"
        )
    else:
        # The update is already in the descent direction, so decay is negative.
        decay = optax.add_decayed_weights(-config.weight_decay, mask=decays)
    # Paths within a stack do not include the name of the stack.
    of_stacks = {
        name: config.without_caution() if name in config.exempt else config
        for name in (stacked if config.per_layer else ())
    }
    parts = [
        per_layer(
            {name: _direction(of_stack) for name, of_stack in of_stacks.items()},
            _rest_direction(config),
        ),
        decay,
        optax.scale_by_schedule(schedule),
    ]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*parts)


def make_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Build the learning-rate schedule: linear warm-up, then the schedule by name.

    Args:
        config: the name of the schedule and its fractions.
        peak: the peak learning rate.
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
    """Return how many steps a run has in common with a longer one, warm-up aside.

    These are the steps before the learning rate decays. Return None if the learning
    rate depends on the length of the run from the start.
    """
    if config.schedule == "constant":
        return steps
    if config.schedule == "warmup-stable-decay":
        return steps - int(config.decay_fraction * steps)
    return None


class PerLayerState(NamedTuple):
    """Optimizer states: one per stack of layers, also stacked, and one for the rest."""

    stacks: dict[str, optax.OptState]
    rest: optax.OptState


def per_layer(
    txs: Mapping[str, optax.GradientTransformation],
    rest_tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Present the parameters of each layer to an optimizer as separate leaves.

    A model stacks the parameters of its layers for a scan. An optimizer treats such a
    stack as one leaf, so quantities computed per leaf, such as caution's aligned
    fraction and LAMB's trust ratio, would be shared by all layers. ``jax.vmap`` over
    the stack makes them per layer without moving anything in memory.

    Args:
        txs: the transformation of a layer, for each top-level name of parameters whose
            leaves have a leading axis of layers.
        rest_tx: the transformation of all other parameters.
    """

    def state_axes(tx: optax.GradientTransformation, stack: Any) -> Any:
        # All layers share a step count. A vector of counts would make Adam's bias
        # correction an array as large as the parameters.
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
    """Build the optimizer without decay, at a learning rate of 1."""
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
            require(own_name in parameters, f"{setting} is not a setting of {name}.")
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
    except ValueError as error:  # Names the invalid option of caution.
        raise InputError(str(error)) from error


def _rest_direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Build the optimizer for parameters outside the layers: AdamW instead of Muon."""
    if config.optimizer == "muon":
        config = replace(config, optimizer="adamw", caution_on="update")
    return _direction(config)


def _not_exempt(exempt: tuple[str, ...]) -> Callable[[Any], Any]:
    return lambda params: _where(params, lambda names: not names & set(exempt))


def _where(params: Any, holds: Callable[[set[str]], bool]) -> Any:
    """Return a tree of bools: whether a predicate holds for the names on each path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: holds({str(getattr(key, "key", key)) for key in path}), params
    )
