"""The command that trains a model.

``python -m examples.llama.train --help`` lists its options. A run that was interrupted
goes on from its last checkpoint when the same command is given again.
"""

import hashlib
from pathlib import Path

import jax
from tqdm import tqdm

from examples.llama import log
from examples.llama.checks import InputError
from examples.llama.command_line import Start, run_training_command
from examples.llama.config import TrainConfig, require_learning_rate, title
from examples.llama.loop import is_over, training
from examples.llama.model import count_parameters
from examples.llama.processes import Processes, preemption
from examples.llama.run_dir import identity


def default_run_dir(config: TrainConfig) -> Path:
    """Names a directory after the optimizer and a hash of the settings."""
    text = repr(sorted(identity(config).items()))
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path("outputs/llama") / f"{config.optimizer.optimizer}-{key}"


def train(
    run_dir: Path | None = None,
    start: Start = Start(),  # noqa: B008 (frozen)
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> None:
    """Train a Llama, or go on with a training that has been interrupted.

    Args:
        run_dir: where the configuration, the tokenizer, the log and the checkpoints
            go. Not given: a directory of outputs/llama named after the settings.
        start: where the settings start from.
        processes: how several processes find each other.
        config: the run.
    """
    del start  # It has become the defaults of the configuration.
    require_learning_rate(config)
    processes.join()
    run_dir = run_dir or default_run_dir(config)
    speaks = jax.process_index() == 0
    if speaks:
        print(
            f"{count_parameters(config.model):,} parameters, {config.steps} steps of "
            f"{config.data.batch_size} x {config.data.sequence_length} tokens with "
            f"{title(config.optimizer.optimizer)} at {config.optimizer.peak:g}, in "
            f"{run_dir}",
            flush=True,
        )
    last: log.Record = {}
    bar = tqdm(total=config.steps, desc="Compiling", unit="step", disable=not speaks)
    with bar, preemption() as stop:
        for records in training(config, run_dir, stop=stop):
            last = records[-1]
            validated = [r for r in records if "aligned_fraction" in r]
            if validated and speaks:
                tqdm.write(summary(validated[-1]))
            bar.set_description("Training", refresh=False)
            bar.set_postfix(progress(last), refresh=False)
            bar.update(last["step"] - bar.n)
    if not is_over([last], config.steps) and speaks:
        print(f"Stopped: step {last['step']} is saved, and the same command goes on.")
    if last.get("diverged") and speaks:
        raise InputError(
            f"the loss is not finite at step {last['step']}; a lower --learning-rate "
            "may help"
        )


def summary(record: log.Record) -> str:
    """Writes an evaluation as a line."""
    return (
        f"step {record['step']:6d}   validation loss {record['validation_loss']:.4f}   "
        f"perplexity {log.perplexity(record['validation_loss']):8.2f}   "
        f"aligned fraction {record['aligned_fraction']:.3f}"
    )


def progress(record: log.Record) -> dict[str, str]:
    """Writes what stands beside the progress bar."""
    shown = {"loss": f"{record['loss']:.3f}"}
    if "tokens_per_second" in record:
        shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
    if "mfu" in record:
        shown["MFU"] = f"{record['mfu']:.1%}"
    return shown


if __name__ == "__main__":
    run_training_command(train)
