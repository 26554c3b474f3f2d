"""The optimizers and parameter shapes of the benchmarks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import optax
from tabulate import tabulate

import optax_cautious

Shape = tuple[int, ...]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]

markdown_table = partial(tabulate, tablefmt="github", disable_numparse=True)
"""Format rows and a header as a Markdown table."""

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1


def _chain(**caution: Any) -> Callable[..., optax.GradientTransformation]:
    """Return a constructor of AdamW with caution as the last link of a chain."""

    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        links = optax.adamw(*args, **kwargs), optax_cautious.cautious(**caution)
        return optax_cautious.provide_gradient(optax.chain(*links))

    return make


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "optax.adamw": optax.adamw,
    "cautious_adamw": optax_cautious.cautious_adamw,
    "cautious_adamw(cautious_decay=True)": lambda *args, **kwargs: (
        optax_cautious.cautious_adamw(*args, cautious_decay=True, **kwargs)
    ),
    "cautious_adamw(stacked=1)": lambda *args, **kwargs: optax_cautious.cautious_adamw(
        *args, stacked=1, **kwargs
    ),
    "chain(optax.adamw, cautious)": _chain(),
    "chain(optax.adamw, cautious(renormalize=None))": _chain(renormalize=None),
    "with_caution(optax.adamw)": lambda *args, **kwargs: optax_cautious.with_caution(
        optax.adamw(*args, **kwargs)
    ),
    "optax.lion": optax.lion,
    "cautious_lion": optax_cautious.cautious_lion,
    "optax.sgd": lambda rate, **_: optax.sgd(rate, momentum=0.9),
    "cautious_sgd": lambda rate, **_: optax_cautious.cautious_sgd(rate, momentum=0.9),
}
"""Optimizer constructors by their names in the tables."""


def make_optimizer(name: str) -> optax.GradientTransformation:
    """Build an optimizer by name, with weight decay if it has any."""
    return OPTIMIZERS[name](LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def optimizer_step(tx: optax.GradientTransformation) -> Step:
    """Build the function from (params, state, grads) to the new (params, state)."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def llama_shapes(
    hidden: int, intermediate: int, layers: int, vocabulary: int = 32_000
) -> list[Shape]:
    """List the leaf shapes of a Llama with as many key/value heads as query heads."""
    block: list[Shape] = [
        *[(hidden, hidden)] * 4,
        *[(hidden, intermediate)] * 2,
        (intermediate, hidden),
        *[(hidden,)] * 2,
    ]
    return [(vocabulary, hidden), *block * layers, (hidden,), (hidden, vocabulary)]


LLAMAS: dict[str, list[Shape]] = {
    "1M": llama_shapes(128, 344, 3, vocabulary=2048),
    "10M": llama_shapes(128, 352, 4),
    "58M": llama_shapes(512, 1376, 8),
    "200M": llama_shapes(1024, 2736, 10),
}
"""Models by parameter count; 58M is the paper's 60M model."""


def count(shapes: Sequence[Shape]) -> int:
    """Count the coordinates of all leaves."""
    return sum(jax.ShapeDtypeStruct(shape, bool).size for shape in shapes)
