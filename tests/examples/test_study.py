"""The study: its files, its tuning, and the page generated from them."""

import platform
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

for _module in ("grain", "orbax.checkpoint", "matplotlib", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.study import __main__ as command
from benchmarks.study import figures, outcomes, page, records
from benchmarks.study import run as study_run
from benchmarks.study.questions import (
    QUESTIONS,
    SEEDS,
    SIZES,
    TUNING_SEED,
    Arm,
    Question,
)
from examples.llama.task import PRESETS as LLAMA
from examples.training.checks import InputError
from examples.training.engine import make_engine
from examples.training.history import Evaluation, History, Run, Side

DOCS = Path(__file__).parents[2] / "docs"
BASE, CAUTIOUS = Side("adamw", False), Side("adamw", True)
QUESTION = Question(
    "Does it help?",
    "a model",
    QUESTIONS["adamw"].config,
    {"learning_rate": ("0.001", "0.002", "0.004")},
    (
        Arm("AdamW", BASE),
        Arm("cautious AdamW", CAUTIOUS, against=("AdamW",)),
        Arm(
            "follow",
            CAUTIOUS,
            {"neutral": "follow"},
            {"learning_rate": ("0.002", "0.004")},
            ("cautious AdamW", "AdamW"),
        ),
    ),
)


def loss_of(run):
    """Return a loss that is lowest at 0.004 for the published rule, else at 0.002."""
    point = dict(run.point)
    rate = float(point["learning_rate"])
    if run.side == BASE:
        return 3.0 + abs(rate - 2e-3) * 100 + 0.01 * (run.seed % 3)
    if "neutral" in point:
        return 3.0 + abs(rate - 2e-3) * 100 + 0.01 * (run.seed % 2)
    return 2.8 + abs(rate - 4e-3) * 100 + 0.01 * (run.seed % 3)


def history(run, diverged_at=None):
    loss = round(loss_of(run), 6)  # The precision of the files.
    evaluations = (
        *(
            Evaluation(step, round(loss + 1 - step / 600, 6), 0.625)
            for step in (150, 300, 450)
        ),
        Evaluation(600, loss, 0.5),
    )
    seconds = (0.5 if run.side == CAUTIOUS else 0.4,)
    scores = {} if diverged_at else {"accuracy": round(loss / 10, 6)}
    return History(run, (), evaluations, seconds, diverged_at, scores)


def answered(question=QUESTION):
    tuning = [history(run) for run in study_run.tuning_runs(question)]
    compared = study_run.compared_runs(question, tuning)
    return [*tuning, *map(history, compared)]


def test_records_round_trip(tmp_path):
    histories = answered()
    diverged = replace(
        history(histories[0].run._replace(seed=9), diverged_at=420),
        evaluations=histories[0].evaluations[:1],
    )
    records.write([*histories, diverged], tmp_path / "a.csv")
    assert records.read(tmp_path / "a.csv") == [*histories, diverged]
    assert records.read(tmp_path / "absent.csv") == []


def test_each_arm_is_compared_at_its_own_and_at_the_first_arms_best_point():
    tuning = [history(run) for run in study_run.tuning_runs(QUESTION)]
    assert len(tuning) == 3 + 3 + 2
    assert {h.run.seed for h in tuning} == {TUNING_SEED}
    runs = study_run.compared_runs(QUESTION, tuning)
    points = {(run.side, run.point) for run in runs}
    own = {
        (BASE, (("learning_rate", "0.002"),)),
        (CAUTIOUS, (("learning_rate", "0.004"),)),
        (CAUTIOUS, (("learning_rate", "0.002"), ("neutral", "follow"))),
    }
    dropped_in = {
        (CAUTIOUS, (("learning_rate", "0.002"),)),
        (CAUTIOUS, (("learning_rate", "0.004"), ("neutral", "follow"))),
    }
    assert points == own | dropped_in
    assert {run.seed for run in runs} == {*SEEDS}
    runs = study_run.compared_runs(replace(QUESTION, drop_in=False), tuning)
    assert {(run.side, run.point) for run in runs} == own
    both = replace(QUESTION, drop_in=False, drop_out=True)
    dropped_out = {
        (BASE, (("learning_rate", "0.004"),)),  # Best for the published rule.
        (CAUTIOUS, (("learning_rate", "0.002"),)),  # Best for the variant.
    }
    runs = study_run.compared_runs(both, tuning)
    assert {(run.side, run.point) for run in runs} == own | dropped_out


def test_settings_are_tuned_one_at_a_time():
    question = replace(
        QUESTION,
        grid={"learning_rate": ("0.001", "0.002", "0.004"), "b1": ("0.9", "0.8")},
        arms=QUESTION.arms[:2],
        one_at_a_time=True,
    )
    first = study_run.tuning_runs(question)
    assert [dict(run.point) for run in first][:3] == [
        {"learning_rate": rate, "b1": "0.9"} for rate in ("0.001", "0.002", "0.004")
    ]
    assert len(first) == 2 * 3
    histories = [history(run) for run in first]
    assert not outcomes.is_answered(question, histories)
    # Each arm's other setting is tuned at its own best rate: 0.002 and 0.004.
    tuning = study_run.tuning_runs(question, histories)
    added = {(r.side, *r.point) for r in tuning.keys() - first.keys()}
    assert added == {
        (BASE, ("learning_rate", "0.002"), ("b1", "0.8")),
        (CAUTIOUS, ("learning_rate", "0.004"), ("b1", "0.8")),
    }
    histories = [history(run) for run in tuning]
    assert study_run.tuning_runs(question, histories).keys() == tuning.keys()
    best = study_run.best_points(question, histories)
    assert dict(best["cautious AdamW"]) == {"learning_rate": "0.004", "b1": "0.9"}
    histories += map(history, study_run.compared_runs(question, histories))
    assert outcomes.is_answered(question, histories)
    assert "better" in page.table(question, histories)


def test_settings_are_tuned_until_the_best_point_does_not_change():
    # The best rate depends on b1: with 0.9 it is 0.002, with 0.8 it is 0.004.
    losses = {
        ("0.001", "0.9"): 3.3,
        ("0.002", "0.9"): 3.2,
        ("0.004", "0.9"): 3.4,
        ("0.002", "0.8"): 3.1,
        ("0.001", "0.8"): 3.2,
        ("0.004", "0.8"): 3.0,
    }
    question = replace(
        QUESTION,
        grid={"learning_rate": ("0.001", "0.002", "0.004"), "b1": ("0.9", "0.8")},
        arms=QUESTION.arms[:1],
        one_at_a_time=True,
    )
    histories: list[History] = []
    counts = []
    while len(runs := study_run.tuning_runs(question, histories)) > len(histories):
        counts.append(len(runs))
        histories = [
            replace(
                history(run),
                evaluations=(
                    Evaluation(600, losses[tuple(dict(run.point).values())], 1),
                ),
            )
            for run in runs
        ]
    assert counts == [3, 4, 6]
    best = study_run.best_points(question, histories)["AdamW"]
    assert dict(best) == {"learning_rate": "0.004", "b1": "0.8"}


def test_an_arm_is_tuned_at_the_best_rate_although_others_diverged():
    question = replace(
        QUESTION,
        grid={"learning_rate": ("0.001", "0.002"), "b1": ("0.9", "0.8")},
        arms=QUESTION.arms[:1],
        one_at_a_time=True,
    )
    first = study_run.tuning_runs(question)
    histories = [
        replace(history(run), diverged_at=5 if "0.001" in run.name else None)
        for run in first
    ]
    points = {run.point for run in study_run.tuning_runs(question, histories)}
    assert (("learning_rate", "0.002"), ("b1", "0.8")) in points
    assert len(points) == 3


def test_a_run_has_the_settings_of_its_arm_and_its_point():
    runs = study_run.tuning_runs(QUESTION)
    for run, config in runs.items():
        optimizer = config.optimizer
        assert optimizer.caution == run.side.caution
        assert f"{config.learning_rate:g}" == dict(run.point)["learning_rate"]
        assert (optimizer.neutral == "follow") == ("neutral" in dict(run.point))
        assert config.seed == TUNING_SEED
        assert config.task == QUESTION.config.task


def test_a_setting_can_depend_on_the_seed():
    arm = Arm("after", BASE, {"from_run": "runs/base-seed{seed}"})
    run = study_run.run_of(arm, (("learning_rate", "0.002"),), 3)
    assert dict(run.point)["from_run"] == "runs/base-seed3"


def test_an_arm_that_diverges_everywhere_is_reported():
    histories = [
        replace(h, diverged_at=7, scores={}) if h.run.side == BASE else h
        for h in map(history, study_run.tuning_runs(QUESTION))
    ]
    compared = study_run.compared_runs(QUESTION, histories)
    assert BASE not in {run.side for run in compared}
    histories += map(history, compared)
    assert "diverged at every point" in page.table(QUESTION, histories)


@pytest.mark.parametrize("count", [1, len(SEEDS)])
def test_runs_that_diverge_in_the_comparison_are_reported(count, tmp_path, monkeypatch):
    def diverge(h):
        hit = h.run.side == CAUTIOUS and h.run.seed in SEEDS[:count]
        return replace(h, diverged_at=300, evaluations=(), scores={}) if hit else h

    two = replace(QUESTION, arms=QUESTION.arms[:2])
    questions = {"maps": two, "line": replace(two, one_at_a_time=True)}
    questions |= {"score": replace(two, score="accuracy")}
    questions |= {name: two for name in SIZES[:2]}
    monkeypatch.setattr(page, "QUESTIONS", questions)
    for name, question in questions.items():
        records.write(map(diverge, answered(question)), tmp_path / f"{name}.csv")
    page.draw(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert f"diverged with {count} of 5 seeds" in text
    assert "nan" not in text
    assert "inf" not in text
    assert "no difference seen" not in text.split("## In short")[1]


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_a_page_is_drawn_if_an_arm_diverges_everywhere(
    one_at_a_time, tmp_path, monkeypatch
):
    question = replace(
        QUESTION, arms=QUESTION.arms[:2], one_at_a_time=one_at_a_time, drop_in=False
    )
    histories = [
        replace(h, diverged_at=7, scores={}) if h.run.side == BASE else h
        for h in map(history, study_run.tuning_runs(question))
    ]
    histories += map(history, study_run.compared_runs(question, histories))
    records.write(histories, tmp_path / "a.csv")
    monkeypatch.setattr(page, "QUESTIONS", {"a": question})
    page.draw(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "diverged at every point" in text
    assert "inf" not in text
    assert "0.00" not in text.split("save time as well as steps?")[1]
    assert ("results/a.png" in text) == (tmp_path / "a.png").exists()


def test_arms_with_the_same_losses_are_reported():
    histories = [
        h
        if h.run.side == BASE or "neutral" in dict(h.run.point)
        else replace(h, evaluations=(Evaluation(600, 2.5, 0.5),))
        for h in answered()
    ]
    # At 0.002 and 0.004 with the tuning seed, and at 0.002 with five others, of which
    # only seed 1 has equal losses.
    assert outcomes.equal_arms(QUESTION, histories) == [
        "follow has the same loss as AdamW at every evaluation in 3 of 7 pairs of runs "
        "with the same grid point and seed.",
    ]
    at_once = [replace(h, evaluations=(), diverged_at=1) for h in answered()]
    assert outcomes.equal_arms(QUESTION, at_once) == []


def test_runs_that_answer_two_questions_are_summarized_once(tmp_path, monkeypatch):
    two = replace(QUESTION, arms=QUESTION.arms[:2])
    monkeypatch.setattr(page, "QUESTIONS", {"a": two, "b": QUESTION})
    for name, question in page.QUESTIONS.items():
        records.write(answered(question), tmp_path / f"{name}.csv")
    page.draw(tmp_path, tmp_path / "results.md")
    summary = (tmp_path / "results.md").read_text().split("\n## ")[1]
    rows = [line.split("|") for line in summary.splitlines() if line[:3] == "| ["]
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [
        ("cautious AdamW", "AdamW"),
        ("follow", "cautious AdamW"),
    ]


def test_the_table_shows_intervals_and_verdicts():
    lines = page.table(QUESTION, answered()).splitlines()
    base, drop_in, own, dropped, follow, follow_base = lines[2:]
    assert "| AdamW" in base
    assert "3.0120 (3.0000 to 3.0200)" in base
    assert "cautious AdamW, at the settings of AdamW" in drop_in
    assert "learning rate 0.002" in drop_in
    assert "+0.0000 (+0.0000 to +0.0000)" in drop_in
    assert "no difference seen" in drop_in
    # Paired by seed, the published rule differs by the same for every seed.
    assert "-0.2000 (-0.2000 to -0.2000)" in own
    assert "better" in own
    assert "worse" in dropped
    assert "worse" in follow
    assert "not reached with 5 of 5 seeds" in follow
    assert "no difference seen" in follow_base


def test_the_table_shows_what_turning_off_caution_does():
    question = replace(QUESTION, arms=QUESTION.arms[:2], drop_in=False, drop_out=True)
    _, own, off = page.table(question, answered(question)).splitlines()[2:]
    assert "at the settings of" not in own
    cells = [cell.strip() for cell in off.split("|")]
    assert cells[1:3] == ["cautious AdamW", "learning rate 0.004"]
    assert cells[4] == "AdamW, at the settings of cautious AdamW"
    assert cells[5].startswith("-0.4000 ")


def test_a_higher_score_is_better():
    question = replace(QUESTION, score="accuracy", drop_in=False)
    own = page.table(question, answered(question)).splitlines()[3]
    assert "-0.0200 (-0.0200 to -0.0200)" in own
    assert "worse" in own


def test_a_question_without_all_its_runs_is_not_answered(tmp_path):
    histories = answered()
    assert outcomes.is_answered(QUESTION, histories)
    assert not outcomes.is_answered(QUESTION, histories[:-1])


def test_runs_that_no_comparison_uses_are_counted():
    used = answered()
    assert outcomes.unused_runs(QUESTION, used) == set()
    point = (("learning_rate", "0.001"),)
    runs = [Run(CAUTIOUS, point, seed) for seed in (TUNING_SEED, 1, 2)]
    found = outcomes.unused_runs(QUESTION, [*used, *map(history, runs)])
    assert found == {*runs[1:]}


def test_best_points_on_the_grid_edge_are_reported():
    run = Run(CAUTIOUS, (("learning_rate", "0.001"), ("neutral", "follow")), 0)
    lines = outcomes.edges(QUESTION, [*answered(), history(run)])
    assert lines == [
        "The best learning rate for cautious AdamW, 0.004, is the largest in the grid.",
        "The best learning rate for follow, 0.002, is the smallest in the grid. "
        "Outside the grid, 0.001 ended at 3.1000 instead of 3.0000 (seed 0).",
    ]


def test_good_points_are_counted():
    base, cautious, _ = outcomes.robustness(QUESTION, answered())
    # AdamW: 3.1, 3.0 and 3.2; the published rule: 3.1, 3.0 and 2.8.
    assert base[1:] == (3.0, 1, 0, 3)
    assert cautious[1:] == (2.8, 1, 1, 3)


def test_times_of_runs_that_took_turns_are_compared():
    cautious, follow = outcomes.time_ratios(QUESTION, answered())
    assert cautious[2:] == ((0.5, 0.4), 1.25, 1.25, 1.25, 3)
    assert follow[2:] == ((0.5, 0.5), 1.0, 1.0, 1.0, 2)
    assert follow.other.title == "cautious AdamW"


def test_answering_tunes_one_setting_after_the_other(tmp_path, monkeypatch):
    def run_all(runs, swept, directory, together):
        for run in runs:
            (directory / run.name).mkdir()
        return True

    monkeypatch.setattr(study_run.compare, "run_all", run_all)
    monkeypatch.setattr(study_run, "read_history", lambda run, _: history(run))
    grid = {"learning_rate": ("0.001", "0.002", "0.004"), "b1": ("0.9", "0.8")}
    question = replace(
        QUESTION, grid=grid, arms=QUESTION.arms[:2], one_at_a_time=True, drop_in=False
    )
    path = tmp_path / "a.csv"
    assert study_run.answer(question, path, tmp_path)
    assert outcomes.is_answered(question, records.read(path))
    assert len(records.read(path)) == 2 * (3 + 1) + 2 * len(SEEDS)


def test_runs_are_trained_once_and_kept_in_order(tmp_path, monkeypatch):
    trained, groups = [], []

    def run_all(runs, swept, directory, together):
        assert together
        groups.append([*runs])
        for run in runs:
            trained.append(run)
            (directory / run.name).mkdir()
        return len(trained) < 8 or not stopping

    stopping = True
    monkeypatch.setattr(study_run.compare, "run_all", run_all)
    monkeypatch.setattr(study_run, "read_history", lambda run, _: history(run))
    path = tmp_path / "a.csv"
    assert not study_run.answer(QUESTION, path, tmp_path)
    assert len(records.read(path)) == 5  # The last of three points was stopped.
    # Runs with the same point and seed take turns.
    assert [len(runs) for runs in groups] == [2, 3, 3]
    stopping = False
    for directory in tmp_path.iterdir():
        if directory.is_dir():
            directory.rmdir()
    assert study_run.answer(QUESTION, path, tmp_path)
    assert [h.run for h in records.read(path)] == [h.run for h in answered()]
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    count = len(trained)
    assert study_run.answer(QUESTION, path, tmp_path)
    assert len(trained) == count


def test_a_run_that_another_question_has_is_copied(tmp_path, monkeypatch):
    trained = []

    def run_all(runs, swept, directory, together):
        for run in runs:
            trained.append(run)
            (directory / run.name).mkdir()
        return True

    monkeypatch.setattr(study_run.compare, "run_all", run_all)
    monkeypatch.setattr(study_run, "read_history", lambda run, _: history(run))
    two = replace(QUESTION, arms=QUESTION.arms[:2])
    records.write(answered(two), tmp_path / "two.csv")
    others = [(two, tmp_path / "two.csv"), (QUESTION, tmp_path / "absent.csv")]
    path = tmp_path / "three.csv"
    assert study_run.answer(QUESTION, path, tmp_path, others)
    assert outcomes.is_answered(QUESTION, records.read(path))
    assert {dict(run.point).get("neutral") for run in trained} == {"follow"}
    for h in records.read(path):
        assert not h.seconds  # None of them took turns with all runs at its point.
        assert replace(h, seconds=()) == replace(history(h.run), seconds=())
    # With another configuration, it is another run.
    shorter = replace(two, config=replace(two.config, steps=300))
    trained.clear()
    others = [(shorter, tmp_path / "two.csv")]
    assert study_run.answer(QUESTION, tmp_path / "other.csv", tmp_path, others)
    assert {run.side for run in trained} == {BASE, CAUTIOUS}
    assert outcomes.is_answered(QUESTION, records.read(tmp_path / "other.csv"))
    assert all(h.seconds for h in records.read(tmp_path / "other.csv"))


def test_the_models_to_start_from_are_trained(tmp_path, monkeypatch):
    trained = {}

    def run_all(runs, swept, directory, together):
        trained.update({str(directory / run.name): c for run, c in runs.items()})
        return False

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_run.compare, "run_all", run_all)
    question = QUESTIONS["glue"]
    path = shutil.copy(DOCS / "results" / "glue.csv", tmp_path)
    assert study_run.answer(question, Path(path), tmp_path)
    assert not trained
    histories = records.read(Path(path))
    records.write(histories[1:], Path(path))
    assert not study_run.answer(question, Path(path), tmp_path)
    point = (("learning_rate", "0.001"),)
    needed = {
        dict(study_run.run_of(arm, point, seed).point)["from_run"]
        for arm in question.arms
        for seed in (TUNING_SEED, *SEEDS)
    }
    assert trained.keys() == needed
    assert {(c.task, c.steps) for c in trained.values()} == {
        (LLAMA["demo"].task, LLAMA["demo"].steps)
    }


def test_runs_on_another_text_are_refused(monkeypatch):
    """The Llamas' text is the standard library of the Python that runs the study."""
    monkeypatch.setattr(command, "PYTHON", (3, 0))
    with pytest.raises(InputError, match=r"library of Python 3.0; use it, or pass ano"):
        command.run(("adamw",))
    with pytest.raises(InputError, match="unknown question: adam; choose from adamw, "):
        command.run(("adam",))


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_can_be_planned(name, tmp_path):
    question = QUESTIONS[name]
    titles = [arm.title for arm in question.arms]
    assert len({*titles}) == len(titles)
    assert all({*arm.against} <= {*titles} for arm in question.arms)
    assert not question.arms[0].against
    configs: dict[str, Run] = {}
    for run, config in study_run.tuning_runs(question).items():
        make_engine(config)
        assert configs.setdefault(str(config), run) == run
    if "b1" not in question.grid:
        assert question.config.optimizer.b1 == 0.9  # As the page says.
    assert len(question.seeds) > 1
    assert TUNING_SEED not in question.seeds
    # The file keeps the order of the settings, by which runs are found again.
    histories = [
        replace(history(run), scores={}) for run in study_run.tuning_runs(question)
    ]
    records.write(histories, tmp_path / "a.csv")
    assert [h.run for h in records.read(tmp_path / "a.csv")] == [
        h.run for h in histories
    ]


@pytest.mark.filterwarnings("ignore:Precision loss")  # Equal for all seeds.
def test_a_page_of_answers_is_drawn(tmp_path, monkeypatch):
    """Every kind of section is drawn, from made-up runs."""
    two = replace(QUESTION, arms=QUESTION.arms[:2])
    questions = {"three": QUESTION, "score": replace(QUESTION, score="accuracy")}
    questions |= {name: two for name in SIZES[:2]}
    questions["line"] = replace(two, one_at_a_time=True)
    monkeypatch.setattr(page, "QUESTIONS", questions)
    for name, question in questions.items():
        records.write(answered(question), tmp_path / f"{name}.csv")
    page.draw(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "Not answered yet" not in text
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert figures == {*questions, "sizes", "during"}
    for title in (
        "In short",
        "Does the effect grow or shrink",
        "Does the difference last?",
        "Does caution save time as well as steps?",
    ):
        assert f"## {title}" in text
    short = text.split("## In short")[1].split("\n## ")[0]
    rows = [line.split("|")[2:5] for line in short.splitlines() if line[:3] == "| ["]
    assert "With b1 0.9 on both sides" in short
    assert "\n- cautious AdamW, better: [a model](#does-it-help)" in short
    # Each arm against the first of its others, and equal runs once for each measure.
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["cautious AdamW", "AdamW", "validation loss"],
        ["follow", "cautious AdamW", "validation loss"],
        ["cautious AdamW", "AdamW", "accuracy"],
        ["follow", "cautious AdamW", "accuracy"],
    ]
    # The same files result in a byte-identical page and figures.
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.glob("*.png"):
        path.unlink()
    page.draw(tmp_path, tmp_path / "results.md")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_variants_that_are_better_at_all_sizes_come_first(tmp_path, monkeypatch):
    def draw(losses):
        """Draw the page if the variant's losses at two sizes were these."""
        for name, loss in zip(("small", "large"), losses, strict=True):
            histories = [
                replace(
                    h, evaluations=(Evaluation(600, loss + 0.01 * h.run.seed, 0.5),)
                )
                if "neutral" in dict(h.run.point)
                else h
                for h in answered()
            ]
            records.write(histories, tmp_path / f"{name}.csv")
        page.draw(tmp_path, tmp_path / "results.md")
        return (tmp_path / "results.md").read_text()

    monkeypatch.setattr(page, "QUESTIONS", {"small": QUESTION, "large": QUESTION})
    monkeypatch.setattr(page, "RULES", ("small", "large"))
    zero = "with intervals that exclude zero"
    assert f"{zero}: follow.**" in draw([2.6, 2.6])
    text = draw([2.6, 2.9])
    assert f"{zero}: none.** Tried at both: follow." in text
    assert "These end lower at one of them: follow (1,068,928)." in text


def test_differences_at_each_step_are_paired_by_seed():
    def comparison(losses):
        """Compare runs with these final losses; the other's are 3.0, 3.1 and 3.3."""
        arm, other = QUESTION.arms[1], QUESTION.arms[0]
        own, others = (
            tuple(
                History(
                    Run(arm.side, (), seed),
                    (),
                    (Evaluation(300, loss + seed, 0.5), Evaluation(600, loss, 0.5)),
                    (),
                )
                for seed, loss in enumerate(of_arm)
            )
            for arm, of_arm in ((arm, losses), (other, (3.0, 3.1, 3.3)))
        )
        return outcomes.Comparison(arm, other, own, others[::-1], None, "")

    first, second = comparison((2.9, 3.0, 3.1)), comparison((3.0, 3.3, 3.8))
    by_step = second.differences_by_step
    assert {step: sorted(values) for step, values in by_step.items()} == {
        step: pytest.approx([0.0, 0.2, 0.5]) for step in (300, 600)
    }
    assert sorted(second.differences) == pytest.approx([0.0, 0.2, 0.5])
    # Welch's interval by its formula, with t of 2.62 degrees of freedom.
    found = outcomes.difference_of_differences(first, second)
    variances = [statistics.variance(c.differences) / 3 for c in (first, second)]
    freedom = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
    half = scipy.stats.t.ppf(0.975, freedom) * sum(variances) ** 0.5
    mean = 0.7 / 3 + 0.4 / 3
    assert found == pytest.approx((mean, mean - half, mean + half))


def test_a_diverged_run_has_no_mark_in_the_figure_of_sizes(tmp_path, monkeypatch):
    drawn = []

    class Recorded(Figure):
        def savefig(self, *args, **kwargs):
            drawn.append(self)

    monkeypatch.setattr(figures, "Figure", Recorded)
    arm, other = QUESTION.arms[1], QUESTION.arms[0]

    def marks(diverged_at):
        own, others = (
            tuple(
                History(
                    Run(of_arm.side, (), seed),
                    (),
                    (Evaluation(300, 3.5, 0.5), Evaluation(600, loss, 0.5)),
                    (),
                    diverged_at if of_arm is arm and seed == 1 else None,
                )
                for seed in (1, 2)
            )
            for of_arm, loss in ((arm, 2.9), (other, 3.0))
        )
        comparison = outcomes.Comparison(arm, other, own, others, None, "")
        figures.plot_sizes([(10**6, comparison)], tmp_path / "sizes.png")
        return sum(line.get_marker() in ("o", "v") for line in drawn[-1].axes[1].lines)

    assert (marks(None), marks(600)) == (2, 0)


def test_headlines_are_results():
    """Each difference that the documents name is in a row of the results."""
    rows = re.findall(
        r"([-+]\d\.\d{4}) \((\S+) to (\S+)\) *\|[^|]*\| *(\d\.\d\d)?",
        (DOCS / "results.md").read_text(),
    )
    in_table = r"\| ([-+]\d\.\d{3}) \((\S+) to (\S+)\)[^|]*\| (\d\.\d\d)?"
    in_text = r"([-+]?\d\.\d{3})\s+to\s+([-+]?\d\.\d{3})"
    signed = [(*(f"{float(x):+.3f}" for x in row), ratio) for *row, ratio in rows]
    unsigned = {
        (*sorted(f"{abs(float(x)):.3f}" for x in ends),): f"{abs(float(mean)):.3f}"
        for mean, *ends, _ in rows
    }
    for name, count in (("../README.md", 9), ("index.md", 9)):
        found = re.findall(in_table, (DOCS / name).read_text())
        assert len(found) == count
        assert {*found} <= {*signed}
    for name, count in (("usage.md", 9), ("mae.md", 1), ("glue.md", 5)):
        text = (DOCS / name).read_text()
        found = [*re.finditer(in_text, text)]
        assert len(found) == count
        for match in found:
            ends = (*sorted(end.lstrip("-+") for end in match.groups()),)
            assert unsigned[ends] in text[match.start() - 100 : match.start()]
    (ratio,) = re.findall(r"ratio is (\d\.\d\d)", (DOCS / "llama.md").read_text())
    assert ratio in {ratio for *_, ratio in rows}


def _best(name):
    """Return the settings and the runs of each arm at its best point, by title."""
    question = QUESTIONS[name]
    histories = records.read(DOCS / "results" / f"{name}.csv")
    best = study_run.best_points(question, histories)
    return {
        arm.title: (
            dict(best[arm.title]),
            study_run.group_at(question, arm, best[arm.title], histories),
        )
        for arm in question.arms
    }


def test_what_the_documentation_says_about_lion_and_muon():
    low, high = _best("lion"), _best("lion-0.98")
    for of in (low, high):
        assert of["Lion"][0]["b1"] == "0.6"
        assert of["cautious Lion"][0]["b1"] == "0.8"
    lion, cautious = QUESTIONS["lion"].arms
    runs = high[cautious.title][1], low[lion.title][1]
    better = outcomes.Comparison(cautious, lion, *runs, None, "")
    assert better.verdict == "no difference seen"
    assert _mean_loss(low["Lion"][1]) < _mean_loss(low["cautious Lion"][1])
    assert _mean_loss(high["cautious Lion"][1]) < _mean_loss(high["Lion"][1])
    muon = [settings["b1"] for settings, _ in _best("muon").values()]
    assert muon == ["0.6", "0.4", "0.6"]


def _mean_loss(group):
    return statistics.fmean(h.final_loss for h in group)


def test_what_the_documentation_says_about_the_gain_during_training():
    text = (DOCS / "results.md").read_text()
    text = text.split("## Does the difference last?")[1].split("\n## ")[0]

    def differences(name):
        start = f"| [{QUESTIONS[name].title}]("
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        return [float(cell.split()[0]) for cell in row.split("|")[4:8]]

    for early, _, late, last in map(differences, SIZES):
        assert abs(last) < 0.6 * abs(early)
        assert abs(last - late) < 0.01
    assert differences("mae") == sorted(differences("mae"), reverse=True)


def _lowest_by_b1(name, caution):
    """Return the lowest loss of the tuning runs for each b1."""
    lowest = {}
    for history in records.read(DOCS / "results" / f"{name}.csv"):
        if (history.run.side.caution, history.run.seed) == (caution, TUNING_SEED):
            b1 = dict(history.run.point)["b1"]
            lowest[b1] = min(history.final_loss, lowest.get(b1, float("inf")))
    return lowest


def test_what_the_documentation_says_about_the_aligned_fraction():
    for name, fraction in (("size-0.3m", 0.45), ("size-9m", 0.6)):
        by_b1 = {
            b1: [
                h.evaluations[-1].aligned_fraction
                for h in records.read(DOCS / "results" / f"{name}.csv")
                if h.run.side.caution and dict(h.run.point)["b1"] == b1
            ]
            for b1 in ("0.8", "0.9")
        }
        assert by_b1["0.9"] == pytest.approx([fraction] * len(by_b1["0.9"]), abs=0.02)
        assert min(by_b1["0.8"]) > max(by_b1["0.9"])


@pytest.mark.parametrize(
    ("name", "excess"),
    [(name, 0.005) for name in ("size-0.3m", "adamw", "size-4m", "mae")]
    + [("size-9m", 0.034)],
)
def test_what_the_documentation_says_about_b1(name, excess):
    """How far above the best b1 the recommended values end."""
    for caution, b1, at_most in (
        (True, "0.9", excess),
        (False, "0.8", 0.03),
        (False, "0.9", 0.11),
    ):
        lowest = _lowest_by_b1(name, caution)
        assert len(lowest) >= 3
        assert round(lowest[b1] - min(lowest.values()), 3) <= at_most


def test_what_the_notes_say():
    """The notes name the variants and the b1 that the results select."""
    small, large = (QUESTIONS[name] for name in page.RULES)
    histories = records.read(DOCS / "results" / "rule-0.3m.csv")
    better = [
        c.arm.title
        for c in outcomes.compare_all(small, histories)
        if (c.other.title, c.verdict) == (page.PUBLISHED, "better")
    ]
    assert better == [a.title for a in large.arms if a.title.startswith("opposed")]
    for smaller, larger in (("adamw", "size-4m"), ("size-4m", "size-9m")):
        question = QUESTIONS[larger]
        for arm in question.arms:
            lowest = _lowest_by_b1(smaller, caution=arm.side.caution)
            start = {**question.grid, **arm.grid}["b1"][0]
            assert min(lowest, key=lowest.get) == start


def test_the_page_is_that_of_the_files(tmp_path):
    for path in (DOCS / "results").iterdir():
        if path.suffix != ".png":
            shutil.copy(path, tmp_path)
    page.draw(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert text == (DOCS / "results.md").read_text()
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == sorted(path.name for path in (DOCS / "results").glob("*.png"))
    for name in drawn:
        committed, image = map(Image.open, (DOCS / "results" / name, tmp_path / name))
        with committed, image:
            # Other versions of matplotlib, and other processors, draw other pixels.
            if image.info == committed.info and platform.machine() == "x86_64":
                np.testing.assert_allclose(image, committed, atol=8, err_msg=name)
