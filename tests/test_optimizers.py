"""Caution around every optimizer that optax and optax.contrib export."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from optax_cautious import with_caution

pytestmark = pytest.mark.filterwarnings("ignore:.*optimistic_adam:DeprecationWarning")


class Target(NamedTuple):
    objective: Callable[[jax.Array], jax.Array]
    start: list[Any]
    minimum: list[Any]


TARGETS = {
    "rosenbrock": Target(
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
        start=[0.0, 0.0],
        minimum=[1.0, 1.0],
    ),
    # One coordinate starts at its minimum: its gradient is zero.
    "matrix": Target(
        lambda x: jnp.sum((x - jnp.array([[3.0, -2.0], [1.0, 4.0]])) ** 2),
        start=[[3.0, 0.0], [0.0, 0.0]],
        minimum=[[3.0, -2.0], [1.0, 4.0]],
    ),
}


class Optimizer(NamedTuple):
    build: Callable[[], optax.GradientTransformation]
    #: The extra arguments that its update requires.
    needs: tuple[str, ...] = ()
    #: Whether caution has something to prevent on one of the targets.
    opposes: bool = True
    caution: Mapping[str, Any] = {}
    steps: int = 10_000


# With steps of constant size, training would end in a cycle as wide as the step.
_COSINE = optax.cosine_decay_schedule(1e-2, decay_steps=10_000)
# Sign updates without momentum bounce across the valley of Rosenbrock's function, and
# make little progress along it until the steps are tiny.
_HALVED = optax.exponential_decay(3e-2, transition_steps=1000, decay_rate=0.5)

# These two choose a step size close to the largest that converges. Once only k of n
# coordinates have a nonzero gradient, caution would make the step n / k times as long,
# and they would diverge.
_UNSCALED = {"renormalize": None}

OPTIMIZERS = {
    "adabelief": Optimizer(lambda: optax.adabelief(1e-2)),
    "adadelta": Optimizer(lambda: optax.adadelta(0.1), opposes=False),
    "adafactor": Optimizer(lambda: optax.adafactor(5e-3), opposes=False),
    "adagrad": Optimizer(lambda: optax.adagrad(1.0), opposes=False),
    "adam": Optimizer(lambda: optax.adam(0.1)),
    "adamax": Optimizer(lambda: optax.adamax(0.1)),
    "adamaxw": Optimizer(lambda: optax.adamaxw(0.1)),
    "adamw": Optimizer(lambda: optax.adamw(0.1)),
    "adan": Optimizer(lambda: optax.adan(0.1)),
    "amsgrad": Optimizer(lambda: optax.amsgrad(0.1)),
    "fromage": Optimizer(lambda: optax.fromage(5e-3), opposes=False),
    "lamb": Optimizer(lambda: optax.lamb(1e-3)),
    "lars": Optimizer(lambda: optax.lars(1.0)),
    # For lbfgs with its line search, see test_lbfgs_with_a_line_search.
    "lbfgs": Optimizer(lambda: optax.lbfgs(0.1, linesearch=None)),
    "lion": Optimizer(lambda: optax.lion(_COSINE, weight_decay=1e-4)),
    "nadam": Optimizer(lambda: optax.nadam(1e-2)),
    "nadamw": Optimizer(lambda: optax.nadamw(1e-2)),
    "noisy_sgd": Optimizer(lambda: optax.noisy_sgd(1e-3, eta=1e-4, key=0)),
    "novograd": Optimizer(lambda: optax.novograd(1e-3)),
    "optimistic_adam": Optimizer(lambda: optax.optimistic_adam(2e-3)),
    "optimistic_adam_v2": Optimizer(lambda: optax.optimistic_adam_v2(2e-3)),
    "optimistic_gradient_descent": Optimizer(
        lambda: optax.optimistic_gradient_descent(2e-3, alpha=0.7, beta=0.1),
        opposes=False,
    ),
    "polyak_sgd": Optimizer(
        lambda: optax.polyak_sgd(1.0), needs=("value",), opposes=False
    ),
    "radam": Optimizer(lambda: optax.radam(5e-3)),
    "rmsprop": Optimizer(lambda: optax.rmsprop(5e-3, momentum=0.9)),
    "rprop": Optimizer(lambda: optax.rprop(0.1), opposes=False),
    "selective_transform": Optimizer(
        lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=False)
    ),
    "sgd": Optimizer(lambda: optax.sgd(1e-3, momentum=0.9)),
    "sign_sgd": Optimizer(lambda: optax.sign_sgd(_HALVED), opposes=False, steps=30_000),
    "signum": Optimizer(lambda: optax.signum(_COSINE)),
    "sm3": Optimizer(lambda: optax.sm3(1.0)),
    "yogi": Optimizer(lambda: optax.yogi(0.1)),
    # Its first step on Rosenbrock's function is so long that it only moves back later.
    "acprop": Optimizer(lambda: contrib.acprop(1e-3), opposes=False, steps=30_000),
    "ademamix": Optimizer(lambda: contrib.ademamix(1e-3), steps=30_000),
    "adopt": Optimizer(lambda: contrib.adopt(1e-2)),
    "cocob": Optimizer(contrib.cocob, caution=_UNSCALED, steps=30_000),
    "dadapt_adamw": Optimizer(lambda: contrib.dadapt_adamw(0.1)),
    "dog": Optimizer(lambda: contrib.dog(1.0), opposes=False, steps=30_000),
    "dowg": Optimizer(
        lambda: contrib.dowg(1.0), opposes=False, caution=_UNSCALED, steps=30_000
    ),
    "galore": Optimizer(lambda: contrib.galore(1e-2, rank=8)),
    "madgrad": Optimizer(lambda: contrib.madgrad(1e-2), steps=30_000),
    "momo": Optimizer(lambda: contrib.momo(0.1), needs=("value",)),
    "momo_adam": Optimizer(lambda: contrib.momo_adam(0.1), needs=("value",)),
    "muon": Optimizer(lambda: contrib.muon(1e-2)),
    "prodigy": Optimizer(lambda: contrib.prodigy(0.1), steps=30_000),
    "reduce_on_plateau": Optimizer(
        lambda: optax.chain(optax.sgd(1e-3, momentum=0.9), contrib.reduce_on_plateau()),
        needs=("value",),
    ),
    "simplified_ademamix": Optimizer(lambda: contrib.simplified_ademamix(1e-3)),
    "sophia": Optimizer(lambda: contrib.sophia(1e-2), needs=("obj_fn",)),
    "split_real_and_imaginary": Optimizer(
        lambda: contrib.split_real_and_imaginary(optax.adam(0.1))
    ),
}

_PER_EXAMPLE = (
    "takes one gradient per example: chain(differentially_private_aggregate(...), "
    "with_caution(...))"
)
_SCHEDULE_FREE = (
    "its state assumes that its update is applied unmodified: "
    "schedule_free(with_caution(...), ...)"
)
EXCLUDED = {
    "differentially_private_aggregate": _PER_EXAMPLE,
    "dpsgd": _PER_EXAMPLE,
    "hutchinson_estimator_diag_hessian": "estimates a Hessian and does not optimize",
    "lookahead": "updates a pair of parameters, only one of which has a gradient: "
    "lookahead(with_caution(...), ...)",
    "mechanize": "moves along the total displacement from the start, not along a step: "
    "mechanize(with_caution(...))",
    "normalize": "divides by the norm and does not optimize",
    "sam": "climbs on purpose at every other step: sam(with_caution(...), ...)",
    "schedule_free": _SCHEDULE_FREE,
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_eval_params": "reads parameters and does not optimize",
    "schedule_free_sgd": _SCHEDULE_FREE,
}


def _is_function(x: Any) -> bool:
    return inspect.isfunction(x) or isinstance(x, functools.partial)


def _exported() -> set[str]:
    """List optimizers by module, by argument names, and all of optax.contrib."""
    names = set()
    for module in (optax, contrib):
        for name, function in inspect.getmembers(module, _is_function):
            parameters = inspect.signature(function).parameters
            if not name.startswith(("_", "scale_by_")) and (
                module is contrib
                or getattr(function, "__module__", "") == optax.adam.__module__
                or any(p.endswith(("learning_rate", "optimizer")) for p in parameters)
            ):
                names.add(name)
    return names


NAMES = [name for name in OPTIMIZERS if hasattr(optax, name) or hasattr(contrib, name)]


class WatchedState(NamedTuple):
    inner: optax.OptState
    opposed: jax.Array


def _watched(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Count the coordinates that `tx` moves against its incoming gradient."""
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return WatchedState(tx.init(params), jnp.zeros((), jnp.int32))

    def update_fn(grads, state, params=None, **extra_args):
        updates, inner = tx.update(grads, state.inner, params, **extra_args)
        # The product of the values could underflow.
        opposed = jnp.sum(jnp.sign(updates) * jnp.sign(grads) > 0)
        return updates, WatchedState(inner, state.opposed + opposed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(tx: optax.GradientTransformation, target: Target, needs: tuple[str, ...]):
    def step(params, state):
        value, grad = jax.value_and_grad(target.objective)(params)
        extra_args = {
            "value": value,
            "grad": grad,
            "value_fn": target.objective,
            "obj_fn": target.objective,
        }
        updates, state = tx.update(
            grad, state, params, **{name: extra_args[name] for name in needs}
        )
        return optax.apply_updates(params, updates), state

    return step


def _iterate(step: Callable, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    def run(params, state):
        return jax.lax.fori_loop(0, steps, lambda _, x: step(*x), (params, state))

    return jax.jit(run)(params, state)


def _minimize(
    tx: optax.GradientTransformation,
    target: Target,
    needs: tuple[str, ...] = (),
    steps: int = 10_000,
) -> tuple[jax.Array, optax.OptState]:
    params = jnp.array(target.start)
    return _iterate(_step(tx, target, needs), params, tx.init(params), steps)


def _opposed(state: optax.OptState) -> int:
    return int(optax.tree.get(state, "opposed"))


def _assert_minimized(params: jax.Array, target: Target) -> None:
    np.testing.assert_allclose(params, target.minimum, rtol=3e-2, atol=3e-2)


def test_every_optimizer_is_covered():
    exported = _exported()
    assert exported >= set(NAMES)
    new = exported - OPTIMIZERS.keys() - EXCLUDED.keys()
    assert not new, (
        f"optax exports {sorted(new)}: add each to OPTIMIZERS or, if with_caution "
        "cannot wrap it, to EXCLUDED with the reason."
    )
    assert not OPTIMIZERS.keys() & EXCLUDED.keys()


@pytest.mark.parametrize("name", NAMES)
def test_never_moves_against_the_gradient_and_converges(name):
    build, needs, opposes, caution, steps = OPTIMIZERS[name]
    tx = _watched(with_caution(_watched(build()), **caution))
    opposed = 0
    for target in TARGETS.values():
        params, state = _minimize(tx, target, needs, steps)
        assert state.opposed == 0
        _assert_minimized(params, target)
        opposed += state.inner.opposed
    assert opposed > 0 or not opposes


@pytest.mark.parametrize("name", NAMES)
def test_compiles_once(name):
    """A step returns the types that it takes."""
    build, needs, _, caution, _ = OPTIMIZERS[name]
    tx = with_caution(build(), **caution)
    target = TARGETS["matrix"]
    params = jnp.array(target.start)
    before = params, tx.init(params)
    step = _step(tx, target, needs)
    jaxpr, after = jax.make_jaxpr(step, return_shape=True)(*before)
    assert jaxpr.in_avals == jaxpr.out_avals
    assert jax.tree.structure(before) == jax.tree.structure(after)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_lbfgs_with_a_line_search(target):
    # The line search has to come last: rescaling its step could undo the search.
    tx = optax.chain(
        with_caution(optax.lbfgs(1.0, linesearch=None)),
        optax.scale_by_zoom_linesearch(max_linesearch_steps=20),
    )
    needs = ("value", "grad", "value_fn")
    params, state = _minimize(_watched(tx), target, needs, steps=300)
    assert _opposed(state) == 0
    _assert_minimized(params, target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inside_schedule_free(target):
    learning_rate = optax.linear_schedule(0.0, 1e-2, transition_steps=5000)
    base = with_caution(optax.adamw(learning_rate, b1=0.0))
    tx = contrib.schedule_free(_watched(base), learning_rate)
    params, state = _minimize(tx, target, steps=30_000)
    assert _opposed(state) == 0
    _assert_minimized(contrib.schedule_free_eval_params(state, params), target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inside_mechanize(target):
    base = _watched(with_caution(optax.adam(1.0)))
    tx = contrib.mechanize(base, weight_decay=0.0)
    params, state = _minimize(tx, target, steps=30_000)
    assert _opposed(state) == 0
    _assert_minimized(params, target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inside_sam(target):
    # contrib.normalize, the usual first link of the adversary, is NaN at the minimum.
    base = _watched(with_caution(optax.sgd(1e-3, momentum=0.9)))
    params, state = _minimize(contrib.sam(base, optax.sgd(1e-4)), target)
    assert _opposed(state) == 0
    _assert_minimized(params, target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inside_lookahead(target):
    base = _watched(with_caution(optax.adam(0.1)))
    tx = optax.lookahead(base, sync_period=5, slow_step_size=0.5)

    def step(params, state):
        grad = jax.grad(target.objective)(params.fast)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = optax.LookaheadParams.init_synced(jnp.array(target.start))
    params, state = _iterate(step, params, tx.init(params), steps=10_000)
    assert _opposed(state) == 0
    _assert_minimized(params.slow, target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_after_differentially_private_aggregation(target):
    aggregate = contrib.differentially_private_aggregate(
        l2_norm_clip=10.0, noise_multiplier=1e-5, key=jax.random.key(0)
    )
    base = _watched(with_caution(optax.sgd(1e-3, momentum=0.9)))
    tx = optax.chain(aggregate, base)

    def step(params, state):
        grad = jax.grad(target.objective)(params)
        per_example = jnp.stack([0.5 * grad, 1.5 * grad])
        updates, state = tx.update(per_example, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.array(target.start)
    params, state = _iterate(step, params, tx.init(params), steps=10_000)
    assert _opposed(state) == 0
    _assert_minimized(params, target)
