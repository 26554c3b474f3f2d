"""The training program imports no experiment, and experiments do not copy code."""

import ast
import itertools
from collections import defaultdict
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPERIMENTS = sorted(
    p.name for p in EXAMPLES.iterdir() if p.is_dir() and p.name not in ("training",)
)
LINES = 6


def modules(directory):
    return sorted(directory.rglob("*.py"))


def imported(path):
    """Yield the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", modules(EXAMPLES / "training"), ids=lambda path: path.name
)
def test_training_imports_no_experiment(path):
    for name in imported(path):
        assert not name.startswith("examples.") or name.startswith("examples.training")


# Fine-tuning needs a pretrained model: the model, its configuration and its loader.
LOADER = ("config", "model", "pretrained", "transformers_files")
ALLOWED = {"glue": tuple(f"examples.llama.{name}." for name in LOADER)}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_imports_no_other(experiment):
    allowed = (
        f"examples.{experiment}",
        "examples.training",
        *ALLOWED.get(experiment, ()),
    )
    for path in modules(EXAMPLES / experiment):
        for name in imported(path):
            assert not name.startswith("examples.") or name.startswith(allowed), path


def code_lines(path):
    """Return the lines of a file, without imports, which are the same everywhere."""
    source = path.read_text()
    lines = [line.strip() for line in source.splitlines()]
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = ""
    return [line for line in lines if line]


def test_experiments_share_no_lines():
    found = defaultdict(set)
    for directory in (*EXPERIMENTS, "training"):
        for path in modules(EXAMPLES / directory):
            lines = code_lines(path)
            for some in zip(*(lines[i:] for i in range(LINES))):
                found[some].add(directory)
    assert len(found) > 1000
    twice = {some for some, where in found.items() if len(where) > 1}
    assert not twice, "\n\n".join(map("\n".join, itertools.islice(twice, 3)))
