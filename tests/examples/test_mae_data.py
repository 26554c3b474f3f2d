"""The data of the masked autoencoder: glyphs, image files and streams."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

for _module in ("grain", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from PIL import Image, ImageOps

from examples.mae.config import DataConfig
from examples.mae.data import find_pictures, load_data
from examples.mae.glyphs import draw_glyphs, font_files
from examples.mae.pictures import augment, prepare, read_picture, to_colours
from examples.training.checks import InputError
from examples.training.files import split_hashes
from tests.examples.data_fixtures import assert_resumes
from tests.examples.training_fixtures import ROOT

SIZE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Write forty images of several sizes to three directories."""
    directory = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(make_pictures(40)):
        path = directory / ["", "cats", "dogs"][i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return directory


@pytest.fixture(scope="module")
def config(pictures):
    return DataConfig(
        data=(str(pictures),),
        batch_size=4,
        validation_batches=2,
        validation_fraction=0.2,
        crop_min=0.3,
        flip=True,
    )


@pytest.fixture
def glyph_config(monkeypatch):
    """Configure glyphs of two fonts."""
    monkeypatch.setattr("examples.mae.data.font_files", two_fonts)
    return DataConfig(batch_size=4, validation_batches=2)


def two_fonts():
    return [font for font in font_files() if font.name in ("cmr10.ttf", "cmb10.ttf")]


def make_pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 256, (12 + i, 20, 3), np.uint8))
        for i in range(count)
    ]


def take(dataset, count):
    """Concatenate the first batches."""
    batches = list(islice(dataset, count))
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() == {"image", "seed"}
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def as_rows(images):
    return [image.tobytes() for image in images]


# Images


def colour_of(image):
    """Return the colour of an image that has only one."""
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


def plain(mode, colour):
    return Image.new(mode, (6, 5), colour)


def with_palette(mode="P"):
    image = plain(mode, 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


def sixteen_bits(dtype, value=0x8012):
    return Image.fromarray(np.full((5, 6), value, dtype))


@pytest.mark.parametrize(
    ("image", "form", "colour"),
    [
        (plain("RGB", (10, 20, 30)), "png", (10, 20, 30)),
        (plain("L", 100), "png", (100, 100, 100)),
        (plain("1", 1), "png", (255, 255, 255)),
        (plain("1", 0), "tiff", (0, 0, 0)),
        (with_palette(), "png", (10, 20, 30)),
        (with_palette(), "gif", (10, 20, 30)),
        (with_palette(), "bmp", (10, 20, 30)),
        (plain("RGBA", (10, 20, 30, 255)), "png", (10, 20, 30)),
        (plain("RGBA", (10, 20, 30, 0)), "png", (255, 255, 255)),
        (plain("RGBA", (255, 0, 0, 51)), "png", (255, 204, 204)),
        (plain("RGBA", (255, 0, 0, 0)), "webp", (255, 255, 255)),
        (plain("LA", (0, 51)), "png", (204, 204, 204)),
        (plain("CMYK", (255, 0, 0, 0)), "tiff", (0, 255, 255)),
        (plain("CMYK", (0, 0, 0, 255)), "jpeg", (0, 0, 0)),
        (plain("YCbCr", (100, 128, 128)), "tiff", (100, 100, 100)),
        (plain("HSV", (0, 255, 255)), None, (255, 0, 0)),
        (plain("RGBX", (10, 20, 30, 40)), None, (10, 20, 30)),
        (sixteen_bits("<u2"), "png", (128, 128, 128)),
        (sixteen_bits("<u2", 0xFFFF), "tiff", (255, 255, 255)),
        (sixteen_bits(">u2"), None, (128, 128, 128)),
        (sixteen_bits("<i4"), "tiff", (128, 128, 128)),
        (sixteen_bits("<i4", 0x7FFFFFFF), None, (255, 255, 255)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_colours_of_every_mode(image, form, colour, tmp_path):
    if form is None:
        assert colour_of(to_colours(image)) == colour
    else:
        image.save(tmp_path / f"picture.{form}")
        read = read_picture(tmp_path / f"picture.{form}")
        assert read.mode == "RGB"
        assert read.size == (6, 5)
        assert colour_of(read) == colour


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(mode, tmp_path):
    image = {
        "P": with_palette(),
        "L": plain("L", 1),
        "RGB": plain("RGB", (10, 20, 30)),
    }[mode]
    transparent = (10, 20, 30) if mode == "RGB" else 1
    image.save(tmp_path / "picture.png", transparency=transparent)
    assert colour_of(read_picture(tmp_path / "picture.png")) == (255, 255, 255)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [plain("RGB", "red"), plain("RGB", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert colour_of(read_picture(tmp_path / "a.gif")) == (255, 0, 0)


@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_the_exif_orientation_is_applied(orientation, stored_as, tmp_path):
    (image,) = make_pictures(1)
    stored = image if stored_as is None else image.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "picture.png", exif=exif)
    read = read_picture(tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


def test_the_largest_centered_square_is_cropped():
    (image,) = make_pictures(1)
    assert image.size == (20, 12)
    np.testing.assert_array_equal(
        prepare(image, 12), np.asarray(image)[:, 4:16], strict=True
    )
    expected = ImageOps.fit(image, (5, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(prepare(image, 5), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (300, 2)])
def test_tiny_images_are_enlarged(size):
    image = Image.new("RGB", size, (10, 20, 30))
    for pixels in (
        prepare(image, 32),
        augment(image, 32, 0.2, True, np.random.default_rng(0)),
    ):
        assert pixels.shape == (32, 32, 3)
        assert colour_of(pixels) == (10, 20, 30)


def coordinates(width, height):
    """Create an image whose red encodes the column and green the row, from 0 to 255."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(
        np.stack([red, green, 0 * red], axis=-1).round().astype(np.uint8)
    )


@pytest.mark.parametrize(("size", "largest"), [((256, 256), 1.0), ((400, 256), 0.85)])
def test_random_crops_cover_the_range_of_areas_and_aspect_ratios(size, largest):
    image = coordinates(*size)
    rng = np.random.default_rng(0)
    shares, ratios, corners = [], [], []
    for _ in range(200):
        pixels = augment(image, 64, 0.25, False, rng).astype(int)
        # The centers of the outer pixels lie half a pixel inside the crop.
        across = (pixels[32, -1, 0] - pixels[32, 0, 0]) / 255 * 64 / 63
        down = (pixels[-1, 32, 1] - pixels[0, 32, 1]) / 255 * 64 / 63
        shares.append(across * down)
        ratios.append(across * size[0] / (down * size[1]))
        corners.append(pixels[0, 0, :2])
    assert 0.23 < min(shares) < 0.35
    assert 0.8 * largest < max(shares) < 1.03 * largest
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.38
    assert (np.std(corners, axis=0) > 15).all()


def test_a_crop_that_cannot_fit_is_the_centered_square():
    (image,) = make_pictures(1)
    narrow = image.resize((400, 4))
    pixels = augment(narrow, 8, 1.0, False, np.random.default_rng(0))
    np.testing.assert_array_equal(pixels, prepare(narrow, 8))


def test_half_of_the_images_are_flipped():
    image = coordinates(32, 32)
    rng = np.random.default_rng(0)
    plain = prepare(image, 16)
    flipped = 0
    for _ in range(200):
        pixels = augment(image, 16, None, True, rng)
        is_flipped = (pixels == plain[:, ::-1]).all()
        assert is_flipped or (pixels == plain).all()
        flipped += int(is_flipped)
    assert 70 < flipped < 130


# Glyphs


def test_fonts_ship_with_matplotlib():
    names = [font.name for font in font_files()]
    assert {"DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "cmr10.ttf"} <= set(names)
    assert not any("LastResort" in name for name in names)
    assert names == sorted(names)


def test_glyphs_are_distinct_and_not_blank():
    glyphs = draw_glyphs(SIZE, two_fonts())
    assert glyphs.images.shape == (len(glyphs.characters), SIZE, SIZE)
    assert glyphs.images.dtype == np.uint8
    assert len(set(as_rows(glyphs.images))) == len(glyphs.images) > 200
    assert (glyphs.images.min((1, 2)) < 128).mean() > 0.95
    assert (glyphs.images.min((1, 2)) < 255).all()
    assert 1 < len(glyphs.characters) / len(set(glyphs.characters)) <= 2
    assert not any(character.isspace() for character in glyphs.characters)
    assert {"A", "z", "7"} <= set(glyphs.characters)


@pytest.mark.parametrize("size", [2, 9, 40])
def test_glyphs_fit_into_their_images(size):
    images = draw_glyphs(size, two_fonts()[:1]).images
    assert images.shape[1:] == (size, size)
    if size > 2:
        assert (images[:, [0, -1]] == 255).all()
        assert (images[:, :, [0, -1]] == 255).all()


def test_glyphs_are_split_by_character(glyph_config):
    glyphs = draw_glyphs(SIZE, two_fonts())
    character = dict(zip(as_rows(glyphs.images), glyphs.characters))
    config = replace(glyph_config, batch_size=1, validation_batches=1)
    loaded = load_data(config, SIZE, 0)
    one_more = load_data(replace(config, validation_batches=20), SIZE, 0)
    held_out = {
        character[row] for row in as_rows(one_more.validation["image"][:, 0, :, :, 0])
    }
    assert len(held_out) > 5
    train = take(loaded.train, 200)["image"]
    np.testing.assert_array_equal(train[..., 0], train[..., 1])
    trained = {character[row] for row in as_rows(train[..., 0])}
    assert not trained & held_out
    both = set(glyphs.characters)
    assert len(trained) > 0.7 * len(both)


def test_an_epoch_has_every_glyph_once(glyph_config, capsys):
    config = replace(glyph_config, batch_size=1, validation_batches=1)
    loaded = load_data(config, SIZE, 0)
    words = capsys.readouterr().out.split()
    assert words[0] == "Corpus:"
    count = int(words[1])
    glyphs = len(draw_glyphs(SIZE, two_fonts()).images)
    assert 0.8 * glyphs < count < glyphs
    passes = np.split(take(loaded.train, 2 * count)["image"], 2)
    first, second = map(as_rows, passes)
    assert len(set(first)) == count
    assert sorted(first) == sorted(second)
    assert first != second


# Files


def test_batches_of_files(config, capsys):
    loaded = load_data(config, SIZE, 0)
    assert capsys.readouterr().out == ("Corpus: 32 training and 8 validation images.\n")
    batch = next(iter(loaded.train))
    assert batch["image"].shape == (4, SIZE, SIZE, 3)
    assert batch["seed"].shape == (4,)
    assert loaded.validation["image"].shape == (2, 4, SIZE, SIZE, 3)
    assert loaded.validation["seed"].shape == (2, 4)
    for part in (batch, loaded.validation):
        assert part["image"].dtype == np.uint8
        assert part["seed"].dtype == np.uint32
    assert not loaded.files


def test_no_image_is_in_both_splits(config, pictures):
    config = replace(config, crop_min=None, flip=False)
    loaded = load_data(config, SIZE, 0)
    train = as_rows(take(loaded.train, 8)["image"])
    validation = as_rows(loaded.validation["image"].reshape(8, SIZE, SIZE, 3))
    paths = find_pictures([pictures])
    expected = as_rows([prepare(read_picture(path), SIZE) for path in paths])
    assert sorted(train + validation) == sorted(expected)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_hashes_are_split_by_their_order(fraction):
    hashes = [bytes([i]) for i in range(10)]
    train, validation = split_hashes(reversed(hashes), fraction)
    assert sorted(train + validation) == hashes
    assert max(validation) < min(train)
    assert len(validation) == {0.01: 1, 0.3: 3, 0.99: 9}[fraction]


def test_images_are_found_in_directories(tmp_path):
    (image,) = make_pictures(1)
    for name in ("a.png", "b.JPG", "c/d.webp", ".hidden.png", "no_suffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = {".JPG": "jpeg", ".webp": "webp"}.get(Path(name).suffix, "png")
        image.save(tmp_path / name, kind)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = [str(path.relative_to(tmp_path)) for path in find_pictures([tmp_path])]
    assert found == ["a.png", "b.JPG", "c/d.webp"]
    named = tmp_path / "no_suffix"
    assert next(iter(find_pictures([named, tmp_path]))) == named


def test_copies_of_an_image_count_once(config, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "copy")
    expected = load_data(config, SIZE, 0)
    both = replace(config, data=(*config.data, str(tmp_path / "copy")))
    loaded = load_data(both, SIZE, 0)
    assert loaded.fingerprint == expected.fingerprint
    assert_equal(next(iter(loaded.train)), next(iter(expected.train)))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_the_fingerprint_covers_the_content_of_files(config, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copy")
    renamed = tmp_path / "copy" / "other" / "name.jpg"  # Pillow ignores the suffix.
    renamed.parent.mkdir()
    (tmp_path / "copy" / "0.png").rename(renamed)
    other = replace(config, data=(str(tmp_path / "copy"),))
    expected = load_data(config, SIZE, 0)
    loaded = load_data(other, SIZE, 1)
    assert loaded.fingerprint == expected.fingerprint
    assert_equal(loaded.validation, expected.validation)
    assert load_data(other, SIZE, 0, 1, 2).fingerprint == expected.fingerprint
    split = replace(other, validation_fraction=0.5)
    assert load_data(split, SIZE, 0).fingerprint != expected.fingerprint
    make_pictures(1, seed=7)[0].save(renamed, "png")
    assert load_data(other, SIZE, 0).fingerprint != expected.fingerprint


def test_the_fingerprint_covers_glyphs(glyph_config, monkeypatch):
    expected = load_data(glyph_config, SIZE, 0).fingerprint
    assert load_data(glyph_config, SIZE, 1, 1, 2).fingerprint == expected
    monkeypatch.setattr("examples.mae.data.font_files", lambda: two_fonts()[:1])
    config = replace(glyph_config, validation_batches=1)
    assert load_data(config, SIZE, 0).fingerprint != expected


# Batches


@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
@pytest.mark.parametrize("name", ["config", "glyph_config"])
def test_batches_resume_from_a_state(name, process, request):
    config = request.getfixturevalue(name)
    assert_resumes(load_data(config, SIZE, 0, *process).train, 20, every=3)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_seed_determines_the_training_batches(seed, config):
    ours = take(load_data(config, SIZE, seed).train, 20)
    assert_equal(ours, take(load_data(config, SIZE, seed).train, 20))
    assert len(set(ours["seed"].tolist())) == 80  # Two and a half epochs.
    other = load_data(config, SIZE, 1)
    theirs = take(other.train, 20)
    assert not set(ours["seed"].tolist()) & set(theirs["seed"].tolist())
    assert (ours["image"] != theirs["image"]).any()
    assert_equal(other.validation, load_data(config, SIZE, seed).validation)


def test_an_image_is_cropped_differently_in_each_epoch(config):
    train = take(load_data(config, SIZE, 0).train, 16)["image"]
    assert len(set(as_rows(train))) == 64


def test_masks_do_not_depend_on_the_augmentation(config):
    plain = replace(config, crop_min=None, flip=False)
    ours = take(load_data(config, SIZE, 0).train, 5)
    theirs = take(load_data(plain, SIZE, 0).train, 5)
    np.testing.assert_array_equal(ours["seed"], theirs["seed"])
    assert (ours["image"] != theirs["image"]).any()


@pytest.mark.parametrize("name", ["config", "glyph_config"])
def test_processes_share_the_rows_of_each_batch(name, request, capsys):
    config = request.getfixturevalue(name)
    whole = load_data(config, SIZE, 3)
    parts = [load_data(config, SIZE, 3, p, 2) for p in range(2)]
    assert capsys.readouterr().out.count("Corpus") == 2
    for i, (batch, *shares) in enumerate(
        islice(zip(whole.train, *[part.train for part in parts]), 10)
    ):
        for p, share in enumerate(shares):
            assert_equal(share, {name: rows[p::2] for name, rows in batch.items()})
        assert i < 10
    for p, part in enumerate(parts):
        expected = {name: rows[:, p::2] for name, rows in whole.validation.items()}
        assert_equal(part.validation, expected)


def test_worker_processes_change_nothing(config):
    plain = iter(load_data(config, SIZE, 0).train)
    workers = iter(load_data(replace(config, workers=2), SIZE, 0).train)
    assert workers.get_state() == plain.get_state()
    for _ in range(3):
        next(plain)
    workers.set_state(json.loads(json.dumps(plain.get_state())))
    for _ in range(6):
        assert_equal(next(workers), next(plain))
        assert workers.get_state() == plain.get_state()
    workers.close()


_READS = """
import multiprocessing, os, signal, sys, time
import grain
from examples.mae.workers import WorkerBatches

def slow(i):
    time.sleep(0.005)
    return i

if __name__ == "__main__":
    dataset = grain.MapDataset.range(10_000).map(slow)
    # A print within an interrupted print would be an error.
    signal.signal(signal.SIGINT, lambda *_: os.write(1, b"signal\\n"))
    batches = iter(WorkerBatches(dataset, 1, grain.ReadOptions(num_threads=1)))
    next(batches)
    (worker,) = multiprocessing.active_children()
    print(worker.pid, flush=True)
    for i in batches:
        if i % 10 == 0:
            print(i, flush=True)
"""


def test_workers_survive_ctrl_c_but_not_the_program(tmp_path):
    """Ctrl-C in a terminal reaches all processes of the program."""
    script = tmp_path / "reads.py"
    script.write_text(_READS)
    program = subprocess.Popen(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = iter(program.stdout.readline, "")
    worker = int(next(lines))
    try:
        os.killpg(program.pid, signal.SIGINT)
        for line in lines:
            if line == "signal\n":
                break
        last = int(next(lines))
        # More than was prefetched.
        for line in islice(lines, 60):
            assert int(line) == last + 10
            last = int(line)
        assert last > 600
        program.kill()
        # This waits for every process that holds the output open.
        program.communicate(timeout=30)
    finally:
        program.kill()
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


# Errors


def test_a_missing_file_is_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"^data: .*missing does not exist"):
        load_data(replace(config, data=(str(tmp_path / "missing"),)), SIZE, 0)


def test_a_directory_without_images_is_refused(config, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(InputError, match=r"^data: no images in .*; pass .* to --data"):
        load_data(replace(config, data=(str(tmp_path),)), SIZE, 0)


def test_a_single_image_is_refused(config, pictures):
    with pytest.raises(InputError, match=r"^data: only one image, .*; provide more"):
        load_data(replace(config, data=(str(pictures / "0.png"),)), SIZE, 0)


def test_a_file_that_is_not_an_image_is_refused(config, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(InputError, match=r"^data: cannot read .*bad.png \(not an ima"):
        load_data(replace(config, data=(str(tmp_path),)), SIZE, 0)


def test_an_unreadable_file_is_refused(config, pictures, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"^data: cannot read .*png \(Permission den"):
        load_data(config, SIZE, 0)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_truncated_images_are_refused(fraction, config, tmp_path):
    content = io.BytesIO()
    make_pictures(1)[0].save(content, "png")
    for i in range(8):  # Truncated at different lengths.
        part = content.getvalue()[: 200 + 20 * i]
        (tmp_path / f"bad-{i}.png").write_bytes(part)
    config = replace(config, data=(str(tmp_path),), validation_fraction=fraction)
    config = replace(config, batch_size=1, validation_batches=1)
    with pytest.raises(InputError, match=r"^data: cannot read .*bad-\d.png \(.+\)\.$"):
        load_data(config, SIZE, 0)


def test_a_truncated_jpeg_is_refused(config, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    config = replace(config, data=(str(tmp_path),))
    load_data(config, SIZE, 0)
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"^data: cannot read .*half.jpg \(.*truncat"):
        load_data(config, SIZE, 0)


def test_ignored_files_are_reported(config, pictures, tmp_path, capsys):
    """Pillow registers suffixes of videos, but cannot decode them."""
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    for name in ("a.mpg", "b.h5", "notes.txt", ".git/c.png"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("not an image")
    load_data(replace(config, data=(str(tmp_path),)), SIZE, 0)
    printed = capsys.readouterr().out
    assert re.search(r"Ignored 1 hidden files: .*c\.png\.", printed)
    assert re.search(r"Ignored 3 non-image files: .*a.mpg, .*b.h5, .*txt\.", printed)


def test_an_empty_path_is_refused(config):
    with pytest.raises(InputError, match=r"^data: '' is not a file; omit --data"):
        load_data(replace(config, data=("",)), SIZE, 0)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    message = r"^data: cannot read .*float.tiff \(its pixels are floating-point .*8 b"
    with pytest.raises(InputError, match=message):
        read_picture(tmp_path / "float.tiff")


def test_too_few_training_images_are_refused(config):
    config = replace(config, batch_size=33)
    with pytest.raises(
        InputError, match=r"^data: 32 training images are too few .* 33;"
    ):
        load_data(config, SIZE, 0)


def test_too_few_validation_images_are_refused(config):
    config = replace(config, validation_batches=3)
    message = r"^data: 8 validation images are too few for 3 batches of 4; .*-fraction"
    with pytest.raises(InputError, match=message):
        load_data(config, SIZE, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"validation_batches": 0}, "validation_batches must be positive, got 0"),
        ({"shuffle_images": 0}, "shuffle_images must be positive, got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be .*, got 1.0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"crop_min": 0.0}, r"crop_min must lie in \(0, 1\], got 0.0"),
        ({"crop_min": 1.5}, r"crop_min must lie in \(0, 1\], got 1.5"),
        ({"data": ("\udcff",)}, "data: .* is not UTF-8"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        DataConfig(**settings)


# Streams


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs the extra [hf]")


def write_dataset(datasets, directory, validation=10):
    """Write four training files of six images each, and a validation file."""
    features = datasets.Features(
        {"label": datasets.Value("int64"), "image": datasets.Image()}
    )
    images = make_pictures(24)
    parts = {f"train-{i}": images[6 * i :][:6] for i in range(4)}
    parts["validation-0"] = make_pictures(validation, seed=1)
    for name, some in parts.items():
        rows = {"label": list(range(len(some))), "image": some}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(directory / f"{name}.parquet", batch_size=2)
    return directory


@pytest.fixture(scope="module")
def stream_config(datasets, tmp_path_factory):
    directory = write_dataset(datasets, tmp_path_factory.mktemp("dataset"))
    return DataConfig(
        data=(f"hf:{directory}",),
        batch_size=4,
        validation_batches=2,
        shuffle_images=5,
        crop_min=0.3,
        flip=True,
    )


def in_order(config):
    """Disable shuffling and augmentation in a configuration."""
    return replace(config, batch_size=1, shuffle_images=1, crop_min=None, flip=False)


def prepared(images):
    return np.stack([prepare(image, SIZE) for image in images])


def test_a_stream_has_every_image_in_each_epoch(stream_config):
    loaded = load_data(in_order(stream_config), SIZE, 0)
    batches = take(loaded.train, 48)
    expected = prepared(make_pictures(24))
    np.testing.assert_array_equal(batches["image"], np.concatenate([expected] * 2))
    assert batches["seed"].dtype == np.uint32
    assert len(set(batches["seed"].tolist())) == 48


@pytest.mark.parametrize("count", [2, 3, 4])  # Four files do not divide by three.
def test_an_image_is_read_by_one_process_per_epoch(count, stream_config):
    config = replace(in_order(stream_config), batch_size=count)
    parts = [
        take(load_data(config, SIZE, 0, p, count).train, 24 // count)
        for p in range(count)
    ]
    rows = [row for part in parts for row in as_rows(part["image"])]
    assert sorted(rows) == sorted(as_rows(prepared(make_pictures(24))))
    assert len({seed for part in parts for seed in part["seed"].tolist()}) == 24


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2), (2, 3)])
def test_a_stream_resumes_from_a_state(index, count, stream_config):
    config = replace(stream_config, batch_size=4 * count)
    config = replace(config, validation_batches=1, validation_split="train")
    assert_resumes(load_data(config, SIZE, 0, index, count).train, 14, every=3)


def test_a_stream_is_shuffled_within_a_window(stream_config):
    config = replace(stream_config, crop_min=None, flip=False)
    plain = take(load_data(in_order(config), SIZE, 0).train, 20)
    for seed in (0, 2**32 - 1):
        shuffled = take(load_data(config, SIZE, seed).train, 5)
        assert_equal(shuffled, take(load_data(config, SIZE, seed).train, 5))
        for start in range(0, 20, 5):
            some = slice(start, start + 5)
            ours, theirs = shuffled["image"][some], plain["image"][some]
            assert sorted(as_rows(ours)) == sorted(as_rows(theirs))
        assert (shuffled["image"] != plain["image"]).any()


def test_a_stream_validates_on_its_first_images(stream_config, capsys):
    loaded = load_data(stream_config, SIZE, 0)
    expected = prepared(make_pictures(8, seed=1)).reshape(2, 4, SIZE, SIZE, 3)
    np.testing.assert_array_equal(loaded.validation["image"], expected)
    assert "the first 8 images of validation." in capsys.readouterr().out
    part = load_data(stream_config, SIZE, 1, 1, 2)
    assert part.fingerprint == loaded.fingerprint
    np.testing.assert_array_equal(part.validation["image"], expected[:, 1::2])
    seeds = loaded.validation["seed"]
    np.testing.assert_array_equal(part.validation["seed"], seeds[:, 1::2])
    same = load_data(replace(stream_config, validation_split="train"), SIZE, 0)
    assert "of train, which are also trained on." in capsys.readouterr().out
    assert same.fingerprint != loaded.fingerprint


def test_a_column_of_bytes_with_missing_values(datasets, stream_config, tmp_path):
    images = make_pictures(5)
    rows = []
    for image in images:
        content = io.BytesIO()
        image.save(content, "png")
        rows += [content.getvalue(), None]
    dataset = datasets.Dataset.from_dict({"picture": rows})
    for split in ("train", "validation"):
        dataset.to_parquet(tmp_path / f"{split}.parquet")
    config = in_order(replace(stream_config, data=(f"hf:{tmp_path}",)))
    config = replace(config, image_column="picture")
    train = take(load_data(config, SIZE, 0).train, 10)["image"]
    np.testing.assert_array_equal(train, np.concatenate([prepared(images)] * 2))


def test_a_dataset_of_image_files(datasets, stream_config, tmp_path):
    for split in ("train", "validation"):
        for i, image in enumerate(make_pictures(3)):
            path = tmp_path / split / "class" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    config = in_order(replace(stream_config, data=(f"hf:{tmp_path}",)))
    train = take(load_data(config, SIZE, 0).train, 3)["image"]
    np.testing.assert_array_equal(train, prepared(make_pictures(3)))


def test_a_stream_with_an_invalid_image_is_refused(datasets, stream_config, tmp_path):
    dataset = datasets.Dataset.from_dict({"image": [b"not an image"] * 4})
    for split in ("train", "validation"):
        dataset.to_parquet(tmp_path / f"{split}.parquet")
    config = replace(in_order(stream_config), data=(f"hf:{tmp_path}",))
    message = r"^data: cannot read an image of the dataset \(cannot identify"
    with pytest.raises(InputError, match=message):
        load_data(config, SIZE, 0)


@pytest.mark.parametrize("column", ["picture", "label"])
def test_a_column_without_images_is_refused(column, stream_config):
    message = f"^image_column: .*no column '{column}' of images; pass --image-column"
    with pytest.raises(InputError, match=message):
        load_data(replace(stream_config, image_column=column), SIZE, 0)


@pytest.mark.parametrize("setting", ["train_split", "validation_split"])
def test_a_missing_split_is_refused(setting, stream_config):
    option = "--" + setting.replace("_", "-")
    message = f"^{setting}: .* no split 'dev'; pass {option} .*: train, validation\\.$"
    with pytest.raises(InputError, match=message):
        load_data(replace(stream_config, **{setting: "dev"}), SIZE, 0)


def test_a_stream_with_too_few_validation_images_is_refused(stream_config):
    message = r"^validation_split: 'validation' has 10 images, too few for 3 batches"
    with pytest.raises(InputError, match=message):
        load_data(replace(stream_config, validation_batches=3), SIZE, 0)


def test_workers_for_a_stream_are_refused(stream_config):
    with pytest.raises(InputError, match=r"^workers must be 0 for a Hugging .* got 2"):
        load_data(replace(stream_config, workers=2), SIZE, 0)


def test_a_dataset_alongside_files_is_refused(stream_config, config):
    both = replace(stream_config, data=(*stream_config.data, *config.data))
    with pytest.raises(InputError, match=r"^data: a Hugging Face dataset cannot be co"):
        load_data(both, SIZE, 0)
