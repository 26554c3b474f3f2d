"""Training: the loss, the step, evaluation, and the loop.

``python -m examples.llama.train --help`` lists the options of a single run.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optax_cautious
from examples.llama.config import (
    DEFAULT_LEARNING_RATES,
    TITLES,
    OptimizerName,
    TrainConfig,
    require_choice,
    require_positive,
    run_command,
)
from examples.llama.data import Corpus, load_corpus, train_batches, validation_batches
from examples.llama.model import Llama
from examples.llama.optimizer import make_optimizer

GraphDef = nnx.GraphDef[Llama]
Params = nnx.State[Any, Any]


class TrainState(NamedTuple):
    """All that a training step changes."""

    params: Params
    opt_state: optax.OptState


def loss_fn(graphdef: GraphDef, params: Params, tokens: jax.Array) -> jax.Array:
    """Computes the mean cross-entropy of the next token.

    Args:
        graphdef: the model without its parameters.
        params: its parameters.
        tokens: windows, ``[B, T + 1]``.

    Returns:
        A float32 scalar, in nats.
    """
    tokens = tokens.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])  # [B, T, V]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:]
    )
    return losses.mean()


def init_state(
    config: TrainConfig, tx: optax.GradientTransformation
) -> tuple[GraphDef, TrainState]:
    """Draws the initial weights and makes the optimizer's state for them."""
    graphdef, params = nnx.split(Llama(config.model, nnx.Rngs(config.seed)), nnx.Param)
    return graphdef, TrainState(params, tx.init(params))


def make_train_step(
    graphdef: GraphDef, tx: optax.GradientTransformation
) -> Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]:
    """Makes the pure function from state and batch to the next state and the loss."""

    def train_step(
        state: TrainState, tokens: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(partial(loss_fn, graphdef))(
            state.params, tokens
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    return train_step


def make_aligned_fraction(
    graphdef: GraphDef, tx: optax.GradientTransformation
) -> Callable[[TrainState, jax.Array], jax.Array]:
    """Makes the function that measures how far the next update follows the gradient.

    It returns the fraction of all parameters whose update and gradient have opposite
    signs, that is, which the step moves downhill. Caution zeroes the others, so that
    with and without it the same is counted.
    """

    def aligned_fraction(state: TrainState, tokens: jax.Array) -> jax.Array:
        grads = jax.grad(partial(loss_fn, graphdef))(state.params, tokens)
        updates, _ = tx.update(grads, state.opt_state, state.params)
        fractions = optax_cautious.aligned_fraction(updates, grads)
        counts = jax.tree.map(
            lambda fraction, leaf: fraction * leaf.size, fractions, grads
        )
        return optax.tree.sum(counts) / optax.tree.size(grads)

    return aligned_fraction


@partial(jax.jit, static_argnums=0)
def evaluate(graphdef: GraphDef, params: Params, batches: jax.Array) -> jax.Array:
    """Computes the mean loss over ``[batches, B, T + 1]``, a batch at a time."""
    return jax.lax.map(partial(loss_fn, graphdef, params), batches).mean()


class Evaluation(NamedTuple):
    """What is measured every few steps."""

    step: int
    """Steps taken before."""
    loss: float
    """Validation loss."""
    aligned_fraction: float
    """Fraction of parameters that the next step moves downhill."""

    @property
    def perplexity(self) -> float:
        """Exponential of the validation loss."""
        with np.errstate(over="ignore"):  # Infinity is the right word for it.
            return float(np.exp(self.loss))


@dataclass
class History:
    """The record of one run."""

    name: OptimizerName
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    """Training loss of every step."""
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Time a step took on average, between each evaluation and the next."""
    diverged_at: int | None = None
    """The first step with a loss that is not finite."""

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step, without what came before the first evaluation."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def aligned_fraction(self) -> float:
        """Mean over the evaluations."""
        return statistics.fmean(e.aligned_fraction for e in self.evaluations)


def training(
    name: OptimizerName, learning_rate: float, config: TrainConfig, corpus: Corpus
) -> Iterator[History]:
    """Trains a model, and yields its record, one and the same, after each evaluation.

    A run whose loss is no longer finite says so and ends.
    """
    tx = make_optimizer(name, learning_rate, config.recipe, config.steps)
    # The same, reduced to the direction of its update: weight decay does not come from
    # the gradient, and a learning rate of zero leaves no sign.
    bare = replace(
        config.recipe, weight_decay=0.0, warmup_fraction=0.0, final_fraction=1.0
    )
    bare_tx = make_optimizer(name, learning_rate, bare, config.steps)

    batches = train_batches(corpus, config.data, config.seed)
    validation = jnp.asarray(validation_batches(corpus, config.data))
    graphdef, state = init_state(config, tx)
    # Compiled ahead, to keep it off the clock below.
    jitted_step = jax.jit(make_train_step(graphdef, tx), donate_argnums=0)
    train_step = jitted_step.lower(state, batches[0]).compile()
    aligned_fraction = jax.jit(make_aligned_fraction(graphdef, bare_tx))

    history = History(name, learning_rate)
    for first in range(0, config.steps, config.eval_every):
        last = min(first + config.eval_every, config.steps)
        start = time.perf_counter()
        losses = []
        for step in range(first, last):
            state, loss = train_step(state, batches[step])
            losses.append(loss)
        jax.block_until_ready(state)
        history.seconds.append((time.perf_counter() - start) / (last - first))

        history.losses += map(float, jax.device_get(losses))
        validation_loss = float(evaluate(graphdef, state.params, validation))
        finite = np.isfinite([*history.losses[first:], validation_loss])
        if not finite.all():
            history.diverged_at = min(first + 1 + int(np.argmin(finite)), last)
            tqdm.write(
                f"{TITLES[name]} diverged at a learning rate of {learning_rate:g}: its "
                f"loss is not finite at step {history.diverged_at}. This run stops."
            )
            yield history
            return
        aligned = float(aligned_fraction(state, batches[last]))
        history.evaluations.append(Evaluation(last, validation_loss, aligned))
        yield history


def train(
    names: Sequence[OptimizerName],
    learning_rate: float,
    config: TrainConfig,
    corpus: Corpus,
) -> list[History]:
    """Trains the same model with each optimizer: equal seed, equal data in equal order.

    The runs take turns, from one evaluation to the next, so that whatever else the
    machine does slows all of them down alike.

    Returns:
        The records, in the order of the names.
    """
    runs = {name: training(name, learning_rate, config, corpus) for name in names}
    histories: dict[OptimizerName, History] = {}
    with tqdm(total=config.steps * len(names), desc="Compiling", unit="step") as bar:
        for _ in range(0, config.steps, config.eval_every):
            for name, run in runs.items():
                history = next(run, None)
                if history is None:  # It has diverged.
                    continue
                histories[name] = history
                taken = [len(h.losses) for h in histories.values()]
                losses = [
                    f"{TITLES[n]} {h.losses[-1]:.3f}" for n, h in histories.items()
                ]
                bar.set_description(
                    f"Step {max(taken)} of {config.steps}", refresh=False
                )
                bar.set_postfix_str("loss: " + ", ".join(losses), refresh=False)
                bar.update(sum(taken) - bar.n)
    return list(histories.values())


def train_one(
    optimizer: OptimizerName = "cautious_adamw",
    learning_rate: float | None = None,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> History:
    """Train a small Llama once, and print its validation loss as it falls.

    Args:
        optimizer: what to train with.
        learning_rate: the peak; the one that suits the optimizer's base unless given.
        config: all the rest.
    """
    require_choice("optimizer", optimizer, tuple(TITLES))
    if learning_rate is None:
        learning_rate = DEFAULT_LEARNING_RATES[optimizer]
    require_positive("learning_rate", learning_rate)
    corpus = load_corpus(config.data, config.model.vocab_size)
    (history,) = train([optimizer], learning_rate, config, corpus)
    for evaluation in history.evaluations:
        print(
            f"step {evaluation.step:5d}   validation loss {evaluation.loss:.4f}   "
            f"perplexity {evaluation.perplexity:8.2f}   "
            f"aligned fraction {evaluation.aligned_fraction:.3f}"
        )
    return history


if __name__ == "__main__":
    run_command(train_one)
