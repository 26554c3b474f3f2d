"""What the TPU's compiler says that a step moves: where libtpu is installed.

Nothing is executed: the compiler runs on any machine. ``make test-tpu`` installs it.
"""

import importlib.util

import jax
import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "libtpu, the TPU's compiler, is not installed: make test-tpu runs these tests.",
        allow_module_level=True,
    )

from benchmarks.tpu import LARGE, MIXED, account, make_mesh

TOPOLOGY = "v5e:2x2"


@pytest.mark.parametrize(
    ("name", "moved", "temporaries", "all_reduces"),
    [
        ("optax.adamw", 7.0, 0.0, 0),
        ("cautious_adamw", 9.0, 0.0, 1),
        ("chain(optax.adamw, cautious)", 10.5, 0.25, 1),
        ("with_caution(optax.adamw)", 10.5, 0.25, 1),
        ("optax.lion", 5.0, 0.0, 0),
        ("cautious_lion", 7.0, 0.0, 1),
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


def test_one_all_reduce_for_250_leaves():
    found = account("cautious_adamw", MIXED, "float32", make_mesh(TOPOLOGY))
    assert found.moved < 9.2
    assert found.all_reduces == 1
    assert found.all_gathers == 0


def test_without_the_barrier_half_an_array_more(monkeypatch):
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    found = account("cautious_adamw", LARGE, "float32", make_mesh(TOPOLOGY))
    assert found.moved == pytest.approx(9.5, abs=0.01)
