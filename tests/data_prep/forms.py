"""The same few images in every form that the sharder reads, written with the standard library."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n02102040")


def picture(number: int, *, size: int = 24, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small image that no other number has."""
    rng = np.random.default_rng(number)
    channels = {"L": (), "RGB": (3,), "CMYK": (4,), "RGBA": (4,)}[mode]
    pixels = rng.integers(0, 256, (size, size + number % 5, *channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, mode).save(out, form)
    return out.getvalue()


def imagenet(per_class: int) -> dict[str, bytes]:
    """Images by their path in the tree, named as ImageNet names them."""
    return {
        f"{name}/{name}_{number}.JPEG": picture(1000 * label + number)
        for label, name in enumerate(CLASSES)
        for number in range(per_class)
    }


def write_tree(root: Path, images: Mapping[str, bytes]) -> Path:
    for name, data in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_bytes(members: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, form))
    return path


def nested(images: Mapping[str, bytes]) -> dict[str, bytes]:
    """Members of an archive of one archive a class, like ILSVRC2012_img_train.tar."""
    names = sorted({name.partition("/")[0] for name in images})
    return {
        f"{folder}.tar": tar_bytes(
            {
                name.partition("/")[2]: data
                for name, data in images.items()
                if name.startswith(f"{folder}/")
            }
        )
        for folder in names
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
