"""What sharding costs: ours beside webdataset's example way; lists of nested tars; resizing.

    python -m mocov3_ds.bench shard SRC

SRC is a folder of class folders or a tar of them. Its images are copied to a temporary tree first,
from which every variant reads, in this process, in turn; CPU time (user and system) counts, the
median of the rounds. The example way is that of webdataset's documentation: torchvision's
`ImageFolder` for the list, `ShardWriter` for the tars. Ours makes digests (SHA-256 of the shard,
crc32 of each image), looks at each image's header and end, writes the index and syncs to disk, on
top. For the list of a nested tar, an archive like ILSVRC2012_img_train.tar of small files is made.
"""

import hashlib
import io
import shutil
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from data_prep import tar
from data_prep.shard import ShardOptions as ShardOptions
from data_prep.shard import make_shards
from data_prep.sources import Listing, Window, list_images


@dataclass(frozen=True, kw_only=True)
class Options:
    """CPU time of sharding, of listing a nested tar, and of resizing."""

    source: tyro.conf.Positional[str]
    """folder of class folders, or a tar of them"""
    under: str = ""
    """take only what lies in this folder of the source"""
    images: int = 2000
    """images copied to the tree; the source's are taken again and again"""
    resized: int = 200
    """images that the slow variants work on"""
    nested: int = 100_000
    """images in the nested tar"""
    rounds: int = 5
    """times that each variant runs"""


def command() -> None:
    """Entry point of the benchmark."""
    options = tyro.cli(Options, prog="python -m mocov3_ds.bench shard", description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing = list_images(options.source, under=options.under, scratch_folder=folder)
        tree = _copied(listing, folder / "tree", options.images)
        few = _copied(listing, folder / "few", min(options.resized, options.images))
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        print(f"{options.images} images of {size / options.images / 1e3:.1f} kB on average\n")
        _print(
            "copy, ms of CPU an image",
            options.images,
            options.rounds,
            {
                "webdataset's example (ImageFolder, ShardWriter)": partial(_example, tree),
                "the same, then SHA-256 of shards, crc32 of images": partial(_digested, tree),
                "ours (with digests, check, index)": partial(_ours, tree),
            },
        )
        _print(
            "check or resize, ms of CPU an image",
            len([*few.rglob("*.*")]),
            options.rounds,
            {
                "webdataset's writer given Pillow images": partial(_example_encoded, few),
                "--check decode": partial(_ours, few, check="decode"),
                "--resize 384": partial(_ours, few, resize=384),
                "--resize 384 --reencode": partial(_ours, few, resize=384, reencode=True),
                "--resize 256": partial(_ours, few, resize=256),
            },
        )
        archive = _nested(folder / "nested.tar", options.nested)
        _print(
            f"list of a nested tar of {options.nested} images, ms of CPU an image",
            options.nested,
            min(options.rounds, 3),
            {
                "tarfile, archive in archive: names, offsets, sizes": partial(
                    _tarfile_list, archive
                ),
                "ours: the same, headers alone": partial(_our_headers, archive),
                "ours: the whole list with keys and labels, sorted": partial(_our_list, archive),
            },
        )


def _print(
    title: str, images: int, rounds: int, variants: dict[str, Callable[[Path], None]]
) -> None:
    """Run the variants in turn and print their medians, and how many times the first is slower."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            with tempfile.TemporaryDirectory() as out:
                started = time.process_time()
                variant(Path(out))
                seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(times) / images * 1e3 for name, times in seconds.items()}
    first = next(iter(medians.values()))
    width = max(map(len, variants))
    print(f"| {title:<{width}} | ms     | range           | first / this |")
    print(f"| {'-' * width} | ------ | --------------- | ------------ |")
    for name, median in medians.items():
        low, high = min(seconds[name]) / images * 1e3, max(seconds[name]) / images * 1e3
        span = f"{low:.4f} - {high:.4f}"
        print(f"| {name:<{width}} | {median:6.4f} | {span:<15} | {first / median:12.2f} |")
    print()


def _copied(listing: Listing, root: Path, count: int) -> Path:
    """A tree of ten class folders with so many images of the source."""
    for place in range(count):
        suffix, data = image_at(listing, place % len(listing))
        label = f"{place * 10 // count:05d}"
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{label}_{place}.{suffix}").write_bytes(data)
    return root


def image_at(listing: Listing, place: int) -> tuple[str, bytes]:
    """Name ending and bytes of an image of the source."""
    (item,) = listing.items(np.array([place]))
    with Path(item.path).open("rb") as file:
        file.seek(item.offset)
        return item.suffix, file.read(item.size)


def _example(tree: Path, out: Path) -> None:
    from torchvision.datasets import ImageFolder
    from webdataset import ShardWriter

    with ShardWriter(f"{out}/shard-%06d.tar", maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(ImageFolder(str(tree)).imgs):
            data = Path(path).read_bytes()
            writer.write({"__key__": f"{number:07d}", "jpg": data, "cls": label})


def _digested(tree: Path, out: Path) -> None:
    """The example way, and then the digests that ours makes on the way."""
    _example(tree, out)
    for path in sorted(out.glob("*.tar")):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    content = archive.extractfile(member)
                    assert content is not None
                    zlib.crc32(content.read())


def _example_encoded(tree: Path, out: Path) -> None:
    """What converters do that hand decoded images to the writer, which encodes them again."""
    from torchvision.datasets import ImageFolder
    from webdataset import ShardWriter

    with ShardWriter(f"{out}/shard-%06d.tar", maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(ImageFolder(str(tree)).imgs):
            with Image.open(path) as image:
                writer.write(
                    {"__key__": f"{number:07d}", "jpg": image.convert("RGB"), "cls": label}
                )


def _ours(tree: Path, out: Path, **options: object) -> None:
    made = ShardOptions(**options)  # type: ignore[arg-type]
    make_shards(list_images(str(tree)), str(out), made, workers=1, quiet=True)


def _nested(path: Path, images: int) -> Path:
    """An archive of 100 archives of small members with names like ImageNet's."""
    each = max(1, images // 100)
    with path.open("wb") as out:
        for label in range(images // each):
            inner = io.BytesIO()
            for number in range(each):
                inner.write(tar.make_header(f"n{label:08d}_{number}.JPEG", 600))
                inner.write(bytes(1024))
            inner.write(tar.END)
            out.write(tar.make_header(f"n{label:08d}.tar", inner.tell()))
            inner.seek(0)
            shutil.copyfileobj(inner, out)
        out.write(tar.END)
    return path


def _our_list(archive: Path, out: Path) -> None:
    list_images(str(archive))


def _our_headers(archive: Path, out: Path) -> None:
    with archive.open("rb", buffering=0) as file:
        whole = Window(file.fileno(), 0, archive.stat().st_size)
        for outer in list(tar.read_members(whole, "outer")):
            window = Window(file.fileno(), outer.offset, outer.offset + outer.size)
            _ = [(m.name, m.offset, m.size) for m in tar.read_members(window, "inner", outer.size)]


def _tarfile_list(archive: Path, out: Path) -> None:
    with tarfile.open(archive) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                _ = [(entry.name, entry.offset_data, entry.size) for entry in inner]
