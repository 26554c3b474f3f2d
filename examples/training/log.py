"""The log of a run: a line of JSON per step, and TensorBoard events."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from examples.training.checks import require
from examples.training.chips import chip_of

Record = dict[str, Any]
"""The log entry of a step.

Always present are ``step`` (counted from one), ``loss``, ``grad_norm``,
``learning_rate`` and the task's metrics. An evaluation adds ``validation_loss``, its
metrics, ``aligned_fraction``, ``aligned_fractions`` (by parameter, and by layer where
layers are stacked) and the task's ``scores``, if any. A log write adds
``seconds_per_step``, the throughput in the task's units and, where the peak is known,
``mfu``. ``diverged`` marks the last step of a run that diverged.
"""

FILE_NAME = "metrics.jsonl"


class Log:
    """The writer of a run's log. Only process 0 writes."""

    def __init__(self, directory: Path, step: int):
        """Open the log and drop all records after a step.

        Args:
            directory: the directory of the run.
            step: the last step to keep, that of the checkpoint to resume from.

        Raises:
            InputError: if the log ends before that step.
        """
        self._path = directory / FILE_NAME
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        kept = [record for record in read(directory) if record["step"] <= step]
        require(
            len(kept) == step,
            f"run_dir: {self._path} ends at step {len(kept)}, before the checkpoint of "
            f"step {step}; choose another --run-dir.",
        )
        partial = self._path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, kept))
            _sync(file)
        partial.replace(self._path)
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1, flush_secs=10
        )

    def write(self, records: Iterable[Record]) -> None:
        """Append records, and return once they are on disk."""
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(_line(record))
                for name, value in scalars(record):
                    self._events.add_scalar(name, value, record["step"])
            _sync(file)
        self._events.flush()

    def close(self) -> None:
        """Stop TensorBoard's writer thread."""
        if self._writes:
            self._events.close()


def read(directory: Path) -> list[Record]:
    """Read a run's log, ignoring an incomplete last line."""
    path = directory / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")[:-1]
    return [_parse(line) for line in lines]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record, each layer under its own name."""
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
    """Return the fraction of peak FLOP/s in use, or None if the peak is unknown."""
    chip = chip_of(jax.devices()[0])
    return None if chip is None else flops_per_second / (chip.flops * devices)


def _parse(line: str) -> Record:
    values = json.loads(line)
    return {name: math.nan if v is None else v for name, v in values.items()}


def _line(record: Record) -> str:
    # JSON has no NaN or infinity.
    finite = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in record.items()
    }
    return json.dumps(finite) + "\n"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
