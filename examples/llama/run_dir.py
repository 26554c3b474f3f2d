"""The directory of a run, and whether the run can go on there.

It holds the configuration, the tokenizer, a hash of the corpus, the log and the
checkpoints.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import jax

from examples.llama import log
from examples.llama.checkpoint import saved_steps
from examples.llama.checks import make_directory, require
from examples.llama.config import TrainConfig, from_json, to_json
from examples.llama.data import Data

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
CORPUS_NAME = "corpus.sha256"
CHECKPOINTS_NAME = "checkpoints"

VISIBLE_SECONDS = 60
"""After which a network's file system shows to all what one process has written."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """Lists the settings that have to be equal for a run to go on."""
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        values.update(vars(value) if hasattr(value, "__dict__") else {name: value})
    for free in ("mesh", "keep", "checkpoint_every", "cache_dir", "unroll"):
        del values[free]
    return values


def open_run(config: TrainConfig, run_dir: Path) -> list[log.Record]:
    """Makes a run's directory, or reads the log of the run that is there."""
    make_directory("run_dir", run_dir)
    path = run_dir / CONFIG_NAME
    if path.exists():
        there = identity(from_json(path.read_text("utf-8"), str(path)))
        here = identity(config)
        different = sorted(name for name in here if here[name] != there.get(name))
        require(
            not different,
            f"run_dir: {run_dir} holds a run with other settings "
            f"({', '.join(different)}); choose another --run-dir",
        )
    elif jax.process_index() == 0:
        require(
            all(file.suffix == ".partial" for file in run_dir.iterdir()),
            f"run_dir: {run_dir} is not empty and holds no run; choose another",
        )
        _write_whole(path, to_json(config))
    return log.read(run_dir)


def require_shared(run_dir: Path) -> None:
    """Checks that this process sees what process 0 has written.

    A network's file system may show it a while later.
    """
    end = time.monotonic() + VISIBLE_SECONDS
    while not (run_dir / CONFIG_NAME).exists():
        require(
            time.monotonic() < end,
            f"run_dir: process {jax.process_index()} does not see in {run_dir} what "
            "process 0 has written there; choose a directory that all processes share",
        )
        time.sleep(1)


def require_space(run_dir: Path, checkpoint: int, keep: int) -> None:
    """Checks that the disk holds the checkpoints that are to be there at a time."""
    # The newest, the best, and the one that is being written.
    needed = (keep + 2) * checkpoint
    there = run_dir / CHECKPOINTS_NAME
    used = sum(f.stat().st_size for f in there.rglob("*") if f.is_file())
    free = shutil.disk_usage(run_dir).free
    require(
        needed <= free + used,
        f"run_dir: {keep + 2} checkpoints of {checkpoint / 1e9:.1f} GB do not fit on "
        f"the disk of {run_dir}, where {free / 1e9:.1f} GB are free; make room, or "
        "choose another --run-dir or a smaller --keep",
    )


def keep_data(data: Data, run_dir: Path, records: list[log.Record]) -> None:
    """Writes what data the run is on, or checks that it is that of the steps before."""
    corpus, tokenizer = run_dir / CORPUS_NAME, run_dir / TOKENIZER_NAME
    texts = {
        corpus: data.fingerprint + "\n",
        tokenizer: data.tokenizer.to_str(pretty=True),
    }
    for path, what in (
        (corpus, "was trained on other text"),
        (tokenizer, "has another tokenizer"),
    ):
        require(
            not records or not path.exists() or path.read_text("utf-8") == texts[path],
            f"run_dir: the run in {run_dir} {what}: the data have changed since; "
            "choose another --run-dir",
        )
    if jax.process_index() == 0:
        for path, text in texts.items():
            _write_whole(path, text)


def is_saved(records: list[log.Record], run_dir: Path) -> bool:
    """Says whether a run that is over needs no step to be made again.

    So it does where it was killed in its last save. Not so where it diverged, and
    where somebody has deleted all of its checkpoints.
    """
    last, there = records[-1], saved_steps(run_dir / CHECKPOINTS_NAME)
    return bool(last.get("diverged")) or not there or last["step"] in there


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
