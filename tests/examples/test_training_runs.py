"""Runs that are killed, stopped or damaged, and resume exactly."""

import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

for _module in (
    "grain",
    "orbax.checkpoint",
    "safetensors",
    "tensorboardX",
    "tokenizers",
    "tyro",
):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import filelock
import grain
import orbax.checkpoint as ocp
from safetensors.numpy import load_file
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from examples.llama.config import TOKENIZER_NAME, DataConfig
from examples.llama.model import flops_per_token
from examples.llama.task import LlamaTask
from examples.mae.config import DataConfig as PicturesConfig
from examples.mae.config import ModelConfig as AutoencoderConfig
from examples.mae.task import MAETask
from examples.training import log, loop
from examples.training.checkpoint import Checkpoints, checksum, size
from examples.training.checks import InputError
from examples.training.config import TrainConfig, to_json
from examples.training.engine import Engine, make_engine
from examples.training.loop import training
from examples.training.optimizers import OptimizerConfig
from examples.training.processes import preemption
from examples.training.run_dir import CONFIG_NAME, DATA_NAME
from examples.training.step import Evaluated, TrainState
from examples.training.task import count_parameters
from tests.examples.training_fixtures import (
    MODEL,
    Command,
    changed,
    largest_file,
    programs_compiled_once,
    read_log,
    run_command,
    train,
    write_documents,
    write_pictures,
)

STEPS = 22
STOPPED = 13
"""Step of the stopped run, at neither an evaluation nor a checkpoint."""


# Raised by tensorstore's coroutines after one of them has failed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(little_optimization):
    with programs_compiled_once():
        yield
    gc.collect()  # Tensorstore's coroutines raise here, not in another file's tests.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    documents = write_documents(tmp_path_factory.mktemp("documents"))
    return TrainConfig(
        LlamaTask(
            MODEL,
            DataConfig(
                data=(str(documents),),
                cache_dir=tmp_path_factory.mktemp("cache"),
                sequence_length=16,
                batch_size=8,
                validation_batches=2,
            ),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        steps=STEPS,
        log_every=3,
        eval_every=2,
        checkpoint_every=4,
        mesh=(1, 1, 1),
    )


@pytest.fixture(scope="module")
def whole_dir(config, tmp_path_factory):
    """Return the directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert [r["step"] for r in train(config, directory)] == [*range(1, STEPS + 1)]
    return directory


@pytest.fixture(scope="module")
def whole(whole_dir):
    return read_log(whole_dir)


@pytest.fixture(scope="module")
def stopped_dir(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stopped") / "run"
    train(config, directory, stop=lambda step: step == STOPPED)
    return directory


@pytest.fixture
def run_dir(stopped_dir, tmp_path):
    """Return a copy of the stopped run."""
    return shutil.copytree(stopped_dir, tmp_path / "run")


def saved(run_dir):
    return sorted(int(d.name) for d in (run_dir / "checkpoints").iterdir())


def checksum_of(run_dir, step):
    return (run_dir / "checkpoints" / str(step) / "checksum" / "metadata").read_text()


# The log


def test_the_contents_of_the_log(config, whole, whole_dir):
    records = log.read(whole_dir)
    assert [r["step"] for r in records] == [*range(1, STEPS + 1)]
    evaluated = [r["step"] for r in records if "validation_loss" in r]
    assert evaluated == [*range(2, STEPS + 1, 2)]
    assert [r["step"] for r in records if "aligned_fraction" in r] == evaluated
    timed = [r for r in records if "seconds_per_step" in r]
    written = {*range(2, STEPS + 1, 2), *range(3, STEPS + 1, 3)}
    assert [r["step"] for r in timed] == sorted(written)
    for record in timed:
        tokens = record["tokens_per_second"] * record["seconds_per_step"]
        assert tokens == pytest.approx(8 * 16)
    for record in records:
        assert record["perplexity"] == pytest.approx(np.exp(record["loss"]))
    assert records[0]["learning_rate"] == 0
    assert records[2]["learning_rate"] == pytest.approx(1e-2)
    assert whole[-1]["validation_loss"] < whole[1]["validation_loss"] - 1


def test_the_time_of_a_step_includes_loading_its_batch(config, tmp_path, monkeypatch):
    put_batch, now = Engine.put_batch, 0.0

    def load(engine, batch):
        nonlocal now
        now += 1
        return put_batch(engine, batch)

    monkeypatch.setattr(Engine, "put_batch", load)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    train(config, tmp_path / "run")
    records = log.read(tmp_path / "run")
    # The batch of the first step is loaded before the clock starts.
    _, *others = [r["seconds_per_step"] for r in records if "seconds_per_step" in r]
    assert {*others} == {1.0}


def test_an_incomplete_line_is_written_again(config, run_dir, whole):
    with (run_dir / log.FILE_NAME).open("a") as file:
        file.write('{"step": 14, "loss": 4.')
    assert len(log.read(run_dir)) == STOPPED
    assert train(config, run_dir) == whole
    assert read_log(run_dir) == whole


def test_steps_after_the_checkpoint_are_repeated(config, run_dir, whole):
    with (run_dir / log.FILE_NAME).open("a") as file:
        file.writelines(f'{{"step": {step}, "loss": 9.0}}\n' for step in (14, 15, 16))
    records = train(config, run_dir)
    assert records == whole
    assert read_log(run_dir) == whole


def test_a_log_that_ends_before_the_checkpoint(config, run_dir):
    lines = (run_dir / log.FILE_NAME).read_text().splitlines(keepends=True)
    (run_dir / log.FILE_NAME).write_text("".join(lines[:-2]))
    with pytest.raises(InputError, match=r"ends at step 11, before the .* of step 13;"):
        next(training(config, run_dir))


def events(directory):
    """Read TensorBoard's files as it does: a new start hides later steps."""
    found = []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = [e for e in found if e.step < event.step]
            found += [event] * bool(event.summary.value)
    return found


def test_tensorboard_shows_the_log_and_no_step_twice(
    config, run_dir, whole, monkeypatch
):
    shutil.rmtree(run_dir / "checkpoints" / "13")
    monkeypatch.setattr(
        log, "SummaryWriter", partial(SummaryWriter, filename_suffix=".resumed")
    )
    train(config, run_dir)
    files = sorted((run_dir / "tensorboard").iterdir())
    assert [file.suffix == ".resumed" for file in files] == [False, True]
    shown = {}
    for event in events(run_dir / "tensorboard"):
        for value in event.summary.value:
            assert (event.step, value.tag) not in shown
            shown[event.step, value.tag] = value.simple_value
    for record in log.read(run_dir):
        for name, expected in log.scalars(record):
            value = shown.pop((record["step"], name))
            assert value == pytest.approx(expected, rel=1e-6)
    assert not shown


def test_flops_per_token():
    attention = 2 * 32 * 32 + 2 * 32 * 16
    block = attention + 3 * 32 * 48 + 2 * 32
    parameters = 2 * block + 32 + 32 * 304
    # Scores and sums of 16 keys, forward and twice backward.
    scores = 2 * (3 * 2 * 2 * 16 * 32)
    assert flops_per_token(MODEL, parameters + 304 * 32, 16) == 6 * parameters + scores


def test_utilization_where_the_peak_is_known(monkeypatch):
    assert log.utilization(1e12, 1) is None
    device = namedtuple("device", ["device_kind"])("TPU v4")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert log.utilization(4 * 275e12 / 2, 4) == pytest.approx(0.5)


# Resuming


def test_a_run_stopped_anywhere_resumes_exactly(config, whole, tmp_path):
    run_dir = tmp_path / "run"
    for step in (1, 4, 5, 9, STEPS - 1):
        records = train(config, run_dir, stop=lambda at, step=step: at == step)
        assert records == whole[:step]
        assert saved(run_dir)[-1] == step
    assert train(config, run_dir) == whole
    assert read_log(run_dir) == whole


def test_a_run_killed_anywhere_resumes_exactly(config, whole, whole_dir, tmp_path):
    command = Command(config, tmp_path)
    run_dir = tmp_path / "run"
    draw = random.Random(0).randint
    kills = [
        # In the first save, which renames five times: the run starts over.
        ("os.rename", ".orbax-checkpoint-tmp", draw(1, 5)),
        # At a log write.
        ("open", "metrics.jsonl", draw(6, 8)),
        # When the log is rewritten, but not yet in place.
        ("os.rename", "metrics.partial", 1),
        # Anywhere from the second save on.
        ("any", "", draw(100, 200)),
        # When a checkpoint is removed.
        ("shutil.rmtree", "", 1),
    ]
    for kill in kills:
        code, output = command.run_until((*kill, int(signal.SIGKILL)), run_dir)
        assert code == -signal.SIGKILL, (kill, output)
    code, output = command.run(run_dir)
    assert code == 0, output
    assert read_log(run_dir) == whole
    assert checksum_of(run_dir, STEPS) == checksum_of(whole_dir, STEPS)
    assert saved(run_dir) == saved(whole_dir)


def test_an_autoencoder_killed_and_stopped_resumes_exactly(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = PicturesConfig(
        data=(str(write_pictures(pictures)),),
        batch_size=4,
        validation_batches=1,
        validation_fraction=0.2,
        crop_min=0.5,
        flip=True,
    )
    model = AutoencoderConfig(
        image_size=16, hidden_size=32, num_layers=1, num_heads=2, decoder_num_layers=1
    )
    config = TrainConfig(
        MAETask(model, data),
        OptimizerConfig(learning_rate=1e-3),
        steps=9,
        log_every=2,
        eval_every=2,
        checkpoint_every=4,
        mesh=(1, 1, 1),
    )
    whole = train(config, tmp_path / "whole")
    run_dir = tmp_path / "run"
    command = Command(config, tmp_path)
    killed = "open", "metrics.jsonl", 4, int(signal.SIGKILL)
    code, output = command.run_until(killed, run_dir)
    assert code == -signal.SIGKILL, output
    assert train(config, run_dir, stop=lambda step: step == 7) == whole[:7]
    assert train(config, run_dir) == whole
    assert read_log(run_dir) == whole


def test_sigterm_saves_and_exits(config, whole, tmp_path):
    command = Command(config, tmp_path)
    run_dir = tmp_path / "run"
    at = "open", "metrics.jsonl", 4, int(signal.SIGTERM)
    code, output = command.run_until(at, run_dir)
    assert code == 0, output
    step = saved(run_dir)[-1]
    assert 6 < step < STEPS
    assert f"Stopped: step {step} is saved. Run the same command to resume." in output
    assert read_log(run_dir) == whole[:step]
    assert train(config, run_dir) == whole


def test_sigterm_stops_after_a_step_and_its_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_computes_nothing(config, whole, whole_dir, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in whole_dir.rglob("*")}
    monkeypatch.delattr(loop, "load_run_data")
    for name in ("make_state", "compile"):
        monkeypatch.delattr(Engine, name)
    assert train(config, whole_dir) == whole
    assert {p: p.stat().st_mtime_ns for p in whole_dir.rglob("*")} == before


def test_a_run_killed_in_its_last_save_saves_again(config, whole, whole_dir, tmp_path):
    run_dir = shutil.copytree(whole_dir, tmp_path / "run")
    last = run_dir / "checkpoints" / str(STEPS)
    last.rename(last.with_suffix(".orbax-checkpoint-tmp"))
    assert train(config, run_dir) == whole
    assert checksum_of(run_dir, STEPS) == checksum_of(whole_dir, STEPS)


def test_settings_that_may_change_in_a_run(config, run_dir, whole, tmp_path):
    other = changed(
        config,
        model={"unroll": 2},
        data={"cache_dir": tmp_path / "other"},
        mesh=(2, 2, 2),
        keep=3,
        checkpoint_every=10,
    )
    records = train(other, run_dir)
    assert [r["step"] for r in records] == [*range(1, STEPS + 1)]
    for name in ("loss", "grad_norm"):
        found = [r[name] for r in records]
        assert found == pytest.approx([r[name] for r in whole], rel=1e-4)
    assert saved(run_dir)[-3:] == [STOPPED, 20, STEPS]


def test_changed_text_is_rejected(config, run_dir, tmp_path):
    (documents,) = map(Path, config.task.data.data)
    there = shutil.copytree(documents, tmp_path / "documents")
    file = next(file for file in sorted(there.iterdir()) if file.is_file())
    file.write_text(file.read_text() + " and")
    # As if files had changed in the same directory.
    other = changed(config, data={"data": (str(there),)})
    text = (run_dir / CONFIG_NAME).read_text()
    (run_dir / CONFIG_NAME).write_text(text.replace(str(documents), str(there)))
    before = read_log(run_dir)
    with pytest.raises(
        InputError, match=r"^run_dir: the data have .* a different data.sha256; "
    ):
        train(other, run_dir)
    (run_dir / DATA_NAME).unlink()
    (run_dir / TOKENIZER_NAME).write_text("{}")
    with pytest.raises(InputError, match=r"^run_dir: the data .* different tokenizer"):
        train(other, run_dir)
    assert not (run_dir / DATA_NAME).exists()
    assert read_log(run_dir) == before


def test_a_run_is_sampled_and_exported(config, whole_dir, tmp_path, capsys):
    source = ["--run-dir", str(whole_dir)]
    sampling = ["--temperature", "0", "--tokens", "5", "--prompt", "the "]
    run_command("generate", [*source, *sampling])
    text = capsys.readouterr().out
    assert text.startswith("the ")
    assert len(text) > len("the \n")
    run_command("export", [*source, "--output-dir", str(tmp_path / "hf")])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert sum(map(np.size, tensors.values())) == count_parameters(config.task)
    head = tensors["lm_head.weight"]
    assert head.shape == (config.task.model.vocab_size, config.task.model.hidden_size)


def test_the_best_is_kept_when_a_run_resumes(config, run_dir):
    lines = (run_dir / log.FILE_NAME).read_text().splitlines()
    record = {**json.loads(lines[11]), "validation_loss": 0.1}
    lines[11] = json.dumps(record)
    (run_dir / log.FILE_NAME).write_text("".join(f"{line}\n" for line in lines))
    train(config, run_dir)
    assert saved(run_dir) == [12, 20, STEPS]


# Checkpoints


def test_the_newest_are_kept_and_the_best(config, whole, whole_dir):
    at = [r for r in whole if r["step"] % 4 == 0 or r["step"] == STEPS]
    best = min(at, key=lambda r: r["validation_loss"])["step"]
    assert saved(whole_dir) == sorted({best, 20, STEPS})


def small_state(seed):
    values = np.random.default_rng(seed).normal(size=(64, 32)).astype(np.float32)
    moments = {"w": jnp.asarray(values) * 2, "zeros": jnp.zeros(16)}
    return TrainState({"w": jnp.asarray(values)}, (jnp.int32(seed), moments))


def numbers():
    data = grain.MapDataset.range(1000).shuffle(3).repeat().batch(4)
    return iter(data.to_iter_dataset())


def like(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        state,
    )


LIKE = like(small_state(0))


def test_the_best_is_kept_however_old(tmp_path):
    there = tmp_path / "checkpoints"
    there.mkdir()
    checkpoints, batches = Checkpoints(there, 1), numbers()
    kept, losses = [], {}
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, 0.5, 4.0], 1):
        checkpoints.save(step, small_state(step), batches, loss)
        checkpoints.close()
        kept.append(saved(tmp_path))
        if loss is not None:
            losses[step] = loss
        checkpoints = Checkpoints(there, 1, losses)
    checkpoints.close()
    assert kept == [[1], [2], [2, 3], [2, 4], [2, 5], [6], [6, 7]]


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three")
    checkpoints, batches = Checkpoints(directory / "checkpoints", 3), numbers()
    for step in (1, 2, 3):
        next(batches)
        checkpoints.save(step, small_state(step), batches, float(step))
    checkpoints.close()
    return directory


def restore(directory):
    """Restore the newest checkpoint, check its contents, and return its step."""
    batches = numbers()
    checkpoints = Checkpoints(directory / "checkpoints", 3)
    step, state = checkpoints.restore(LIKE, batches)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, small_state(step))
    expected = numbers()
    for _ in range(step):
        next(expected)
    np.testing.assert_array_equal(next(batches), next(expected))
    return step


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink], ids=lambda damage: damage.__name__
)
def test_damage_to_any_file_is_detected_or_harmless(
    damage, three_checkpoints, tmp_path, capsys
):
    newest = three_checkpoints / "checkpoints" / "3"
    files = [f.relative_to(newest) for f in sorted(newest.rglob("*")) if f.is_file()]
    found = []
    for i, file in enumerate(files):
        if file.name == "commit_success.txt":
            continue  # Redundant: directory names mark complete checkpoints, too.
        directory = shutil.copytree(three_checkpoints, tmp_path / str(i))
        damage(directory / "checkpoints" / "3" / file)
        step = restore(directory)
        said = capsys.readouterr().out
        if step == 3:
            assert "damaged" not in said
            continue
        found.append(file)
        assert step == 2
        assert "The checkpoint of step 3 is damaged (" in said
        assert f"moving it to {directory}/damaged_checkpoints." in said
        assert saved(directory) == [1, 2]
        assert [d.name for d in (directory / "damaged_checkpoints").iterdir()] == ["3"]
    needed = {"checksum/metadata", "data/process_0-of-1.json", "state/_METADATA"}
    large = largest_file(newest).relative_to(newest)
    assert {Path(name) for name in needed} | {large} <= set(found)


def damage_largest(checkpoint):
    flip(largest_file(checkpoint))


def damage_json(checkpoint):
    empty(checkpoint / "state" / "_METADATA")


@pytest.mark.parametrize("damage", [damage_largest, damage_json])
def test_a_run_resumes_from_the_previous_checkpoint(
    damage, config, run_dir, whole, capsys
):
    damage(run_dir / "checkpoints" / "13")
    records = train(config, run_dir)
    assert records == whole
    assert read_log(run_dir) == whole
    said = capsys.readouterr().out
    assert "The checkpoint of step 13 is damaged (" in said
    assert f"moving it to {run_dir}/damaged_checkpoints." in said
    assert (run_dir / "damaged_checkpoints" / "13" / "state").is_dir()


def test_a_run_without_an_intact_checkpoint_reports_it(config, run_dir, capsys):
    steps = saved(run_dir)
    assert len(steps) > 1
    for step in steps:
        damage_largest(run_dir / "checkpoints" / str(step))
    with pytest.raises(
        InputError, match=r"run_dir: all checkpoints in .* are damaged \("
    ) as raised:
        next(training(config, run_dir))
    # They stay in place for a possible repair.
    assert "damaged" not in capsys.readouterr().out
    assert all(f"step {step}: " in str(raised.value) for step in steps)
    assert saved(run_dir) == steps
    assert len(read_log(run_dir)) == STOPPED


def test_a_run_without_an_intact_checkpoint_does_not_start_over(config, run_dir):
    for step in saved(run_dir):
        damage_largest(run_dir / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(InputError, match="run_dir: all checkpoints in"):
            next(training(config, run_dir))
    assert len(read_log(run_dir)) == STOPPED


def test_a_run_with_a_different_number_of_processes(config, run_dir):
    steps = saved(run_dir)
    for file in run_dir.glob("checkpoints/*/data/process_0-of-1.json"):
        shutil.copy(file, file.with_stem("process_1-of-2"))
        file.rename(file.with_stem("process_0-of-2"))
    with pytest.raises(
        InputError, match=r"run_dir: .* saved by 2 processes, but there are 1"
    ):
        next(training(config, run_dir))
    assert saved(run_dir) == steps


ARRAYS = {
    "float32": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "int32": np.arange(-3, 4, dtype=np.int32),
    "bfloat16": np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)),
    "scalar": np.int32(7),
}


@given(st.sampled_from(sorted(ARRAYS)), st.integers(0, 2**16))
def test_the_checksum_depends_on_every_bit(name, place):
    data = bytearray(np.asarray(ARRAYS[name]).tobytes())
    place %= 8 * len(data)
    data[place // 8] ^= 1 << place % 8
    like = np.asarray(ARRAYS[name])
    flipped = np.frombuffer(data, like.dtype).reshape(like.shape)
    assert checksum({**ARRAYS, name: flipped}) != checksum(ARRAYS)


def test_the_size_of_a_checkpoint(config):
    state = make_engine(config).make_state()
    assert size(state) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


# Directories


def test_a_directory_of_a_run_with_different_settings(config, run_dir):
    before = sorted(run_dir.rglob("*"))
    other = changed(config, seed=1, optimizer={"b1": 0.8}, data={"batch_size": 16})
    with pytest.raises(
        InputError, match=r"run with different settings \(b1, batch_size, seed\); ch"
    ):
        next(training(other, run_dir))
    assert sorted(run_dir.rglob("*")) == before


def test_a_directory_with_other_files(config, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear reader")
    with pytest.raises(InputError, match="is not empty and contains no run; choose an"):
        next(training(config, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_directory_with_another_programs_config(config, tmp_path):
    """As in an exported model."""
    contents = {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    message = r"^run_dir: .*config.json is not the configuration of a run.* Choose an"
    with pytest.raises(InputError, match=message):
        next(training(config, tmp_path))
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == contents


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_cannot_be_written(config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"^run_dir: cannot write to .* \(Permission"):
        next(training(config, tmp_path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_where_no_lock_can_be_created(
    number, config, tmp_path, monkeypatch
):
    def acquire(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(InputError, match=r"^run_dir: cannot write to .*; choose anoth"):
        next(training(config, tmp_path / "run"))


def test_unreadable_data_do_not_damage_a_checkpoint(config, run_dir, monkeypatch):
    """As when the network is down temporarily."""
    before = sorted(run_dir.rglob("*"))

    def restore(*args, **options):
        raise InputError("data: cannot read the dataset")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", restore)
        with pytest.raises(InputError, match=r"^data: cannot read the dataset"):
            next(training(config, run_dir))
    assert sorted(run_dir.rglob("*")) == before


def test_a_directory_that_cannot_be_created(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"run_dir: cannot create .*run \(Not a dir"):
        next(training(config, tmp_path / "file" / "run"))


def test_a_configuration_that_cannot_be_read(config, run_dir):
    empty(run_dir / "config.json")
    with pytest.raises(
        InputError, match=r"config.json is not the configuration of a r"
    ):
        next(training(config, run_dir))


def test_invalid_settings_leave_no_files(config, tmp_path):
    optimizer = OptimizerConfig(optimizer="sgd", learning_rate=1.0, b2=0.5)
    for wrong in (
        replace(config, mesh=(3, 3, 1)),
        replace(config, optimizer=optimizer),
    ):
        with pytest.raises(InputError):
            next(training(wrong, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_run_killed_at_its_start_starts_again(
    resumed, config, whole, run_dir, monkeypatch
):
    """Partially written files are ignored."""
    if not resumed:
        shutil.rmtree(run_dir)
    write_text = Path.write_text
    writes = 0
    while True:
        left = writes

        def killed(path, text, encoding=None):
            nonlocal left
            left -= 1
            if left < 0:
                write_text(path, text[:10], encoding)
                raise KeyboardInterrupt
            write_text(path, text, encoding)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", killed)
            try:
                next(training(config, run_dir))
                break
            except KeyboardInterrupt:
                writes += 1
    assert train(config, run_dir) == whole


# Disks


class Began(Exception):
    """Raised when the training begins."""


@pytest.mark.parametrize("missing", [0, 1])
def test_a_disk_needs_room_for_all_checkpoints(missing, config, tmp_path, monkeypatch):
    def begin(*_):
        raise Began

    usage = namedtuple("usage", ["free"])
    state = make_engine(config).make_state()
    # The two newest, the best, and the one being written.
    free = 4 * size(state) - missing
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free))
    monkeypatch.setattr(Engine, "make_state", begin)
    if missing:
        with pytest.raises(
            InputError, match=r"run_dir: 4 checkpoints of [0-9.]+ kB do not"
        ):
            next(training(config, tmp_path / "run"))
    else:
        with pytest.raises(Began):
            next(training(config, tmp_path / "run"))


def test_a_disk_with_existing_checkpoints_needs_less_room(config, run_dir, monkeypatch):
    usage = namedtuple("usage", ["free"])
    files = [f for f in (run_dir / "checkpoints").rglob("*") if f.is_file()]
    used = sum(f.stat().st_size for f in files)
    state = make_engine(config).make_state()
    assert used > size(state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(4 * size(state) - used))
    assert len(next(training(config, run_dir))) == STOPPED


def command_line(config, run_dir, tmp_path):
    file = tmp_path / "options.json"
    file.write_text(to_json(config))
    return ["--config-file", str(file), "--run-dir", str(run_dir)]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_tensorstore(*_):
    reason = os.strerror(errno.ENOSPC)
    raise ValueError(
        f"Failed to write 56367 bytes to file 23: {reason} [os_error_co..."
    )


@pytest.mark.parametrize(
    ("where", "name", "replacement"),
    [(log, "_sync", full), (Checkpoints, "save", full_for_tensorstore)],
    ids=["log", "checkpoint"],
)
def test_a_full_disk_ends_a_run_which_can_resume(
    where, name, replacement, config, run_dir, whole, tmp_path, monkeypatch
):
    compiled = Engine.compile

    def fill(*arguments):
        monkeypatch.setattr(where, name, replacement)
        return compiled(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "compile", fill)
        with pytest.raises(SystemExit, match=r"^error: no space left on the disk"):
            run_command("train", command_line(config, run_dir, tmp_path))
    monkeypatch.undo()
    assert train(config, run_dir) == whole


def test_an_error_in_writing_a_checkpoint_is_not_lost(config, whole, tmp_path):
    run_dir = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match="File too large"):
            list(training(config, run_dir))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert train(config, run_dir) == whole


# Divergence


def diverge(config, run_dir, tmp_path):
    """Run the command until the run diverges, and return the log."""
    with pytest.raises(SystemExit) as ended:
        run_command("train", command_line(config, run_dir, tmp_path))
    records = read_log(run_dir)
    step = records[-1]["step"]
    assert ended.value.code == (
        f"error: the loss is not finite at step {step}; "
        "a lower --learning-rate may help."
    )
    assert [r["step"] for r in records] == [*range(1, step + 1)]
    assert ["diverged" in r for r in records] == [False] * (step - 1) + [True]
    return records


def test_a_diverged_run_ends_and_does_not_resume(config, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    optimizer = OptimizerConfig(learning_rate=1e30)
    hot = replace(
        config, optimizer=optimizer, log_every=8, eval_every=8, checkpoint_every=8
    )
    records = diverge(hot, run_dir, tmp_path)
    assert 1 < len(records) < 8
    not_finite = [not np.isfinite(r["loss"]) for r in records]
    assert not_finite == ["diverged" in r for r in records]
    assert saved(run_dir) == []
    monkeypatch.delattr(loop, "load_run_data")
    assert diverge(hot, run_dir, tmp_path) == records


def test_a_validation_loss_that_is_not_finite_is_divergence(
    config, whole, tmp_path, monkeypatch
):
    compiled, losses = Engine.compile, iter([5.0, np.nan])

    def broken(*arguments):
        return compiled(*arguments)._replace(
            evaluate=lambda *_: Evaluated(next(losses), ())
        )

    monkeypatch.setattr(Engine, "compile", broken)
    run_dir = tmp_path / "run"
    records = diverge(config, run_dir, tmp_path)
    assert [r["loss"] for r in records] == [r["loss"] for r in whole[:4]]
    assert np.isnan(records[-1]["validation_loss"])
    assert saved(run_dir) == []
    assert diverge(config, run_dir, tmp_path) == records
