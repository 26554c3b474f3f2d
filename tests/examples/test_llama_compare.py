"""The Llama example: the comparison of optimizers, and its report."""

import csv
import math
import random
from dataclasses import replace

import jax
import pytest

for _module in ("grain", "matplotlib", "tokenizers", "tqdm", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from PIL import Image

from examples.llama import compare, log, report
from examples.llama.checks import InputError
from examples.llama.command_line import run_training_command
from examples.llama.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from examples.llama.report import Evaluation, History, Run


@pytest.fixture(scope="module", autouse=True)
def little_optimization():
    """These programs run for less time than it takes to optimize them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("documents")
    generator = random.Random(0)
    words = ["the ", "optimizer ", "moves ", "a ", "weight ", "along ", "its "]
    for i in range(30):
        text = f"document {i}\n" + "".join(generator.choices(words, k=400))
        (directory / f"{i}.txt").write_text(text)
    return TrainConfig(
        model=ModelConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
        ),
        data=DataConfig(
            data=(str(directory),),
            cache_dir=tmp_path_factory.mktemp("cache"),
            sequence_length=32,
            batch_size=8,
            validation_batches=2,
        ),
        steps=6,
        eval_every=2,
        checkpoint_every=4,
        log_every=2,
        mesh=(1, 1, 1),
    )


def history(*losses, name="adamw", rate=1.0, seed=0, every=10, diverged_at=None):
    evaluations = tuple(
        Evaluation(every * i, loss, 0.5) for i, loss in enumerate(losses, start=1)
    )
    run = Run(name, rate, seed)
    return History(run, (1.0,), evaluations, (1.0, 2.0), diverged_at)


def cells(table, line):
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


# Report


def test_the_step_at_which_a_loss_is_reached():
    evaluations = history(4.0, 3.0, 3.5, 2.0).evaluations
    assert report.first_step_at(evaluations, 3.25) == 17.5
    assert report.first_step_at(evaluations, 3.0) == 20
    assert report.first_step_at(evaluations, 2.75) == 35
    assert report.first_step_at(evaluations, 9.0) == 10
    assert report.first_step_at(evaluations, 1.99) is None
    assert report.first_step_at([], 1.0) is None


def test_ratio_of_steps(config):
    base = history(4.0, 3.0)
    faster = history(3.5, 2.5, name="cautious_adamw")
    assert report.speed_up(base, faster) == 20 / 15
    text = report.text([base, faster], config)
    assert (
        "At 1, the best for AdamW: cautious AdamW reached AdamW's final validation "
        "loss of 3.0000 at step 15 of 20: a ratio of 1.33." in text
    )
    table = report.table([base, faster])
    assert (cells(table, 2)[-1], cells(table, 3)[-1]) == ("", "1.33")

    slower = history(4.0, 3.1, name="cautious_adamw")
    assert report.speed_up(base, slower) is None
    assert "did not reach AdamW's" in report.text([base, slower], config)
    assert cells(report.table([base, slower]), 3)[-1] == "not reached"


def test_several_seeds(config):
    runs = [
        history(4.0, 3.0, seed=0),
        history(4.0, 3.2, seed=1),
        history(3.5, 2.5, name="cautious_adamw", seed=0),
        history(3.2, 2.7, name="cautious_adamw", seed=1),
    ]
    table = report.table(runs)
    assert cells(table, 2)[2] == "3.1000 (3.0000 to 3.2000)"
    # Each seed with its own: 20 / 15 and 20 / 10.
    assert cells(table, 3)[-1] == "1.67 (1.33 to 2.00)"
    (line,) = report.verdicts(runs)
    assert "at step 12 (10 to 15) of 20: a ratio of 1.67 (1.33 to 2.00)." in line
    assert "seed 0, 1; of several seeds, the mean and the range" in (
        report.text(runs, config)
    )


def test_each_at_its_best():
    runs = [
        history(9.0, base if name == "adamw" else cautious, name=name, rate=rate)
        for rate, base, cautious in ((1e-3, 4.0, 3.0), (2e-3, 5.0, 2.0))
        for name in ("adamw", "cautious_adamw")
    ]
    same, own = report.verdicts(runs)
    assert same.startswith("At 0.001, the best for AdamW: ")
    assert "at step 18 of 20: a ratio of 1.09" in same
    assert own.startswith("Each at its best, 0.001 and 0.002: ")
    assert "validation loss of 4.0000 at step 17 of 20: a ratio of 1.17" in own
    assert len(report.verdicts(runs[:2])) == 1


def test_runs_that_diverged(config, tmp_path):
    lost = history(9.0, rate=4.0, diverged_at=13)
    runs = [
        history(4.0, 3.0),
        lost,
        history(3.5, 2.5, name="cautious_adamw"),
        history(3.5, 2.9, name="cautious_adamw", rate=4.0),
    ]
    assert report.best(runs, "adamw") == (runs[0],)
    table = report.table(runs)
    assert cells(table, 4)[:3] == ["4", "AdamW", "diverged at step 13"]
    assert cells(table, 5)[-1] == ""
    report.write(runs, config, tmp_path)
    (line,) = report.verdicts([lost, runs[2]])
    assert "no comparison, as AdamW diverged" in line
    report.write([lost], config, tmp_path)


def test_an_optimizer_alone_is_compared_with_none():
    runs = [history(4.0, 3.0, name="cautious_lion"), history(4.0, 3.0)]
    assert report.pairs(runs) == []
    assert report.verdicts(runs) == []
    assert cells(report.table(runs), 2)[-1] == ""


def test_the_picture_has_a_panel_more_for_several_learning_rates(tmp_path):
    runs = [history(4.0, 3.0, rate=rate) for rate in (1e-3, 2e-3)]
    report.plot(runs, tmp_path / "two.png")
    report.plot(runs[:1], tmp_path / "one.png")
    two, one = (Image.open(tmp_path / f"{n}.png") for n in ("two", "one"))
    assert two.width > 1.5 * one.width
    assert len(one.convert("RGB").getcolors(maxcolors=2**24) or ()) > 10


# Comparison


def test_plan(config):
    caution = replace(config, optimizer=OptimizerConfig(min_fraction=0.1))
    runs = compare.plan(("lion", "cautious_lion"), (1e-3, 2e-3), (0, 1), caution)
    assert len(runs) == 8
    assert len({run.name for run in runs}) == 8
    for run, planned in runs.items():
        optimizer = planned.optimizer
        assert (optimizer.optimizer, optimizer.peak, planned.seed) == run
        cautious = run.optimizer == "cautious_lion"
        assert optimizer.min_fraction == (0.1 if cautious else None)
    (run,) = compare.plan(("lion",), (), (0,), config)
    assert run == ("lion", 5e-4, 0)
    given = replace(config, optimizer=OptimizerConfig(learning_rate=3e-4))
    (run,) = compare.plan(("lion",), (), (0,), given)
    assert run == ("lion", 3e-4, 0)
    (run,) = compare.plan(("lion",), (1e-3,), (0,), given)
    assert run == ("lion", 1e-3, 0)


@pytest.mark.parametrize("together", [True, False])
def test_compare_from_end_to_end(together, config, tmp_path, capsys):
    names = ("lion", "cautious_lion")
    directory = tmp_path / "new"

    def run():
        compare.compare(
            names, (1e-3,), (0,), directory, together=together, config=config
        )

    run()
    histories = [
        report.read_history(Run(n, 1e-3, 0), directory / f"{n}-lr0.001-seed0")
        for n in names
    ]
    with (directory / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for ours, part in zip(histories, (rows[:6], rows[6:])):
        assert {row["optimizer"] for row in part} == {ours.run.optimizer}
        assert tuple(float(row["loss"]) for row in part) == ours.losses
        evaluated = [row for row in part if row["validation_loss"]]
        assert [row["step"] for row in evaluated] == ["2", "4", "6"]
        keys = ("step", "validation_loss", "aligned_fraction")
        assert ours.evaluations == tuple(
            tuple(float(row[key]) for key in keys) for row in evaluated
        )

    text = (directory / "report.md").read_text()
    assert text in capsys.readouterr().out
    table = "\n".join(line for line in text.splitlines() if line[:1] == "|")
    for line, ours in enumerate(histories, start=2):
        found = cells(table, line)
        assert float(found[2]) == pytest.approx(ours.final_loss, abs=1e-4)
        assert float(found[3]) == pytest.approx(math.exp(ours.final_loss), abs=1e-2)
        assert float(found[4]) == pytest.approx(ours.seconds_per_step, abs=1e-3)
        assert float(found[5]) == pytest.approx(ours.aligned_fraction, abs=1e-3)

    # Once more: all is there, nothing is trained.
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.jsonl")}
    run()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (directory / "report.md").read_text() == text


def test_caution_changes_the_run_and_the_order_of_turns_does_not(config, tmp_path):
    names = ("adamw", "cautious_adamw")
    for together in (True, False):
        directory = tmp_path / str(together)
        compare.run_all(compare.plan(names, (1e-2,), (3,), config), directory, together)
    runs = [f"{name}-lr0.01-seed3" for name in names]
    losses = [
        [record["loss"] for record in log.read(tmp_path / together / run)]
        for together in ("True", "False")
        for run in runs
    ]
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
    assert losses[0][0] == losses[1][0]


def test_one_that_diverges_ends_and_the_other_goes_on(config, tmp_path, capsys):
    rates = replace(config, optimizer=OptimizerConfig(max_grad_norm=None))
    runs = compare.plan(("sgd", "cautious_adamw"), (1e30,), (0,), rates)
    runs = {
        run: replace(c, optimizer=replace(c.optimizer, learning_rate=1e-3))
        if run.optimizer == "cautious_adamw"
        else c
        for run, c in runs.items()
    }
    assert compare.run_all(runs, tmp_path, together=True)
    sgd, adamw = (report.read_history(run, tmp_path / run.name) for run in runs)
    assert sgd.diverged_at is not None
    assert len(sgd.losses) == sgd.diverged_at < config.steps
    assert adamw.diverged_at is None
    assert len(adamw.losses) == config.steps
    assert "SGD diverged at a learning rate of 1e+30" in capsys.readouterr().out


def test_from_the_command_line(config, tmp_path, capsys):
    command = f"""--optimizers lion --learning-rates 1e-3 --steps 2 --eval-every 2
        --checkpoint-every 2 --data {config.data.data[0]} --mesh 1 1 1
        --cache-dir {config.data.cache_dir} --output-dir {tmp_path / "new"}
        --vocab-size 300 --hidden-size 32 --num-layers 1 --sequence-length 32
        --batch-size 8 --validation-batches 2"""
    run_training_command(compare.compare, command.split())
    assert "| 0.001           | Lion        |" in capsys.readouterr().out


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("lion", "lion"), (), (0,)), "optimizers: one of them is there twice"),
        ((("lion",), (1e-3, 1e-3), (0,)), "learning_rates: one of them"),
        ((("lion",), (), (1, 1)), "seeds: one of them"),
        (((), (), (0,)), "optimizers: give at least one"),
        ((("lion",), (), ()), "seeds: give at least one"),
        ((("lion",), (0.0,), (0,)), r"learning_rate is 0\.0"),
        ((("lion",), (math.nan,), (0,)), "learning_rate is nan"),
        ((("lyon",), (), (0,)), "optimizer is 'lyon': choose one of adamw"),
        ((("sgd",), (), (0,)), "learning_rate: there is no default for sgd"),
        ((("lion",), (), (-1,)), "seed is -1"),
    ],
)
def test_a_comparison_that_cannot_be(arguments, message, config):
    with pytest.raises(InputError, match=message):
        compare.plan(*arguments, config)


def test_a_directory_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(
        InputError, match=r"output_dir: cannot make .*inside \(Not a dir"
    ):
        compare.compare(output_dir=inside, config=config)


def test_a_run_with_other_settings_is_in_the_way(config, tmp_path):
    runs = compare.plan(("lion",), (1e-3,), (0,), config)
    compare.run_all(runs, tmp_path, together=True)
    other = compare.plan(("lion",), (1e-3,), (0,), replace(config, eval_every=1))
    with pytest.raises(InputError, match=r"other settings \(eval_every\)"):
        compare.run_all(other, tmp_path, together=True)
