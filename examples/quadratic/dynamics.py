"""The quadratic, its Hamiltonian, and the trajectory of an optimizer on it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Trajectory(NamedTuple):
    """Points and momenta, one per row: initially and after each step."""

    points: jax.Array
    momenta: jax.Array


def loss(w: jax.Array, condition: float) -> jax.Array:
    """Compute f(w) = (w_1^2 + condition * w_2^2) / 2 over the last axis of `w`."""
    return (w[..., 0] ** 2 + condition * w[..., 1] ** 2) / 2


def hamiltonian(path: Trajectory, condition: float, learning_rate: float) -> jax.Array:
    """Compute loss plus kinetic energy, f(w) + learning_rate * |m|^2 / 2.

    The momentum step is m' = beta m + grad f(w), w' = w - learning_rate m'. With
    h = sqrt(learning_rate) and the velocity s = h m, it reads s' = beta s + h grad f(w)
    and w' = w - h s': a ball of unit mass with friction, in time steps of h, whose
    kinetic energy is |s|^2 / 2.
    """
    kinetic = learning_rate * jnp.sum(path.momenta**2, axis=-1) / 2
    return loss(path.points, condition) + kinetic


def trajectory(
    optimizer: optax.GradientTransformation,
    start: jax.Array,
    condition: float,
    steps: int,
) -> Trajectory:
    """Run `optimizer` for `steps` steps from `start` and return its trajectory.

    The momentum is zero for an optimizer without an `optax.TraceState`.
    """

    def step(
        carry: tuple[jax.Array, optax.OptState], _: None
    ) -> tuple[tuple[jax.Array, optax.OptState], Trajectory]:
        w, state = carry
        momentum = optax.tree.get(state, "trace", jnp.zeros_like(w))
        updates, state = optimizer.update(jax.grad(loss)(w, condition), state, w)
        return (optax.apply_updates(w, updates), state), Trajectory(w, momentum)

    initial = (start, optimizer.init(start))
    return jax.lax.scan(step, initial, length=steps + 1)[1]
