"""The drawn sample images: the same everywhere, whole or not there, no task for a colour meter."""

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from data_prep import drawn_samples
from data_prep.drawn_samples import CLASSES, SIZE, draw_image, ensure_samples
from data_prep.verify import verify_set
from tests.data_prep import forms

FEW = {"train": 40, "test": 20}


def test_the_first_use_makes_sound_labelled_splits(tmp_path):
    train, test = ensure_samples(tmp_path / "runs" / "sample-images", FEW)
    for url, count in ((train, 40), (test, 20)):
        verdict = verify_set(url, workers=1, quiet=True)
        assert verdict.is_sound and verdict.samples == count and not verdict.repeated_image_groups
        assert verdict.labels == dict.fromkeys(sorted(CLASSES), count // 10)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["sample-images"]


def test_the_second_use_makes_nothing(tmp_path, monkeypatch):
    urls = ensure_samples(tmp_path / "s", FEW)
    before = forms.files_of(tmp_path)
    monkeypatch.setattr(drawn_samples, "draw_image", None)
    assert ensure_samples(tmp_path / "s", FEW) == urls
    assert forms.files_of(tmp_path) == before


def test_a_run_killed_while_drawing_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    drawn = drawn_samples.draw_image

    def dies(label, rng):
        if label == 9:
            raise KeyboardInterrupt
        return drawn(label, rng)

    monkeypatch.setattr(drawn_samples, "draw_image", dies)
    with pytest.raises(KeyboardInterrupt):
        ensure_samples(tmp_path / "s", FEW)
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(drawn_samples, "draw_image", drawn)
    assert verify_set(ensure_samples(tmp_path / "s", FEW)[0], workers=1, quiet=True).is_sound


def _ensure_few(folder):
    ensure_samples(folder, {"train": 30, "test": 10})
    return forms.files_of(folder)


def test_processes_that_draw_at_once_agree(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=spawn) as pool:
        first, *others = pool.map(_ensure_few, [tmp_path / "s"] * 3)
    assert all(other == first for other in others)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        ensure_samples(tmp_path / "s", FEW)
    assert forms.files_of(tmp_path) == {"s/mine.txt": b"x"}


def test_pixels_are_the_same_everywhere():
    """Up to the last bit of sine and cosine, which differs between machines."""
    whole = np.stack([draw_image(label, np.random.default_rng([0, label])) for label in range(10)])
    assert whole.shape == (10, SIZE, SIZE, 3) and whole.dtype == np.uint8
    assert abs(whole.astype(float).mean() - MEAN) < 0.05
    again = np.stack([draw_image(label, np.random.default_rng([0, label])) for label in range(10)])
    assert hashlib.sha256(whole).digest() == hashlib.sha256(again).digest()


MEAN = 100.921


def test_the_mean_colour_hardly_tells_the_class():
    images = np.stack([draw_image(n % 10, np.random.default_rng([7, n])) for n in range(1200)])
    mean_N3 = images.reshape(1200, -1, 3).mean(1)
    bank, probes = mean_N3[:1000], mean_N3[1000:]
    distance_PN = ((probes[:, None] - bank[None]) ** 2).sum(-1)
    nearest_P20 = np.argsort(distance_PN, axis=1)[:, :20] % 10
    votes_PC = (nearest_P20[..., None] == np.arange(10)).sum(1)
    right = (votes_PC.argmax(1) == np.arange(1000, 1200) % 10).mean()
    assert right < 0.25, "chance is 0.10"
