"""The command that draws a trained model's reconstructions.

``python -m examples.mae reconstruct --run-dir DIR`` draws pictures that the run in DIR
was validated on. ``--help`` lists all options.
"""

from pathlib import Path

from examples.mae.drawing import choose, draw
from examples.mae.task import MAETask
from examples.training.checks import InputError, make_directory, read_text, require
from examples.training.loop import load_run_data
from examples.training.run_dir import DATA_NAME
from examples.training.trained import Source, load_trained

_MOST = 64


def reconstruct(
    source: Source, output: Path = Path("reconstructions.png"), pictures: int = 8
) -> None:
    """Draw validation pictures, their visible patches, and the model's reconstruction.

    Where it predicts normalized pixels, each patch is drawn with the mean and the
    deviation of the original.

    Args:
        source: where the parameters come from.
        output: the PNG to write.
        pictures: how many to draw, of those that the run was validated on.
    """
    require(
        1 <= pictures <= _MOST,
        f"pictures is {pictures}: it has to be at least 1 and at most {_MOST}",
    )
    require(
        output.suffix == ".png", f"output: {output} is no PNG; name a file with .png"
    )
    config, step, params = load_trained(source, MAETask)
    make_directory("output", output.parent)
    data = load_run_data(config)
    require(
        read_text("run_dir", source.run_dir / DATA_NAME).strip() == data.fingerprint,
        f"data: the pictures have changed since the run in {source.run_dir} began",
    )
    examples = choose(data.validation, pictures)
    drawn = len(examples["seed"])
    try:
        draw({"reconstruction": config.task.reconstruct(params, examples)}, output)
    except OSError as error:
        raise InputError(f"output: cannot write {output} ({error.strerror})") from error
    print(f"Drew {drawn} pictures with the model of step {step} to {output}.")
