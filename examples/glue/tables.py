"""Rows of text and labels from a file, a dataset, or the standard library."""

import csv
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from examples.glue.config import DataConfig
from examples.glue.standard_library import (
    Row,
    Rows,
    docstring_rows,
    package_rows,
)
from examples.training.checks import InputError, reason, require
from examples.training.files import split_hashes
from examples.training.huggingface import (
    Column,
    import_datasets,
    is_streamed,
    open_splits,
    require_column,
)

_TABLES = {".csv": ",", ".tsv": "\t"}
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}


def read_rows(config: DataConfig) -> Rows:
    """Read the configured rows.

    Raises:
        InputError: if the rows cannot be loaded, or lack a column.
    """
    if config.data:
        rows = (_read_dataset if is_streamed(config.data) else _read_file)(config)
        source = config.data[0]
    else:
        make = {"package": package_rows, "docstring": docstring_rows}[config.made]
        rows, source = make(config.validation_fraction), "the standard library"
    for split, side in zip(("training", "validation"), rows, strict=True):
        require(
            bool(side),
            f"data: no {split} rows in {source}; provide more rows or change "
            "--validation-fraction.",
        )
    return rows


def _columns(config: DataConfig) -> list[Column]:
    texts = [
        Column("text_columns", name, "text", lambda value: isinstance(value, str))
        for name in config.text_columns
    ]
    label = Column(
        "label_column",
        config.label_column,
        "labels",
        lambda value: isinstance(value, str | int | float),
    )
    return [*texts, label]


def _read_dataset(config: DataConfig) -> Rows:
    """Read all rows of two splits of a Hugging Face dataset."""
    splits = {
        "train_split": config.train_split,
        "validation_split": config.validation_split,
    }
    opened = open_splits(config.data, splits, *_columns(config))
    return Rows(*[_take(split, config) for split in opened])


def _read_file(config: DataConfig) -> Rows:
    """Read a file and split its rows by the hash of their texts."""
    (source,) = config.data
    path = Path(source)
    require(
        not path.is_dir(),
        f"data: {path} is a directory; pass a file, or a dataset as --data hf:NAME.",
    )
    require(path.is_file(), f"data: {path} does not exist.")
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        found: Iterable[Mapping[str, Any]] = _read_table(path, _TABLES[suffix])
    else:
        require(
            suffix in _BUILDERS,
            f"data: the suffix of {path} is not one of "
            f"{', '.join((*_TABLES, *_BUILDERS))}.",
        )
        found = _read_columns(path, _BUILDERS[suffix])
    found = iter(found)
    first = next(found, None)
    if first is None:
        raise InputError(f"data: {path} has no rows.")
    for column in _columns(config):
        require_column(first, column, source)
    by_hash: dict[bytes, list[Row]] = {}
    for row in _take(itertools.chain([first], found), config):
        key = hashlib.sha256("\0".join(row.texts).encode()).digest()
        by_hash.setdefault(key, []).append(row)
    require(
        len(by_hash) > 1,
        f"data: {path} has only one distinct text; validation needs another.",
    )
    sides = split_hashes(by_hash, config.validation_fraction)
    return Rows(*[[row for key in side for row in by_hash[key]] for side in sides])


def _read_table(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    """Read CSV or TSV, with all values as strings.

    In TSV, quotation marks are ordinary characters.
    """
    # A cell may hold a whole document.
    csv.field_size_limit(2**31 - 1)
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    try:
        # Excel starts UTF-8 files with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(
                file, delimiter=delimiter, quoting=quoting, strict=True
            )
            for row in reader:
                require(
                    None not in row,
                    f"data: line {reader.line_num} of {path} has more cells than the "
                    f"header; quote or replace each {delimiter!r} in its texts.",
                )
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data: cannot read {path} ({reason(error)}).") from error


def _read_columns(path: Path, builder: str) -> Iterator[Mapping[str, Any]]:
    """Read a file with the package datasets."""
    datasets = import_datasets()
    try:
        yield from datasets.load_dataset(builder, data_files=str(path), streaming=True)[
            "train"
        ]
    except Exception as error:  # datasets raises errors of many types.
        raise InputError(f"data: cannot read {path} ({reason(error)}).") from error


def _take(rows: Iterable[Mapping[str, Any]], config: DataConfig) -> list[Row]:
    """Collect texts and labels, and report how many rows lack one of them."""
    taken, skipped = [], 0
    source = config.data[0]
    try:
        for row in tqdm(rows, "Reading", unit="row", leave=False):
            found = (row.get(name) for name in config.text_columns)
            texts = tuple(text for text in found if isinstance(text, str))
            label = row.get(config.label_column)
            if label in (None, "") or len(texts) < len(config.text_columns):
                skipped += 1
                continue
            taken.append(Row(texts, str(label)))
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many types.
        raise InputError(f"data: cannot read {source} ({reason(error)}).") from error
    if skipped and jax.process_index() == 0:
        print(f"Skipped {skipped} rows of {source} without a text or a label.")
    return taken
