"""Memory traffic of a step as reported by the TPU compiler, if libtpu is installed.

Nothing is executed: the compiler runs on any machine. ``make test-tpu`` installs it.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

if not all(map(importlib.util.find_spec, ("libtpu", "grain"))):
    pytest.skip(
        "needs libtpu (the TPU compiler) and the extra [examples]; run make test-tpu",
        allow_module_level=True,
    )

from benchmarks.tpu import (
    LARGE,
    MIXED,
    STACK,
    THREE,
    account,
    bytes_accessed,
    make_mesh,
)

TOPOLOGY = "v5e:2x2"

# JAX cannot load cached programs for devices that are not attached.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.mark.parametrize(
    ("name", "moved", "temporaries", "all_reduces"),
    [
        ("optax.adamw", 7.0, 0.0, 0),
        ("cautious_adamw", 9.0, 0.0, 1),
        ("cautious_adamw(cautious_decay=True)", 9.0, 0.0, 1),
        ("chain(optax.adamw, cautious)", 10.5, 0.25, 1),
        ("chain(optax.adamw, cautious(renormalize=None))", 7.0, 0.0, 0),
        ("with_caution(optax.adamw)", 10.5, 0.25, 1),
        ("optax.lion", 5.0, 0.0, 0),
        ("cautious_lion", 7.0, 0.0, 1),
        ("cautious_sgd", 6.5, 0.25, 1),
    ],
)
def test_one_large_leaf(name, moved, temporaries, all_reduces):
    found = account(name, LARGE, "float32", make_mesh(TOPOLOGY))
    assert found.moved == pytest.approx(moved, abs=0.01)
    assert found.temporaries == pytest.approx(temporaries, abs=0.01)
    assert found.all_reduces == all_reduces
    assert found.all_gathers == 0


def test_bfloat16():
    found = account("cautious_adamw", LARGE, "bfloat16", make_mesh(TOPOLOGY))
    assert found.moved == pytest.approx(9.0, abs=0.01)
    assert found.temporaries == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(
    ("name", "moved"), [("cautious_adamw", 9.0), ("with_caution(optax.adamw)", 10.5)]
)
def test_three_large_leaves(name, moved):
    found = account(name, THREE, "float32", make_mesh(TOPOLOGY))
    assert found.moved == pytest.approx(moved, abs=0.01)
    assert found.all_reduces == 1


def test_a_stack_of_layers():
    """One fraction per layer, with one all-reduce and no full-size temporary."""
    found = account("cautious_adamw(stacked=1)", STACK, "float32", make_mesh(TOPOLOGY))
    assert found.moved == pytest.approx(9.0, abs=0.01)
    assert found.temporaries == pytest.approx(0.0, abs=0.01)
    assert found.all_reduces == 1
    assert found.all_gathers == 0


def test_one_all_reduce_for_250_leaves():
    found = account("cautious_adamw", MIXED, "float32", make_mesh(TOPOLOGY))
    assert found.moved < 9.1
    assert found.all_reduces == 1
    assert found.all_gathers == 0


def test_without_the_barrier_half_an_array_more_is_moved(monkeypatch):
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    jax.clear_caches()
    found = account("cautious_adamw", LARGE, "float32", make_mesh(TOPOLOGY))
    jax.clear_caches()
    assert found.moved == pytest.approx(9.5, abs=0.01)


@pytest.mark.parametrize(("caution", "moved"), [(False, 8), (True, 10)])
def test_the_optimizer_of_a_whole_training_step(caution, moved):
    """One array more than the optimizer alone, for the gradient norm of clipping."""
    from dataclasses import replace

    from benchmarks.training_step import OPTIMIZERS
    from examples.llama.task import PRESETS, with_model
    from examples.training import engine, xla

    config = with_model(PRESETS["c-optim"], "1b")
    config = replace(config, optimizer=OPTIMIZERS[caution])
    made = engine.make_engine(config, xla.topology_devices("v5e:4x4"))
    like = made.state_like

    def step(state, grads):
        updates, opt_state = made.tx.update(grads, state.opt_state, state.params)
        return type(state)(optax.apply_updates(state.params, updates), opt_state)

    layout = jax.tree.map(lambda leaf: leaf.sharding, like)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=layout)
    compiled = jitted.lower(like, like.params).compile(
        compiler_options=xla.WITHOUT_PREFETCHES
    )
    arrays = sum(
        leaf.dtype.itemsize * np.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(like.params)
    )
    assert bytes_accessed(compiled) / arrays == pytest.approx(moved, abs=0.01)


def test_a_whole_training_step():
    from examples.llama.config import ModelConfig
    from examples.llama.task import LlamaTask
    from examples.training import compile as compiling
    from examples.training.config import TrainConfig
    from examples.training.optimizers import OptimizerConfig
    from examples.training.task import count_parameters

    model = ModelConfig(hidden_size=256, num_layers=2, num_kv_heads=4, unroll=1)
    task = LlamaTask(model)
    config = TrainConfig(task, OptimizerConfig(learning_rate=1e-3))
    found = compiling.account(config, TOPOLOGY)
    # Four bytes per parameter on four chips; only the norms are replicated.
    assert found.parameters == pytest.approx(count_parameters(task), rel=0.01)
    assert found.moments == pytest.approx(2 * found.parameters, rel=0.01)
    assert found.peak > found.parameters + found.moments
    # The optimizer reads and writes parameters and moments.
    assert found.accessed > 6 * found.parameters
    # All parameters but the embedding are multiplied.
    assert found.flops == pytest.approx(task.flops() / 4, rel=0.02)
    assert 0 < found.roofline.utilization < 1
    peaks = compiling.evaluation_peaks(config, TOPOLOGY)
    assert found.parameters + found.moments < peaks["validation loss"] < found.peak
    # It computes the same gradient, and the optimizer's step without caution.
    assert 0.8 * found.peak < peaks["aligned fraction"] < 1.1 * found.peak


def test_what_caution_adds_to_a_whole_training_step():
    """At most two arrays, which may fit vector memory here, and one all-reduce.

    The model has two layers of the paper's 60M Llama.
    """
    from examples.llama.task import PRESETS, with_model
    from examples.training.compile import account
    from examples.training.config import with_settings
    from examples.training.xla import WITHOUT_PREFETCHES

    changed = {"num_layers": "2", "batch_size": "16", "sequence_length": "128"}
    config = with_settings(with_model(PRESETS["paper"], "60m"), changed)
    without, found = (
        account(
            with_settings(config, {"learning_rate": "1e-3", "caution": caution}),
            TOPOLOGY,
            WITHOUT_PREFETCHES,
        )
        for caution in ("false", "true")
    )
    added = (found.accessed - without.accessed) / found.parameters
    assert 0 < added < 2.01
    times = [
        {kind: one.times for kind, one in a.collectives.items()}
        for a in (without, found)
    ]
    times[0]["all-reduce"] += 1
    assert times[0] == times[1]


def test_collectives_in_a_loop_are_counted_once_per_iteration():
    from examples.training.hlo import parse
    from examples.training.traffic import Collective, collectives

    mesh = make_mesh(TOPOLOGY)

    def add_up(x, times):
        def once(x, _):
            total = jax.lax.with_sharding_constraint(
                x.sum(0, keepdims=True), NamedSharding(mesh, P())
            )
            return jnp.cos(x) + total, None

        return jax.lax.scan(once, x, length=times)[0]

    shape = jax.ShapeDtypeStruct(
        (512, 1024), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    jitted = jax.jit(add_up, static_argnums=1)
    found = collectives(parse(str(jitted.lower(shape, 11).compile().as_text())))
    size = 11 * 4 * 1024
    assert found == {"all-reduce": Collective(11, size, 2 * 3 / 4 * size)}


@pytest.mark.parametrize(
    ("name", "moved"), [("optax.adamw", 7), ("cautious_adamw", 9), ("cautious_lion", 7)]
)
def test_memory_traffic_is_what_the_compiler_counts(name, moved):
    from benchmarks.steps import make_optimizer, optimizer_step
    from benchmarks.tpu import compile_step
    from examples.training.hlo import parse
    from examples.training.traffic import memory_traffic

    tx = make_optimizer(name)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in THREE]
    state = jax.eval_shape(tx.init, params)
    mesh = make_mesh(TOPOLOGY)
    compiled = compile_step(optimizer_step(tx), mesh, (params, state), params)
    traffic = memory_traffic(parse(str(compiled.as_text())))
    assert traffic == pytest.approx(bytes_accessed(compiled), rel=1e-3)
    array = 4 * sum(np.prod(shape) for shape in THREE) / mesh.size
    assert traffic / array == pytest.approx(moved, abs=0.01)


def test_memory_traffic_in_a_loop_is_counted_once_per_iteration():
    """Each layer reads its weights and what it saved, a slice of a stack."""
    from benchmarks.tpu import compile_step
    from examples.training.hlo import parse
    from examples.training.traffic import memory_traffic

    mesh = make_mesh(TOPOLOGY)

    def gradient(weights, x):
        def loss(weights):
            y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
            return y.sum()

        return jax.grad(loss)(weights)

    def traffic(layers):
        weights = jax.ShapeDtypeStruct((layers, 4096, 4096), jnp.bfloat16)
        x = jax.ShapeDtypeStruct((65536, 4096), jnp.bfloat16)
        compiled = compile_step(gradient, mesh, (weights,), x)
        return memory_traffic(parse(str(compiled.as_text()))), bytes_accessed(compiled)

    (few, few_by_compiler), (many, many_by_compiler) = traffic(5), traffic(15)
    assert many / few == pytest.approx(3, rel=0.1)
    assert many_by_compiler / few_by_compiler < 2  # It counts one iteration.


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_peak_rates_of_each_kind_of_tpu_are_known(topology):
    from examples.training.chips import chip_of
    from examples.training.xla import topology_devices

    version = topology.partition(":")[0]
    assert f"/{version}" in chip_of(topology_devices(topology)[0]).source


def test_the_command_prints_the_roofline(capsys):
    from examples.llama.config import ModelConfig
    from examples.llama.task import LlamaTask
    from examples.training.compile import compile_only
    from examples.training.config import TrainConfig
    from examples.training.optimizers import OptimizerConfig

    task = LlamaTask(ModelConfig(num_layers=2, num_kv_heads=4, unroll=1))
    compile_only(
        TOPOLOGY, config=TrainConfig(task, OptimizerConfig(learning_rate=1e-3))
    )
    printed = capsys.readouterr().out
    for rate in ("197 TFLOP/s", "819 GB/s", "200 GB/s"):
        assert rate in printed
    assert "docs.cloud.google.com/tpu/docs/v5e" in printed
    assert re.search(r"utilization is at most \d+%", printed)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_splash_attention(kv_heads):
    """Chosen on a TPU; forward and backward move no scores."""
    from examples.training.attention import attend
    from examples.training.hlo import parse
    from examples.training.sharding import BATCH
    from examples.training.traffic import memory_traffic
    from examples.training.xla import topology_devices

    mesh = jax.sharding.Mesh(
        np.array(topology_devices(TOPOLOGY)).reshape(1, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    sharding = NamedSharding(mesh, P(BATCH, None, "tensor"))
    query, key = (
        jax.ShapeDtypeStruct((16, 1024, heads, 64), jnp.bfloat16, sharding=sharding)
        for heads in (8, kv_heads)
    )

    def compiled(kernel):
        def total(*inputs):
            return attend(*inputs, causal=True, kernel=kernel).astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
            return str(gradient.lower(query, key, key).compile().as_text())

    auto, xla = compiled("auto"), compiled("xla")
    assert "splash_mha" in auto
    assert "splash_mha" not in xla
    assert "all-gather" not in auto
    scores = 4 * 8 * 4 * 1024**2  # In float32, of a device's sequences and heads.
    assert memory_traffic(parse(auto)) < 2 * scores < memory_traffic(parse(xla))
