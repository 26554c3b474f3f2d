"""Eight simulated devices match one device under jit, shard_map and pmap."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cautious
from optax_cautious import cautious, provide_gradient
from tests.named import NAMED, make

# Drawn with NumPy: with JAX, every worker would compile the generator on import.
PARAMS = {
    name: np.random.default_rng(0).standard_normal(shape, np.float32)
    for name, shape in {
        "embedding": (64, 32),
        "kernel": (32, 128),
        "bias": (128,),
    }.items()
}
# Both axes shard the matrices; the bias is sharded over one, replicated over the other.
SPECS = {
    "embedding": P("tensor", "fsdp"),
    "kernel": P("fsdp", "tensor"),
    "bias": P("tensor"),
}
ALIGNMENTS = ("element", "leaf", "tree")
SETTINGS = [
    *({"alignment": a, "opposed_weight": 0.25} for a in ALIGNMENTS),
    {"renormalize": "plus_one"},
    {"renormalize": None, "opposed_weight": -1.0},
]
OPTIMIZERS = {
    **{name: make(name, 1e-2, **(NAMED[name].decayed or {})) for name in NAMED},
    "monitor": optax_cautious.cautious_adamw(1e-2, monitor=True),
    "chain": provide_gradient(optax.chain(optax.adamw(1e-2), cautious())),
    "leaf": optax_cautious.cautious_adamw(1e-2, alignment="leaf"),
    "tree": optax_cautious.cautious_adamw(1e-2, alignment="tree"),
    "stacked": optax_cautious.cautious_adamw(1e-2, stacked=1, cautious_decay=True),
}


def mesh(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(shape), ("fsdp", "tensor"))


def gradients(step: int) -> dict:
    return {
        name: jax.random.normal(jax.random.key(10 * step + i), x.shape)
        for i, (name, x) in enumerate(PARAMS.items())
    }


def gradient_descent(tx: optax.GradientTransformation, put=lambda tree: tree):
    params = put(PARAMS)
    state = tx.init(params)  # Under jit, its zeros would be replicated.
    update = jax.jit(tx.update)
    for step in range(4):
        updates, state = update(put(gradients(step)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def on_one_device(name: str):
    return gradient_descent(OPTIMIZERS[name])


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("name", "shape"), [("adamw", (8, 1)), *((name, (2, 4)) for name in OPTIMIZERS)]
)
def test_jit_with_named_shardings_matches_one_device(name, shape):
    def put(tree):
        shardings = {k: NamedSharding(mesh(*shape), spec) for k, spec in SPECS.items()}
        return jax.device_put(tree, shardings)

    expected = on_one_device(name)
    actual = gradient_descent(OPTIMIZERS[name], put)
    # Muon's iterations amplify the rounding of its sharded products.
    tolerance = 1e-3 if name == "muon" else 1e-5
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance / 10)
    for k, spec in SPECS.items():
        sharding = NamedSharding(mesh(*shape), spec)
        assert actual[0][k].sharding.is_equivalent_to(sharding, PARAMS[k].ndim)


# Regardless of caution, Muon multiplies whole matrices and Adafactor takes row norms.
@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"muon", "adafactor"}))
def test_the_compiled_step_gathers_no_parameter(name):
    tx = OPTIMIZERS[name]
    shardings = {k: NamedSharding(mesh(2, 4), spec) for k, spec in SPECS.items()}
    params = jax.device_put(PARAMS, shardings)
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert "all-gather" not in compiled
    assert "all-to-all" not in compiled
    shapes = " ".join(re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled))
    assert shapes
    # Fractions and inner products are scalars, or vectors over the stacked axes. On a
    # CPU, the int8 counts of small groups may be reduced first.
    assert name == "stacked" or not re.search(r"(?<!\bs8)\[\d", shapes)


def shard_mapped(rule, check_vma: bool):
    """Build the cautious update of leaves that shard_map shards."""
    tx = cautious(axis_name=("fsdp", "tensor"), monitor=True, **rule)

    def update(u, g):
        updates, state = tx.update(u, tx.init(u), grad=g)
        return updates, state.aligned_fraction

    specs = {"embedding": P("tensor", "fsdp"), "kernel": P(("fsdp", "tensor"))}
    return jax.jit(
        jax.shard_map(
            update,
            mesh=mesh(4, 2),
            in_specs=(specs, specs),
            out_specs=(specs, P()),
            check_vma=check_vma,
        )
    )


@pytest.mark.parametrize(
    ("rule", "check_vma"),
    [*((rule, True) for rule in SETTINGS), (SETTINGS[0], False), (SETTINGS[2], False)],
)
def test_shard_map_with_axis_name_matches_one_device(rule, check_vma):
    u, g = ({k: x for k, x in gradients(i).items() if k != "bias"} for i in (0, 1))
    tx = cautious(monitor=True, **rule)
    expected, state = tx.update(u, tx.init(u), grad=g)
    actual, fraction = shard_mapped(rule, check_vma)(u, g)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(fraction, state.aligned_fraction, rtol=1e-6)


@pytest.mark.parametrize("rule", [SETTINGS[i] for i in (0, 2, 3)])
def test_pmap_with_axis_name_matches_one_device(rule):
    u, g = (jax.random.normal(jax.random.key(i), (8, 5, 3)) for i in (0, 1))
    tx = cautious(axis_name="shards", monitor=True, **rule)

    def update(u, g):
        updates, state = tx.update(u, tx.init(u), grad=g)
        return updates, state.aligned_fraction

    actual, fractions = jax.pmap(update, axis_name="shards")(u, g)
    whole = cautious(monitor=True, **rule)
    expected, state = whole.update(u, whole.init(u), grad=g)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(fractions, state.aligned_fraction, rtol=1e-6)


# Muon needs whole matrices.
@pytest.mark.parametrize("name", ["with_caution", *sorted(NAMED.keys() - {"muon"})])
def test_every_optimizer_forwards_axis_name(name):
    local_norms = {"clipping_threshold": None, "multiply_by_parameter_scale": False}
    options = local_norms if name == "adafactor" else {}

    def make_one(**caution):
        if name == "with_caution":
            return optax_cautious.with_caution(optax.adam(0.1), **caution)
        return make(name, 0.1, **options, **caution)

    params = jnp.ones((8, 4))
    grads = jnp.ones((8, 4)).at[0].set(0.0)  # the first shard does not move

    def first_update(tx):
        return lambda g, p: tx.update(g, tx.init(p), p)[0]

    expected = first_update(make_one())(grads, params)
    actual = jax.pmap(first_update(make_one(axis_name="shards")), axis_name="shards")(
        grads, params
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    local = jax.pmap(first_update(make_one()))(grads, params)
    assert not np.allclose(local[1:], expected[1:], rtol=1e-3)


@pytest.mark.parametrize("alignment", ["leaf", "tree"])
def test_shards_are_weighted_by_their_magnitude(alignment):
    """Normalized separately, seven small shards would outvote a large one."""
    u = jnp.array([1e-15] * 7 + [1e15])
    g = jnp.array([-1e-15] * 7 + [1e15])
    tx = cautious(alignment=alignment, direction="ascent", axis_name="shards")
    update = jax.pmap(lambda u, g: tx.update(u, tx.init(u), grad=g)[0], "shards")
    np.testing.assert_array_equal(update(u, g), u)


def test_without_axis_name_each_shard_is_scaled_separately():
    """The trap: the scale depends on the number of devices."""
    u = -jnp.ones((8, 4))
    g = jnp.ones((8, 4)).at[0].set(-1.0)  # all of the first shard is opposed
    tx = cautious()
    local = jax.pmap(lambda u, g: tx.update(u, tx.init(u), grad=g)[0])(u, g)
    split = cautious(axis_name="shards")
    shared = jax.pmap(
        lambda u, g: split.update(u, split.init(u), grad=g)[0], axis_name="shards"
    )(u, g)
    np.testing.assert_allclose(local[1:], -1.0)
    np.testing.assert_allclose(shared[1:], -8 / 7, rtol=1e-6)


def test_partition_separates_replicated_leaves():
    """As the documentation of `axis_name` recommends."""
    u = {"split": jnp.arange(16.0) - 5, "copied": jnp.array([1.0, -2.0, 3.0])}
    g = jax.tree.map(lambda x: jnp.sin(3 * x), u)
    rule = {"renormalize": "plus_one"}
    tx = optax.partition(
        {"split": cautious(axis_name="x", **rule), "copied": cautious(**rule)},
        {"split": "split", "copied": "copied"},
    )
    specs = {"split": P("x"), "copied": P()}
    actual = jax.jit(
        jax.shard_map(
            lambda u, g: tx.update(u, tx.init(u), grad=g)[0],
            mesh=Mesh(np.array(jax.devices()), ("x",)),
            in_specs=(specs, specs),
            out_specs=specs,
        )
    )(u, g)
    whole = cautious(**rule)
    expected, _ = whole.update(u, whole.init(u), grad=g)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_data_parallel_pmap_needs_no_axis_name():
    """Parameters are replicated, and gradients already averaged."""
    tx = optax_cautious.cautious_adamw(1e-2)

    def step(params, state, grads):
        updates, state = tx.update(jax.lax.pmean(grads, "batch"), state, params)
        return optax.apply_updates(params, updates), state

    def copies(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * 8), tree)

    params, state = copies(PARAMS), copies(tx.init(PARAMS))
    noise = jax.random.normal(jax.random.key(3), (8, 1, 1))
    noise = noise - noise.mean()
    for i in range(3):
        grads = {
            k: x[None] + noise.reshape(8, *[1] * x.ndim)
            for k, x in gradients(i).items()
        }
        params, state = jax.pmap(step, axis_name="batch")(params, state, grads)

    single, single_state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for i in range(3):
        updates, single_state = update(gradients(i), single_state, single)
        single = optax.apply_updates(single, updates)
    for device in range(8):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, d=device: x[d], params), single, rtol=1e-4, atol=1e-4
        )
