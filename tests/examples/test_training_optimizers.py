"""The optimizers of the training program: layers, decay, schedules, and caution."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

for _module in ("grain", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import optax_cautious
from examples.llama.task import LlamaTask
from examples.training import optimizers
from examples.training.checks import InputError
from examples.training.optimizers import (
    OPTIMIZERS,
    OptimizerConfig,
    make_schedule,
    per_layer,
)
from tests.examples.training_fixtures import named

pytestmark = pytest.mark.usefixtures("little_optimization")

NAMES = [c + name for name in OPTIMIZERS for c in ("", "cautious_")]


def make_optimizer(config, steps):
    """Build the optimizer for parameters that stack blocks."""
    schedule = make_schedule(config, config.learning_rate, steps)
    return optimizers.make_optimizer(
        config, schedule, ["blocks"], LlamaTask.not_decayed
    )


# Layers


def normal(seed, *shape):
    """Draw with NumPy: with JAX, every worker would compile the generator on import."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# Like the parameters of a model of two layers, but fewer and smaller.
PARAMS = {
    "blocks": {
        "query": {"kernel": normal(0, 2, 8, 6)},
        "attention_norm": {"scale": normal(1, 2, 8)},
    },
    "embedding": {"embedding": normal(2, 9, 8)},
    "logits": {"kernel": normal(3, 8, 9)},
}
DECAYS = {
    "blocks": {"query": {"kernel": True}, "attention_norm": {"scale": False}},
    "embedding": {"embedding": False},
    "logits": {"kernel": True},
}
STEPS = 4
GRADIENTS = jax.tree.map(lambda leaf: normal(leaf.size, STEPS, *leaf.shape), PARAMS)
# The gradient is zero for tokens that are not in the batch.
GRADIENTS["embedding"]["embedding"][:, :3] = 0.0
GRADIENTS["embedding"]["embedding"][1:, 3:5] = 0.0
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
    """Apply the updates of stacked gradients; return the parameters and updates."""

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
    """Unstack the layers into a list."""
    return {**tree, "blocks": [layer(tree["blocks"], i, axis) for i in range(2)]}


@pytest.mark.parametrize("name", LAYERWISE)
def test_each_layer_is_optimized_separately(name):
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
    """Build an optimizer directly, without the training program."""
    match name:
        case "adamw":
            return optax.adamw(schedule, **options)
        case "cautious_adamw":
            return optax_cautious.cautious_adamw(schedule, **options)
        case "cautious_lion":
            return optax_cautious.cautious_lion(schedule, **options)
        case "cautious_nadamw":  # Its own decay would be masked.
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
def test_an_optimizer_matches_its_package(name, options):
    """With clipping, the schedule, and decay of the matrices."""
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
    """It compares the update with the weight, with and without caution."""
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


def all_updates(**options):
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.0, **options)
    return descend(make_optimizer(config, STEPS), PARAMS, GRADIENTS)[1]


@pytest.mark.parametrize("name", ["cautious_adamw", "cautious_nadamw", "cautious_muon"])
def test_an_exempt_embedding_is_updated_without_caution(name):
    """With Muon, AdamW updates everything outside the blocks."""
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
    exempt = all_updates(**named(name), exempt=("blocks",))
    plain = all_updates(**named(name) | {"caution": False})
    close(exempt["blocks"], plain["blocks"])
    assert (exempt["logits"]["kernel"] == 0).any()


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
def test_settings_map_to_the_optimizers_own_names(name, theirs):
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


def test_muon_masks_its_momentum_only_in_the_layers():
    config = OptimizerConfig(
        **named("cautious_muon"),
        caution_on="momentum",
        learning_rate=1.0,
        schedule="constant",
        warmup_fraction=0.0,
        max_grad_norm=None,
    )
    params, _ = descend(make_optimizer(config, STEPS), PARAMS, GRADIENTS)
    muon = optax_cautious.cautious_muon(1.0, consistent_rms=0.2, caution_on="momentum")
    for i in range(2):
        block, gradients = layer(PARAMS["blocks"], i), layer(GRADIENTS["blocks"], i, 1)
        expected, _ = descend(muon, block, gradients)
        close(layer(params["blocks"], i), expected, rtol=1e-3, atol=1e-5)
    rest, rest_gradients = (
        {name: tree[name] for name in ("embedding", "logits")}
        for tree in (PARAMS, GRADIENTS)
    )
    adamw = optax_cautious.cautious_adamw(1.0, weight_decay=0.0)
    expected, _ = descend(adamw, rest, rest_gradients)
    close({name: params[name] for name in rest}, expected)
    whole = replace(config, caution_on="update")
    other, _ = descend(make_optimizer(whole, STEPS), PARAMS, GRADIENTS)
    kernels = (p["blocks"]["query"]["kernel"] for p in (params, other))
    assert not np.allclose(*kernels, rtol=1e-2)


@pytest.mark.parametrize(
    ("exempt", "tx"),
    [
        ((), optax_cautious.cautious_adamw(1.0, weight_decay=0.0)),
        (("blocks",), optax.adam(1.0)),
    ],
)
def test_a_stack_of_layers_can_be_one_leaf(exempt, tx):
    config = OptimizerConfig(
        learning_rate=1.0,
        schedule="constant",
        warmup_fraction=0.0,
        max_grad_norm=None,
        exempt=exempt,
        per_layer=False,
    )
    params, _ = descend(make_optimizer(config, STEPS), PARAMS, GRADIENTS)
    expected, _ = descend(tx, PARAMS, GRADIENTS)
    close(params["blocks"], expected["blocks"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_caution_changes_every_optimizer(name):
    """Its state is the same with and without caution, whatever is exempt."""
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    # The momentum of the first gradients outweighs the last gradient.
    gradients = jax.tree.map(lambda g: jnp.stack([g, g, -0.01 * g]), grads)
    updates, states = [], []
    for options in (
        {"caution": False},
        {"caution": True},
        {"caution": True, "exempt": ("blocks", "embedding")},
    ):
        config = OptimizerConfig(
            name, **options, learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=None
        )
        tx = make_optimizer(config, 100)
        states.append(jax.tree.map(jnp.shape, jax.eval_shape(tx.init, PARAMS)))
        if not config.exempt:
            updates.append(layer(descend(tx, PARAMS, gradients)[1], -1))
    assert states[0] == states[1] == states[2]
    with pytest.raises(AssertionError):
        close(updates[0], updates[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"b2": 0.9}, "b2 is not a setting of sgd"),
        ("cautious_sgd", {"eps": 1e-8}, "eps is not a setting of sgd"),
        ("cautious_lion", {"eps": 1e-8}, "eps is not a setting of lion"),
        ("adan", {"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
        (
            "adamw",
            {"opposed_weight": 0.1},
            "opposed_weight can only be set with caution",
        ),
        ("cautious_lion", {"caution_on": "momentum"}, "caution_on .* --optimizer muon"),
        ("muon", {"caution_on": "momentum"}, "caution_on can only be set with caution"),
        ("cautious_muon", {"per_layer": False}, "single layers; pass --per-layer"),
        ("lamb", {"exempt": ("w",)}, r"exempt can only .*; pass --caution\.$"),
        ("adam", {}, "optimizer must be one of adamw, lion, sgd, .*, got 'adam'"),
    ],
)
def test_settings_that_an_optimizer_lacks_are_rejected(name, options, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(
            OptimizerConfig(**{**named(name), "learning_rate": 1.0, **options}), 10
        )
