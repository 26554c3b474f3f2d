"""Cautious optimizers for JAX: never move against the gradient of this step."""

from optax_cautious._alias import (
    cautious_adafactor,
    cautious_adamw,
    cautious_lion,
    cautious_muon,
    cautious_sgd,
)
from optax_cautious._caution import CautiousState
from optax_cautious._transform import (
    aligned_fraction,
    cautious,
    provide_gradient,
    with_caution,
)

__version__ = "0.1.0"

__all__ = [
    "CautiousState",
    "aligned_fraction",
    "cautious",
    "cautious_adafactor",
    "cautious_adamw",
    "cautious_lion",
    "cautious_muon",
    "cautious_sgd",
    "provide_gradient",
    "with_caution",
]
