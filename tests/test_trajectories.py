"""Comparison with the authors' and timm's own optimizers, step by step.

`reference_trajectories/README.md` describes the run behind each file.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cautious
from optax_cautious import cautious, provide_gradient

FILES = Path(__file__).parent / "reference_trajectories"
LEAVES = ("w", "b", "e")
STEPS = 20


def chain(
    direction: optax.GradientTransformation, renormalize: str
) -> optax.GradientTransformation:
    return provide_gradient(
        optax.chain(
            direction,
            cautious(direction="ascent", renormalize=renormalize),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(1e-2),
        )
    )


def sgdw(**kwargs) -> optax.GradientTransformation:
    """Add decoupled decay to `cautious_sgd`, which has none, like optax.sgd."""
    decay = optax.chain(
        optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2)
    )
    sgd = optax_cautious.cautious_sgd(1e-2, **kwargs)

    def update(grads, state, params):
        updates, state = sgd.update(grads, state, params)
        decays, _ = decay.update(
            optax.tree.zeros_like(updates), decay.init(params), params
        )
        return optax.tree.add(updates, decays), state

    return optax.GradientTransformation(sgd.init, update)


ADAM = {"b1": 0.9, "b2": 0.95}
LION = {"b1": 0.95, "b2": 0.98}
DECAY = {"learning_rate": 1e-2, "weight_decay": 0.1}
OPTIMIZERS = {
    ("c_optim_c_adamw", "chain"): chain(optax.scale_by_adam(**ADAM), "clamp"),
    ("c_optim_c_adamw", "named"): optax_cautious.cautious_adamw(**ADAM, **DECAY),
    ("timm_cautious_adamw", "chain"): chain(optax.scale_by_adam(**ADAM), "clamp"),
    ("timm_cautious_adamw", "named"): optax_cautious.cautious_adamw(**ADAM, **DECAY),
    ("c_optim_c_lion", "chain"): chain(optax.scale_by_lion(**LION), "plus_one"),
    ("c_optim_c_lion", "named"): optax_cautious.cautious_lion(
        **LION, **DECAY, renormalize="plus_one"
    ),
    ("timm_cautious_lion", "chain"): chain(optax.scale_by_lion(**LION), "clamp"),
    ("timm_cautious_lion", "named"): optax_cautious.cautious_lion(**LION, **DECAY),
    ("timm_cautious_sgdw_nesterov", "chain"): chain(
        optax.trace(0.9, nesterov=True), "clamp"
    ),
    ("timm_cautious_sgdw_nesterov", "named"): sgdw(momentum=0.9, nesterov=True),
    ("c_optim_c_muon", "named"): optax_cautious.cautious_muon(
        **DECAY,
        nesterov=False,
        adam_b1=0.9,
        adam_b2=0.95,
        adam_weight_decay=0.1,
        caution_on="momentum",
    ),
}


def test_every_file_is_compared():
    assert {name for name, _ in OPTIMIZERS} == {f.stem for f in FILES.glob("*.npz")}


@pytest.mark.parametrize(("file", "form"), OPTIMIZERS)
def test_trajectory(file, form):
    optimizer = OPTIMIZERS[file, form]
    data = np.load(FILES / f"{file}.npz")
    grads = {leaf: jnp.asarray(data[f"grads/{leaf}"]) for leaf in LEAVES}
    expected = {leaf: data[f"params/{leaf}"] for leaf in LEAVES}

    params = {leaf: jnp.asarray(expected[leaf][0]) for leaf in LEAVES}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        gradient = {leaf: grads[leaf][step] for leaf in LEAVES}
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for leaf in LEAVES:
            np.testing.assert_allclose(
                params[leaf], expected[leaf][step + 1], rtol=0, atol=5e-6
            )


def test_the_gradients_exercise_caution():
    """Without caution, the same gradients lead to other parameters."""
    data = np.load(FILES / "c_optim_c_adamw.npz")
    params = jnp.asarray(data["params/w"][0])
    optimizer = optax.adamw(**ADAM, **DECAY)
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = optimizer.update(
            jnp.asarray(data["grads/w"][step]), state, params
        )
        params = optax.apply_updates(params, updates)
    assert np.max(np.abs(params - data["params/w"][STEPS])) > 1e-2
