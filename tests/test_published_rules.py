"""The code in the table of docs/rules.md, compared with each rule in NumPy."""

import re
from pathlib import Path

import numpy as np
import optax
import pytest

from optax_cautious import (  # noqa: F401 (some are for the table's code)
    add_cautious_decayed_weights,
    cautious,
    cautious_muon,
    provide_gradient,
)

DOCS = Path(__file__).parent.parent / "docs" / "rules.md"
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in DOCS.read_text().splitlines()
    if line.startswith("| ") and "`" in line
]


def named(row: str) -> str:
    """Strip links and backquotes from the name of a rule."""
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", row).replace("`", "")


CODE = {named(rule): code.strip("`") for rule, code, _ in ROWS}


def leaves(seed: int, zeros: bool = True) -> dict[str, np.ndarray]:
    """Draw float64 leaves, by default with a fifth of them exactly zero."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (8, 6), "b": (6,)}
    return {
        k: rng.standard_normal(s) * ((rng.random(s) > 0.2) | (not zeros))
        for k, s in shapes.items()
    }


UPDATES, GRADS, PARAMS = leaves(0), leaves(1), leaves(2)


# Each takes an update that is added to the parameters: agreement is u * g < 0.


def clamped(u, g):
    m = (u * g < 0).astype(float)
    return u * m / max(m.mean(), 1e-3)


def plus_one(u, g):
    m = (u * g < 0).astype(float)
    return u * m * m.size / (m.sum() + 1)


def follow(u, g):
    m = (u * g <= 0).astype(float)
    return u * m / max(m.mean(), 1e-3)


def cadam(u, g):
    return np.where(u * g < 0, u, 0)


def grams(u, g):
    return -np.sign(g) * np.abs(u)


def cmgup(u, g):
    """Apply CMGUP with alpha 2 and gamma 0.1; the learning rate absorbs alpha."""
    aligned = (u * g <= 0).astype(float)
    return u * (2.0 * aligned + 0.1 * (1 - aligned)) / 2.0


def soft(u, g):
    w = np.where(u * g < 0, 1, 0.5)
    return u * w / w.mean()


def leaf(u, g):
    return u * (np.sum(u * g) <= 0)


def levanter(u, g):
    m = u * g < 0
    return u * m / (m.mean() + 1e-8)


def heavyball(u, g):
    m = np.signbit(-u) == np.signbit(g)
    return np.where(m, u, 0) * m.size / max(m.sum(), 1)


LEAF_BY_LEAF = {
    "Cautious, rescaled as in C-Optim today": clamped,
    "Cautious, rescaled as in the paper's first version": plus_one,
    "Cautious, zeros follow": follow,
    "CAdam": cadam,
    "Grams": grams,
    "CMGUP, alpha 2 and gamma 0.1": cmgup,
    "soft caution": soft,
    "inner product per leaf": leaf,
    "timm, caution=True": clamped,
    "levanter, scale_by_cautious": levanter,
    "HeavyBall, caution=True": heavyball,
}
OTHERS = {
    "inner product over the whole tree",
    "cautious weight decay alone",
    "cautious weight decay with caution",
    "C-Muon, mask on the update",
    "C-Muon, mask on the momentum",
}


def build(rule: str) -> optax.GradientTransformationExtraArgs:
    return eval(CODE[rule])


def float32(tree):
    return {k: np.float32(x) for k, x in tree.items()}


def assert_close(actual, expected):
    for k, x in expected.items():
        np.testing.assert_allclose(actual[k], x, rtol=1e-5, atol=1e-6)


def test_every_row_is_tested():
    assert CODE.keys() == LEAF_BY_LEAF.keys() | OTHERS


@pytest.mark.parametrize("rule", LEAF_BY_LEAF)
def test_rule(rule):
    tx, numpy = build(rule), LEAF_BY_LEAF[rule]
    zeros = rule != "HeavyBall, caution=True"
    u, g = leaves(0, zeros), leaves(1, zeros)
    expected = {k: numpy(u[k], g[k]) for k in u}
    assert_close(tx.update(float32(u), tx.init(u), grad=float32(g))[0], expected)


def test_heavyball_at_a_zero_matches_the_remark():
    u, g = np.array([1.0, -1.0]), np.array([0.0, 0.0])
    np.testing.assert_array_equal(heavyball(u, g), [0.0, -2.0])


@pytest.mark.parametrize("sign", [1, -1])
def test_inner_product_of_the_tree(sign):
    product = sum(np.sum(UPDATES[k] * GRADS[k]) for k in UPDATES)
    g = {k: sign * x for k, x in GRADS.items()}
    tx = build("inner product over the whole tree")
    expected = {k: u * (sign * product <= 0) for k, u in UPDATES.items()}
    u = float32(UPDATES)
    assert_close(tx.update(u, tx.init(u), grad=float32(g))[0], expected)


# Weight decay, with updates that point up the loss.


def cwd(u, p):
    return u + 0.1 * (u * p >= 0) * p


def test_cautious_weight_decay_alone():
    tx = build("cautious weight decay alone")
    u, p = float32(UPDATES), float32(PARAMS)
    expected = {k: cwd(UPDATES[k], PARAMS[k]) for k in u}
    assert_close(tx.update(u, tx.init(p), p)[0], expected)


def test_cautious_weight_decay_with_caution():
    tx = build("cautious weight decay with caution")
    u, g, p = map(float32, (UPDATES, GRADS, PARAMS))
    expected = {k: cwd(clamped(u[k], -GRADS[k]), PARAMS[k]) for k in u}
    assert_close(tx.update(u, tx.init(p), p, grad=g)[0], expected)


# Muon, on one matrix.


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def muon_steps(grads, mask):
    m, steps = 0.0, []
    for g in grads:
        m = 0.95 * m + g
        if mask == "momentum":
            o = newton_schulz(clamped(m, -g))
        else:
            o = clamped(newton_schulz(m), -g)
        steps.append(-0.1 * o * np.sqrt(max(1, g.shape[1] / g.shape[0])))
    return steps


@pytest.mark.parametrize("mask", ["update", "momentum"])
def test_muon(mask):
    tx = build(f"C-Muon, mask on the {mask}")
    grads = [leaves(seed)["w"] for seed in range(4)]
    params = np.float32(PARAMS["w"])
    state = tx.init(params)
    for g, expected in zip(grads, muon_steps(grads, mask), strict=True):
        update, state = tx.update(np.float32(g), state, params)
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=2e-5)
