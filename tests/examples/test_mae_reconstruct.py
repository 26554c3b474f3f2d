"""Drawing the reconstructions of trained autoencoders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

for _module in ("grain", "matplotlib", "orbax.checkpoint", "PIL", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from PIL import Image

from examples.mae.config import DataConfig
from examples.mae.drawing import choose, draw
from examples.mae.model import Reconstruction, mask_noise, patchify, random_mask
from examples.mae.reconstruct import reconstruct
from examples.mae.task import MAETask
from examples.training.checks import InputError
from examples.training.task import Data, Model
from examples.training.trained import Source
from tests.examples.mae_fixtures import (
    MODEL,
    random_images,
    random_params,
    run_command,
    write_pictures,
    write_run,
)

pytestmark = pytest.mark.usefixtures("little_optimization")


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def find(sheet, kinds, count, size):
    """Cut the images out of a figure, ``[kinds, count, size, size, 3]``.

    Check that everything else is white, except for frames and the names on the left.
    """
    scale = max(1, round(128 / size))
    side = scale * size
    gap = side // 16
    columns, bands = min(count, 8), -(-count // 8)
    tile = side + 2 + gap
    height, width = bands * (kinds * tile + gap), side + columns * tile
    assert sheet.shape == (height, width, 3)
    found = np.zeros((kinds, count, size, size, 3), np.uint8)
    rest = sheet.copy()
    for kind in range(kinds):
        for i in range(count):
            band, column = divmod(i, 8)
            top = band * (kinds * tile + gap) + kind * tile + gap // 2
            left = side + column * tile + gap // 2
            rest[top : top + side + 2, left : left + side + 2] = 255
            cell = sheet[top + 1 :, left + 1 :][:side, :side]
            found[kind, i] = cell[::scale, ::scale]
            enlarged = found[kind, i].repeat(scale, 0).repeat(scale, 1)
            np.testing.assert_array_equal(cell, enlarged)
    assert (rest[:, side:] == 255).all()
    for band in np.split(rest[:, :side], bands):
        for name in np.split(band[: kinds * tile], kinds):
            assert (name < 128).any()
    for end in (0, -1):
        assert (rest[:, end] == 255).all()
    return found


# Drawing


@pytest.mark.parametrize("count", [1, 3, 8, 11])
@pytest.mark.parametrize("size", [16, 32, 100, 224])
def test_images_are_enlarged_without_smoothing(size, count, tmp_path):
    rows = random_images(4 * count, size).reshape(4, count, size, size, 3)
    original, seen, *filled = rows
    names = "AdamW", "cautious Adafactor"
    models = {n: Reconstruction(original, seen, x) for n, x in zip(names, filled)}
    draw(models, tmp_path / "drawn.png")
    np.testing.assert_array_equal(
        find(read(tmp_path / "drawn.png"), 4, count, size), rows
    )


def test_chosen_examples_are_evenly_spaced():
    numbers = np.arange(12, dtype=np.uint32)
    validation = {
        "image": np.broadcast_to(numbers[:, None, None, None], (12, 4, 4, 3)),
        "seed": numbers,
    }
    validation = {k: x.reshape(3, 4, *x.shape[1:]) for k, x in validation.items()}
    for count, expected in (
        (1, [0]),
        (2, [0, 11]),
        (4, [0, 3, 7, 11]),
        (12, list(range(12))),
        (20, list(range(12))),
    ):
        chosen = choose(validation, count)
        assert chosen["seed"].tolist() == expected
        assert chosen["image"].shape == (len(expected), 4, 4, 3)
        assert chosen["image"][:, 0, 0, 0].tolist() == expected


# A comparison


def make_data():
    """Build two validation batches of six images."""
    images = random_images(12, 20).reshape(2, 6, 20, 20, 3)
    seeds = np.arange(12, dtype=np.uint32).reshape(2, 6)
    return Data(None, {"image": images, "seed": seeds}, "")


def test_models_are_drawn_side_by_side(tmp_path):
    task = MAETask(MODEL)
    models = {
        name: Model(task, random_params(MODEL, i))
        for i, name in enumerate(("AdamW", "cautious AdamW"))
    }
    (path,) = task.show(lambda: models, make_data, tmp_path)
    assert path == tmp_path / "reconstructions.png"
    assert list(tmp_path.iterdir()) == [path]

    original, seen, *filled = find(read(path), 4, 8, 20)
    examples = choose(make_data().validation, 8)
    np.testing.assert_array_equal(original, examples["image"])
    noise = mask_noise(examples["seed"], MODEL.patches)
    masked = np.asarray(random_mask(noise, MODEL.visible).masked)
    patches = {
        name: patchify(x, 4)
        for name, x in zip(("original", "seen", *models), (original, seen, *filled))
    }
    for shown in patches.values():
        np.testing.assert_array_equal(shown[~masked], patches["original"][~masked])
    assert (patches["seen"][masked] == 128).all()
    for name, model in models.items():
        expected = patchify(task.reconstruct(model.params, examples).filled, 4)
        np.testing.assert_array_equal(patches[name], expected)
    assert (patches["AdamW"] != patches["cautious AdamW"]).any()


def test_each_model_is_drawn_with_its_own_settings(tmp_path, capsys):
    """Models of a comparison may differ in the settings that it sweeps."""
    task = MAETask(MODEL)
    wide = replace(MODEL, hidden_size=2 * MODEL.hidden_size, num_heads=1)
    seen = replace(MODEL, mask_ratio=0.5)
    models = {
        name: Model(MAETask(config), random_params(config, 0))
        for name, config in (("wide", wide), ("half", seen))
    }
    (path,) = task.show(lambda: models, make_data, tmp_path)
    assert "Not drawn, because its image size or masks differ: half." in (
        capsys.readouterr().out
    )
    *_, filled = find(read(path), 3, 8, 20)
    examples = choose(make_data().validation, 8)
    expected = MAETask(wide).reconstruct(models["wide"].params, examples).filled
    np.testing.assert_array_equal(filled, expected)


# The command


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    write_pictures(directory, 24, 20)
    data = DataConfig(
        data=(str(directory),),
        batch_size=5,
        validation_batches=2,
        validation_fraction=0.5,
    )
    return MAETask(MODEL, data)


@pytest.fixture(scope="module")
def run_dir(task, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    write_run(directory, task, {2: 0.5, 3: 0.3, 7: 0.4})
    return directory


@pytest.mark.parametrize(
    ("options", "step", "count"),
    [
        ([], 7, 8),
        (["--step", 2, "--pictures", 3], 2, 3),
        (["--best", "--pictures", 64], 3, 10),
    ],
)
def test_reconstruct_command(options, step, count, task, run_dir, tmp_path, capsys):
    path = tmp_path / "new" / "drawn.png"
    run_command("reconstruct", "--run-dir", run_dir, "--output", path, *options)
    printed = f"Drew {count} images with the model of step {step} to {path}."
    assert printed in capsys.readouterr().out

    examples = choose(task.load(0, 0, 1).validation, count)
    made = task.reconstruct(random_params(MODEL, step), examples)
    found = find(read(path), 3, count, 20)
    for drawn, expected in zip(found, made):
        np.testing.assert_array_equal(drawn, expected)


def test_the_default_output_is_in_the_working_directory(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command("reconstruct", "--run-dir", run_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["reconstructions.png"]


def test_changed_images_are_refused(run_dir, task, tmp_path):
    (file, *_) = Path(task.data.data[0]).iterdir()
    moved = file.rename(tmp_path / file.name)
    try:
        with pytest.raises(InputError, match=r"^data: the images have changed since"):
            reconstruct(Source(run_dir), tmp_path / "drawn.png")
    finally:
        moved.rename(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", 0], r"pictures must lie in \[1, 64\], got 0"),
        (["--pictures", 65], r"pictures must lie in \[1, 64\], got 65"),
        (["--output", "x.jpg"], "output must be a .png file, got x.jpg"),
        (["--output", "file/x.png"], "output: cannot create file"),
        (["--output", "taken.png"], "output: cannot write taken.png .* a directory"),
        (["--step", 4], "step: there is no checkpoint of step 4 in .* one of 2, 3, 7"),
        (["--run-dir", "none"], "run_dir: none contains no run"),
    ],
)
def test_invalid_options_are_refused(options, message, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run_command("reconstruct", "--run-dir", run_dir, *options)
