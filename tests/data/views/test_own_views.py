"""Views of a user's own functions: what they get, what they may return, what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_ds.data.views.own_views import load_functions, make_own_views
from mocov3_ds.data.views.photometric import normalise_crops
from mocov3_ds.data.views.spec import ViewSpec
from tests.data.loading import open_loader, run, same
from tests.data.pictures import encode_image, picture

DATA = encode_image(picture(40, 60), "PNG")


def random_crop(image, rng):
    x, y = rng.integers(0, 20, 2)
    return image.crop((x, y, x + 8, y + 8))


def noise(image, rng):
    return rng.normal(size=(3, 8, 8))


def spec_of(first, second=None, channels=3):
    numbers = (0.25, 0.5, 0.75, 0.3, 0.6)[:channels]
    return ViewSpec(mean=numbers, std=numbers, functions=(first, second or first))


def made(spec, key=(0, 0, 0), size=(8, 8), data=DATA):
    views_VCHW = np.full((2, spec.channels, *size), np.nan, np.float32)
    make_own_views(data, spec, key, views_VCHW)
    return views_VCHW


def test_a_view_follows_from_seed_epoch_sample_and_view():
    spec = spec_of(random_crop, noise)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    views = [made(spec, key) for key in keys]
    for view, key in zip(views, keys, strict=True):
        assert np.array_equal(view, made(spec, key))
    assert len({view[0].tobytes() for view in views}) == len(keys)
    both = made(spec_of(noise))
    assert not np.array_equal(both[0], both[1])


def test_bytes_are_normalised_and_floats_are_not():
    for convert in (lambda x: x, np.asarray, lambda x: torch.from_numpy(np.array(x))):
        spec = spec_of(lambda image, rng, convert=convert: convert(image.resize((8, 8))))
        pixels = np.asarray(picture(40, 60).resize((8, 8))).transpose(2, 0, 1)[None]
        expected = normalise_crops(
            torch.from_numpy(pixels.copy()), spec.mean, spec.std, torch.float32
        )
        assert np.array_equal(made(spec)[0], expected[0].numpy())
    floats = torch.randn(3, 8, 8, dtype=torch.float64)
    assert np.array_equal(made(spec_of(lambda image, rng: floats))[1], floats.float().numpy())


def test_the_image_comes_as_pillow_has_it_or_as_an_array():
    seen = []

    def look(image, rng):
        seen.append(image)
        return np.zeros((8, 8, 1), np.uint8)

    made(spec_of(look, channels=1))
    assert all(isinstance(x, Image.Image) and x.mode == "L" for x in seen)
    buffer = io.BytesIO()
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 5), dtype=np.uint8)
    np.save(buffer, array)
    spec = spec_of(lambda image, rng: seen.append(image) or image[:8, :7], channels=5)
    made(spec, size=(8, 7), data=buffer.getvalue())
    assert np.array_equal(seen[-1], array) and seen[-1] is not seen[-2]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (
            np.zeros((8, 9, 3), np.uint8),
            r"gives uint8 of the shape \(8, 9, 3\); a uint8 image",
        ),
        (np.zeros((8, 8), np.uint8), r"uint8 of the shape \(8, 8\)"),
        (torch.zeros(8, 8, 3), r"torch.float32 of the shape \(8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.int64), "int64"),
        (Image.new("L", (8, 8)), "an image of 8 x 8 pixels in L"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_view_is_refused(returned, words):
    with pytest.raises(ValueError, match=words):
        made(spec_of(lambda image, rng: returned))


def test_a_function_that_fails_is_named_with_the_sample():
    def broken(image, rng):
        raise KeyError("x")

    with pytest.raises(ValueError, match=r"broken fails on sample 7: KeyError: 'x'"):
        made(spec_of(broken), (0, 0, 7))


def test_functions_are_found_by_name():
    assert load_functions([]) is None
    assert load_functions([f"{__name__}:noise"]) == (noise, noise)
    assert load_functions([f"{__name__}:noise", f"{__name__}:random_crop"]) == (noise, random_crop)
    for name, words in (
        ("nowhere.at_all:x", "No module named"),
        (f"{__name__}:nothing", "nothing"),
        (__name__, "it has no colon"),
        (f"{__name__}:DATA", "is a bytes, no function"),
    ):
        with pytest.raises(ValueError, match=rf"--views.function {name}.*{words}"):
            load_functions([name])


def test_batches_are_the_same_on_any_ranks_and_threads_and_after_a_resume(small):
    views = spec_of(random_crop_12, noise)
    whole = run(small, 1, 6, views=views, threads=0)
    assert whole[0][1].dtype == torch.float32
    assert same(run(small, 3, 6, views=views, threads=3), whole)
    assert same(run(small, 2, 3, views=views, position=3), whole[3:])


def random_crop_12(image, rng):
    """Of the small set, whose images have 12 pixels a side or some more."""
    x, y = rng.integers(0, 4, 2)
    return image.crop((x, y, x + 8, y + 8))


def test_a_failing_function_ends_the_loader(small):
    views = spec_of(lambda image, rng: 1 / 0)
    with (
        open_loader(small, views=views) as loader,
        pytest.raises(ValueError, match="fails on"),
    ):
        next(loader)
