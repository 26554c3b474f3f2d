"""Two tasks built from the source of Python's standard library.

Training and validation use different modules.
"""

import ast
import functools
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.training.checks import require
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
"""Lines per snippet."""
_MOST = 300
"""Maximum number of training snippets per package, so that labels are balanced."""
_MOST_GROUPS = 1000
"""Maximum number of function pairs, of four rows each, in each split."""


class Row(NamedTuple):
    """One or two texts and their label."""

    texts: tuple[str, ...]
    label: str


class Rows(NamedTuple):
    """The rows of the training and validation splits."""

    train: list[Row]
    validation: list[Row]


@functools.cache
def package_rows(validation_fraction: float) -> Rows:
    """Build the task: which package is this snippet of four lines from?

    Each snippet is used once, so that none is in both splits.

    Raises:
        InputError: if a package is not installed.
    """
    rows, taken = Rows([], []), set[str]()
    for package in _PACKAGES:
        found = _modules(package)
        require(
            len(found) > 1,
            f"data: this Python lacks its package {package}, which the task needs; "
            "install it (Debian has python3-tk and idle), or pass --data.",
        )
        modules = _split(found, validation_fraction)
        for side, texts, most in zip(rows, modules, (_MOST, _MOST // 3), strict=True):
            cut = {s: None for text in texts.values() for s in _snippets(text)}
            snippets = [snippet for snippet in cut if snippet not in taken]
            taken |= {*snippets}
            random.Random(0).shuffle(snippets)
            side += [Row((snippet,), package) for snippet in snippets[:most]]
    return _shuffled(rows)


@functools.cache
def docstring_rows(validation_fraction: float) -> Rows:
    """Build the task: does this docstring belong to this function?

    Functions are paired within their package, and each is used with its own docstring
    and with the other's. Duplicate docstrings and functions are skipped, so that none
    is in both splits or fits two functions.
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
    """Shuffle the rows, so that the first few are a fair sample."""
    return Rows(*[random.Random(0).sample(side, len(side)) for side in rows])


def _modules(package: str = "") -> dict[Path, str]:
    """Read the modules of a package, or of the whole library."""
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
    """Split modules by the hash of their text; copies count once."""
    by_hash = {hashlib.sha256(t.encode()).digest(): p for p, t in modules.items()}
    train, validation = split_hashes(by_hash, fraction)
    return (
        {by_hash[key]: modules[by_hash[key]] for key in train},
        {by_hash[key]: modules[by_hash[key]] for key in validation},
    )


def _snippets(text: str) -> Iterator[str]:
    """Cut a module into snippets, without imports, which would name the package."""
    lines = [
        line
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith(("import ", "from "))
    ]
    for start in range(0, len(lines) - _LINES + 1, _LINES):
        yield "\n".join(lines[start : start + _LINES])


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Yield the summary of each docstring, and its function without the docstring."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # Some modules contain invalid syntax on purpose.
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
    """Yield four rows per pair of functions: own and exchanged docstrings."""
    pairs = random.Random(0).sample(pairs, len(pairs))
    for (first, code), (second, other) in zip(pairs[::2], pairs[1::2], strict=False):
        yield [
            Row((first, code), "own"),
            Row((first, other), "another's"),
            Row((second, other), "own"),
            Row((second, code), "another's"),
        ]
