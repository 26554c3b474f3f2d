"""The guarantees of the paper, as properties.

Liang et al, "Cautious Optimizers", arXiv:2411.16085.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_cautious
from tests.named import NAMED, make

ALIGNMENTS = ("element", "leaf", "tree")
OPTIMIZERS = {
    **{name: functools.partial(make, name, 0.1) for name in NAMED},
    "nesterov": functools.partial(make, "sgd", 0.1, nesterov=True),
}
SEEDS, STEPS_OF_NOISE = 5, 40
PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(5)}


def noise(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield gradients around a mean that turns against the momentum halfway."""
    rng = np.random.default_rng(seed)
    for step in range(STEPS_OF_NOISE):
        mean = 1.0 if step < STEPS_OF_NOISE // 2 else -1.0
        yield {
            k: mean + rng.standard_normal(x.shape, np.float32)
            for k, x in PARAMS.items()
        }


def cosine(u: np.ndarray, g: np.ndarray) -> float:
    return u @ g / (np.linalg.norm(u) * np.linalg.norm(g) + 1e-300)


def inner_products(tx: optax.GradientTransformation) -> np.ndarray:
    """Compute <u, g> / (|u| |g|) at each step, per leaf and for the tree, in float64.

    The parameters stay fixed; each seed starts from the initial state.
    """
    update = jax.jit(tx.update)
    cosines = []
    for seed in range(SEEDS):
        state = tx.init(PARAMS)
        for grads in noise(seed):
            updates, state = update(grads, state, PARAMS)
            us = [np.asarray(updates[k], np.float64).ravel() for k in PARAMS]
            gs = [np.asarray(grads[k], np.float64).ravel() for k in PARAMS]
            us, gs = [*us, np.concatenate(us)], [*gs, np.concatenate(gs)]
            cosines.append([cosine(u, g) for u, g in zip(us, gs, strict=True)])
    return np.array(cosines)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_moves_against_the_gradient(name, alignment):
    cosines = inner_products(OPTIMIZERS[name](alignment=alignment))
    # "tree" only guarantees the sum over the leaves.
    guaranteed = cosines[:, -1] if alignment == "tree" else cosines
    assert np.max(guaranteed) <= 1e-7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_base_optimizer_moves_against_the_gradient(name):
    assert np.max(inner_products(OPTIMIZERS[name](opposed_weight=1.0))) > 0.1


CURVATURE = jnp.array([50.0, 1.0])
LEARNING_RATE, MOMENTUM, STEPS = 5e-4, 0.9, 1000
STARTS = st.tuples(
    *(st.floats(0.5, 2.0) | st.floats(-2.0, -0.5) for _ in range(CURVATURE.size))
)


@functools.cache
def quadratic(learning_rate: float = LEARNING_RATE, **caution):
    """Build a function that minimizes f(x) = 1/2 sum_i c_i x_i^2 from a start x.

    The function returns the relative change of the loss at each step, (f(x + d) - f(x))
    / f(x), and its first-order part, <gradient, d> / f(x). Without arguments for
    caution, the optimizer is plain momentum.
    """
    if caution:
        tx = optax_cautious.cautious_sgd(learning_rate, momentum=MOMENTUM, **caution)
    else:
        tx = optax.sgd(learning_rate, momentum=MOMENTUM)

    def f(x):
        return 0.5 * jnp.sum(CURVATURE * x**2)

    def step(carry, _):
        x, state = carry
        gradient = CURVATURE * x
        d, state = tx.update(gradient, state, x)
        new = optax.apply_updates(x, d)
        before = jnp.maximum(f(x), 1e-30)
        changes = ((f(new) - f(x)) / before, jnp.sum(gradient * d) / before)
        return (new, state), changes

    @jax.jit
    def run(start):
        return jax.lax.scan(step, (start, tx.init(start)), length=STEPS)[1]

    return lambda start: tuple(map(np.asarray, run(jnp.array(start, jnp.float32))))


@settings(max_examples=50)
@given(start=STARTS)
@pytest.mark.parametrize("renormalize", ["clamp", "plus_one", None])
def test_cautious_momentum_never_raises_the_loss_of_a_quadratic(renormalize, start):
    """At this learning rate, where plain momentum raises it from every start."""
    change, _ = quadratic(renormalize=renormalize)(start)
    assert np.max(change) < 0
    plain, _ = quadratic()(start)
    assert np.sum(plain > 1e-3) > 5


@settings(max_examples=50)
@given(start=STARTS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("learning_rate", [LEARNING_RATE, 4 * LEARNING_RATE])
def test_to_first_order_no_step_raises_the_loss(learning_rate, alignment, start):
    """At any learning rate.

    With "leaf" and "tree", one sign decides for all coordinates. A step that is nearly
    orthogonal to the gradient has no first-order decrease to offset the second-order
    part of the change, 1/2 <d, C d>, so there the loss may rise by that much.
    """
    _, first_order = quadratic(learning_rate, alignment=alignment)(start)
    assert np.max(first_order) <= 1e-6
    _, first_order = quadratic(learning_rate)(start)
    assert np.max(first_order) > 1e-3


@pytest.mark.parametrize("alignment", ["leaf", "tree"])
def test_inner_products_never_raise_the_loss_from_this_start(alignment):
    """From most starts they raise it slightly at one or two steps: see above."""
    start = (1.5, 1.0)
    change, _ = quadratic(alignment=alignment)(start)
    assert np.max(change) <= 0  # 0 where it stands still
    plain, _ = quadratic()(start)
    assert np.sum(plain > 1e-3) > 5
