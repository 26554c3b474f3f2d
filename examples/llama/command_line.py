"""The command line: where settings start from, and how errors end a program."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from examples.llama.checks import InputError
from examples.llama.config import (
    PRESETS,
    ModelName,
    PresetName,
    TrainConfig,
    from_json,
    with_model,
)

_OPTIONS = (tyro.conf.OmitArgPrefixes,)


@dataclass(frozen=True)
class Start:
    """Where the settings start from; every other option then changes one of them."""

    preset: PresetName = "demo"
    """demo: a tiny model on the source of the Python standard library. paper: the
    recipe of the paper's language models, on C4."""
    model: ModelName | None = None
    """A model of the paper's family, or tiny. Not given: that of the preset, tiny for
    demo and 60m for paper."""
    config_file: Path | None = None
    """The config.json of an earlier run, in place of a preset."""


def starting_config(start: Start) -> TrainConfig:
    """Makes the settings that hold where no other option changes them."""
    config = PRESETS[start.preset]
    if start.config_file is not None:
        try:
            text = start.config_file.read_text("utf-8")
        except OSError as error:
            raise InputError(
                f"config_file: cannot read {start.config_file} ({error.strerror})"
            ) from error
        config = from_json(text, str(start.config_file))
    return config if start.model is None else with_model(config, start.model)


def run_training_command(
    function: Callable[..., Any], args: Sequence[str] | None = None
) -> Any:
    """Does as ``run_command``, for a function with a parameter ``config``.

    Its defaults are what the parameter ``start`` says, which is found on the command
    line before all others are.
    """

    def run() -> Any:
        start, _ = tyro.cli(
            Start, args=args, config=_OPTIONS, add_help=False, return_unknown_args=True
        )
        command = partial(function, config=starting_config(start))
        command.__doc__ = function.__doc__
        return tyro.cli(command, args=args, config=_OPTIONS)

    return _or_exit(run)


def run_command(function: Callable[..., Any], args: Sequence[str] | None = None) -> Any:
    """Calls a function with the arguments of the command line.

    The fields of nested settings become options without prefix. An ``InputError`` ends
    the program with its message alone.
    """
    return _or_exit(lambda: tyro.cli(function, args=args, config=_OPTIONS))


def _or_exit(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except InputError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not _is_of_a_full_disk(error):
            raise
        sys.exit(
            "error: there is no space left on the disk; make room, and give the same "
            f"command again ({error})"
        )


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """Looks for the error behind the error; tensorstore's has no number, but a text."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    return (
        number in (errno.ENOSPC, errno.EDQUOT)
        or os.strerror(errno.ENOSPC) in str(error)
        or _is_of_a_full_disk(error.__cause__ or error.__context__)
    )
