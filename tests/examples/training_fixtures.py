"""Helpers for tests of the training program: data, settings and commands."""

import itertools
import os
import random
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from examples.llama.__main__ import COMMANDS
from examples.llama.config import ModelConfig
from examples.llama.task import EXPERIMENT
from examples.training import command_line, log, loop
from examples.training.config import identity, to_json
from examples.training.engine import Engine

ROOT = Path(__file__).parents[2]

# 4 divides all sizes except the number of key/value heads, which 2 divides. With the
# default of unroll, the scan over two layers would have no loop.
MODEL = ModelConfig(
    vocab_size=304,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    unroll=1,
)

_TIMES = {
    "seconds_per_step",
    "tokens_per_second",
    "pictures_per_second",
    "examples_per_second",
    "mfu",
}

# Sends a signal to its own process when a file of the run is accessed: at the nth event
# of a kind (docs.python.org/3/library/audit_events.html) on a path with a given ending.
_AT_AN_EVENT = """
import os, runpy, sys
kind, ending, count, number = sys.argv[1:5]
del sys.argv[1:5]
run_dir = sys.argv[sys.argv.index("--run-dir") + 1]
left = int(count)
def hook(event, arguments):
    global left
    path = str(arguments[0]) if arguments else ""
    if kind in (event, "any") and path.startswith(run_dir) and path.endswith(ending):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), int(number))
sys.addaudithook(hook)
runpy.run_module("examples.llama", run_name="__main__", alter_sys=True)
"""


def write_documents(directory):
    """Write thirty documents made of a few words."""
    generator = random.Random(0)
    words = ["the", "optimizer", "moves", "a", "weight", "along", "its", "gradient"]
    for i in range(30):
        text = " ".join(generator.choices(words, k=150))
        (directory / f"{i}.txt").write_text(f"document {i}\n{text}")
    return directory


@contextmanager
def programs_compiled_once():
    """Share compiled programs and initial states between runs with equal settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_state", "compile"):
            patch.setattr(Engine, name, _remembering(getattr(Engine, name)))
        yield


def _remembering(function):
    found = {}

    def remembering(engine, *arrays):
        key = str(identity(engine.config)), tuple(engine.mesh.shape.values())
        if key not in found:
            found[key] = function(engine, *arrays)
        # The first step donates its state.
        is_array = lambda leaf: isinstance(leaf, jax.Array)  # noqa: E731
        return jax.tree.map(lambda x: x.copy() if is_array(x) else x, found[key])

    return remembering


def changed(config, *, model=None, data=None, optimizer=None, **top):
    """Change settings of the model, the data, the optimizer and the run."""
    task = replace(
        config.task,
        model=replace(config.task.model, **model or {}),
        data=replace(config.task.data, **data or {}),
    )
    return replace(
        config,
        task=task,
        optimizer=replace(config.optimizer, **optimizer or {}),
        **top,
    )


def named(name):
    """Return the settings for a name such as "cautious_adamw"."""
    base = name.removeprefix("cautious_")
    return {"optimizer": base, "caution": base != name}


def run_command(name, arguments):
    """Run a command of the program in this process."""
    arguments = [str(argument) for argument in arguments]
    return command_line.main(
        "python -m examples.llama", EXPERIMENT, COMMANDS, [name, *arguments]
    )


def without_times(records):
    return [{k: v for k, v in r.items() if k not in _TIMES} for r in records]


def train(config, run_dir, **options):
    """Train in this process, and return all records that are yielded."""
    yielded = loop.training(config, run_dir, **options)
    return without_times(itertools.chain.from_iterable(yielded))


def read_log(run_dir):
    return without_times(log.read(run_dir))


class Process:
    """A process that writes to a file, so that it never blocks on its output."""

    def __init__(self, arguments, environment):
        """Start the process."""
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._popen = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def finish(self):
        """Wait for the process, and return its exit code and output."""
        with self._output:
            try:
                code = self._popen.wait(timeout=900)
            finally:
                self.kill()
            self._output.seek(0)
            return code, self._output.read()

    def kill(self):
        """End the process, if it has not ended."""
        self._popen.kill()


class Command:
    """The ``train`` command, in processes of its own."""

    def __init__(self, config, directory):
        """Write the settings to a directory."""
        file = directory / "options.json"
        file.write_text(to_json(config))
        self._module = f"examples.{config.task.name}"
        self._options = ["--config-file", file]
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            # As in pyproject.toml.
            "PYTHONWARNINGS": ",".join(
                f"ignore:Error {verb} persistent compilation cache entry"
                for verb in ("reading", "writing")
            ),
        }

    def start(self, run_dir, *options, program=None, **env):
        """Start the command, with ``program`` as its program and ``env`` added."""
        program = program or ("-m", self._module)
        options = [*self._options, "--run-dir", run_dir, *options]
        return Process(
            [sys.executable, *program, "train", *options], self._environment | env
        )

    def run(self, run_dir, *options, **arguments):
        """Run the command, and return its exit code and output."""
        return self.start(run_dir, *options, **arguments).finish()

    def run_until(self, event, run_dir):
        """Run the command with a signal at an event: kind, ending, count, signal."""
        script = _AT_AN_EVENT.replace("examples.llama", self._module)
        return self.run(run_dir, program=("-c", script, *map(str, event)))


def write_pictures(directory, count=24):
    """Write small pictures, each of one color with a square in another."""
    generator = np.random.default_rng(0)
    for i in range(count):
        ground, figure = generator.integers(0, 256, (2, 3), np.uint8)
        picture = np.broadcast_to(ground, (24, 20, 3)).copy()
        picture[6:14, 4:12] = figure
        Image.fromarray(picture).save(directory / f"{i}.png")
    return directory


def largest_file(directory: Path) -> Path:
    files = (file for file in directory.rglob("*") if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)
