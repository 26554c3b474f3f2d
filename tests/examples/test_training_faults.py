"""Interrupted training: typos, Ctrl-C, kills, and changes of the number of steps."""

import errno
import gc
import io
import itertools
import os
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

for _module in (
    "filelock",
    "grain",
    "orbax.checkpoint",
    "tensorboardX",
    "tokenizers",
    "tyro",
):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.llama.config import DataConfig
from examples.llama.task import LlamaTask
from examples.training import command_line, loop, run_dir
from examples.training import train as module_of_train
from examples.training.checkpoint import Checkpoints, load_params
from examples.training.checks import InputError, human_size
from examples.training.config import TrainConfig, to_json
from examples.training.engine import Engine, make_engine
from examples.training.loop import training
from examples.training.optimizers import RULE, OptimizerConfig
from examples.training.processes import preemption
from examples.training.step import TrainState
from examples.training.trained import Source, load_trained
from tests.examples.training_fixtures import (
    MODEL,
    Command,
    changed,
    programs_compiled_once,
    read_log,
    run_command,
    train,
    write_documents,
)

STEPS, MORE = 6, 12
DECAYS = 3
"""Step after which the learning rate decays in the ``decaying`` run of ``STEPS``."""
RATE = 0.1


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
    """Return the configuration of a run at a constant learning rate."""
    documents = write_documents(tmp_path_factory.mktemp("documents"))
    data = DataConfig(
        data=(str(documents),),
        cache_dir=tmp_path_factory.mktemp("cache"),
        sequence_length=16,
        batch_size=8,
        validation_batches=1,
    )
    # Compiles quickly.
    optimizer = OptimizerConfig(
        optimizer="sgd",
        caution=False,
        learning_rate=RATE,
        max_grad_norm=None,
        schedule="constant",
        warmup_fraction=0.0,
    )
    return TrainConfig(
        LlamaTask(replace(MODEL, num_layers=1), data),
        optimizer,
        steps=STEPS,
        log_every=2,
        eval_every=2,
        checkpoint_every=2,
        keep=1,
        mesh=(1, 1, 1),
    )


@pytest.fixture(scope="module")
def decaying(config):
    """Return the configuration of a run whose learning rate decays at its end."""
    return changed(
        config, optimizer={"schedule": "warmup-stable-decay", "decay_fraction": 0.5}
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Return the directory of a finished run."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(config, directory)
    return directory


@pytest.fixture(scope="module")
def decayed(decaying, tmp_path_factory):
    """Return the directory of a finished run whose learning rate has decayed."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(decaying, directory)
    return directory


@pytest.fixture(scope="module")
def longer(config, tmp_path_factory):
    """Return the log of an uninterrupted run with twice as many steps."""
    return train(replace(config, steps=MORE), tmp_path_factory.mktemp("longer"))


@pytest.fixture(scope="module")
def longer_decaying(decaying, tmp_path_factory):
    return train(replace(decaying, steps=MORE), tmp_path_factory.mktemp("longer"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def steps_in(directory):
    return sorted(map(int, names(directory)))


def as_arguments(config, directory, run_dir):
    file = directory / "options.json"
    file.write_text(to_json(config))
    return ["--config-file", file, "--run-dir", run_dir]


def save(directory, *states):
    """Save the states of the first steps, with decreasing losses."""
    batches = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints = Checkpoints(directory / "checkpoints", 3)
    for step, state in enumerate(states, 1):
        checkpoints.save(step, state, batches, 1.0 / step)
    checkpoints.close()


# Before the first step


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice(*_):
    interrupt()
    interrupt()


def fail(*_):
    raise RuntimeError("the compiler has run out of memory")


def test_a_command_that_cannot_run_leaves_no_files(
    config, tmp_path, monkeypatch, longer
):
    run_dir = tmp_path / "run"
    (tmp_path / "short.txt").write_text("too little")
    typo, short = (
        changed(config, data={"data": (str(tmp_path / name),)})
        for name in ("typo", "short.txt")
    )
    wrong = {
        "data: .*typo does not exist": typo,
        "data: only one document, of 10 characters": short,
        "mesh: 3 x 3 x 1 needs 9 devices": replace(config, mesh=(3, 3, 1)),
    }
    for message, other in wrong.items():
        with pytest.raises(InputError, match=message):
            next(training(other, run_dir))
        assert not run_dir.exists()
    for name in ("make_state", "compile"):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, name, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                next(training(config, run_dir))
        assert not run_dir.exists()
    assert train(config, run_dir) == longer[:STEPS]


def test_a_run_killed_before_its_first_step_starts_over(config, longer, tmp_path):
    """The settings may differ, and the lock file of the killed run remains."""
    run_dir = tmp_path / "run"
    other = changed(config, optimizer={"learning_rate": 0.2}, steps=MORE)
    kill = "os.rename", "metrics.partial", 1, int(signal.SIGKILL)
    code, output = Command(other, tmp_path).run_until(kill, run_dir)
    assert code == -signal.SIGKILL, output
    assert {"config.json", "run.lock"} <= {*names(run_dir)}
    assert train(config, run_dir) == longer[:STEPS]
    assert "run.lock" not in names(run_dir)


def test_a_second_program_is_locked_out(config, longer, tmp_path):
    run_dir = tmp_path / "run"
    first = training(config, run_dir)
    records = next(first)
    there = names(run_dir)
    with pytest.raises(
        InputError, match=r"^run_dir: another program is training in .*run;"
    ):
        next(training(config, run_dir))
    assert names(run_dir) == there
    records += itertools.chain.from_iterable(first)
    assert [r["loss"] for r in records] == [r["loss"] for r in longer[:STEPS]]


def test_a_second_program_is_locked_out_before_the_first_step(
    config, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"

    def load(config, source):
        with pytest.raises(
            InputError, match=r"^run_dir: another program is training in"
        ):
            next(training(config, run_dir))
        assert names(run_dir) == ["run.lock"]
        raise InputError("data: no")

    monkeypatch.setattr(loop, "load_run_data", load)
    with pytest.raises(InputError, match="data: no"):
        next(training(config, run_dir))
    assert not run_dir.exists()


def test_the_configuration_is_removed_last(config, tmp_path, monkeypatch):
    """If killed meanwhile, the program leaves a run and not foreign files."""
    removed = []

    def recorded(path, *arguments, **options):
        if path.parent == tmp_path / "run":
            removed.append(path.name)
        return unlink(path, *arguments, **options)

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", recorded)
    monkeypatch.setattr(Engine, "put_batch", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(training(config, tmp_path / "run"))
    assert len(removed) > 3
    assert removed[-2:] == ["config.json", "run.lock"]


# Ctrl-C


def before(function, *others):
    """Return a function that calls others before each call of a function."""

    def both(*arguments):
        for other in others:
            other()
        return function(*arguments)

    return both


@pytest.mark.parametrize(
    ("owner", "name"), [(loop, "load_run_data"), (Engine, "compile")]
)
def test_ctrl_c_before_the_first_step_waits_for_the_step(
    owner, name, config, longer, tmp_path, monkeypatch, capfd
):
    run_dir = tmp_path / "run"
    arguments = as_arguments(config, tmp_path, run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, before(getattr(owner, name), interrupt))
        run_command("train", arguments)
    said = capfd.readouterr()
    assert "press Ctrl-C again to exit" in said.err
    assert "Stopped: step 1 is saved. Run the same command to resume." in said.out
    assert steps_in(run_dir / "checkpoints") == [1]
    run_command("train", arguments)
    assert read_log(run_dir) == longer[:STEPS]


@pytest.mark.parametrize(
    ("owner", "name"), [(loop, "load_run_data"), (Engine, "compile")]
)
def test_ctrl_c_twice_before_the_first_step_leaves_no_files(
    owner, name, config, tmp_path, monkeypatch, capfd
):
    run_dir = tmp_path / "run"
    monkeypatch.setattr(owner, name, before(getattr(owner, name), interrupt_twice))
    with pytest.raises(SystemExit) as ended:
        run_command("train", as_arguments(config, tmp_path, run_dir))
    assert ended.value.code == 130
    assert not run_dir.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err.endswith("\nInterrupted.\n")


_INTERRUPTED_TWICE = """
import os, signal
from examples.training import log
write = log.Log.write
def interrupted(*arguments):
    write(*arguments)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
log.Log.write = interrupted
import runpy
runpy.run_module("examples.llama", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_twice_exits_immediately(config, longer, tmp_path):
    run_dir = tmp_path / "run"
    command = Command(config, tmp_path)
    code, output = command.run(run_dir, program=("-c", _INTERRUPTED_TWICE))
    assert code == 130, output
    assert output.endswith("\nInterrupted.\n")
    for word in ("Traceback", "Exception ignored", "Error"):
        assert word not in output
    assert read_log(run_dir) == longer[:2]
    # Steps logged before the first checkpoint are repeated.
    assert train(config, run_dir) == longer[:STEPS]


def test_ctrl_c_stops_after_a_step_and_its_handlers_are_restored(capfd):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with preemption() as stop:
        assert not stop(1)
        interrupt()
        assert stop(2)
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert "Stopping after this step" in capfd.readouterr().err


def test_ctrl_c_may_also_end_the_reader_of_the_output(monkeypatch):
    """As in ``| tee``: later writes fail, but the run must still be saved."""
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(2)
    with monkeypatch.context() as patch, open(writing, "wb", 0) as pipe:
        patch.setattr(
            sys, "stdout", io.TextIOWrapper(pipe, "utf-8", write_through=True)
        )
        os.dup2(writing, 2)
        try:
            with preemption() as stop:
                interrupt()
                assert stop(1)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def test_ctrl_c_twice_while_progress_is_shown(config, tmp_path, monkeypatch):
    """The command releases the run's directory."""
    run_dir = tmp_path / "run"
    progress = before(module_of_train.progress, interrupt_twice)
    monkeypatch.setattr(module_of_train, "progress", progress)
    with pytest.raises(SystemExit) as ended:
        run_command("train", as_arguments(config, tmp_path, run_dir))
    assert ended.value.code == 130
    assert "run.lock" not in names(run_dir)
    assert steps_in(run_dir / "checkpoints") == [2]


# More steps


def test_a_cosine_schedule_cannot_be_extended(config, run, tmp_path):
    run_dir = shutil.copytree(run, tmp_path / "run")
    cosine = changed(config, optimizer={"schedule": "cosine"})
    file = run_dir / "config.json"
    file.write_text(to_json(cosine))
    message = rf"^steps: .*\(cosine\) .* ends at {STEPS} .*: --from {run_dir} --run-dir"
    for steps in (STEPS - 1, MORE):
        with pytest.raises(InputError, match=message):
            next(training(replace(cosine, steps=steps), run_dir))
    assert file.read_text() == to_json(cosine)


def test_a_run_at_a_constant_rate_is_extended(config, run, longer, tmp_path):
    run_dir = shutil.copytree(run, tmp_path / "run")
    assert read_log(run_dir) == longer[:STEPS]
    assert train(replace(config, steps=MORE), run_dir) == longer
    assert read_log(run_dir) == longer
    assert "decayed_checkpoints" not in names(run_dir)


def test_a_decayed_run_is_extended_from_before_the_decay(
    decaying, decayed, longer_decaying, tmp_path, capsys
):
    run_dir = shutil.copytree(decayed, tmp_path / "run")
    assert steps_in(run_dir / "checkpoints") == [DECAYS, STEPS]
    rates = [r["learning_rate"] for r in read_log(run_dir)]
    assert rates[: DECAYS + 1] == [pytest.approx(RATE)] * (DECAYS + 1)
    assert rates[-1] < 0.6 * RATE
    assert train(replace(decaying, steps=MORE), run_dir) == longer_decaying
    assert read_log(run_dir) == longer_decaying
    assert steps_in(run_dir / "decayed_checkpoints") == [STEPS]
    assert f"step {STEPS} to {run_dir}/decayed_checkpoints/" in capsys.readouterr().out


class Killed(BaseException):
    """Raised in place of killing the program."""


def kill(*_):
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name"),
    [(run_dir.shutil, "move"), (run_dir, "_write_whole"), (Checkpoints, "restore")],
)
def test_a_run_killed_while_it_is_extended(
    owner, name, decaying, decayed, longer_decaying, tmp_path, monkeypatch
):
    run_dir = shutil.copytree(decayed, tmp_path / "run")
    more = replace(decaying, steps=MORE)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            train(more, run_dir)
    assert train(more, run_dir) == longer_decaying
    assert read_log(run_dir) == longer_decaying


def test_a_run_is_shortened(decaying, decayed, longer_decaying, tmp_path):
    """The shorter of the two schedules determines the shared steps."""
    run_dir = tmp_path / "run"
    more = replace(decaying, steps=MORE, keep=5)
    # By then the rate has decayed in the shorter run only.
    train(more, run_dir, stop=lambda step: step == DECAYS + 2)
    assert train(decaying, run_dir) == read_log(decayed)
    assert steps_in(run_dir / "decayed_checkpoints") == [DECAYS + 1, DECAYS + 2]


def test_the_validation_loss_of_a_repeated_step_is_forgotten(tmp_path):
    """The best checkpoint is not chosen by the loss of another state."""
    batches = iter(grain.MapDataset.range(9).to_iter_dataset())
    state = TrainState({"w": jnp.zeros(8)}, ())
    save(tmp_path, state, state)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, {1: 1.0, 2: 0.5, 3: 0.1})
    assert checkpoints.restore(like, batches).step == 2
    for step in (3, 4):
        checkpoints.save(step, state, batches, None)
    checkpoints.close()
    assert steps_in(tmp_path / "checkpoints") == [2, 4]


def test_fewer_steps_than_were_taken(config, decaying, run, decayed):
    for settings, directory in ((config, run), (decaying, decayed)):
        with pytest.raises(
            InputError, match=rf"^steps: the run in .* has already taken {STEPS} steps"
        ):
            next(training(replace(settings, steps=STEPS - 1), directory))
    assert steps_in(decayed / "checkpoints") == [DECAYS, STEPS]


def test_a_run_cannot_be_shortened_to_the_steps_taken(decaying, tmp_path):
    """Its learning rate has not decayed, and its last step was not evaluated."""
    run_dir = tmp_path / "run"
    train(decaying, run_dir, stop=lambda step: step == DECAYS - 2)
    message = r"^steps: the run in .* has already taken 1 steps; pass more\.$"
    with pytest.raises(InputError, match=message):
        next(training(replace(decaying, steps=1), run_dir))


def test_no_checkpoint_from_before_the_decay(decaying, decayed, tmp_path):
    run_dir = shutil.copytree(decayed, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / str(DECAYS))
    message = rf"^steps: .* the first {DECAYS} with .* no checkpoint of those; choose"
    with pytest.raises(InputError, match=message):
        next(training(replace(decaying, steps=MORE), run_dir))
    assert steps_in(run_dir / "checkpoints") == [STEPS]


def test_a_warm_up_that_would_exceed_the_steps_taken(config, tmp_path, run):
    run_dir = shutil.copytree(run, tmp_path / "run")
    warm = changed(config, optimizer={"warmup_fraction": 0.5})
    (run_dir / "config.json").write_text(to_json(warm))
    message = rf"^steps: with 100 .* would take 50, .* that of step {STEPS}; pass fewer"
    with pytest.raises(InputError, match=message):
        next(training(replace(warm, steps=100), run_dir))


# The weights of another run


@pytest.fixture(scope="module")
def begun(config, run):
    """Return the configuration of a run that starts from another's weights."""
    return replace(config, from_run=run, steps=2)


@pytest.fixture(scope="module")
def begun_log(begun, tmp_path_factory):
    return train(begun, tmp_path_factory.mktemp("begun") / "run")


def test_a_run_starts_from_the_weights_of_another(begun, begun_log, run):
    params = load_trained(Source(run), LlamaTask).params
    batch = next(iter(loop.load_run_data(begun).train))
    expected = float(begun.task.loss(params, batch))
    assert begun_log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert [r["step"] for r in begun_log] == [1, 2]
    engine = make_engine(begun)
    new, other = engine.make_state(params), engine.make_state()
    jax.tree.map(np.testing.assert_array_equal, new.params, params)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, other.opt_state)


def test_it_resumes_when_the_other_run_is_gone(begun, begun_log, run, tmp_path):
    run_dir, gone = tmp_path / "run", run.with_name("gone")
    train(begun, run_dir, stop=lambda step: step == 1)
    run.rename(gone)
    try:
        assert train(begun, run_dir) == begun_log
        with pytest.raises(InputError, match=r"^from: .*run contains neither che"):
            next(training(begun, tmp_path / "new"))
    finally:
        gone.rename(run)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "model", [{"hidden_size": 64}, {"num_layers": 2}, {"intermediate_size": 40}]
)
def test_the_weights_of_another_model(model, begun, tmp_path):
    other = changed(begun, model=model)
    with pytest.raises(InputError, match=r"^from: the run in .* has a different model"):
        next(training(other, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_weights_of_a_model_with_other_parts(tmp_path):
    array = jnp.zeros(8)
    save(tmp_path, TrainState({"w": array, "v": array}, ()))
    like = {"w": array, "v": array}
    np.testing.assert_array_equal(load_params(tmp_path, like)["v"], array)
    others = {"w": array}, {"w": array, "x": array}, {"w": {"x": array}, "v": array}
    for other, name in zip(others, ("v", "v", "w")):
        message = rf"^from: .* in which {name} is \(8,\); here it is missing\.$"
        with pytest.raises(InputError, match=message):
            load_params(tmp_path, other)
    message = r"^from: .* in which x is missing; here it is \(8,\)\.$"
    with pytest.raises(InputError, match=message):
        load_params(tmp_path, {**like, "x": array})


def test_the_weights_of_another_tokenizer(begun, run, tmp_path):
    """The rows of the embedding would stand for other tokens."""
    other = tmp_path / "other"
    shutil.copytree(begun.task.data.data[0], other)
    (other / "more.txt").write_text("quite different words, and many of them " * 30)
    elsewhere = changed(begun, data={"data": (str(other),)})
    message = rf"^from: .* a different tokenizer.json; pass --tokenizer {run}/.*json\.$"
    with pytest.raises(InputError, match=message):
        next(training(elsewhere, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    given = changed(elsewhere, data={"tokenizer": str(run / "tokenizer.json")})
    assert len(train(given, tmp_path / "run")) == 2


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_weights_that_are_damaged(name, begun, run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "checkpoints" / str(STEPS) / "state" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"^from: the checkpoint of step 6 .* is dam"):
        next(training(replace(begun, from_run=damaged), tmp_path / "run"))


# Output of the program


def test_a_run_is_finished_and_was_already_finished(begun, tmp_path, capsys):
    """Even if all steps are taken before the first log write."""
    run_dir = tmp_path / "run"
    arguments = as_arguments(begun, tmp_path, run_dir)
    for over in ("is finished", "was already finished"):
        run_command("train", arguments)
        last = capsys.readouterr().out.splitlines()[-1]
        loss = f"{read_log(run_dir)[-1]['validation_loss']:.4f}"
        assert last.startswith(f"The run {over}: step      2   validation loss {loss}")
        assert last.endswith(f", in {run_dir}")


def test_a_run_killed_in_its_last_save_is_then_finished(
    decaying, decayed, tmp_path, capsys
):
    run_dir = shutil.copytree(decayed, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    run_command("train", as_arguments(decaying, tmp_path, run_dir))
    assert "The run is finished: step      6" in capsys.readouterr().out
    assert read_log(run_dir) == read_log(decayed)


def test_a_high_learning_rate_is_reported_at_the_start(config, run, tmp_path, capsys):
    for rate, high in ((0.3, False), (10.0, True)):
        optimizer = {"optimizer": "adamw", "learning_rate": rate}
        hot = changed(config, optimizer=optimizer)
        # The warning comes before any other check.
        with pytest.raises(SystemExit):
            run_command("train", as_arguments(hot, tmp_path, run))
        said = capsys.readouterr().out
        assert ("A learning rate of 10 is high: " in said) == high


@pytest.mark.parametrize("option", [["--stepps", "3"], ["--preset", "big"]])
def test_an_error_names_the_command(option, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("train", option)
    assert ended.value.code == 2
    assert "run python -m examples.llama train --help" in capsys.readouterr().err


def test_help_has_the_defaults_of_caution(capsys):
    with pytest.raises(SystemExit):
        run_command("train", ["--help"])
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    assert text.startswith("usage: python -m examples.llama train ")
    for name in RULE:
        default = getattr(OptimizerConfig(), name)
        option = f"--{name.replace('_', '-')}"
        (shown,) = re.findall(rf"{option} .*?\(default: (\S+)\)", text)
        assert shown == str(default)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (56_789, "56.8 kB"),
        (1_234_567, "1.23 MB"),
        (2.5e9, "2.5 GB"),
    ],
)
def test_sizes(size, text):
    assert human_size(size) == text


def test_a_full_disk_is_reported_once(monkeypatch, capsys):
    errors = []
    monkeypatch.setattr(
        threading, "excepthook", lambda args: errors.append(args.exc_value)
    )

    def fill():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wrap():
        try:
            fill()
        except OSError as error:
            raise RuntimeError("cannot write") from error

    def run():
        for target in (fill, wrap, fail):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        wrap()

    with pytest.raises(SystemExit, match=r"^error: no space left on the disk"):
        command_line.or_exit(run)
    assert [str(error) for error in errors] == ["the compiler has run out of memory"]
    assert capsys.readouterr().err == ""


def test_cautious_decay_without_decay_is_rejected(config, tmp_path):
    arguments = as_arguments(config, tmp_path, tmp_path / "run")
    message = r"^error: cautious_decay has no effect without weight decay"
    with pytest.raises(SystemExit, match=message):
        run_command("train", [*arguments, "--cautious-decay"])
    assert not (tmp_path / "run").exists()
    both = [*arguments[:2], "--output-dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=message):
        run_command("compare", [*both, "--sweep", "cautious_decay=false,true"])


# Traces


def test_a_negative_number_of_steps_cannot_be_traced(config, tmp_path):
    arguments = as_arguments(config, tmp_path, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"^error: profile must be at least 0, got -1"):
        run_command("train", [*arguments, "--profile", "-1"])


def test_a_trace_changes_nothing(config, longer, tmp_path):
    run_dir = tmp_path / "run"
    assert train(config, run_dir, profile=1) == longer[:STEPS]
    assert read_log(run_dir) == longer[:STEPS]
    (trace,) = (run_dir / "tensorboard" / "plugins" / "profile").iterdir()
    assert any(trace.iterdir())
