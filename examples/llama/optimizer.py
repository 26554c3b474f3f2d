"""From an optimizer's name and settings to an optax transformation."""

from collections.abc import Callable

import jax
import optax

import optax_cautious
from examples.llama.config import OptimizerName, RecipeConfig

_Constructor = Callable[..., optax.GradientTransformation]

# Each with its usual b2.
_OPTIMIZERS: dict[OptimizerName, tuple[_Constructor, float]] = {
    "adamw": (optax.adamw, 0.999),
    "cautious_adamw": (optax_cautious.cautious_adamw, 0.999),
    "lion": (optax.lion, 0.99),
    "cautious_lion": (optax_cautious.cautious_lion, 0.99),
}


def make_optimizer(
    name: OptimizerName, learning_rate: float, recipe: RecipeConfig, steps: int
) -> optax.GradientTransformation:
    """Makes an optimizer whose learning rate warms up and decays along a cosine.

    Args:
        name: the optimizer; a cautious one takes the settings of its base.
        learning_rate: the peak of the schedule.
        recipe: the other settings.
        steps: length of the schedule.
    """
    constructor, usual_b2 = _OPTIMIZERS[name]
    caution = {}
    if recipe.exempt_embedding and name.startswith("cautious"):
        caution["caution_mask"] = _all_but_embedding
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=int(recipe.warmup_fraction * steps),
        decay_steps=steps,
        end_value=recipe.final_fraction * learning_rate,
    )
    return constructor(
        schedule,
        b1=recipe.b1,
        b2=usual_b2 if recipe.b2 is None else recipe.b2,
        weight_decay=recipe.weight_decay,
        **caution,
    )


def _all_but_embedding(params: optax.Params) -> optax.Params:
    """Marks every leaf but the table of the embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "embedding" not in jax.tree_util.keystr(path), params
    )
