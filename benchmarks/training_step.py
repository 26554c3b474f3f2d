"""A whole training step: its roofline, and what caution adds to it.

``python -m benchmarks.training_step cpu`` times the steps of the study's Llamas with
AdamW and with cautious AdamW, in turns, on this machine.
``python -m benchmarks.training_step tpu`` compiles the steps of the paper's models for
TPU slices, which takes a quarter of an hour, and prints an analysis of each program.
Both need the ``examples`` extra, and the second also needs the ``tpu`` extra.
"""

import statistics
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.steps import markdown_table
from benchmarks.study.questions import QUESTIONS, SIZES
from benchmarks.timing import Pair, take_turns
from examples.llama.task import PRESETS, LlamaTask, with_model
from examples.mae.task import PRESETS as MAE_PRESETS
from examples.training.compile import Account, account
from examples.training.config import TrainConfig, settings, with_settings
from examples.training.engine import make_engine
from examples.training.optimizers import OptimizerConfig
from examples.training.task import count_parameters
from examples.training.xla import WITHOUT_PREFETCHES, CompilerOptions

OPTIMIZERS = [
    # The cost does not depend on the learning rate.
    OptimizerConfig("adamw", caution=caution, learning_rate=1e-3)
    for caution in (False, True)
]


class Slice(NamedTuple):
    """A model and the TPU slice that it is compiled for."""

    title: str
    config: TrainConfig[Any]
    topology: str
    settings: dict[str, str]
    """Settings that differ from the model's own."""


def _llama(model: str) -> TrainConfig[Any]:
    config = with_model(PRESETS["paper"], model)
    return with_settings(config, {"batch_size": "128"})


PLAIN = {"attention": "xla", "remat": "full"}
"""XLA's attention, and all activations recomputed, for comparison."""

SLICES = [
    Slice("Llama 60M", _llama("60m"), "v5e:2x2", {"remat": "none"}),
    Slice("Llama 1B", _llama("1b"), "v5e:4x4", {"remat": "dots"}),
    Slice("Llama 1B", _llama("1b"), "v6e:4x4", {"remat": "dots"}),
    Slice("Llama 7B", _llama("7b"), "v5p:2x2x4", {"remat": "dots"}),
    Slice("ViT-B", MAE_PRESETS["paper"], "v5e:4x4", {"remat": "dots"}),
]


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
    """Time the steps of Llamas with and without caution, and print a table."""
    configs = [QUESTIONS[name].config for name in SIZES]
    rows = []
    with tqdm(total=rounds * len(configs), unit="round") as bar:
        for config in configs:
            steppers = [
                TrainStepper(replace(config, optimizer=tx)) for tx in OPTIMIZERS
            ]
            pair = Pair(*take_turns(steppers, rounds, bar))
            rows.append(
                (
                    f"{count_parameters(config.task):,}",
                    *(f"{1e3 * statistics.median(seconds):.1f}" for seconds in pair),
                    "{:.3f} ({:.3f} to {:.3f})".format(pair.ratio, *pair.quartiles),
                )
            )
    print(
        f"{configs[0].task.units} tokens per step; jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}. Times in ms per step.\n"
    )
    titles = [tx.title for tx in OPTIMIZERS]
    print(markdown_table(rows, ("parameters", *titles, "ratio (quartiles)")))


def on_tpu() -> None:
    """Compile the paper's models for TPU slices, and print two tables."""
    rooflines: list[tuple[str, ...]] = []
    costs: list[tuple[str, ...]] = []
    with tqdm(total=4 * len(SLICES), unit="step") as bar:

        def analyze(
            on: Slice,
            changed: dict[str, str],
            tx: OptimizerConfig,
            options: CompilerOptions | None = None,
        ) -> Account:
            bar.set_description(f"Compiling {on.title} for {on.topology}")
            known = settings(on.config)
            chosen = {name: text for name, text in changed.items() if name in known}
            config = replace(with_settings(on.config, chosen), optimizer=tx)
            found = account(config, on.topology, options)
            bar.update()
            return found

        for on in SLICES:
            rooflines += [
                _roofline_row(on, changed, analyze(on, changed, OPTIMIZERS[1]))
                for changed in (PLAIN, on.settings)
            ]
            both = [
                analyze(on, on.settings, tx, WITHOUT_PREFETCHES) for tx in OPTIMIZERS
            ]
            costs += [_cost_row(on, tx, both, i) for i, tx in enumerate(OPTIMIZERS)]
    print("Cautious AdamW; all amounts are per device.\n")
    of_rooflines = (
        "model",
        "slice",
        "a step of",
        "attention",
        "--remat",
        "TFLOP",
        "memory, GB",
        "received, GB",
        "peak, GiB",
        "shortest step",
        "utilization at most",
    )
    print(markdown_table(rooflines, of_rooflines))
    of_costs = (
        "model",
        "slice",
        "optimizer",
        "memory, GB",
        "caution adds",
        "in parameter arrays",
        "peak, GiB",
        "all-reduces",
        "other collectives",
    )
    print("\nWithout prefetches, which differ between the two programs.\n")
    print(markdown_table(costs, of_costs))


def _roofline_row(on: Slice, changed: dict[str, str], a: Account) -> tuple[str, ...]:
    line = a.roofline
    assert line is not None
    return (
        on.title,
        on.topology,
        on.config.task.describe(),
        changed.get("attention", "auto"),
        changed["remat"],
        f"{a.flops / 1e12:.1f}",
        f"{a.accessed / 1e9:.1f}",
        f"{sum(c.received for c in a.collectives.values()) / 1e9:.1f}",
        f"{a.peak / 2**30:.2f}",
        f"{1e3 * line.shortest:.0f} ms, {line.limit}",
        f"{line.utilization:.0%}",
    )


def _cost_row(
    on: Slice, tx: OptimizerConfig, both: list[Account], index: int
) -> tuple[str, ...]:
    a = both[index]
    added = a.accessed - both[0].accessed
    others = sum(c.times for k, c in a.collectives.items() if k != "all-reduce")
    return (
        on.title,
        on.topology,
        tx.title,
        f"{a.accessed / 1e9:.1f}",
        f"{added / 1e9:.2f} GB, {added / both[0].accessed:.2%}" if index else "",
        f"{added / a.parameters:.2f}" if index else "",
        f"{a.peak / 2**30:.2f}",
        str(a.collectives["all-reduce"].times),
        str(others),
    )


def main(where: tyro.conf.Positional[Literal["cpu", "tpu"]], rounds: int = 60) -> None:
    """Print the cost of a whole training step, and what caution adds to it.

    Args:
        where: cpu times the study's Llamas, tpu compiles the paper's models.
        rounds: number of timed steps per optimizer.
    """
    if where == "cpu":
        on_cpu(rounds)
    else:
        jax.config.update("jax_platforms", "cpu")  # Do not claim this machine's TPU.
        # JAX cannot load cached programs for devices that are not attached.
        jax.config.update("jax_enable_compilation_cache", False)
        on_tpu()


if __name__ == "__main__":
    tyro.cli(main)
