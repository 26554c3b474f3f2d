"""Eight simulated devices or two processes train any task as one device does."""

import functools
import re
import socket
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

for _module in ("grain", "orbax.checkpoint", "tensorboardX", "tokenizers", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.llama.config import DataConfig
from examples.llama.task import LlamaTask
from examples.mae.config import DataConfig as PicturesConfig
from examples.mae.config import ModelConfig as AutoencoderConfig
from examples.mae.task import MAETask
from examples.training import log, loop, processes, run_dir, step
from examples.training.checkpoint import checksum
from examples.training.checks import InputError
from examples.training.config import TrainConfig
from examples.training.engine import make_engine
from examples.training.optimizers import (
    OPTIMIZERS,
    OptimizerConfig,
)
from examples.training.sharding import BATCH, make_mesh, shardings, specs
from examples.training.step import mean_gradient
from examples.training.task import Data
from tests.examples.training_fixtures import (
    MODEL,
    Command,
    changed,
    named,
    read_log,
    train,
    write_documents,
    write_pictures,
)

CONFIG = TrainConfig(
    LlamaTask(MODEL, DataConfig(sequence_length=16, batch_size=8)),
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
    steps=20,
    mesh=(1, 1, 1),
)
MAE = replace(
    CONFIG,
    task=MAETask(
        AutoencoderConfig(
            image_size=16,
            hidden_size=32,
            num_layers=2,
            unroll=1,
            num_heads=2,
            intermediate_size=64,
            decoder_hidden_size=16,
            decoder_num_layers=2,
            decoder_unroll=1,
            decoder_num_heads=2,
            decoder_intermediate_size=32,
        ),
        PicturesConfig(batch_size=8, validation_batches=2),
    ),
)
MESHES = ((1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 8, 1))
LEARNING_RATES = {"adamw": 1e-2, "cautious_adamw": 1e-2, "cautious_lion": 1e-3}
NAMES = [c + name for name in OPTIMIZERS for c in ("", "cautious_")]
TASK = CONFIG.task

# Ten times the observed rounding, and a thousandth of the effect of an error.
TOLERANCE = 5e-6


pytestmark = pytest.mark.usefixtures("little_optimization")


def with_optimizer(name, config=CONFIG, **changes):
    rate = LEARNING_RATES.get(name, 1e-2)
    optimizer = {**named(name), "learning_rate": rate}
    return changed(config, optimizer=optimizer, **changes)


def walks():
    """Return batches of windows with predictable next tokens."""
    generator = np.random.default_rng(0)
    shape = CONFIG.steps, TASK.data.batch_size, TASK.data.sequence_length + 1
    steps = generator.integers(0, 3, shape).cumsum(axis=-1)
    starts = generator.integers(0, MODEL.vocab_size, shape[:2])[..., None]
    return ((starts + steps) % MODEL.vocab_size).astype(np.uint16)


def pictures():
    """Yield batches of single-color pictures, which are easy to predict."""
    generator = np.random.default_rng(0)
    side, count = MAE.task.model.image_size, MAE.task.data.batch_size
    for i in range(CONFIG.steps):
        colors = generator.integers(0, 256, (count, 1, 1, 3), np.uint8)
        images = np.broadcast_to(colors, (count, side, side, 3))
        yield {"image": images, "seed": np.arange(count, dtype=np.uint32) + i}


def trajectory(config):
    """Train on a mesh, and return loss and gradient norm of each step."""
    engine = make_engine(config)
    state = engine.make_state()
    examples = walks() if config.task.name == "llama" else pictures()
    batches = [engine.put_batch(b) for b in examples]
    train_step = engine.lower_train_step(batches[0]).compile()
    measured = []
    for batch in batches:
        state, step_measured = train_step(state, batch)
        measured.append(step_measured)
    return np.array(jax.device_get(measured))


@pytest.fixture(scope="module")
def on_one_device():
    found = {}

    def make(name, config=CONFIG):
        key = name, config.task.name
        if key not in found:
            found[key] = trajectory(with_optimizer(name, config))
        return found[key]

    return make


# Trajectories


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *(("cautious_adamw", mesh) for mesh in MESHES),
        ("cautious_lion", (2, 2, 2)),
        ("adamw", (2, 2, 2)),
    ],
)
def test_a_mesh_trains_as_one_device(name, mesh, on_one_device):
    losses = on_one_device(name)[:, 0]
    assert losses[-1] < losses[0] - 0.1
    measured = trajectory(with_optimizer(name, mesh=mesh))
    np.testing.assert_allclose(measured, on_one_device(name), rtol=TOLERANCE)


def test_a_task_may_have_no_sizes_that_a_mesh_axis_must_divide(monkeypatch):
    monkeypatch.setattr(LlamaTask, "divided", {})
    assert make_mesh(replace(CONFIG, mesh=(1, 1, 8))).size == 8


def test_a_partly_lost_gradient_is_detected(on_one_device, monkeypatch):
    """The tolerance is not too large, even for Lion, which uses only signs."""

    def mean_gradient_of_most(task, params, tokens, parts):
        loss, _ = mean_gradient(task, params, tokens, parts)
        return loss, mean_gradient(task, params, tokens[:-1], parts)[1]

    expected = on_one_device("cautious_lion")[:, 0]
    monkeypatch.setattr(step, "mean_gradient", mean_gradient_of_most)
    error = trajectory(with_optimizer("cautious_lion"))[:, 0] / expected - 1
    assert np.abs(error).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "changes", [{"mesh": (2, 2, 2)}, {"mesh": (1, 8, 1)}, {"accumulate": 4}], ids=str
)
def test_an_autoencoder_trains_as_on_one_device(changes, on_one_device):
    """Its masks depend on the pictures, however these are split."""
    expected = on_one_device("cautious_adamw", MAE)
    assert expected[-1, 0] < 0.9 * expected[0, 0]
    measured = trajectory(with_optimizer("cautious_adamw", MAE, **changes))
    np.testing.assert_allclose(measured, expected, rtol=10 * TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 4},
        {"accumulate": 2, "mesh": (2, 2, 2)},
        {"model": {"unroll": 2}},
        {"model": {"remat": "full", "unroll": 2}, "mesh": (1, 4, 2)},
        {"model": {"remat": "dots"}, "mesh": (2, 2, 2)},
    ],
    ids=[
        "accumulate",
        "accumulate on a mesh",
        "unroll",
        "remat on a mesh",
        "remat of all but dots",
    ],
)
def test_options_that_save_memory_or_time_change_nothing(changes, on_one_device):
    config = with_optimizer("cautious_adamw", **changes)
    expected = on_one_device("cautious_adamw")
    np.testing.assert_allclose(trajectory(config), expected, rtol=TOLERANCE)


def test_remat_saves_memory():
    """Of all layers only the projections' outputs, or only the inputs, are kept."""

    def temporaries(remat):
        model = {"num_layers": 8, "remat": remat, "unroll": 1}
        engine = make_engine(with_optimizer("sgd", model=model))
        compiled = engine.lower_train_step(walks()[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.5 * temporaries("none")
    assert temporaries("full") < 0.8 * temporaries("dots")
    assert temporaries("dots") < 0.9 * temporaries("none")


# Layout

# Shapes on a device of the mesh (2, 2, 2), where fsdp and tensor split in two each.
SHARDS = {
    "embedding": (152, 16),
    "query": (2, 16, 16),
    "key": (2, 16, 8),
    "value": (2, 16, 8),
    "output": (2, 16, 16),
    "gate": (2, 16, 24),
    "up": (2, 16, 24),
    "down": (2, 24, 16),
    "logits": (16, 152),
    "attention_norm": (2, 32),
    "feed_forward_norm": (2, 32),
    "norm": (32,),
}


def holder(path):
    """Return the module name of a parameter or of its optimizer state."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return next((name for name in reversed(names) if name in SHARDS), None)


def is_spec(x):
    return isinstance(x, P)


def shard_shapes(tree):
    return [
        (holder(path), leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def test_parameters_and_their_optimizer_state_are_split():
    engine = make_engine(replace(CONFIG, mesh=(2, 2, 2)))
    state = engine.make_state()
    batch = engine.put_batch(walks()[0])
    assert batch.addressable_shards[0].data.shape == (2, 17)
    train_step = engine.lower_train_step(batch).compile()
    for _ in range(2):
        assert sorted(shard_shapes(state.params)) == sorted(SHARDS.items())
        kept = [found for found in shard_shapes(state.opt_state) if found[0]]
        assert sorted(kept) == sorted([*SHARDS.items()] * 2)
        state, _ = train_step(state, batch)


def test_gradients_are_split_like_the_parameters():
    """They equal those of one device, summed where the optimizer needs them."""
    params = TASK.init(0)

    def gradient(mesh):
        layout = shardings(params, TASK, mesh)
        tokens = jax.device_put(walks()[0], NamedSharding(mesh, P(BATCH)))
        with jax.set_mesh(mesh):
            take = jax.jit(
                lambda params, tokens: mean_gradient(TASK, params, tokens, 1)
            )
            return take(jax.device_put(params, layout), tokens)

    loss, expected = gradient(make_mesh(CONFIG))
    for shape in MESHES[:2]:
        mesh = make_mesh(replace(CONFIG, mesh=shape))
        loss_there, grads = gradient(mesh)
        np.testing.assert_allclose(loss_there, loss, rtol=1e-6)
        for (path, grad), leaf, sharding in zip(
            jax.tree_util.tree_leaves_with_path(grads),
            jax.tree.leaves(expected),
            jax.tree.leaves(shardings(params, TASK, mesh)),
            strict=True,
        ):
            scale = float(jnp.abs(leaf).max())
            np.testing.assert_allclose(grad, leaf, atol=2e-6 * scale, err_msg=str(path))
            assert grad.sharding.is_equivalent_to(sharding, grad.ndim), path


@functools.cache
def params_like():
    return jax.eval_shape(lambda: TASK.init(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_any_optimizer_is_split_like_the_parameters(name):
    tx = make_engine(with_optimizer(name)).tx
    params = params_like()
    state = step.TrainState(params, jax.eval_shape(tx.init, params))
    split = {
        holder(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(specs(state.params, TASK), is_leaf=is_spec),
            strict=True,
        )
    }
    kept = jax.tree_util.tree_leaves_with_path(state.opt_state)
    their_specs = jax.tree.leaves(specs(state.opt_state, TASK), is_leaf=is_spec)
    large = 0
    for (path, leaf), spec in zip(kept, their_specs, strict=True):
        if leaf.size >= MODEL.hidden_size**2 / 2:
            large += 1
            assert (leaf.shape, spec) == split[holder(path)], path
        else:
            assert spec == P()
    assert large >= len(SHARDS) - 3


def test_the_gradient_is_the_slope_of_the_loss():
    """On a mesh, it uses a custom differentiation rule."""
    params = TASK.init(0)
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # Where the loss is not flat.
    batch = walks()[0]
    with jax.set_mesh(make_mesh(CONFIG)):
        loss = jax.jit(lambda params: TASK.loss(params, batch))
        grads = jax.jit(lambda params: mean_gradient(TASK, params, batch, 1)[1])
        leaves, treedef = jax.tree.flatten(params)
        for i, grad in enumerate(jax.tree.leaves(grads(params))):
            norm = jnp.linalg.norm(grad)

            def at(distance, i=i, direction=grad / norm):
                there = leaves[i] + distance * direction
                there = [*leaves[:i], there, *leaves[i + 1 :]]
                return float(loss(treedef.unflatten(there)))

            slope = (at(0.01) - at(-0.01)) / 0.02
            assert slope == pytest.approx(float(norm), rel=0.02)


def test_no_device_holds_the_activations_of_all_sequences():
    """A batch stays split in the embedding and its gradient."""
    engine = make_engine(with_optimizer("sgd", mesh=(2, 2, 2)))
    batch = engine.put_batch(walks()[0])
    program = engine.lower_train_step(batch).compile().as_text()
    assert re.search(r"f32\[2,16,32\]", program)
    assert not re.search(r"f32\[(8,16|128),\d+\]", program)


def test_a_checksum_is_the_same_on_any_mesh():
    params = TASK.init(0)
    sums = {
        int(checksum(make_engine(replace(CONFIG, mesh=mesh)).make_state(params).params))
        for mesh in ((1, 1, 1), *MESHES)
    }
    assert sums == {int(checksum(params))}


# Between the steps


def states_of(engine, batches):
    """Return the initial state, and the state after a step on each batch."""
    train_step = engine.lower_train_step(batches[0]).compile()
    states = [engine.make_state()]
    for batch in batches:
        copy = jax.tree.map(jnp.copy, states[-1])  # The step donates its state.
        states.append(train_step(copy, batch)[0])
    return states


def measured(engine, states, batch):
    """Measure the aligned fraction of states as an engine does."""
    program = engine.lower(batch, batch[None]).aligned_fraction.compile()
    return [float(program(state, batch).whole) for state in states]


def test_the_aligned_fraction_is_of_the_optimizer_without_decay():
    """Nor is it affected by the warm-up, which starts at a learning rate of zero."""
    plain = make_engine(with_optimizer("adamw"))
    batch = plain.put_batch(walks()[0])
    states = states_of(plain, [batch, batch])
    expected = measured(plain, states, batch)
    assert min(expected) > 0.1
    for options in (
        {"weight_decay": 10.0},
        {"weight_decay": 10.0, "cautious_decay": True},
    ):
        decayed = make_engine(changed(plain.config, optimizer=options))
        assert measured(decayed, states, batch) == expected


def test_the_aligned_fraction_is_measured_before_caution_acts():
    """A rule that reverses opposed coordinates would leave none."""
    plain = make_engine(with_optimizer("cautious_adamw"))
    *batches, last = (plain.put_batch(batch) for batch in walks()[:3])
    states = states_of(plain, batches)
    expected = measured(plain, states, last)
    flipped = make_engine(changed(plain.config, optimizer={"opposed_weight": -1.0}))
    assert measured(flipped, states, last) == expected
    assert expected[-1] < 1


@pytest.mark.parametrize("config", [CONFIG, MAE], ids=["llama", "mae"])
def test_an_evaluation_in_parts_equals_that_of_the_whole(config):
    params = config.task.init(0)
    generator = np.random.default_rng(0)
    batches = jax.tree.map(
        lambda x: generator.integers(0, 255, (2, *x.shape), x.dtype),
        config.task.batch_like(),
    )
    whole, parts = (
        jax.jit(step.make_evaluate(config.task, parts))(params, batches).loss
        for parts in (1, 4)
    )
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)


# Messages


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({}, (3, 3, 1), "mesh: 3 x 3 x 1 needs 9 devices, but there are only 8"),
        (
            {},
            (3, 1, 1),
            r"batch_size: 8 examples .* cannot be split over the 3 x 1 dev",
        ),
        ({"accumulate": 4}, (2, 2, 1), r"batch_size: 2 examples .* over the 2 x 2"),
        ({"num_kv_heads": 1}, (1, 1, 2), r"tensor axis \(2\) must divide num_kv_heads"),
        ({"num_kv_heads": 4}, (1, 1, 8), r"tensor axis \(8\) must divide num_heads \("),
        (
            {"intermediate_size": 47},
            (1, 1, 2),
            r"must divide intermediate_size \(47\); ",
        ),
        (
            {"vocab_size": 301},
            (1, 1, 2),
            r"must divide vocab_size \(301\).*--vocab-size",
        ),
        (
            {"hidden_size": 36, "num_heads": 2},
            (1, 8, 1),
            r"the fsdp axis \(8\) must divide hidden_size \(36\)",
        ),
        (
            {"hidden_size": 36, "num_heads": 2},
            None,
            r"fsdp axis \(8\) must divide hidd",
        ),
    ],
)
def test_a_mesh_that_does_not_fit(changes, mesh, message):
    top = {name: changes[name] for name in changes if hasattr(CONFIG, name)}
    model = {name: changes[name] for name in changes if hasattr(MODEL, name)}
    config = changed(CONFIG, model=model, mesh=mesh, **top)
    with pytest.raises(InputError, match=message):
        make_mesh(config)


def test_processes_use_all_their_devices(monkeypatch):
    assert make_mesh(replace(CONFIG, mesh=(1, 2, 2))).size == 4
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="4 devices, but the processes have 8; use al"):
        make_mesh(replace(CONFIG, mesh=(1, 2, 2)))


def test_the_given_devices_are_used():
    last = jax.devices()[-4:]
    mesh = make_mesh(replace(CONFIG, mesh=None), last)
    assert set(mesh.devices.flat) == set(last)
    assert mesh.shape == {"data": 1, "fsdp": 4, "tensor": 1}


def test_a_missing_parameter_cannot_be_exempt():
    config = changed(CONFIG, optimizer={"exempt": ("embeding",)})
    with pytest.raises(InputError, match=r"exempt: .* 'embeding'; .* embedding"):
        make_engine(config)


# Processes

# The signal comes at step 4. JAX polls for it once a second, so later steps are slow:
# the run stops a step or two after the signal, and never reaches its last one.
_PREEMPTED = """
import os, runpy, signal, sys, time
import jax
from jax.experimental import multihost_utils
look = multihost_utils.reached_preemption_sync_point
def slow_look(step):
    if step == 4 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 if step >= 4 else 0)
    return look(step)
multihost_utils.reached_preemption_sync_point = slow_look
runpy.run_module("examples.llama", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def long_config(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    if request.param == "llama":
        config, cache = CONFIG, tmp_path_factory.mktemp("cache")
        data = {"data": (str(write_documents(directory)),), "cache_dir": cache}
    else:
        config = MAE
        data = {"data": (str(write_pictures(directory, 64)),), "crop_min": 0.5}
    return changed(
        config,
        data={**data, "validation_batches": 2, "validation_fraction": 0.3},
        # Low enough that rounding errors hardly grow.
        optimizer={"learning_rate": 3e-3},
        mesh=(2, 2, 2),
        steps=16,
        log_every=4,
        eval_every=8,
        checkpoint_every=8,
    )


@pytest.fixture(scope="module")
def one_process(long_config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    return train(long_config, run_dir)


def assert_close(records, expected):
    """Check that rounding errors have grown to no more than this by the last step."""
    assert [sorted(r) for r in records] == [sorted(r) for r in expected]
    for record, other in zip(records, expected):
        record, other = (dict(log.scalars(r)) for r in (record, other))
        for name, value in other.items():
            if name.startswith("aligned_fractions/"):
                # The gradient of a key bias is pure rounding: softmax ignores the bias.
                if ".kernel" in name:
                    assert record[name] == pytest.approx(value, abs=0.1), name
                continue
            # Coordinates with a nearly zero gradient may or may not be aligned.
            rtol = {"aligned_fraction": 1e-2, "grad_norm": 3e-3}.get(name, 1e-3)
            assert record[name] == pytest.approx(value, rel=rtol), (name, record)


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.fixture
def two_processes(long_config, tmp_path):
    """Return a function that runs the command in two processes of four devices."""
    command = Command(long_config, tmp_path)

    def run(run_dir, program=None):
        address = f"localhost:{free_port()}"
        processes = [
            command.start(
                run_dir,
                *("--distributed", "--coordinator", address),
                *("--num-processes", "2", "--process-id", str(i)),
                program=program,
                XLA_FLAGS="--xla_force_host_platform_device_count=4",
            )
            for i in range(2)
        ]
        try:
            return [process.finish() for process in processes]
        finally:
            for process in processes:
                process.kill()

    return run


@pytest.mark.parametrize("long_config", ["mae"], indirect=True)
def test_two_processes_train_as_one(two_processes, one_process, tmp_path):
    ends = two_processes(tmp_path / "run")
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close(read_log(tmp_path / "run"), one_process)


@pytest.mark.parametrize("long_config", ["llama"], indirect=True)
def test_two_processes_stop_together_and_resume(two_processes, one_process, tmp_path):
    run_dir = tmp_path / "run"
    ends = two_processes(run_dir, ("-c", _PREEMPTED))
    assert [code for code, _ in ends] == [0, 0], ends
    stopped = len(read_log(run_dir))
    assert 4 <= stopped < 16
    assert f"Stopped: step {stopped} is saved" in ends[0][1]
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()
    ends = two_processes(run_dir)
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close(read_log(run_dir), one_process)


@pytest.mark.parametrize("long_config", ["llama"], indirect=True)
def test_two_processes_exit_if_one_cannot_start(two_processes, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "letter.txt").write_text("Dear reader")
    (first, said), (second, of_the_other) = two_processes(run_dir)
    assert (first, second) == (1, 1)
    assert f"error: run_dir: {run_dir} is not empty and contains no run" in said
    assert "error: process 0 cannot start; see its error message." in of_the_other


def test_a_run_directory_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "VISIBLE_SECONDS", 0)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(InputError, match=r"process 1 does not see .* all processes sh"):
        next(loop.training(CONFIG, tmp_path / "of its own"))
    assert not (tmp_path / "of its own").exists()


def test_all_processes_must_have_the_same_settings(tmp_path, monkeypatch):
    def allgather(digest):
        return np.stack([digest, digest + 1])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    with pytest.raises(InputError, match=r"^settings: process 1 has different settin"):
        next(loop.training(replace(CONFIG, mesh=(2, 2, 2)), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{}, {"fingerprint": "1" * 64}, {"files": {"tokenizer.json": "{}"}}]
)
def test_all_processes_must_have_the_same_data(change, monkeypatch):
    data = Data(None, None, "0" * 64, {"tokenizer.json": "[]"})
    digests = []

    def of(data):
        return "data", data.fingerprint, *data.files.values()

    def allgather(digest):
        digests.append(digest)
        return np.stack([digests[0], digest])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    processes.require_same(*of(data))
    if change:
        with pytest.raises(
            InputError, match=r"^data: process 1 has different data from"
        ):
            processes.require_same(*of(replace(data, **change)))
    else:
        processes.require_same(*of(replace(data)))
