"""How do images that lie in the caller's own hands go through the same order and views as shards?

    OwnImages([...])   a map-style dataset: len(images), images[i]

Each item is an image (the bytes of a file, an array of height, width and colours, a tensor of
colours, height and width, or a Pillow image) or a tuple that begins with one, as the datasets of
torchvision give. What is no file yet becomes the bytes of one without loss (PPM, PNG, .npy), so
that everything behind the reading is the same as for shards.
"""

import hashlib
import io
import itertools
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from mocov3_ds.data.manifest import ROW, Manifest, Shard, own_sets
from mocov3_ds.data.sample_source import OWN_SET

_NOMINAL_BYTES = 1 << 17  # of an encoded image, as nobody knows its size before it is read
_numbers = itertools.count(1)  # of the sets that were given an address
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


class MapStyle(Protocol):
    """What is asked of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class OwnImages:
    """A map-style dataset of images, with labels and ids where there are some.

    A run knows its data by the number of images, their ids and labels: the pixels may change from
    one epoch to the next. The numbers of samples in logs are positions in the dataset.

    Args:
        images: The dataset; `targets` and `classes` of one of torchvision's are used.
        labels: Class number of each image, -1 for none; needed by the k-NN monitor.
        ids: A name of each image, which messages and `bad_samples.jsonl` tell.
        classes: Names of the classes by number.
        thread_safe: Whether several threads may ask the dataset at once; otherwise they take turns.

    Raises:
        ValueError: There are no images, or another number of labels or ids.
    """

    def __init__(
        self,
        images: MapStyle,
        *,
        labels: Sequence[int] | None = None,
        ids: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        thread_safe: bool = False,
    ) -> None:
        self._images, self._ids = images, ids
        self._labels = getattr(images, "targets", None) if labels is None else labels
        self._classes = tuple(map(str, classes or getattr(images, "classes", ())))
        self._lock = None if thread_safe else threading.Lock()
        count = len(images)
        if not count:
            raise ValueError("the dataset holds no images.")
        for values, kind in ((self._labels, "labels"), (ids, "ids")):
            if values is not None and len(values) != count:
                raise ValueError(f"{count} images have {len(values)} {kind}; give one for each.")

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: everything but the lock."""
        return {**vars(self), "_lock": self._lock is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock() if state["_lock"] else None

    def describe_set(self) -> Manifest:
        """Return the dataset as a set of one shard that is nowhere, whose samples are asked for."""
        count = len(self._images)
        rows_N = np.zeros(count, dtype=ROW)
        rows_N["offset"], rows_N["size"], rows_N["label"] = 512, _NOMINAL_BYTES, -1
        if self._labels is not None:
            rows_N["label"] = np.asarray(self._labels)
        digest = hashlib.sha256(f"{count} own images\n".encode())
        for name in self._ids or ():
            digest.update(f"{name}\n".encode())
        shard = Shard("own images", 512 + _NOMINAL_BYTES, count, digest.hexdigest())
        return Manifest("own images", [shard], rows_N, self._classes, source=self)

    def read(self, sample_id: int) -> bytes:
        """Return the bytes of an image file.

        Args:
            sample_id: Position in the dataset.

        Raises:
            ValueError: The item is no image; or whatever the dataset raises.
        """
        if self._lock is None:
            item = self._images[sample_id]
        else:
            with self._lock:
                item = self._images[sample_id]
        return encode_image(item[0] if isinstance(item, tuple | list) else item)

    def name(self, sample_id: int) -> str:
        """Return what messages call an image.

        Args:
            sample_id: Position in the dataset.
        """
        return str(self._ids[sample_id]) if self._ids is not None else f"image {sample_id}"


def hold_set(described: Manifest) -> str:
    """Give a set that lies in no folder an address which this process can open.

    Args:
        described: The set; the address holds as long as somebody keeps it.
    """
    url = f"{OWN_SET}{next(_numbers)}"
    own_sets[url] = described
    return url


def encode_image(image: Any) -> bytes:
    """Return the bytes of a file with these pixels.

    Args:
        image: Bytes of an image file, which stay as they are; an array (H, W) or (H, W, C), a
            tensor (C, H, W), or a Pillow image.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, torch.Tensor):
        image = (image.permute(1, 2, 0) if image.dim() == 3 else image).cpu().numpy()
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or not image.size or image.dtype.kind not in "uif":
            raise ValueError(
                f"an array {image.dtype} of the shape {image.shape} is no image: numbers of the "
                "shape (H, W) or (H, W, C) are."
            )
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,), (4,)):
            np.save(buffer, image)
            return buffer.getvalue()
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"a {type(image).__name__} is no image: bytes of a file, an array, a tensor, or a "
            "Pillow image is."
        )
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    image.save(buffer, "PPM" if image.mode in ("L", "RGB") else "PNG")
    return buffer.getvalue()
