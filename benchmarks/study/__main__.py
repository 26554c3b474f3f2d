"""The commands of the study: ``python -m benchmarks.study run`` and ``draw``."""

from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.study.page import RESULTS, draw
from benchmarks.study.questions import QUESTIONS
from benchmarks.study.run import answer


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
    """
    unknown = sorted({*questions} - {*QUESTIONS})
    if unknown:
        raise SystemExit(
            f"error: unknown question: {', '.join(unknown)}; choose from "
            f"{', '.join(QUESTIONS)}"
        )
    results_dir.mkdir(parents=True, exist_ok=True)
    files = {name: results_dir / f"{name}.csv" for name in QUESTIONS}
    for name in questions or QUESTIONS:
        directory = work_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        others = [(QUESTIONS[n], path) for n, path in files.items() if n != name]
        if not answer(QUESTIONS[name], files[name], directory, others):
            print("Stopped. Run the same command to resume.")
            return


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "draw": draw})
