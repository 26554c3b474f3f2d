"""The Llama example: the comparison of optimizers, and its report."""

import csv
import math
import os
import random
import re
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

for _module in ("grain", "matplotlib", "tokenizers", "tqdm", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from matplotlib.figure import Figure
from PIL import Image

from examples.llama.config import DataConfig, ModelConfig
from examples.llama.task import LlamaTask, perplexity
from examples.training import compare, log, plots, report
from examples.training import history as history_of
from examples.training.checks import InputError
from examples.training.config import TrainConfig, settings
from examples.training.engine import Engine
from examples.training.history import Evaluation, History, Run, Side
from examples.training.trained import Trained
from tests.examples.training_fixtures import changed, named, run_command

METRICS = {"perplexity": perplexity}


pytestmark = pytest.mark.usefixtures("little_optimization")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("documents")
    generator = random.Random(0)
    words = ["the ", "optimizer ", "moves ", "a ", "weight ", "along ", "its "]
    for i in range(30):
        text = f"document {i}\n" + "".join(generator.choices(words, k=400))
        (directory / f"{i}.txt").write_text(text)
    return TrainConfig(
        LlamaTask(
            ModelConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=48,
                num_layers=1,
                num_heads=4,
                num_kv_heads=2,
            ),
            DataConfig(
                data=(str(directory),),
                cache_dir=tmp_path_factory.mktemp("cache"),
                sequence_length=32,
                batch_size=8,
                validation_batches=2,
            ),
        ),
        steps=6,
        eval_every=2,
        checkpoint_every=4,
        log_every=2,
        mesh=(1, 1, 1),
    )


def history(
    *losses, name="adamw", rate=1.0, seed=0, every=10, diverged_at=None, point=()
):
    evaluations = tuple(
        Evaluation(every * i, loss, 0.5) for i, loss in enumerate(losses, start=1)
    )
    side = Side(*named(name).values())
    run = Run(side, (("learning_rate", f"{rate:g}"), *point), seed)
    return History(run, (1.0,), evaluations, (1.0, 2.0), diverged_at)


def cells(table, line):
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


# Report


def test_first_step_at_a_loss():
    evaluations = history(4.0, 3.0, 3.5, 2.0).evaluations
    assert history_of.first_step_at(evaluations, 3.25) == 17.5
    assert history_of.first_step_at(evaluations, 3.0) == 20
    assert history_of.first_step_at(evaluations, 2.75) == 35
    assert history_of.first_step_at(evaluations, 9.0) == 10
    assert history_of.first_step_at(evaluations, 1.99) is None
    assert history_of.first_step_at([], 1.0) is None


def test_ratio_of_steps(config):
    base = history(4.0, 3.0)
    faster = history(3.5, 2.5, name="cautious_adamw")
    assert history_of.speed_up(base, faster) == 20 / 15
    text = report.text([base, faster], [config])
    assert (
        "At learning rate 1: cautious AdamW reached AdamW's final validation loss of "
        "3.0000 at step 15 of 20: a ratio of 1.33." in text
    )
    table = report.table([base, faster], METRICS)
    assert (cells(table, 2)[-1], cells(table, 3)[-1]) == ("", "1.33")

    slower = history(4.0, 3.1, name="cautious_adamw")
    assert history_of.speed_up(base, slower) is None
    assert "did not reach AdamW's" in report.text([base, slower], [config])
    assert cells(report.table([base, slower], METRICS), 3)[-1] == "not reached"


def test_several_seeds(config):
    runs = [
        history(4.0, 3.0, seed=0),
        history(4.0, 3.2, seed=1),
        history(3.5, 2.5, name="cautious_adamw", seed=0),
        history(3.2, 2.7, name="cautious_adamw", seed=1),
    ]
    table = report.table(runs, METRICS)
    assert cells(table, 2)[2] == "3.1000 (3.0000 to 3.2000)"
    # Ratios are paired by seed: 20 / 15 and 20 / 10.
    assert cells(table, 3)[-1] == "1.67 (1.33 to 2.00)"
    (line,) = report.verdicts(runs)
    assert "at step 12 (10 to 15) of 20: a ratio of 1.67 (1.33 to 2.00)." in line
    assert "seeds 0, 1 (mean and range over the seeds)." in (
        report.text(runs, [config])
    )


def test_each_at_its_best():
    runs = [
        history(9.0, base if name == "adamw" else cautious, name=name, rate=rate)
        for rate, base, cautious in ((1e-3, 4.0, 3.0), (2e-3, 5.0, 2.0))
        for name in ("adamw", "cautious_adamw")
    ]
    same, own = report.verdicts(runs)
    assert same.startswith("At learning rate 0.001, the best for AdamW: ")
    assert "at step 18 of 20: a ratio of 1.09" in same
    assert own.startswith(
        "Each at its best on these seeds, learning rate 0.001 (best of 2 points) and "
        "learning rate 0.002 (best of 2 points): "
    )
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
    assert history_of.best(runs, Side("adamw", False)) == (runs[0],)
    table = report.table(runs, METRICS)
    assert cells(table, 3)[:3] == ["4", "AdamW", "diverged at step 13"]
    assert cells(table, 5)[-1] == ""
    report.write(runs, [config], tmp_path)
    (line,) = report.verdicts([lost, runs[2]])
    assert "no comparison, because at every point AdamW diverged" in line
    report.write([lost], [config], tmp_path)


def test_a_diverged_run_has_no_ratio_of_steps():
    runs = [
        *(history(4.0, 3.0, seed=seed) for seed in (0, 1)),
        history(3.5, 2.5, name="cautious_adamw", seed=0, diverged_at=25),
        history(3.5, 2.5, name="cautious_adamw", seed=1),
        *(
            history(3.5, 3.2, name="cautious_adamw", rate=4.0, seed=seed)
            for seed in (0, 1)
        ),
    ]
    assert history_of.speed_up(runs[0], runs[2]) is None
    assert cells(report.table(runs, METRICS), 3)[-1] == ""
    same, _ = report.verdicts(runs)
    assert same.endswith("cautious AdamW diverged with 1 of 2 seeds.")


def test_runs_evaluated_once_have_no_ratio_of_steps(config):
    runs = [
        history(loss + seed / 10, name=name, seed=seed)
        for name, loss in (("adamw", 3.0), ("cautious_adamw", 2.5))
        for seed in (0, 1)
    ]
    assert history_of.speed_up(runs[0], runs[2]) is None
    assert "atio of steps" not in report.text(runs, [config])
    (line,) = report.verdicts(runs)
    assert (
        "AdamW ended at a validation loss of 3.0500, cautious AdamW at 2.5500." in line
    )
    assert "differ by -0.5000" in line
    assert "step" not in line


def test_the_arrow_shows_the_mean_ratio_of_the_table():
    runs = [
        history(4.0, 3.0, seed=0),
        history(4.0, 3.2, seed=1),
        history(3.5, 2.5, name="cautious_adamw", seed=0),
        history(3.2, 2.7, name="cautious_adamw", seed=1),
    ]
    axes = Figure().subplots()
    plots._plot_curves(axes, runs)
    labels = [text.get_text() for text in axes.texts if text.get_text()]
    assert labels == ["ratio of steps: 1.67"]
    axes = Figure().subplots()
    slow = history(3.9, 3.3, name="cautious_adamw", seed=1)
    plots._plot_curves(axes, [*runs[:3], slow])
    assert not axes.texts  # The slow run never reaches the loss.


def test_an_optimizer_without_its_base_is_not_compared():
    runs = [history(4.0, 3.0, name="cautious_lion"), history(4.0, 3.0)]
    assert history_of.pairs(runs) == []
    assert report.verdicts(runs) == []
    assert cells(report.table(runs, METRICS), 2)[-1] == ""


def test_the_figure_has_another_panel_for_several_learning_rates(tmp_path):
    runs = [history(4.0, 3.0, rate=rate) for rate in (1e-3, 2e-3)]
    plots.plot(runs, tmp_path / "two.png")
    plots.plot(runs[:1], tmp_path / "one.png")
    with (
        Image.open(tmp_path / "two.png") as two,
        Image.open(tmp_path / "one.png") as one,
    ):
        assert two.width > 1.5 * one.width
        assert len(one.convert("RGB").getcolors(maxcolors=2**24) or ()) > 10


def test_runs_of_a_sweep_that_were_evaluated_once_have_no_curves(tmp_path, monkeypatch):
    """Nor do long names of runs run over the edge of the figure."""
    figures = []

    class Recorded(Figure):
        def savefig(self, *args, **kwargs):
            figures.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(plots, "Figure", Recorded)
    names = [
        f"{side}-learning_rate=0.002-seed0" for side in ("adamw", "cautious-adamw")
    ]
    for losses in ([3.0], [4.0, 3.0]):
        runs = [history(*losses, point=(("from_run", name),)) for name in names]
        plots.plot(runs, tmp_path / "report.png")
    once, curves = ([axes.get_title() for axes in figure.axes] for figure in figures)
    assert once == ["Final loss"]
    assert curves == ["Each optimizer at its best", "Final loss"]
    for figure in figures:
        bounds = figure.bbox.padded(1)
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert bounds.x0 <= box.x0
            assert box.x1 <= bounds.x1


def test_a_heat_map_distinguishes_missing_from_diverged_runs():
    points = [(("b1", b1), ("b2", b2)) for b1 in "12" for b2 in "34"]
    runs = [
        history(9.0, loss, point=point, diverged_at=lost)
        for point, loss, lost in zip(points, (1.0, 2.0, 3.0), (None, None, 20))
    ]
    figure = Figure()
    panels = [figure.subplots()]
    swept = [("b1", ["1", "2"]), ("b2", ["3", "4"])]
    plots._plot_maps(panels, runs, [runs[0].run.side], swept)
    shown = {text.get_position(): text.get_text() for text in panels[0].texts}
    assert shown == {(0, 0): "1.000", (0, 1): "2.000", (1, 0): "diverged"}
    colors = {text.get_text(): text.get_color() for text in panels[0].texts}
    assert colors["diverged"] == "k"


def test_default_rates_of_two_optimizers_are_not_a_sweep():
    runs = [
        history(4.0, 3.0, name=name, rate=rate, point=(("b1", b1), ("b2", b2)))
        for name, rate in (("adamw", 2e-3), ("lion", 5e-4))
        for b1, b2 in (("0.95", "0.9"), ("0.9", "0.9"))
    ]
    assert plots._swept(runs) == [("b1", ["0.9", "0.95"])]
    more = [
        history(4.0, 3.0, rate=2e-3, point=(("b1", "0.9"), ("b2", b2)))
        for b2 in ("0.99", "0.999")
    ]
    assert [name for name, _ in plots._swept([*runs, *more])] == ["b2", "b1"]


def test_the_report_lists_all_sizes_and_steps(config):
    deeper = changed(config, model={"num_layers": 2}, steps=9)
    text = report.text([history(4.0, 3.0)], [config, deeper, config])
    assert re.match(r"[\d,]+ or [\d,]+ parameters, 6 or 9 steps of 8 x 32 tok", text)


# Comparison


RATES = {"learning_rate": ["1e-3", "2e-3"]}


def test_plan(config):
    caution = changed(config, optimizer={"min_fraction": 0.1})
    runs = compare.plan(("lion",), RATES, (0, 1), caution)
    assert len(runs) == 8
    assert len({run.name for run in runs}) == 8
    for run, planned in runs.items():
        optimizer = planned.optimizer
        assert (optimizer.optimizer, optimizer.caution) == run.side
        assert dict(run.point) == {"learning_rate": f"{optimizer.learning_rate:g}"}
        assert planned.seed == run.seed
        assert optimizer.min_fraction == (0.1 if run.side.caution else 1e-3)


def test_a_learning_rate_that_is_not_swept(config):
    for given, sweep, rate in (
        (config, {}, "0.0005"),
        (changed(config, optimizer={"learning_rate": 3e-4}), {}, "0.0003"),
        (
            changed(config, optimizer={"learning_rate": 3e-4}),
            {"learning_rate": ["1e-3"]},
            "0.001",
        ),
    ):
        for run in compare.plan(("lion",), sweep, (0,), given):
            assert run.point == (("learning_rate", rate),)


def test_any_setting_is_swept_and_those_of_caution_only_with_caution(config):
    sweep = compare.parse_sweep(
        ["b1=0.8,0.9", "--opposed-weight=0,0.5", "num_layers=1,2"]
    )
    runs = compare.plan(("adamw",), sweep, (0,), config)
    plain = [run for run in runs if not run.side.caution]
    assert (len(plain), len(runs)) == (4, 12)
    assert len({run.name for run in runs}) == 12
    for run, planned in runs.items():
        for name, value in run.point:
            found = settings(planned)[name]
            found = planned.learning_rate if name == "learning_rate" else found
            assert found == pytest.approx(float(value))
    turns = {}
    for run, planned in runs.items():
        turns.setdefault((planned.optimizer.b1, planned.task.model), []).append(run)
    assert {len(group) for group in turns.values()} == {3}


def test_values_of_several_parts_and_paths(config):
    sweep = compare.parse_sweep(
        [
            "exempt=none,embedding logits",
            "mesh=1 1 1,none",
            "tokenizer=a/b",
            "remat=none,full",
        ]
    )
    runs = compare.plan(("adamw",), sweep, (0,), config)
    cautious = {
        (c.optimizer.exempt, c.mesh) for run, c in runs.items() if run.side.caution
    }
    assert cautious == {
        (exempt, mesh)
        for exempt in ((), ("embedding", "logits"))
        for mesh in ((1, 1, 1), None)
    }
    assert {c.task.data.tokenizer for c in runs.values()} == {"a/b"}
    assert {c.task.model.remat for c in runs.values()} == {"none", "full"}
    assert all(Path(run.name).name == run.name for run in runs)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["b1"], "sweep: cannot parse 'b1'; pass a setting and its values"),
        (["b1="], "sweep: cannot parse 'b1='"),
        (["b1=0.8,0.8"], "sweep: b1 repeats a value"),
        (["b1=0.8", "b1=0.9"], "sweep: b1 is given twice"),
        (["seed=0,1"], "sweep: seed cannot be swept; use --seeds"),
        (["optimizer=lion"], "sweep: optimizer cannot be swept; use --optimizers"),
        (["caution=true"], "sweep: caution cannot be swept; each optimizer is trained"),
        (["b3=0.8"], "b3 is not a setting"),
        (["b1=high"], "b1: invalid value 'high'"),
        (["b1=2"], r"b1 must be .*, got 2\.0"),
        (["neutral=hold,move"], "neutral: invalid value 'move'"),
    ],
)
def test_an_invalid_sweep_is_rejected(sweep, message, config):
    with pytest.raises(InputError, match=message):
        compare.plan(("adamw",), compare.parse_sweep(sweep), (0,), config)


def test_the_interval_is_students_t_of_the_differences():
    base, other = [3.0, 3.2, 3.1], [2.9, 3.0, 3.05]
    mean, low, high = history_of.paired_difference(base, other)
    differences = [o - b for o, b in zip(other, base)]
    assert mean == pytest.approx(statistics.fmean(differences))
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)  # t(0.975, 2)
    assert (low, high) == pytest.approx((mean - half, mean + half))


def test_verdicts_of_several_seeds_have_an_interval():
    base = [history(4.0, loss, seed=i) for i, loss in enumerate((3.0, 3.1, 3.2))]
    clear = [
        history(3.0, loss, seed=i, name="cautious_adamw")
        for i, loss in enumerate((2.5, 2.62, 2.7))
    ]
    (line,) = report.verdicts(base + clear)
    assert "differ by -0.4933 (95% confidence interval" in line
    assert "3 seeds)." in line
    assert "No difference" not in line
    unclear = [
        history(3.0, loss, seed=i, name="cautious_adamw")
        for i, loss in enumerate((3.3, 2.9, 3.1))
    ]
    (line,) = report.verdicts(base + unclear)
    assert line.endswith("No difference seen.")


def test_two_swept_settings_are_heat_maps_on_one_scale(tmp_path):
    runs = [
        history(
            9.0, loss + (name == "adamw"), name=name, rate=rate, point=(("b1", b1),)
        )
        for name in ("adamw", "cautious_adamw")
        for rate, b1, loss in (
            (1e-3, "0.9", 3.0),
            (2e-3, "0.9", 3.1),
            (1e-3, "0.98", 3.2),
            (2e-3, "0.98", math.inf),
        )
    ]
    plots.plot(runs, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.width > 2500
    table = report.table(runs, METRICS)
    assert cells(table, 0)[:3] == ["learning rate", "b1", "optimizer"]


@pytest.mark.parametrize("together", [True, False])
def test_compare_from_end_to_end(together, config, tmp_path, capsys):
    directory = tmp_path / "new"

    def run():
        compare.compare(
            ("lion",), ("learning_rate=1e-3",), (0,), directory, together, config=config
        )

    run()
    names = "lion", "cautious-lion"
    sides = Side("lion", False), Side("lion", True)
    histories = [
        history_of.read_history(
            Run(side, (("learning_rate", "0.001"),), 0),
            directory / f"{name}-learning_rate=0.001-seed0",
        )
        for name, side in zip(names, sides)
    ]
    for ours in histories:
        for values in ours.aligned_fractions.values():
            assert values.shape[0] == 3
            assert ((values >= 0) & (values <= 1)).all()
    assert (directory / "aligned.png").is_file()
    with (directory / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for ours, part in zip(histories, (rows[:6], rows[6:])):
        found = {(row["optimizer"], row["caution"] == "True") for row in part}
        assert found == {ours.run.side}
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

    # Everything is finished, so nothing is trained again.
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.jsonl")}
    run()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (directory / "report.md").read_text() == text


def test_caution_changes_the_run_and_the_order_of_turns_does_not(config, tmp_path):
    runs = compare.plan(("adamw",), {"learning_rate": ["1e-2"]}, (3,), config)
    for together in (True, False):
        directory = tmp_path / str(together)
        compare.run_all(runs, ["learning_rate"], directory, together)
    losses = [
        [record["loss"] for record in log.read(tmp_path / together / run.name)]
        for together in ("True", "False")
        for run in runs
    ]
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
    assert losses[0][0] == losses[1][0]


def test_the_report_needs_no_checkpoints(config, tmp_path, capsys):
    def run():
        compare.compare(("lion",), (), (0,), tmp_path, config=config)
        return (tmp_path / "report.md").read_text()

    text = run()
    for directory in tmp_path.glob("*/checkpoints"):
        shutil.rmtree(directory)
    assert run() == text


def test_a_diverged_run_ends_and_the_other_continues(config, tmp_path, capsys):
    both = changed(config, optimizer={"max_grad_norm": None})
    runs = compare.plan(("sgd",), {"learning_rate": ["1e30"]}, (0,), both)
    runs = {
        run: changed(c, optimizer={"optimizer": "adamw", "learning_rate": 1e-3})
        if run.side.caution
        else c
        for run, c in runs.items()
    }
    assert compare.run_all(runs, (), tmp_path, together=True)
    sgd, adamw = (history_of.read_history(run, tmp_path / run.name) for run in runs)
    assert sgd.diverged_at is not None
    assert len(sgd.losses) == sgd.diverged_at < config.steps
    assert adamw.diverged_at is None
    assert len(adamw.losses) == config.steps
    assert "SGD diverged at learning rate 1e+30, seed 0" in capsys.readouterr().out


def test_from_the_command_line(config, tmp_path, capsys):
    data = config.task.data
    command = f"""--optimizers lion --sweep learning_rate=1e-3 --steps 6 --eval-every 2
        --checkpoint-every 4 --log-every 2 --data {data.data[0]} --mesh 1 1 1
        --cache-dir {data.cache_dir} --output-dir {tmp_path / "new"}
        --vocab-size 300 --hidden-size 32 --intermediate-size 48 --num-layers 1
        --sequence-length 32 --batch-size 8 --validation-batches 2"""
    run_command("compare", command.split())
    text = capsys.readouterr().out
    assert "| 0.001           | Lion          |" in text
    assert "| 0.001           | cautious Lion |" in text


def test_the_best_models_are_shown_with_their_own_settings(
    config, tmp_path, monkeypatch
):
    shown = {}

    def show(task, models, data, directory):
        shown.update({name: model.task for name, model in models().items()})
        return []

    def load_trained(source, task):
        (planned,) = [c for run, c in runs.items() if run.name == source.run_dir.name]
        return Trained(planned, 6, {})

    runs = compare.plan(("adamw",), {"num_layers": ["1", "2"]}, (0,), config)
    monkeypatch.setattr(LlamaTask, "show", show)
    monkeypatch.setattr(compare, "load_trained", load_trained)
    monkeypatch.setattr(compare, "is_loadable", lambda directory: True)
    histories = [
        replace(history(9.0, loss), run=run)
        for run, loss in zip(runs, (1.0, 2.0, 2.0, 1.0))
    ]
    compare.show_best(histories, runs, tmp_path)
    assert {name: task.model.num_layers for name, task in shown.items()} == {
        "AdamW": 1,
        "cautious AdamW": 2,
    }


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("lion", "lion"), {}, (0,)), "optimizers: pass each value only once"),
        ((("lion",), {}, (1, 1)), "seeds: pass each value only once"),
        (((), {}, (0,)), "optimizers: pass at least one"),
        ((("lion",), {}, ()), "seeds: pass at least one"),
        ((("lion",), {"learning_rate": ["0"]}, (0,)), r"must be positive, got 0\.0"),
        ((("lion",), {"learning_rate": ["nan"]}, (0,)), "must be positive, got nan"),
        ((("lyon",), {}, (0,)), "optimizer must be one of adamw, .*, got 'lyon'"),
        ((("sgd",), {}, (0,)), "learning_rate: there is no default for SGD"),
        ((("lion",), {}, (-1,)), "seed must be .*, got -1"),
    ],
)
def test_an_invalid_comparison_is_rejected(arguments, message, config):
    with pytest.raises(InputError, match=message):
        compare.plan(*arguments, config)


def test_a_directory_that_cannot_be_created(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "inside"
    with pytest.raises(
        InputError, match=r"output_dir: cannot create .*inside \(Not a dir"
    ):
        compare.compare(output_dir=inside, config=config)


def test_a_run_with_different_settings_is_not_overwritten(config, tmp_path):
    runs = compare.plan(("lion",), {}, (0,), config)
    compare.run_all(runs, (), tmp_path, together=True)
    other = compare.plan(("lion",), {}, (0,), replace(config, eval_every=1))
    with pytest.raises(InputError, match=r"different settings \(eval_every\)"):
        compare.run_all(other, (), tmp_path, together=True)
    message = r"different settings \(eval_every\); choose another --output-dir\.$"
    with pytest.raises(InputError, match=message):
        compare.compare(
            ("lion",), output_dir=tmp_path, config=replace(config, eval_every=1)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": ("adamw", "sgd")}, "eps is not a setting of sgd"),
        ({"sweep": ("exempt=none,nothing",)}, "exempt: there is no parameter 'nothin"),
    ],
)
def test_all_runs_are_checked_before_the_first(options, message, config, tmp_path):
    given = changed(config, optimizer={"eps": 1e-8, "learning_rate": 1e-3})
    with pytest.raises(InputError, match=f"^{message}"):
        compare.compare(output_dir=tmp_path, config=given, **options)
    assert not list(tmp_path.iterdir())


def test_no_run_starts_after_a_signal(config, tmp_path, monkeypatch, capsys):
    taken = []

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        taken.append(1)
        return make_state(*args, **options)

    make_state = Engine.make_state
    monkeypatch.setattr(Engine, "make_state", signalled)
    compare.compare(sweep=("b1=0.8,0.9",), output_dir=tmp_path, config=config)
    assert "Stopped. Run the same command to resume." in capsys.readouterr().out
    (begun,) = tmp_path.iterdir()
    assert (begun.name, len(taken)) == ("adamw-learning_rate=0.002-b1=0.8-seed0", 1)


def test_the_seed_and_from_are_used(config, tmp_path, capsys):
    sweep = compare.parse_sweep(["from=a/b"])
    assert sweep == {"from_run": ["a/b"]}
    other = changed(config, seed=5, steps=2)
    other = changed(other, optimizer={"caution": False, "learning_rate": 1e-3})
    compare.compare(("lion",), output_dir=tmp_path, config=other)
    said = capsys.readouterr().out
    assert said.startswith("Each optimizer is trained with and without caution.")
    assert (tmp_path / "cautious-lion-learning_rate=0.001-seed5").is_dir()


def test_runs_of_several_seeds_are_compiled_once(config, tmp_path, monkeypatch):
    lowered = []
    lower = Engine.lower

    def counting(engine, *arrays):
        lowered.append(engine.config.optimizer)
        return lower(engine, *arrays)

    monkeypatch.setattr(Engine, "lower", counting)
    # A learning rate that no other test has compiled.
    config = changed(config, optimizer={"learning_rate": 1.2e-3})
    runs = compare.plan(("adamw",), {}, (0, 1), config)
    assert compare.run_all(runs, (), tmp_path, together=False)
    assert len(runs) == 4
    assert len(lowered) == 2
    ends = [log.read(tmp_path / run.name)[-1]["validation_loss"] for run in runs]
    assert len(set(ends)) == 4
