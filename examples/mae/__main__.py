"""Commands of the masked autoencoder: ``python -m examples.mae COMMAND --help``."""

from collections.abc import Callable
from typing import Any

from examples.mae.export import export
from examples.mae.reconstruct import reconstruct
from examples.mae.task import EXPERIMENT
from examples.training.command_line import main
from examples.training.compare import compare
from examples.training.compile import compile_only
from examples.training.train import train

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "compare": compare,
    "compile": compile_only,
    "reconstruct": reconstruct,
    "export": export,
}

if __name__ == "__main__":
    main("python -m examples.mae", EXPERIMENT, COMMANDS)
