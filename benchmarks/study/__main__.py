"""The commands of the study: ``python -m benchmarks.study run`` and ``draw``."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.study.page import RESULTS, draw
from benchmarks.study.questions import QUESTIONS
from benchmarks.study.run import answer
from examples.training.checks import require
from examples.training.command_line import or_exit
from examples.training.compare import run_dirs_are_in

PYTHON = 3, 11
"""The version of Python whose standard library is the text of the committed runs."""


def run(
    questions: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    results_dir: Path = RESULTS,
    work_dir: Path = Path("outputs") / "study",
) -> None:
    """Train the missing runs; after an interruption, the same command resumes.

    Args:
        questions: names of the questions. Default: all.
        results_dir: directory of the CSV files, one per question.
        work_dir: directory for the runs while they are trained.

    Raises:
        InputError: for an unknown question, or if the text is not that of the runs in
            the files.
    """
    unknown = sorted({*questions} - {*QUESTIONS})
    require(
        not unknown,
        f"unknown question: {', '.join(unknown)}; choose from {', '.join(QUESTIONS)}.",
    )
    require(
        sys.version_info[:2] == PYTHON or results_dir != RESULTS,
        f"the runs in {RESULTS} were trained on the standard library of Python "
        f"{'.'.join(map(str, PYTHON))}; use it, or pass another --results-dir.",
    )
    results_dir.mkdir(parents=True, exist_ok=True)
    files = {name: results_dir / f"{name}.csv" for name in QUESTIONS}
    for name in questions or QUESTIONS:
        directory = work_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        others = [(QUESTIONS[n], path) for n, path in files.items() if n != name]
        with run_dirs_are_in("--work-dir"):
            finished = answer(QUESTIONS[name], files[name], directory, others)
        if not finished:
            print("Stopped. Run the same command to resume.")
            return


if __name__ == "__main__":
    or_exit(lambda: tyro.extras.subcommand_cli_from_dict({"run": run, "draw": draw}))
