"""The named optimizers, one row each, with what the tests need to know."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import optax_cautious

LEARNING_RATE = optax.cosine_decay_schedule(1e-2, 100)
BIASES = {"w": True, "b": False}


class Named(NamedTuple):
    #: Optax's optimizer.
    base: Callable[..., optax.GradientTransformation]
    #: Further configurations, as keyword arguments of Optax's optimizer.
    configurations: list[Mapping[str, Any]]
    #: Arguments with which its update opposes the gradient within a few steps.
    momentum: Mapping[str, Any] = {}
    #: Arguments that disable its default decay.
    undecayed: Mapping[str, Any] = {}
    #: Arguments for a decay of 0.3 times a learning rate of 1e-2; None if it has none.
    decayed: Mapping[str, Any] | None = None
    #: The static arguments for optax.inject_hyperparams.
    static_args: tuple[str, ...] = ()

    @property
    def ours(self) -> Callable[..., optax.GradientTransformationExtraArgs]:
        # Not by the base's __name__: optax.nadam is a functools.partial without one.
        name = next(name for name, named in NAMED.items() if named is self)
        return getattr(optax_cautious, f"cautious_{name}")


NAMED = {
    "adam": Named(
        optax.adam,
        [
            {"b1": 0.8, "b2": 0.9, "eps": 1e-4, "eps_root": 1e-6},
            {"mu_dtype": "bfloat16", "nesterov": True},
        ],
    ),
    "adamw": Named(
        optax.adamw,
        [
            {"weight_decay": 0.3, "mask": BIASES, "nesterov": True},
            {"b1": 0.8, "b2": 0.9, "eps": 1e-4, "eps_root": 1e-6},
            {"mu_dtype": "bfloat16", "weight_decay": LEARNING_RATE},
        ],
        undecayed={"weight_decay": 0.0},
        decayed={"weight_decay": 0.3},
    ),
    "lion": Named(
        optax.lion,
        [
            {"b1": 0.8, "b2": 0.95, "weight_decay": 0.3, "mask": BIASES},
            {"mu_dtype": "bfloat16", "weight_decay": LEARNING_RATE},
        ],
        momentum={"b2": 0.5},
        undecayed={"weight_decay": 0.0},
        decayed={"weight_decay": 0.3},
    ),
    "sgd": Named(
        optax.sgd,
        [
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True, "accumulator_dtype": "bfloat16"},
        ],
        momentum={"momentum": 0.9},
    ),
    "muon": Named(
        optax.contrib.muon,
        [
            {"weight_decay": 0.3, "adam_weight_decay": 0.2},
            {"weight_decay": 0.3, "weight_decay_mask": {"w": False, "b": True}},
            {"weight_decay": 0.3, "weight_decay_mask": BIASES, "beta": 0.8},
            {"weight_decay": LEARNING_RATE, "adam_learning_rate": 1e-3},
            {"ns_coeffs": "dion", "preconditioning": "aol", "consistent_rms": 0.2},
            {
                "adam_weight_decay": 0.3,
                "muon_weight_dimension_numbers": {
                    "w": optax.contrib.MuonDimensionNumbers((0, 1), 2),
                    "b": None,
                },
            },
            {
                "ns_steps": 3,
                "eps": 1e-2,
                "mu_dtype": "bfloat16",
                "nesterov": False,
                "adaptive": True,
                "adam_b1": 0.8,
                "adam_b2": 0.9,
                "adam_eps_root": 1e-2,
            },
        ],
        decayed={"weight_decay": 0.3, "adam_weight_decay": 0.3},
        static_args=("ns_coeffs", "ns_steps"),
    ),
    "adafactor": Named(
        optax.adafactor,
        [
            {"decay_rate": 0.5, "decay_offset": -3, "eps": 1e-3},
            {"min_dim_size_to_factor": 2, "factored": False},
            {"momentum": 0.9, "weight_decay_rate": 1e-2},
            {"min_dim_size_to_factor": 2, "clipping_threshold": None},
            {
                "multiply_by_parameter_scale": False,
                "momentum": 0.9,
                "dtype_momentum": jnp.bfloat16,
                "weight_decay_rate": LEARNING_RATE,
                "weight_decay_mask": BIASES,
            },
        ],
        momentum={"momentum": 0.9},
        decayed={"weight_decay_rate": 0.3 * 1e-2},
        static_args=("min_dim_size_to_factor", "dtype_momentum"),
    ),
}
CONFIGURATIONS = [
    (name, kwargs)
    for name, named in NAMED.items()
    for kwargs in ({}, *named.configurations)
]
DECAYING = [name for name, named in NAMED.items() if named.decayed is not None]
#: The parameters of `cautious` in order, by their names in the named optimizers.
CAUTION = {
    {"mask": "caution_mask"}.get(name, name): parameter
    for name, parameter in inspect.signature(optax_cautious.cautious).parameters.items()
    if name != "direction"
}


def make(name: str, *args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """Build a named optimizer, with momentum and without its default decay."""
    named = NAMED[name]
    return named.ours(*args, **{**named.momentum, **named.undecayed, **kwargs})


def make_base(name: str, *args: Any, **kwargs: Any) -> optax.GradientTransformation:
    """Build Optax's optimizer, with momentum and without its default decay."""
    named = NAMED[name]
    return named.base(*args, **{**named.momentum, **named.undecayed, **kwargs})
