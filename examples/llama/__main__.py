"""The Llama commands: ``python -m examples.llama COMMAND --help``."""

from collections.abc import Callable
from typing import Any

from examples.llama.export import export
from examples.llama.generate import generate
from examples.llama.task import EXPERIMENT
from examples.training.command_line import main
from examples.training.compare import compare
from examples.training.compile import compile_only
from examples.training.train import train

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "compare": compare,
    "compile": compile_only,
    "generate": generate,
    "export": export,
}

if __name__ == "__main__":
    main("python -m examples.llama", EXPERIMENT, COMMANDS)
