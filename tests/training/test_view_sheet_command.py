"""`mocov3 views`: the views of a training command line or of a run, or one sentence."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from mocov3_ds import cli
from mocov3_ds.config.parts import DataConfig
from mocov3_ds.config.run_config import Settings
from mocov3_ds.data.views import decode
from mocov3_ds.recipes import RECIPES
from tests.data.pictures import encode_image, picture
from tests.data.sets import make_set


def shorter_side(image, rng):
    return image.crop((0, 0, 10, 20))


@pytest.fixture
def views(tmp_path, monkeypatch, capsys):
    """Runs the command; its exit status, what it said, and the pixels of the sheet."""
    make_set(str(tmp_path / "set"), [4], lambda number: encode_image(picture(40, 60, number)))

    def call(*arguments):
        out = tmp_path / "views.png"
        monkeypatch.setattr("sys.argv", ["mocov3", "views", *arguments, "--out", str(out)])
        status = cli.main()
        told = capsys.readouterr()
        pixels = np.asarray(Image.open(out)).copy() if out.exists() else None
        out.unlink(missing_ok=True)
        return status, told.out + told.err, pixels

    return call


def write_run(folder, **views):
    """A run folder of the tiny recipe, with other views."""
    tiny = RECIPES["tiny"].config
    data = DataConfig(shards=str(folder.parent / "set"))
    config = dataclasses.replace(
        tiny, seed=7, data=data, runs=folder.parent, views=dataclasses.replace(tiny.views, **views)
    )
    folder.mkdir()
    tree = Settings(config, {}).as_json()
    (folder / "config.json").write_text(json.dumps(tree))


def test_flags_are_those_of_training(views, tmp_path):
    shards = str(tmp_path / "set")
    flags = [shards, "--rows", "2", "--views.image_size", "20x10"]
    status, told, pixels = views(*flags, "--epoch", "0", "3")
    assert status == 0
    assert "views of recipe tiny, 20 x 10 pixels, 3 channels" in told
    assert "differs from the same draws by Pillow by at most" in told
    assert pixels.shape == (18 + 2 * 24, 11 * 14, 3)
    grey = ["--views.channels", "1", "--views.colour_ops", "off"]
    grey += ["--views.mean", "0.5", "--views.std", "0.2"]
    assert (views(*flags, *grey)[2][18:, :, 0] == views(*flags, *grey)[2][18:, :, 2]).all()
    fixed = views(*flags, "--views.fixed", "--epoch", "5")[2]  # always those of the first pass
    assert np.array_equal(fixed[18:], views(*flags)[2][18:])
    assert not np.array_equal(views(*flags, "--epoch", "5")[2][18:], fixed[18:])
    own = ["--views.function", f"{__name__}:shorter_side"]
    status, told, pixels = views(*flags, *own)
    assert "nothing to compare them with" in told
    assert pixels.shape == (18 + 2 * 24, 3 * 14, 3)
    image = decode.decode_rgb(encode_image(picture(40, 60, 0)))
    expected = np.asarray(image.crop((0, 0, 10, 20))).astype(int)
    assert np.abs(pixels[18:38, 14:24] - expected).max() <= 1  # by way of the normalisation


def test_a_run_brings_its_own_settings_and_shards(views, tmp_path):
    write_run(tmp_path / "run", image_size=16, flip_p=0.0)
    status, told, pixels = views("--run", str(tmp_path / "run"), "--rows", "3")
    assert status == 0, told
    assert f"views of run {tmp_path / 'run'}, 16 x 16" in told
    by_flags = ["--seed", "7", "--views.image_size", "16", "--views.flip_p", "0"]
    assert np.array_equal(pixels, views(str(tmp_path / "set"), "--rows", "3", *by_flags)[2])
    without = views("--run", str(tmp_path / "run"), "--rows", "3", "--seed", "8")[2]
    assert not np.array_equal(pixels, without)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "needs SHARDS"),
        (["--run", "nowhere"], "--run nowhere is no run folder"),
        (["--run", "nowhere", "--recipe", "r50"], "--recipe r50 and --run nowhere are two"),
        (["--recipe", "vit_s"], "no recipe 'vit_s'"),
        (["SET", "--epoch", "-1"], "--epoch -1 is below 0"),
        (["SET", "--rows", "0"], "--rows 0"),
        (["SET", "--views.channels", "4"], "--views.mean has 3 numbers for --views.channels 4"),
        (["SET", "--views.function", "no:where"], "--views.function no:where is no function"),
        (
            ["SET", "--views.function", f"{__name__}:shorter_side", "--views.hue", "0"],
            "--views.hue has no effect beside --views.function",
        ),
        (
            [
                *("SET", "--views.channels", "2", "--views.colour_ops", "off"),
                *("--views.mean", "0", "0", "--views.std", "1", "1"),
            ],
            "sample 0 cannot be read: 3 channels (RGB) where 2 are wanted",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(views, tmp_path, flags, words):
    status, told, pixels = views(*(str(tmp_path / "set") if f == "SET" else f for f in flags))
    assert (status, pixels) == (2, None)
    assert told.startswith("mocov3: error: ") and words in told
    assert told.count("\n") == 1


def test_an_unreadable_sample_is_a_sentence(views, tmp_path):
    whole = encode_image(picture())
    images = [whole, whole, whole[: len(whole) // 2], whole]
    make_set(str(tmp_path / "half"), [4], lambda number: images[number])
    status, told, pixels = views(str(tmp_path / "half"), "--rows", "4")
    assert (status, pixels) == (2, None)
    assert "sample 2 cannot be read: truncated JPEG data" in told
