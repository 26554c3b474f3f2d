"""What caution adds to a whole training step of a Llama.

``python -m benchmarks.training_step cpu`` times the demo's step with AdamW and with
cautious AdamW, in turns, on this machine. ``python -m benchmarks.training_step tpu``
compiles the steps of the paper's 60M and 1B models for TPU slices, which takes a few
minutes, and prints the compiler's analysis of each. Both need the ``examples`` extra,
and the second also needs the ``tpu`` extra.
"""

import statistics
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.steps import markdown_table
from benchmarks.timing import Pair, take_turns
from examples.llama.task import PRESETS, LlamaTask, with_model
from examples.training.compile import Account, account
from examples.training.config import TrainConfig
from examples.training.engine import make_engine
from examples.training.optimizers import OptimizerConfig
from examples.training.task import count_parameters

OPTIMIZERS = [
    # The cost does not depend on the learning rate.
    OptimizerConfig("adamw", caution=caution, learning_rate=1e-3)
    for caution in (False, True)
]


class Slice(NamedTuple):
    """A model and the TPU slice that it is compiled for."""

    model: str
    topology: str


SLICES = [Slice("60m", "v5e:2x2"), Slice("1b", "v5e:4x4")]
SEQUENCES = 128
"""Sequences per batch."""


class TrainStepper:
    """A compiled training step with its state and one batch."""

    def __init__(self, config: TrainConfig[LlamaTask]) -> None:
        """Create the arrays and compile the step."""
        engine = make_engine(config, jax.devices()[:1])
        like = config.task.batch_like()
        vocabulary = config.task.model.vocab_size
        tokens = np.random.default_rng(0).integers(vocabulary, size=like.shape)
        self.batch = engine.put_batch(tokens.astype(like.dtype))
        self.state = engine.make_state()
        self.step = engine.lower_train_step(self.batch).compile()

    def __call__(self) -> None:
        """Take a step and wait for it to finish."""
        self.state, _ = jax.block_until_ready(self.step(self.state, self.batch))


def on_cpu(rounds: int) -> None:
    """Time the demo's step with and without caution, and print a table."""
    demo = PRESETS["demo"]
    steppers = [TrainStepper(replace(demo, optimizer=tx)) for tx in OPTIMIZERS]
    with tqdm(total=rounds, unit="round") as bar:
        pair = Pair(*take_turns(steppers, rounds, bar))
    rows = [
        (tx.title, f"{1e3 * statistics.median(seconds):.1f}", ratio)
        for tx, seconds, ratio in zip(
            OPTIMIZERS,
            pair,
            ("", "{:.3f} ({:.3f} to {:.3f})".format(pair.ratio, *pair.quartiles)),
            strict=True,
        )
    ]
    print(
        f"The demo, {count_parameters(demo.task):,} parameters, {demo.task.units} "
        f"tokens per step; jax {jax.__version__} on {jax.devices()[0].device_kind}.\n"
    )
    print(markdown_table(rows, ("optimizer", "ms per step", "ratio (quartiles)")))


def on_tpu() -> None:
    """Compile the paper's models for TPU slices, and print a table."""
    rows: list[tuple[str, ...]] = []
    with tqdm(total=len(SLICES) * len(OPTIMIZERS), unit="step") as bar:
        for model, topology in SLICES:
            config = with_model(PRESETS["paper"], model)
            task = LlamaTask(
                replace(config.task.model, remat=True),
                replace(config.task.data, batch_size=SEQUENCES),
            )
            found: list[Account] = []
            for tx in OPTIMIZERS:
                bar.set_description(f"Compiling {model} for {topology} with {tx.title}")
                found.append(
                    account(replace(config, task=task, optimizer=tx), topology)
                )
                bar.update()
            rows += _rows(model, topology, found)
    print(
        f"{SEQUENCES} sequences of 1024 tokens per step, bfloat16 compute, "
        "rematerialized; values are per device.\n"
    )
    header = (
        "model",
        "slice",
        "optimizer",
        "GB read and written",
        "caution adds",
        "in parameter arrays",
        "peak memory, GiB",
        "all-reduces",
        "other collectives",
    )
    print(markdown_table(rows, header))


def _rows(model: str, topology: str, found: list[Account]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for tx, a in zip(OPTIMIZERS, found, strict=True):
        added = a.accessed - found[0].accessed
        others = sum(c.times for k, c in a.collectives.items() if k != "all-reduce")
        rows.append(
            (
                model,
                topology,
                tx.title,
                f"{a.accessed / 1e9:.1f}",
                f"{added / 1e9:.2f} GB, {added / found[0].accessed:.2%}"
                if added
                else "",
                f"{added / a.parameters:.2f}" if added else "",
                f"{a.peak / 2**30:.2f}",
                str(a.collectives["all-reduce"].times),
                str(others),
            )
        )
    return rows


def main(where: tyro.conf.Positional[Literal["cpu", "tpu"]], rounds: int = 100) -> None:
    """Print what caution adds to a whole training step.

    Args:
        where: cpu times the demo's step, tpu compiles the paper's models.
        rounds: number of timed steps per optimizer.
    """
    if where == "cpu":
        on_cpu(rounds)
    else:
        jax.config.update("jax_platforms", "cpu")  # Do not claim this machine's TPU.
        on_tpu()


if __name__ == "__main__":
    tyro.cli(main)
