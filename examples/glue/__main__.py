"""Commands for fine-tuning: ``python -m examples.glue COMMAND --help``."""

from collections.abc import Callable
from typing import Any

from examples.glue.export import export
from examples.glue.task import EXPERIMENT
from examples.training.command_line import main
from examples.training.compare import compare
from examples.training.train import train

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "compare": compare,
    "export": export,
}

if __name__ == "__main__":
    main("python -m examples.glue", EXPERIMENT, COMMANDS)
