"""Two tasks made of the source of Python's standard library.

Modules are split into training and validation, so that no module is in both.
"""

import ast
import functools
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.training.files import STANDARD_LIBRARY, split_hashes, standard_library

_PACKAGES = (
    "asyncio",
    "email",
    "idlelib",
    "importlib",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
)
_LINES = 4
"""Lines of a snippet."""
_MOST = 300
"""Snippets of a package to train on, so that all are as frequent."""
_MOST_GROUPS = 1000
"""Couples of functions, of four rows each, to train or to validate on."""


class Row(NamedTuple):
    """A text or two, and the label."""

    texts: tuple[str, ...]
    label: str


class Rows(NamedTuple):
    """What to train and to validate on."""

    train: list[Row]
    validation: list[Row]


@functools.cache
def package_rows(validation_fraction: float) -> Rows:
    """Makes the task: from which package is this snippet of four lines?

    Each snippet is taken once, so that none is on both sides.
    """
    rows, taken = Rows([], []), set[str]()
    for package in _PACKAGES:
        modules = _split(_modules(package), validation_fraction)
        for side, texts, most in zip(rows, modules, (_MOST, _MOST // 3), strict=True):
            found = {s: None for text in texts.values() for s in _snippets(text)}
            snippets = [snippet for snippet in found if snippet not in taken]
            taken |= {*snippets}
            random.Random(0).shuffle(snippets)
            side += [Row((snippet,), package) for snippet in snippets[:most]]
    return _shuffled(rows)


@functools.cache
def docstring_rows(validation_fraction: float) -> Rows:
    """Makes the task: does this docstring belong to this function?

    Half of the docstrings are exchanged within their package. Each docstring and each
    function is taken once, so that none is on both sides or fits two functions.
    """
    rows, taken = Rows([], []), set[str]()
    modules = _split(_modules(), validation_fraction)
    for side, texts in zip(rows, modules, strict=True):
        pairs: dict[str, list[tuple[str, str]]] = {}
        for path, text in texts.items():
            package = path.relative_to(STANDARD_LIBRARY).parts[0]
            for docstring, code in _documented(text):
                if taken.isdisjoint((docstring, code)):
                    taken |= {docstring, code}
                    pairs.setdefault(package, []).append((docstring, code))
        groups = [g for found in pairs.values() for g in _half_exchanged(found)]
        for group in random.Random(0).sample(groups, min(len(groups), _MOST_GROUPS)):
            side += group
    return _shuffled(rows)


def _shuffled(rows: Rows) -> Rows:
    """Mixes the labels, so that some of the rows are like all."""
    return Rows(*[random.Random(0).sample(side, len(side)) for side in rows])


def _modules(package: str = "") -> dict[Path, str]:
    """Reads the modules of a package, or of all and of none."""
    texts = {}
    for path in standard_library():
        if path.is_relative_to(STANDARD_LIBRARY / package):
            try:
                texts[path] = path.read_text("utf-8")
            except UnicodeDecodeError:
                continue
    return texts


def _split(
    modules: dict[Path, str], fraction: float
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Splits modules by the hash of their text, of which copies count once."""
    by_hash = {hashlib.sha256(t.encode()).digest(): p for p, t in modules.items()}
    train, validation = split_hashes(by_hash, fraction)
    return (
        {by_hash[key]: modules[by_hash[key]] for key in train},
        {by_hash[key]: modules[by_hash[key]] for key in validation},
    )


def _snippets(text: str) -> Iterator[str]:
    """Cuts a module into pieces, without the imports, which would name the package."""
    lines = [
        line
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith(("import ", "from "))
    ]
    for start in range(0, len(lines) - _LINES + 1, _LINES):
        yield "\n".join(lines[start : start + _LINES])


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Yields the summary of each docstring, and the function without a docstring."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # Some modules show what Python does not understand.
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(node.body) > 1:
            del node.body[0]
            summary, _, _ = docstring.partition("\n\n")
            yield summary, ast.unparse(node)


def _half_exchanged(pairs: list[tuple[str, str]]) -> Iterator[list[Row]]:
    """Yields two functions at a time with their docstrings, and with each other's."""
    pairs = random.Random(0).sample(pairs, len(pairs))
    for (first, code), (second, other) in zip(pairs[::2], pairs[1::2], strict=False):
        yield [
            Row((first, code), "own"),
            Row((first, other), "another's"),
            Row((second, other), "own"),
            Row((second, code), "another's"),
        ]
