"""The demo's training step compared with transformers' Llama in PyTorch.

``python -m benchmarks.llama`` trains the same architecture on the same batch with AdamW
in both frameworks, in turns, on this machine's CPU. It needs the ``examples`` and
``parity`` extras.
"""

import os
import platform
import statistics
from dataclasses import replace
from importlib.metadata import version

import jax
import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

from benchmarks.steps import LEARNING_RATE, markdown_table
from benchmarks.timing import Pair, take_turns
from benchmarks.training_step import OPTIMIZERS, TrainStepper
from examples.llama.task import PRESETS, LlamaTask
from examples.llama.transformers_files import to_config


class TorchStepper:
    """A PyTorch model with its optimizer and one batch."""

    def __init__(self, task: LlamaTask, tokens: np.ndarray) -> None:
        """Build the model with random weights."""
        torch.manual_seed(0)
        settings = {
            **to_config(task.model, task.data.sequence_length, end=0),
            "use_cache": False,
            "attn_implementation": "sdpa",
        }
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self.tokens = torch.tensor(tokens.astype(np.int64))

    def __call__(self) -> None:
        """Take a step, with gradients clipped as in the demo."""
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        logits = self.model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def main(rounds: int = 100, threads: int | None = None) -> None:
    """Print the tokens per second of both frameworks.

    Args:
        rounds: number of timed steps per framework.
        threads: number of PyTorch threads. Default: the number of cores.
    """
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    demo = PRESETS["demo"]
    ours = TrainStepper(replace(demo, optimizer=OPTIMIZERS[0]))
    theirs = TorchStepper(demo.task, np.asarray(ours.batch))
    with tqdm(total=rounds, unit="round") as bar:
        pair = Pair(*take_turns([theirs, ours], rounds, bar))
    names = f"transformers {transformers.__version__}", "examples/llama"
    rows = [
        (name, f"{1e3 * median:.0f}", f"{demo.task.units / median:,.0f}")
        for name, median in zip(names, map(statistics.median, pair), strict=True)
    ]
    print(
        f"The demo's model, {demo.task.describe()}, float32, AdamW; "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, jax "
        f"{jax.__version__}, flax {version('flax')}, Python "
        f"{platform.python_version()}.\n"
    )
    print(markdown_table(rows, ("", "ms per step", "tokens per second")))
    low, high = (1 / ratio for ratio in pair.quartiles[::-1])
    print(
        "\nThroughput of examples/llama relative to transformers: "
        f"{1 / pair.ratio:.2f} (quartiles {low:.2f} to {high:.2f})."
    )


if __name__ == "__main__":
    tyro.cli(main)
