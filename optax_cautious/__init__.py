"""Cautious optimizers for JAX: never move against the gradient of this step."""

from optax_cautious._caution import CautiousState
from optax_cautious._decay import add_cautious_decayed_weights
from optax_cautious._gradient import provide_gradient
from optax_cautious._optimizers.adafactor import cautious_adafactor
from optax_cautious._optimizers.adam import cautious_adam
from optax_cautious._optimizers.adamw import cautious_adamw
from optax_cautious._optimizers.lion import cautious_lion
from optax_cautious._optimizers.muon import cautious_muon
from optax_cautious._optimizers.sgd import cautious_sgd
from optax_cautious._transform import aligned_fraction, cautious, with_caution

__version__ = "0.1.0"

__all__ = [
    "CautiousState",
    "add_cautious_decayed_weights",
    "aligned_fraction",
    "cautious",
    "cautious_adafactor",
    "cautious_adam",
    "cautious_adamw",
    "cautious_lion",
    "cautious_muon",
    "cautious_sgd",
    "provide_gradient",
    "with_caution",
]
