"""The study: its files, its choice of settings, and the page made of them."""

from dataclasses import replace
from pathlib import Path

import pytest

for _module in ("grain", "orbax.checkpoint", "matplotlib", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from benchmarks.study import page, records
from benchmarks.study import run as study_run
from benchmarks.study.questions import QUESTIONS, SEEDS, TUNING_SEED, Question
from examples.training.config import TrainConfig
from examples.training.history import Evaluation, History, Side

DOCS = Path(__file__).parents[2] / "docs"
QUESTION = Question(
    "Does it help?",
    QUESTIONS["adamw"].config,
    (
        {"learning_rate": ("1e-3", "2e-3", "4e-3")},
        {"learning_rate": ("1e-3", "2e-3", "4e-3"), "neutral": ("follow",)},
    ),
)
BASE, CAUTIOUS = Side("adamw", False), Side("adamw", True)


def loss_of(run):
    """AdamW is best at 0.002, the published rule at 0.004, the other nowhere."""
    point = dict(run.point)
    rate = float(point["learning_rate"])
    if run.side == BASE:
        return 3.0 + abs(rate - 2e-3) * 100 + 0.01 * (run.seed % 3)
    if "neutral" in point:
        return 3.0 + abs(rate - 2e-3) * 100 + 0.01 * (run.seed % 2)
    return 2.8 + abs(rate - 4e-3) * 100 + 0.01 * (run.seed % 3)


def history(run, diverged_at=None):
    loss = round(loss_of(run), 6)  # As many digits as a file has.
    evaluations = (Evaluation(300, loss + 0.5, 0.625), Evaluation(600, loss, 0.5))
    return History(run, (), evaluations, (0.25,), diverged_at)


def answered(question=QUESTION):
    tuning = [history(run) for run in study_run.tuning_runs(question)]
    compared = study_run.compared_runs(question, tuning)
    return [*tuning, *map(history, compared)]


def test_what_is_written_is_read(tmp_path):
    histories = answered()
    diverged = replace(
        histories[0],
        run=histories[0].run._replace(seed=9),
        evaluations=histories[0].evaluations[:1],
        diverged_at=420,
    )
    records.write([*histories, diverged], tmp_path / "a.csv")
    assert records.read(tmp_path / "a.csv") == [*histories, diverged]
    assert records.read(tmp_path / "absent.csv") == []


def test_each_side_is_compared_at_its_best_and_caution_at_the_bases():
    tuning = [history(run) for run in study_run.tuning_runs(QUESTION)]
    assert len(tuning) == 9  # The base has no setting of caution.
    assert {h.run.seed for h in tuning} == {TUNING_SEED}
    runs = study_run.compared_runs(QUESTION, tuning)
    points = {(run.side, run.point) for run in runs}
    assert points == {
        (BASE, (("learning_rate", "0.002"),)),
        (CAUTIOUS, (("learning_rate", "0.002"),)),
        (CAUTIOUS, (("learning_rate", "0.004"),)),
        (CAUTIOUS, (("learning_rate", "0.002"), ("neutral", "follow"))),
    }
    assert {run.seed for run in runs} == {*SEEDS}
    assert len(runs) == 4 * len(SEEDS)


def test_the_table_says_what_the_intervals_show():
    lines = page.table(page.comparisons(QUESTION, answered())).splitlines()
    base, drop_in, own, follow = lines[2:]
    assert "AdamW" in base
    assert "learning rate 0.002" in drop_in
    assert "no difference" not in own
    # Paired by seed, the published rule differs by the same with every seed.
    assert "-0.2000 (-0.2000 to -0.2000)" in own
    assert "better" in own
    assert "no difference seen" in follow


def test_a_question_without_all_its_runs_is_not_answered(tmp_path):
    histories = answered()
    assert page.is_answered(QUESTION, histories)
    assert not page.is_answered(QUESTION, histories[:-1])
    assert not page.is_answered(QUESTION, histories[1:])


def test_a_best_point_at_the_edge_is_said():
    lines = page.edges(QUESTION, answered())
    assert lines == [
        "The best learning rate for cautious AdamW, 0.004, is the largest that was "
        "tried."
    ]


def test_runs_are_trained_once_and_kept_in_order(tmp_path, monkeypatch):
    trained = []

    def run_all(runs, swept, directory, together):
        for run in runs:
            trained.append(run)
            (directory / run.name).mkdir()
        return len(trained) < 8 or stopped

    stopped = False
    monkeypatch.setattr(study_run.compare, "run_all", run_all)
    monkeypatch.setattr(study_run, "read_history", lambda run, _: history(run))
    path = tmp_path / "a.csv"
    assert not study_run.answer(QUESTION, path, tmp_path)
    before = len(records.read(path))
    assert 0 < before < 9
    stopped = True
    for directory in tmp_path.iterdir():
        if directory.is_dir():
            directory.rmdir()
    assert study_run.answer(QUESTION, path, tmp_path)
    assert [h.run for h in records.read(path)] == [h.run for h in answered()]
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    count = len(trained)
    assert study_run.answer(QUESTION, path, tmp_path)
    assert len(trained) == count


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_can_be_planned(name):
    runs = study_run.tuning_runs(QUESTIONS[name])
    assert all(isinstance(config, TrainConfig) for config in runs.values())
    sides = {run.side.caution for run in runs}
    assert sides == {False, True}


def test_the_page_is_that_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    page.draw(DOCS / "results", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert text == (DOCS / "results.md").read_text()
