"""What comes across a training: typos, Ctrl-C, kills, and asking for more steps."""

import errno
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
FALLS = 3
"""Where the learning rate begins to fall in a run of ``STEPS`` that ends so."""
RATE = 0.1


# What tensorstore's coroutines say when one of them has failed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(little_optimization):
    with programs_compiled_once():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run at a constant learning rate."""
    documents = write_documents(tmp_path_factory.mktemp("documents"))
    data = DataConfig(
        data=(str(documents),),
        cache_dir=tmp_path_factory.mktemp("cache"),
        sequence_length=16,
        batch_size=8,
        validation_batches=1,
    )
    # What is compiled in little time.
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
def falling(config):
    """A run whose learning rate falls at its end."""
    return changed(
        config, optimizer={"schedule": "warmup-stable-decay", "decay_fraction": 0.5}
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run that is finished."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(config, directory)
    return directory


@pytest.fixture(scope="module")
def fallen(falling, tmp_path_factory):
    """A run that is finished, and whose learning rate has fallen."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(falling, directory)
    return directory


@pytest.fixture(scope="module")
def longer(config, tmp_path_factory):
    """The log of twice as many steps in one go."""
    return train(replace(config, steps=MORE), tmp_path_factory.mktemp("longer"))


@pytest.fixture(scope="module")
def longer_falling(falling, tmp_path_factory):
    return train(replace(falling, steps=MORE), tmp_path_factory.mktemp("longer"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def steps_in(directory):
    return sorted(map(int, names(directory)))


def as_arguments(config, directory, run_dir):
    file = directory / "options.json"
    file.write_text(to_json(config))
    return ["--config-file", file, "--run-dir", run_dir]


def save(directory, *states):
    """Saves the states after the first steps, and a loss that falls."""
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


def test_a_command_that_cannot_run_leaves_nothing(
    config, tmp_path, monkeypatch, longer
):
    run_dir = tmp_path / "run"
    (tmp_path / "short.txt").write_text("too little")
    typo, short = (
        changed(config, data={"data": (str(tmp_path / name),)})
        for name in ("typo", "short.txt")
    )
    wrong = {
        "data: there is no .*typo": typo,
        "data: one document only, of 10 characters": short,
        "mesh: 3 x 3 x 1 are 9 devices": replace(config, mesh=(3, 3, 1)),
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


def test_a_run_killed_before_its_first_step_is_begun_anew(config, longer, tmp_path):
    """With other settings, too, and although nobody has taken away its lock."""
    run_dir = tmp_path / "run"
    other = changed(config, optimizer={"learning_rate": 0.2}, steps=MORE)
    kill = "os.rename", "metrics.partial", 1, int(signal.SIGKILL)
    code, output = Command(other, tmp_path).run_until(kill, run_dir)
    assert code == -signal.SIGKILL, output
    assert {"config.json", "run.lock"} <= {*names(run_dir)}
    assert train(config, run_dir) == longer[:STEPS]
    assert "run.lock" not in names(run_dir)


def test_a_second_program_is_kept_out(config, longer, tmp_path):
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


def test_a_second_program_is_kept_out_before_the_first_step(
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


def test_what_says_that_a_run_is_there_is_removed_last(config, tmp_path, monkeypatch):
    """So that one who is killed meanwhile leaves a run, and no strange files."""
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
    """Does something else before each call of a function."""

    def both(*arguments):
        for other in others:
            other()
        return function(*arguments)

    return both


@pytest.mark.parametrize(
    ("owner", "name"), [(loop, "load_run_data"), (Engine, "compile")]
)
def test_ctrl_c_before_the_first_step_waits_for_it(
    owner, name, config, longer, tmp_path, monkeypatch, capfd
):
    run_dir = tmp_path / "run"
    arguments = as_arguments(config, tmp_path, run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, before(getattr(owner, name), interrupt))
        run_command("train", arguments)
    said = capfd.readouterr()
    assert "Ctrl-C once more ends at once" in said.err
    assert "Stopped: step 1 is saved. Run the same command to resume." in said.out
    assert steps_in(run_dir / "checkpoints") == [1]
    run_command("train", arguments)
    assert read_log(run_dir) == longer[:STEPS]


@pytest.mark.parametrize(
    ("owner", "name"), [(loop, "load_run_data"), (Engine, "compile")]
)
def test_ctrl_c_twice_before_the_first_step_leaves_nothing(
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


def test_ctrl_c_twice_ends_at_once(config, longer, tmp_path):
    run_dir = tmp_path / "run"
    command = Command(config, tmp_path)
    code, output = command.run(run_dir, program=("-c", _INTERRUPTED_TWICE))
    assert code == 130, output
    assert output.endswith("\nInterrupted.\n")
    for word in ("Traceback", "Exception ignored", "Error"):
        assert word not in output
    assert read_log(run_dir) == longer[:2]
    # What was written before the first checkpoint is made again.
    assert train(config, run_dir) == longer[:STEPS]


def test_ctrl_c_is_asked_for_after_each_step_and_then_as_before(capfd):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with preemption() as stop:
        assert not stop(1)
        interrupt()
        assert stop(2)
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert "Stopping after this step" in capfd.readouterr().err


def test_ctrl_c_also_ends_what_reads_the_output(monkeypatch):
    """As in ``| tee``: what is written then fails, and the run is to be saved."""
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(2)
    with monkeypatch.context() as patch, open(writing, "wb", 0) as pipe:
        patch.setattr(sys, "stdout", io.TextIOWrapper(pipe, write_through=True))
        os.dup2(writing, 2)
        try:
            with preemption() as stop:
                interrupt()
                assert stop(1)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def test_ctrl_c_twice_while_a_step_is_shown(config, tmp_path, monkeypatch):
    """The run's directory is free when the command is over."""
    run_dir = tmp_path / "run"
    progress = before(module_of_train.progress, interrupt_twice)
    monkeypatch.setattr(module_of_train, "progress", progress)
    with pytest.raises(SystemExit) as ended:
        run_command("train", as_arguments(config, tmp_path, run_dir))
    assert ended.value.code == 130
    assert "run.lock" not in names(run_dir)
    assert steps_in(run_dir / "checkpoints") == [2]


# More steps


def test_a_cosine_cannot_be_made_longer(config, run, tmp_path):
    run_dir = shutil.copytree(run, tmp_path / "run")
    cosine = changed(config, optimizer={"schedule": "cosine"})
    file = run_dir / "config.json"
    file.write_text(to_json(cosine))
    message = rf"^steps: .* for {STEPS} steps, .*\(cosine\) .*: --from {run_dir} --run-"
    for steps in (STEPS - 1, MORE):
        with pytest.raises(InputError, match=message):
            next(training(replace(cosine, steps=steps), run_dir))
    assert file.read_text() == to_json(cosine)


def test_a_constant_rate_goes_on(config, run, longer, tmp_path):
    run_dir = shutil.copytree(run, tmp_path / "run")
    assert read_log(run_dir) == longer[:STEPS]
    assert train(replace(config, steps=MORE), run_dir) == longer
    assert read_log(run_dir) == longer
    assert "decayed_checkpoints" not in names(run_dir)


def test_a_rate_that_has_fallen_goes_on_from_before(
    falling, fallen, longer_falling, tmp_path, capsys
):
    run_dir = shutil.copytree(fallen, tmp_path / "run")
    assert steps_in(run_dir / "checkpoints") == [FALLS, STEPS]
    rates = [r["learning_rate"] for r in read_log(run_dir)]
    assert rates[: FALLS + 1] == [pytest.approx(RATE)] * (FALLS + 1)
    assert rates[-1] < 0.6 * RATE
    assert train(replace(falling, steps=MORE), run_dir) == longer_falling
    assert read_log(run_dir) == longer_falling
    assert steps_in(run_dir / "decayed_checkpoints") == [STEPS]
    assert f"step {STEPS} is moved to {run_dir}/decayed_che" in capsys.readouterr().out


class Killed(BaseException):
    """Raised where a program is killed."""


def kill(*_):
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name"),
    [(run_dir.shutil, "move"), (run_dir, "_write_whole"), (Checkpoints, "restore")],
)
def test_a_run_killed_when_it_is_made_longer(
    owner, name, falling, fallen, longer_falling, tmp_path, monkeypatch
):
    run_dir = shutil.copytree(fallen, tmp_path / "run")
    more = replace(falling, steps=MORE)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            train(more, run_dir)
    assert train(more, run_dir) == longer_falling
    assert read_log(run_dir) == longer_falling


def test_a_run_is_made_shorter(falling, fallen, longer_falling, tmp_path):
    """The shorter of the two schedules says what both share."""
    run_dir = tmp_path / "run"
    more = replace(falling, steps=MORE, keep=5)
    # The rate has not fallen by then, and has in the shorter run.
    train(more, run_dir, stop=lambda step: step == FALLS + 2)
    assert train(falling, run_dir) == read_log(fallen)
    assert steps_in(run_dir / "decayed_checkpoints") == [FALLS + 1, FALLS + 2]


def test_a_validation_loss_of_a_step_that_is_taken_again_is_forgotten(tmp_path):
    """The best of the checkpoints is not judged by the loss of another state."""
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


def test_fewer_steps_than_were_taken(config, falling, run, fallen):
    for settings, directory in ((config, run), (falling, fallen)):
        with pytest.raises(
            InputError, match=rf"^steps: the run in .* has taken {STEPS} steps already"
        ):
            next(training(replace(settings, steps=STEPS - 1), directory))
    assert steps_in(fallen / "checkpoints") == [FALLS, STEPS]


def test_as_many_steps_as_were_taken_are_not_the_whole_run(falling, tmp_path):
    """Its learning rate has not fallen, and its last step was not validated."""
    run_dir = tmp_path / "run"
    train(falling, run_dir, stop=lambda step: step == FALLS - 2)
    message = r"^steps: the run in .* has taken 1 steps already; give more$"
    with pytest.raises(InputError, match=message):
        next(training(replace(falling, steps=1), run_dir))


def test_no_checkpoint_from_before_the_rate_fell(falling, fallen, tmp_path):
    run_dir = shutil.copytree(fallen, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / str(FALLS))
    message = rf"^steps: .* the first {FALLS} with .* no checkpoint of those; choose"
    with pytest.raises(InputError, match=message):
        next(training(replace(falling, steps=MORE), run_dir))
    assert steps_in(run_dir / "checkpoints") == [STEPS]


def test_a_warm_up_that_would_be_longer_than_the_run(config, tmp_path, run):
    run_dir = shutil.copytree(run, tmp_path / "run")
    warm = changed(config, optimizer={"warmup_fraction": 0.5})
    (run_dir / "config.json").write_text(to_json(warm))
    message = rf"^steps: with 100 .* would take 50, .* that of step {STEPS}; give fewer"
    with pytest.raises(InputError, match=message):
        next(training(replace(warm, steps=100), run_dir))


# The weights of another run


@pytest.fixture(scope="module")
def begun(config, run):
    """A run that begins with the weights of another."""
    return replace(config, from_run=run, steps=2)


@pytest.fixture(scope="module")
def begun_log(begun, tmp_path_factory):
    return train(begun, tmp_path_factory.mktemp("begun") / "run")


def test_a_run_begins_with_the_weights_of_another(begun, begun_log, run):
    params = load_trained(Source(run), LlamaTask).params
    batch = next(iter(loop.load_run_data(begun).train))
    expected = float(begun.task.loss(params, batch))
    assert begun_log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert [r["step"] for r in begun_log] == [1, 2]
    engine = make_engine(begun)
    new, other = engine.make_state(params), engine.make_state()
    jax.tree.map(np.testing.assert_array_equal, new.params, params)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, other.opt_state)


def test_it_goes_on_where_the_other_is_gone(begun, begun_log, run, tmp_path):
    run_dir, gone = tmp_path / "run", run.with_name("gone")
    train(begun, run_dir, stop=lambda step: step == 1)
    run.rename(gone)
    try:
        assert train(begun, run_dir) == begun_log
        with pytest.raises(InputError, match=r"^from: .*run holds neither checkp"):
            next(training(begun, tmp_path / "new"))
    finally:
        gone.rename(run)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "model", [{"hidden_size": 64}, {"num_layers": 2}, {"intermediate_size": 40}]
)
def test_the_weights_of_another_model(model, begun, tmp_path):
    other = changed(begun, model=model)
    with pytest.raises(InputError, match=r"^from: the run in .* is of another model: "):
        next(training(other, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_weights_of_a_model_with_other_parts(tmp_path):
    array = jnp.zeros(8)
    save(tmp_path, TrainState({"w": array, "v": array}, ()))
    like = {"w": array, "v": array}
    np.testing.assert_array_equal(load_params(tmp_path, like)["v"], array)
    others = {"w": array}, {"w": array, "x": array}, {"w": {"x": array}, "v": array}
    for other, name in zip(others, ("v", "v", "w")):
        message = rf"^from: .* another model: its {name} is \(8,\), and .* is missing$"
        with pytest.raises(InputError, match=message):
            load_params(tmp_path, other)
    message = r"^from: .* another model: its x is missing, and here it is \(8,\)$"
    with pytest.raises(InputError, match=message):
        load_params(tmp_path, {**like, "x": array})


def test_the_weights_of_another_tokenizer(begun, run, tmp_path):
    """The rows of the embedding would mean other tokens."""
    other = tmp_path / "other"
    shutil.copytree(begun.task.data.data[0], other)
    (other / "more.txt").write_text("quite different words, and many of them " * 30)
    elsewhere = changed(begun, data={"data": (str(other),)})
    message = rf"^from: .* another tokenizer.json .*; give --tokenizer ({run}/.*json)$"
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


# What the program says


def test_a_run_is_finished_and_was_finished_before(begun, tmp_path, capsys):
    """Also where all steps are taken before the log is written."""
    run_dir = tmp_path / "run"
    arguments = as_arguments(begun, tmp_path, run_dir)
    for over in ("is finished", "was finished before"):
        run_command("train", arguments)
        last = capsys.readouterr().out.splitlines()[-1]
        loss = f"{read_log(run_dir)[-1]['validation_loss']:.4f}"
        assert last.startswith(f"The run {over}: step      2   validation loss {loss}")
        assert last.endswith(f", in {run_dir}")


def test_a_run_killed_in_its_last_save_is_finished_now(
    falling, fallen, tmp_path, capsys
):
    run_dir = shutil.copytree(fallen, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    run_command("train", as_arguments(falling, tmp_path, run_dir))
    assert "The run is finished: step      6" in capsys.readouterr().out
    assert read_log(run_dir) == read_log(fallen)


def test_a_high_learning_rate_is_said_at_the_start(config, run, tmp_path, capsys):
    for rate, high in ((0.3, False), (10.0, True)):
        optimizer = {"optimizer": "adamw", "learning_rate": rate}
        hot = changed(config, optimizer=optimizer)
        # It is said before anything is looked at.
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


def test_a_full_disk_is_said_once(monkeypatch, capsys):
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

    with pytest.raises(SystemExit, match=r"^error: there is no space left on the disk"):
        command_line._or_exit(run)
    assert [str(error) for error in errors] == ["the compiler has run out of memory"]
    assert capsys.readouterr().err == ""


# Traces


def test_fewer_than_no_steps_cannot_be_traced(config, tmp_path):
    arguments = as_arguments(config, tmp_path, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"^error: profile is -1: it has to be at lea"):
        run_command("train", [*arguments, "--profile", "-1"])


def test_a_trace_changes_nothing(config, longer, tmp_path):
    run_dir = tmp_path / "run"
    assert train(config, run_dir, profile=1) == longer[:STEPS]
    assert read_log(run_dir) == longer[:STEPS]
    (trace,) = (run_dir / "tensorboard" / "plugins" / "profile").iterdir()
    assert any(trace.iterdir())
