"""Eight simulated devices and two processes train any task as one device does."""

import re
import socket
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

for _module in ("grain", "orbax.checkpoint", "tensorboardX", "tokenizers", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import optax_cautious
from examples.llama.config import DataConfig
from examples.llama.task import LlamaTask
from examples.mae.config import DataConfig as PicturesConfig
from examples.mae.config import ModelConfig as AutoencoderConfig
from examples.mae.task import MAETask
from examples.training import log, loop, optimizers, processes, run_dir, step
from examples.training.checkpoint import checksum
from examples.training.checks import InputError
from examples.training.config import TrainConfig
from examples.training.engine import make_engine
from examples.training.optimizers import (
    OPTIMIZERS,
    OptimizerConfig,
    make_schedule,
    per_layer,
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
            num_heads=2,
            intermediate_size=64,
            decoder_hidden_size=16,
            decoder_num_layers=2,
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

# Ten times what is seen of rounding, and a thousandth of what is seen of an error.
TOLERANCE = 5e-6


pytestmark = pytest.mark.usefixtures("little_optimization")


def with_optimizer(name, config=CONFIG, **changes):
    rate = LEARNING_RATES.get(name, 1e-2)
    optimizer = {**named(name), "learning_rate": rate}
    return changed(config, optimizer=optimizer, **changes)


def make_optimizer(config, steps):
    """Makes the optimizer for parameters that stack blocks."""
    schedule = make_schedule(config, config.learning_rate, steps)
    return optimizers.make_optimizer(config, schedule, ["blocks"], TASK.not_decayed)


def walks():
    """Batches of windows in which the next token can be guessed from the one before."""
    generator = np.random.default_rng(0)
    shape = CONFIG.steps, TASK.data.batch_size, TASK.data.sequence_length + 1
    steps = generator.integers(0, 3, shape).cumsum(axis=-1)
    starts = generator.integers(0, MODEL.vocab_size, shape[:2])[..., None]
    return ((starts + steps) % MODEL.vocab_size).astype(np.uint16)


def pictures():
    """Batches of pictures of one colour each, which is easily guessed."""
    generator = np.random.default_rng(0)
    side, count = MAE.task.model.image_size, MAE.task.data.batch_size
    for i in range(CONFIG.steps):
        colours = generator.integers(0, 256, (count, 1, 1, 3), np.uint8)
        images = np.broadcast_to(colours, (count, side, side, 3))
        yield {"image": images, "seed": np.arange(count, dtype=np.uint32) + i}


def trajectory(config):
    """Trains on a mesh, and returns loss and gradient norm of each step."""
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


def test_a_share_of_the_gradient_that_is_lost_shows(on_one_device, monkeypatch):
    """The tolerance is not too large, not even for Lion, which sees signs only."""

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
    """Its masks go by the pictures, however they are divided."""
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
        {"model": {"remat": True, "unroll": 2}, "mesh": (1, 4, 2)},
    ],
    ids=["accumulate", "accumulate on a mesh", "unroll", "remat on a mesh"],
)
def test_what_saves_memory_or_time_changes_nothing(changes, on_one_device):
    config = with_optimizer("cautious_adamw", **changes)
    expected = on_one_device("cautious_adamw")
    np.testing.assert_allclose(trajectory(config), expected, rtol=TOLERANCE)


def test_recomputing_saves_memory():
    """Of the layers' activations, only their inputs are kept."""

    def temporaries(remat):
        model = {"num_layers": 8, "remat": remat}
        engine = make_engine(with_optimizer("sgd", model=model))
        compiled = engine.lower_train_step(walks()[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(True) < 0.5 * temporaries(False)


# Layout

# Shapes on one of the devices of the mesh (2, 2, 2): fsdp and tensor split in two each.
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
    """The name of the module of a parameter, or of what is kept for it."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return next((name for name in reversed(names) if name in SHARDS), None)


def is_spec(x):
    return isinstance(x, P)


def shard_shapes(tree):
    return [
        (holder(path), leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def test_parameters_and_what_is_kept_for_them_are_split():
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


def test_gradients_are_split_as_the_parameters_and_those_of_one_device():
    """The sum over the devices ends where the optimizer needs it."""
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


@pytest.mark.parametrize("name", NAMES)
def test_what_any_optimizer_keeps_of_a_matrix_is_split_like_it(name):
    tx = make_optimizer(with_optimizer(name).optimizer, CONFIG.steps)
    state = jax.eval_shape(lambda: step.init_state(TASK, tx, 0))
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
    """On a mesh, it goes through a rule of the program's own."""
    params = TASK.init(0)
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # Where the loss is no plane.
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
    """A batch stays split, whichever way its embeddings and their gradient go."""
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


# Layers

# As the parameters of a model of two layers, but fewer and smaller.
PARAMS = {
    "blocks": {
        "query": {"kernel": jax.random.normal(jax.random.key(0), (2, 8, 6))},
        "attention_norm": {"scale": jax.random.normal(jax.random.key(1), (2, 8))},
    },
    "embedding": {"embedding": jax.random.normal(jax.random.key(2), (9, 8))},
    "logits": {"kernel": jax.random.normal(jax.random.key(3), (8, 9))},
}
DECAYS = {
    "blocks": {"query": {"kernel": True}, "attention_norm": {"scale": False}},
    "embedding": {"embedding": False},
    "logits": {"kernel": True},
}
STEPS = 4
GRADIENTS = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(leaf.size), (STEPS, *leaf.shape)),
    PARAMS,
)
# Of tokens that are not in a batch, the gradient is zero.
GRADIENTS["embedding"]["embedding"] = (
    GRADIENTS["embedding"]["embedding"].at[:, :3].set(0.0).at[1:, 3:5].set(0.0)
)
LAYERWISE = {
    "adamw": optax.adamw(1.0),
    "cautious_adamw": optax_cautious.cautious_adamw(1.0),
    "cautious_adamw of trees": optax_cautious.cautious_adamw(1.0, alignment="tree"),
    "cautious_lion": optax_cautious.cautious_lion(1.0),
    "cautious_muon": optax_cautious.cautious_muon(1.0),
    "cautious_adafactor": optax_cautious.cautious_adafactor(
        1.0, momentum=0.9, min_dim_size_to_factor=4
    ),
    "cautious_lamb": optax_cautious.with_caution(optax.lamb(1.0)),
}
LIKE_ONE_LEAF = {"adamw", "cautious_muon", "cautious_adamw of trees"}


@partial(jax.jit, static_argnums=0)
def descend(tx, params, gradients):
    """Applies the updates of stacked gradients, and returns both."""

    def one(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, _), updates = jax.lax.scan(one, (params, tx.init(params)), gradients)
    return params, updates


def close(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def layer(tree, i, axis=0):
    return jax.tree.map(lambda leaf: leaf.take(i, axis), tree)


def as_list(tree, axis=0):
    """Takes the stack of layers apart."""
    return {**tree, "blocks": [layer(tree["blocks"], i, axis) for i in range(2)]}


@pytest.mark.parametrize("name", LAYERWISE)
def test_each_layer_is_optimized_for_itself(name):
    tx = LAYERWISE[name]
    params, updates = descend(per_layer({"blocks": tx}, tx), PARAMS, GRADIENTS)
    for i in range(2):
        alone = descend(
            tx, layer(PARAMS["blocks"], i), layer(GRADIENTS["blocks"], i, axis=1)
        )
        there = layer(params["blocks"], i), layer(updates["blocks"], i, axis=1)
        close(there, alone, rtol=1e-3, atol=1e-5)
    names = "embedding", "logits"
    rest, rest_gradients = ({n: tree[n] for n in names} for tree in (PARAMS, GRADIENTS))
    alone, _ = descend(tx, rest, rest_gradients)
    close({n: params[n] for n in names}, alone)
    if name not in LIKE_ONE_LEAF:
        whole, _ = descend(tx, PARAMS, GRADIENTS)
        ours, theirs = (p["blocks"]["query"]["kernel"] for p in (params, whole))
        assert not np.allclose(ours, theirs, rtol=1e-2)


def test_the_layers_share_a_step_count():
    tx = optax.adamw(1.0)
    state = per_layer({"blocks": tx}, tx).init(PARAMS)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.stacks["blocks"])}
    assert shapes == {(), (2, 8, 6), (2, 8)}
    _, state = per_layer({"blocks": tx}, tx).update(PARAMS, state, PARAMS)
    assert {leaf.shape for leaf in jax.tree.leaves(state.stacks["blocks"])} == shapes
    assert int(optax.tree.get(state.stacks["blocks"], "count")) == 1


# Optimizers


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_takes_finite_steps(name):
    config = OptimizerConfig(**named(name), learning_rate=1e-2, warmup_fraction=0.0)
    params, updates = descend(make_optimizer(config, 100), PARAMS, GRADIENTS)
    for old, new in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(params)):
        assert np.isfinite(new).all()
        assert (new != old).mean() > 0.3
    if config.caution:
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADIENTS)):
            assert (u * g <= 0).all()


DECAY = {"weight_decay": 0.1}
BETAS = {"b1": 0.8, "b2": 0.5, "eps": 1e-3}


def constructed(name, schedule, **options):
    """Makes an optimizer as one does without the program."""
    match name:
        case "adamw":
            return optax.adamw(schedule, **options)
        case "cautious_adamw":
            return optax_cautious.cautious_adamw(schedule, **options)
        case "cautious_lion":
            return optax_cautious.cautious_lion(schedule, **options)
        case "cautious_nadamw":  # In which decay would be masked.
            own = {k: options.pop(k) for k in ("b1", "b2", "eps") if k in options}
            base = optax.nadamw(schedule, weight_decay=0.0, **own)
            assert options.pop("weight_decay") == 0.0
            del options["mask"]
            return optax_cautious.with_caution(base, **options)
        case "sgd":
            decay = optax.add_decayed_weights(**options)
            rate = optax.scale_by_learning_rate(schedule)
            return optax.chain(optax.trace(0.9), decay, rate)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, DECAY)
            for name in ("adamw", "cautious_adamw", "cautious_lion", "sgd")
        ),
        ("adamw", BETAS),
        ("cautious_nadamw", BETAS),
        ("cautious_adamw", {"opposed_weight": 0.5, "min_fraction": 0.9}),
        ("cautious_adamw", {"renormalize": None}),
        ("cautious_nadamw", {"renormalize": "plus_one"}),
        ("cautious_nadamw", {"alignment": "leaf"}),
    ],
)
def test_an_optimizer_is_that_of_its_package(name, options):
    """Behind the clipping, with the schedule, and with decay of the matrices."""
    options = {"weight_decay": 0.0, **options}
    config = OptimizerConfig(
        **named(name), learning_rate=1e-2, max_grad_norm=0.5, **options
    )
    ours = descend(make_optimizer(config, STEPS), PARAMS, GRADIENTS)
    mask = {**DECAYS, "blocks": [DECAYS["blocks"]] * 2}
    tx = constructed(name, make_schedule(config, 1e-2, STEPS), mask=mask, **options)
    tx = optax.chain(optax.clip_by_global_norm(0.5), tx)
    theirs = descend(tx, as_list(PARAMS), as_list(GRADIENTS, axis=1))
    close((as_list(ours[0]), as_list(ours[1], axis=1)), theirs)


@pytest.mark.parametrize("name", ["cautious_adamw", "cautious_muon", "cautious_nadamw"])
def test_decay_is_never_masked(name):
    config = OptimizerConfig(
        **named(name), learning_rate=0.5, warmup_fraction=0.0, final_fraction=1.0
    )

    def last_update(weight_decay):
        tx = make_optimizer(replace(config, weight_decay=weight_decay), STEPS)

        def at_the_same_params(state, grads):
            updates, state = tx.update(grads, state, PARAMS)
            return state, updates

        scan = jax.jit(
            lambda: jax.lax.scan(at_the_same_params, tx.init(PARAMS), GRADIENTS)
        )
        return layer(scan()[1], -1)

    without, decayed = map(last_update, (0.0, 0.1))
    close(
        decayed,
        jax.tree.map(
            lambda u, p, decays: u - 0.05 * p * decays, without, PARAMS, DECAYS
        ),
        rtol=1e-4,
        atol=1e-6,
    )
    masked = without["logits"]["kernel"] == 0
    assert 0 < masked.mean() < 1


@pytest.mark.parametrize("name", ["adamw", "cautious_adamw"])
def test_cautious_decay_decays_along_the_update(name):
    """Without caution, too: it compares the update with the weight."""
    config = OptimizerConfig(
        **named(name),
        learning_rate=1.0,
        weight_decay=0.1,
        schedule="constant",
        warmup_fraction=0.0,
    )

    def update(**options):
        tx = make_optimizer(replace(config, **options), STEPS)
        grads = layer(GRADIENTS, 0)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    alone, found = update(weight_decay=0.0), update(cautious_decay=True)
    for path, decays in jax.tree_util.tree_leaves_with_path(DECAYS):
        u, p, ours = (
            dict(jax.tree_util.tree_leaves_with_path(tree))[path]
            for tree in (alone, PARAMS, found)
        )
        along = u * p <= 0
        np.testing.assert_allclose(ours, u - decays * along * 0.1 * p, atol=1e-6)
        assert not decays or 0 < along.mean() < 1


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", {0: 0, 10: 2, 25: 1.05, 40: 0.1}),
        ("linear", {0: 0, 5: 1, 10: 2, 25: 1.05, 40: 0.1}),
        ("constant", {0: 0, 5: 1, 10: 2, 39: 2}),
        ("warmup-stable-decay", {0: 0, 10: 2, 32: 2, 36: 1.05, 40: 0.1}),
    ],
)
def test_schedules(schedule, rates):
    config = OptimizerConfig(
        learning_rate=2.0,
        schedule=schedule,
        warmup_fraction=0.25,
        decay_fraction=0.2,
        final_fraction=0.05,
    )
    found = make_schedule(config, 2.0, 40)
    for count, rate in rates.items():
        assert float(found(count)) == pytest.approx(rate, abs=1e-6), count


def test_the_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_fraction=0.25, final_fraction=0.05
    )
    schedule = make_schedule(config, 2.0, 40)
    rates = [float(schedule(i)) for i in range(41)]
    np.testing.assert_allclose(rates[:11], np.linspace(0, 2, 11), atol=1e-6)
    cosine = 0.05 + 0.95 * (1 + np.cos(np.pi * np.arange(31) / 30)) / 2
    np.testing.assert_allclose(rates[10:], 2 * cosine, rtol=1e-5)


@pytest.mark.parametrize("name", ["cautious_adamw", "cautious_nadamw", "cautious_muon"])
def test_an_embedding_that_is_exempt_is_the_optimizers_without_caution(name):
    def all_updates(**options):
        # Of Muon, everything outside the blocks is AdamW's.
        config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.0, **options)
        return descend(make_optimizer(config, STEPS), PARAMS, GRADIENTS)[1]

    exempt = all_updates(**named(name), exempt=("embedding",))
    plain = all_updates(**named(name) | {"caution": False})
    cautious = all_updates(**named(name))
    close(exempt["embedding"], plain["embedding"])
    for part in ("logits", "blocks"):
        close(exempt[part], cautious[part])
        zeros = [(leaf == 0).any() for leaf in jax.tree.leaves(exempt[part])]
        assert any(zeros)


@pytest.mark.parametrize("name", ["cautious_adamw", "cautious_nadamw"])
def test_all_layers_may_be_exempt(name):
    def all_updates(**options):
        config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.0, **options)
        return descend(make_optimizer(config, STEPS), PARAMS, GRADIENTS)[1]

    exempt = all_updates(**named(name), exempt=("blocks",))
    plain = all_updates(**named(name) | {"caution": False})
    close(exempt["blocks"], plain["blocks"])
    assert (exempt["logits"]["kernel"] == 0).any()


def test_a_parameter_that_is_not_there_cannot_be_exempt():
    config = changed(CONFIG, optimizer={"exempt": ("embeding",)})
    with pytest.raises(InputError, match=r"exempt: .* 'embeding'; .* embedding"):
        make_engine(config)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("sgd", optax.sgd(1.0, momentum=0.7)),
        ("adafactor", optax.adafactor(1.0, momentum=0.7)),
        (
            "muon",
            optax.contrib.muon(
                1.0, beta=0.7, adam_b1=0.7, adam_b2=0.8, consistent_rms=0.2
            ),
        ),
    ],
)
def test_settings_go_by_the_optimizers_own_names(name, theirs):
    config = OptimizerConfig(
        **named(name),
        learning_rate=1.0,
        b1=0.7,
        b2=0.8 if name == "muon" else None,
        max_grad_norm=None,
    )
    constant = replace(config, warmup_fraction=0.0, final_fraction=1.0)
    params, _ = descend(make_optimizer(constant, STEPS), PARAMS, GRADIENTS)
    expected, _ = descend(
        theirs, layer(PARAMS["blocks"], 0), layer(GRADIENTS["blocks"], 0, axis=1)
    )
    close(layer(params["blocks"], 0), expected, rtol=1e-3)


@pytest.mark.parametrize("steps_taken", [0, 2])
def test_the_aligned_fraction_is_of_the_optimizer_without_decay(steps_taken):
    """And does not wait for the warm-up, which begins at a learning rate of zero."""
    found = []
    for weight_decay in (0.0, 10.0):
        plain = make_engine(with_optimizer("adamw"))
        decayed = changed(plain.config, optimizer={"weight_decay": weight_decay})
        engine = replace(plain, config=decayed)
        batch = engine.put_batch(walks()[0])
        train_step, _, aligned_fraction = engine.compile(batch, batch[None])
        state = engine.make_state()
        for _ in range(steps_taken):
            state, _ = train_step(state, batch)
        found.append(float(aligned_fraction(state, batch).whole))
    assert found[0] == found[1] > 0.1


def test_the_aligned_fraction_is_measured_before_caution_acts():
    """A rule that turns opposed coordinates round would leave none."""
    found = []
    for weight in (0.0, -1.0):
        plain = make_engine(with_optimizer("cautious_adamw"))
        turned = changed(plain.config, optimizer={"opposed_weight": weight})
        engine = replace(plain, config=turned)
        batches = [engine.put_batch(batch) for batch in walks()[:3]]
        train_step, _, aligned_fraction = engine.compile(batches[0], batches[0][None])
        state = engine.make_state()
        for batch in batches[:2]:
            state, _ = train_step(state, batch)
        found.append(float(aligned_fraction(state, batches[2]).whole))
    assert found[0] == found[1] < 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_row_has_a_state_and_something_to_be_cautious_about(name):
    """The state is the same with caution and without, whatever is exempt."""
    config = with_optimizer("cautious_adamw")
    params = config.task.init(0)
    grads = jax.tree.map(jnp.ones_like, params)
    # The momentum of the first gradients outweighs the last.
    gradients = grads, grads, jax.tree.map(lambda g: -0.01 * g, grads)
    updates, states = [], []
    for changes in (
        {"caution": False},
        {"caution": True},
        {"caution": True, "exempt": ("blocks", "embedding")},
    ):
        changes |= {"optimizer": name, "learning_rate": 1e-3, "schedule": "constant"}
        changes |= {"max_grad_norm": None, "warmup_fraction": 0.0}
        tx = make_engine(changed(config, optimizer=changes)).tx
        state = tx.init(params)
        states.append(jax.tree.map(jnp.shape, state))
        for gradient in gradients:
            update, state = jax.jit(tx.update)(gradient, state, params)
        updates.append(update)
    assert states[0] == states[1] == states[2]
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(updates[0], updates[1])


@pytest.mark.parametrize("config", [CONFIG, MAE], ids=["llama", "mae"])
def test_an_evaluation_in_parts_is_that_of_the_whole(config):
    params = config.task.init(0)
    generator = np.random.default_rng(0)
    batches = jax.tree.map(
        lambda x: generator.integers(0, 255, (2, *x.shape), x.dtype),
        config.task.batch_like(),
    )
    whole, parts = (
        jax.jit(step.make_evaluate(config.task, parts))(params, batches)
        for parts in (1, 4)
    )
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)


# Messages


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({}, (3, 3, 1), "mesh: 3 x 3 x 1 are 9 devices, and there are 8"),
        (
            {},
            (3, 1, 1),
            r"batch_size: 8 examples .* do not divide among the 3 x 1 dev",
        ),
        ({"accumulate": 4}, (2, 2, 1), r"batch_size: 2 examples .* among the 2 x 2"),
        ({"num_kv_heads": 1}, (1, 1, 2), r"tensor \(2\) does not divide num_kv_heads"),
        ({"num_kv_heads": 4}, (1, 1, 8), r"tensor \(8\) does not divide num_heads \(4"),
        (
            {"intermediate_size": 47},
            (1, 1, 2),
            r"not divide intermediate_size \(47\); ",
        ),
        (
            {"vocab_size": 301},
            (1, 1, 2),
            r"not divide vocab_size \(301\).*--vocab-size",
        ),
        (
            {"hidden_size": 36, "num_heads": 2},
            (1, 8, 1),
            r"the axis fsdp \(8\) does not divide hidden_size \(36\)",
        ),
        ({"hidden_size": 36, "num_heads": 2}, None, r"fsdp \(8\) does not divide hidd"),
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
    with pytest.raises(InputError, match="4 devices, and the processes have 8: use th"):
        make_mesh(replace(CONFIG, mesh=(1, 2, 2)))


def test_devices_are_those_given():
    last = jax.devices()[-4:]
    mesh = make_mesh(replace(CONFIG, mesh=None), last)
    assert set(mesh.devices.flat) == set(last)
    assert mesh.shape == {"data": 1, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"b2": 0.9}, "b2: sgd has no such setting"),
        ("cautious_sgd", {"eps": 1e-8}, "eps: sgd has no such setting"),
        ("cautious_lion", {"eps": 1e-8}, "eps: lion has no such setting"),
        ("adan", {"max_grad_norm": 0.0}, "max_grad_norm is 0.0: it has to be above 0"),
        (
            "adamw",
            {"opposed_weight": 0.1},
            "opposed_weight: only caution has these settings",
        ),
        ("lamb", {"exempt": ("w",)}, "exempt: only caution .* give --caution$"),
        ("adam", {}, "optimizer is 'adam': choose one of adamw, lion, sgd"),
    ],
)
def test_an_optimizer_without_that_setting(name, options, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(
            OptimizerConfig(**{**named(name), "learning_rate": 1.0, **options}), 10
        )


# Processes

# Steps take a while from the fourth on, at which the signal comes, as it is looked for
# once a second only.
_PREEMPTED = """
import os, runpy, signal, sys, time
import jax
from jax.experimental import multihost_utils
look = multihost_utils.reached_preemption_sync_point
def slow_look(step):
    if step == 4 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3 if step >= 4 else 0)
    return look(step)
multihost_utils.reached_preemption_sync_point = slow_look
runpy.run_module("examples.llama", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module", params=["llama", "mae"])
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
        # So low that rounding does not grow much.
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
    """Rounding has grown by the last step, but to no more than this."""
    assert [sorted(r) for r in records] == [sorted(r) for r in expected]
    for record, other in zip(records, expected):
        record, other = (dict(log.scalars(r)) for r in (record, other))
        for name, value in other.items():
            if name.startswith("aligned_fractions/"):
                # The gradient of a key's bias is rounding alone: softmax undoes it.
                if ".kernel" in name:
                    assert record[name] == pytest.approx(value, abs=0.1), name
                continue
            # A coordinate may go along with a gradient that is almost zero, or not.
            rtol = {"aligned_fraction": 1e-2, "grad_norm": 3e-3}.get(name, 1e-3)
            assert record[name] == pytest.approx(value, rel=rtol), (name, record)


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.fixture
def two_processes(long_config, tmp_path):
    """Runs the command in two processes of four devices each, which find each other."""
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
        return [process.finish() for process in processes]

    return run


def test_two_processes_stop_together_and_go_on(
    long_config, two_processes, one_process, tmp_path
):
    run_dir = tmp_path / "run"
    script = _PREEMPTED.replace("examples.llama", f"examples.{long_config.task.name}")
    ends = two_processes(run_dir, ("-c", script))
    assert [code for code, _ in ends] == [0, 0], ends
    stopped = len(read_log(run_dir))
    assert 4 <= stopped < 16
    assert f"Stopped: step {stopped} is saved" in ends[0][1]
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()
    ends = two_processes(run_dir)
    assert [code for code, _ in ends] == [0, 0], ends
    assert_close(read_log(run_dir), one_process)


@pytest.mark.parametrize("long_config", ["llama"], indirect=True)
def test_two_processes_end_where_one_cannot_start(two_processes, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "letter.txt").write_text("Dear reader")
    (first, said), (second, of_the_other) = two_processes(run_dir)
    assert (first, second) == (1, 1)
    assert f"error: run_dir: {run_dir} is not empty and holds no run" in said
    assert "error: process 0 cannot start; its message says why" in of_the_other


def test_a_run_directory_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "VISIBLE_SECONDS", 0)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(InputError, match=r"process 1 does not see .* all processes sh"):
        next(loop.training(CONFIG, tmp_path / "of its own"))
    assert not (tmp_path / "of its own").exists()


def test_all_processes_have_the_same_settings(tmp_path, monkeypatch):
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
def test_all_processes_have_the_same_text(change, monkeypatch):
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
