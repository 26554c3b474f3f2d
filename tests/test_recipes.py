"""The recipes of the documentation: both sides of each diff run, and differ."""

import re
from pathlib import Path

import numpy as np
import optax
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BLOCK = re.compile(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```$", re.M | re.S)
RECIPES = {title: diff for title, diff in BLOCK.findall(PAGE.read_text())}


def side(diff, mark):
    """Return the script before ("-") or after ("+") the change."""
    lines = [line for line in diff.splitlines() if line[:1] in ("", " ", mark)]
    return "\n".join(line[1:] for line in lines)


def test_every_recipe_is_found():
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), re.M)
    assert list(RECIPES) == headings
    for diff in RECIPES.values():
        assert {line[:1] for line in diff.splitlines()} <= {"", " ", "+", "-"}
        assert all(len(line) <= 89 for line in diff.splitlines())


@pytest.mark.parametrize("title", RECIPES)
def test_both_sides_of_a_recipe_run(title, monkeypatch):
    monkeypatch.setattr(optax, "big_vision", None, raising=False)
    losses = {}
    for mark in "-+":
        script = side(RECIPES[title], mark)
        assert ("optax_cautious" in script) == (mark == "+")
        names = {"__name__": "recipe"}
        exec(compile(script, f"{title} ({mark})", "exec"), names)
        losses[mark] = float(names["loss"])
    assert np.isfinite(list(losses.values())).all()
    assert losses["-"] != losses["+"]
    # With the wrong direction hardly anything would move.
    assert losses["+"] < 1.001 * losses["-"]
