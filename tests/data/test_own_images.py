"""Images in the caller's hands become samples like those of shards."""

import io
import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.fetch import Unreadable, locate_sample, read_samples
from mocov3_ds.data.own_images import OwnImages, encode_image, hold_set

PIXELS = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_each_kind_of_image_keeps_its_pixels() -> None:
    for image in (PIXELS, torch.from_numpy(PIXELS).permute(2, 0, 1), Image.fromarray(PIXELS)):
        assert (decoded(encode_image(image)) == PIXELS).all()
    assert (decoded(encode_image(PIXELS[:, :, 0])) == PIXELS[:, :, 0]).all()
    alpha = Image.fromarray(PIXELS).convert("RGBA")
    assert (decoded(encode_image(alpha)) == np.asarray(alpha)).all()
    for other in (PIXELS[:, :, :2], PIXELS[:, :, :1], PIXELS.astype(np.uint16)):
        array = np.load(io.BytesIO(encode_image(other)))
        assert array.dtype == other.dtype
        assert (array == other).all()
    assert encode_image(memoryview(b"a file")) == b"a file"
    for wrong, words in (
        (PIXELS[None], r"an array uint8 of the shape \(1, 5, 7, 3\) is no image"),
        (PIXELS.astype(object), "an array object of the shape"),
        ("path.jpg", "a str is no image"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_image(wrong)


def test_a_set_of_own_images_is_read_like_any_other() -> None:
    class Dataset:
        targets = (1, 0, 1)
        classes = ("cat", "dog")

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            if index == 1:
                raise KeyError("it is not there")
            return PIXELS + np.uint8(index), self.targets[index]

    own = OwnImages(Dataset(), ids=["a", "b", "c"])
    manifest = own.describe_set()
    assert manifest.index_N["label"].tolist() == [1, 0, 1]
    assert manifest.classes == ("cat", "dog")
    assert manifest.has_labels
    samples = dict(read_samples(manifest, np.array([2, 1, 0])))
    first, second, third = (samples[index] for index in (2, 1, 0))
    assert isinstance(first, bytes) and isinstance(third, bytes)
    assert (decoded(first) == PIXELS).all()
    assert (decoded(third) == PIXELS + np.uint8(2)).all()
    assert isinstance(second, Unreadable)
    assert second.reason == "KeyError: 'it is not there'"
    assert locate_sample(manifest, 1) == ("own images", "b")


def test_what_identifies_a_set_and_where_it_is_found() -> None:
    images = [PIXELS] * 4
    digest = OwnImages(images).describe_set().digest
    assert OwnImages([PIXELS[:2]] * 4).describe_set().digest == digest
    for other in (
        OwnImages(images[:3]),
        OwnImages(images, labels=[0, 0, 0, 0]),
        OwnImages(images, ids=list("abcd")),
    ):
        assert other.describe_set().digest != digest
    kept = OwnImages(images).describe_set()
    url = hold_set(kept)
    assert manifests.load(url) is kept
    del kept
    with pytest.raises(ValueError, match="was a dataset in the memory of a program"):
        manifests.load(url)
    with pytest.raises(ValueError, match="4 images have 3 labels"):
        OwnImages(images, labels=[0, 1, 2])
    with pytest.raises(ValueError, match="holds no images"):
        OwnImages([])


def test_threads_take_turns_unless_the_dataset_allows_them() -> None:
    class Counting(list[bytes]):
        inside, most = 0, 0
        gate = threading.Semaphore(0)

        def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.gate.acquire(timeout=0.05)
            self.inside -= 1
            return b"image"

    for thread_safe in (False, True):
        dataset = Counting([b""] * 4)
        own = OwnImages(dataset, thread_safe=thread_safe)
        threads = [threading.Thread(target=own.read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (dataset.most > 1) == thread_safe
    copy = pickle.loads(pickle.dumps(OwnImages([b"image"])))
    assert copy.read(0) == b"image"
