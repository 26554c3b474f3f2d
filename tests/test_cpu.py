"""Temporary memory on a CPU, where allocating memory dominates the step time."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_cautious import _mean, cautious_adamw, cautious_sgd, with_caution

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="Older compilers fuse less: the updates are right, but need more memory.",
)

SHAPES = [(512, 1376), (1024, 512), (3, 50257), (512,)]


def temporaries(tx: optax.GradientTransformation, **options: str) -> float:
    """Return the temporary memory of a step in units of all parameters."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    used = compiled.compile(options).memory_analysis().temp_size_in_bytes
    return used / (4 * sum(p.size for p in params))


@pytest.mark.parametrize(
    "tx",
    [
        cautious_adamw(1e-3),
        cautious_adamw(1e-3, nesterov=True),
        cautious_adamw(1e-3, monitor=True),
        cautious_adamw(1e-3, stacked=1),
        cautious_sgd(1e-3, momentum=0.9),
    ],
    ids=["adamw", "nesterov", "monitor", "stacked", "sgd"],
)
def test_named_optimizers_need_almost_no_temporaries(tx):
    assert temporaries(tx) < 0.05


def test_the_chain_stores_only_the_update():
    assert temporaries(with_caution(optax.adamw(1e-3))) < 1.05


def test_scheduled_for_memory_the_chain_stores_the_update_of_one_leaf():
    tx = with_caution(optax.adamw(1e-3))
    sizes = [math.prod(shape) for shape in SHAPES]
    used = temporaries(tx, xla_cpu_scheduler_type="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
    assert used == pytest.approx(max(sizes) / sum(sizes), abs=0.05)


def test_a_plain_mean_needs_as_much_as_the_parameters(monkeypatch):
    def plain(mask, axes, dtype):
        return jnp.mean(mask, axes, dtype)

    monkeypatch.setattr(_mean, "fraction_on_cpu", plain)
    jax.clear_caches()
    assert temporaries(cautious_adamw(1e-3)) > 0.9
    jax.clear_caches()
