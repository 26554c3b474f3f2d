"""The command that draws a trained model's reconstructions.

``python -m examples.mae reconstruct --run-dir DIR`` draws validation images of the run
in DIR. ``--help`` lists all options.
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
    """Draw validation images, their visible patches, and the model's reconstructions.

    If the model predicts normalized pixels, each patch is drawn with the mean and the
    standard deviation of the original.

    Args:
        source: the checkpoint to draw with.
        output: PNG file to write.
        pictures: number of validation images to draw.
    """
    require(
        1 <= pictures <= _MOST,
        f"pictures must lie in [1, {_MOST}], got {pictures}.",
    )
    require(output.suffix == ".png", f"output must be a .png file, got {output}.")
    config, step, params = load_trained(source, MAETask)
    make_directory("output", output.parent)
    data = load_run_data(config)
    require(
        read_text("run_dir", source.run_dir / DATA_NAME).strip() == data.fingerprint,
        f"data: the images have changed since the run in {source.run_dir} started.",
    )
    examples = choose(data.validation, pictures)
    drawn = len(examples["seed"])
    try:
        draw({"reconstruction": config.task.reconstruct(params, examples)}, output)
    except OSError as error:
        raise InputError(
            f"output: cannot write {output} ({error.strerror})."
        ) from error
    print(f"Drew {drawn} images with the model of step {step} to {output}.")
