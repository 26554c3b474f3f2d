"""The log of a run: a line of JSON for every step, and TensorBoard's events."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from examples.training.checks import require

Record = dict[str, Any]
"""What is known of a step. ``step``, counted from one, ``loss``, ``grad_norm``,
``learning_rate`` and the task's metrics are there always; ``validation_loss``, its
metrics, ``aligned_fraction``, ``aligned_fractions`` (of each parameter, by layers where
they are stacked) and the task's ``scores``, if any, after an evaluation;
``seconds_per_step``, the speed in the task's units and ``mfu`` where the log is
written. ``diverged`` ends a run."""

FILE_NAME = "metrics.jsonl"

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Log:
    """Writes records to a run's directory, in the process that is to do so."""

    def __init__(self, directory: Path, step: int):
        """Opens the log, and forgets what comes after a step.

        Args:
            directory: of the run.
            step: the last step that is kept: that of the checkpoint to go on from.

        Raises:
            InputError: for a log that ends before that step.
        """
        self._path = directory / FILE_NAME
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        kept = [record for record in read(directory) if record["step"] <= step]
        require(
            len(kept) == step,
            f"run_dir: {self._path} ends at step {len(kept)}, before the checkpoint of "
            f"step {step}; choose another --run-dir",
        )
        partial = self._path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(map(_line, kept))
            _sync(file)
        partial.replace(self._path)
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1, flush_secs=10
        )

    def write(self, records: Iterable[Record]) -> None:
        """Appends records, and returns when they are on the disk."""
        if not self._writes:
            return
        with self._path.open("a") as file:
            for record in records:
                file.write(_line(record))
                for name, value in scalars(record):
                    self._events.add_scalar(name, value, record["step"])
            _sync(file)
        self._events.flush()

    def close(self) -> None:
        """Ends TensorBoard's thread."""
        if self._writes:
            self._events.close()


def read(directory: Path) -> list[Record]:
    """Reads a run's log. An incomplete last line is ignored."""
    path = directory / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [_parse(line) for line in lines]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Lists the finite numbers of a record, those of each layer by its own name."""
    for name, value in record.items():
        if name == "scores":
            yield from ((f"{name}/{score}", x) for score, x in value.items())
        elif name == "aligned_fractions":
            for leaf, fraction in value.items():
                if isinstance(fraction, list):
                    for layer, of_layer in enumerate(fraction):
                        yield f"{name}/{leaf}/{layer}", of_layer
                else:
                    yield f"{name}/{leaf}", fraction
        elif name != "step" and math.isfinite(value):
            yield name, value


def utilization(flops_per_second: float, devices: int) -> float | None:
    """Returns the share of the devices' peak, where that is known."""
    peak = _PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else flops_per_second / (peak * devices)


def _parse(line: str) -> Record:
    values = json.loads(line)
    return {name: math.nan if v is None else v for name, v in values.items()}


def _line(record: Record) -> str:
    # JSON has no word for what is not finite.
    finite = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in record.items()
    }
    return json.dumps(finite) + "\n"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
