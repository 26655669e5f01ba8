"""What is there to shard? A list of images by name, and where the bytes of each lie.

    folder of class folders     labels by sorted folder name, as torchvision's ImageFolder
    ILSVRC2012_img_train.tar    a tar of one tar a class: only headers are read, nothing is unpacked
    another tar, or several     webdataset samples (KEY.jpg, KEY.cls or KEY.json), or class folders
    compressed tar, parquet     by way of a scratch file (`scratch`, `parquet`)

Names, labels and order come out the same whichever form the images have, so the shards do too.
Classes may also be given by a file: one name a line (`classes`), or one label an image (`labels`).
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from data_prep import parquet, scratch
from data_prep.class_files import read_class_names
from data_prep.class_numbers import ClassNames, Unlabelled
from data_prep.images import SUFFIXES
from data_prep.label_files import read_image_labels
from data_prep.listing import Listing, UnsortedImages, folder_class, is_image_name
from data_prep.tar_listing import list_tar
from mocov3_ds.data import manifest, storage

_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def list_images(
    source: str,
    *,
    under: str = "",
    classes: Path | None = None,
    labels: Path | None = None,
    image: str = "",
    label: str = "",
    unlabelled: Unlabelled = "refuse",
    scratch_folder: Path | None = None,
) -> Listing:
    """List the images of a source without reading them.

    Args:
        source: Folder of class folders, a tar or parquet file, or a folder of such files.
        under: Folder of the source from which alone images are taken.
        classes: File with one class name a line, which numbers the classes; None = sorted names.
        labels: File with the label of each image; see `label_files.read_image_labels`.
        image: Name of the column that holds the images; empty = the only one that can.
        label: Name of the column that holds the class, of `labels` if that is given.
        unlabelled: What to do with images without a label where others have one.
        scratch_folder: Folder for copies of compressed tars and parquet files; None = refuse them.

    Raises:
        ValueError: There is no such source, it is none, or names and labels do not fit.
    """
    path = _find_source(source)
    under = under.strip("/")
    images, root = UnsortedImages(), ""
    names = ClassNames() if classes is None else read_class_names(classes)
    notes: tuple[str, ...] = ()
    files = _find_archives(path)
    if files and files[0].suffix == ".parquet":
        column = label if labels is None else parquet.NO_LABEL
        files, columns = _list_parquet(images, files, scratch_folder, image, column)
        names, notes = names if names.readings else columns.classes, columns.notes
    elif files:
        names = names if names.readings else _find_class_names(path)
        files = [
            _list_archive(images, file, number, scratch_folder, use_prefix=len(files) > 1)
            for number, file in enumerate(files)
        ]
        if under:
            images = images.select_folder(under + "/")
    else:
        root = str(path / under)
        if not (path / under).is_dir():
            raise ValueError(f"there is no folder {under} in {source}.")
        _list_tree(images, path / under)
    _check_images(images, source, under)
    if labels is not None:
        images.label, names, label_notes = read_image_labels(
            labels, images.names, names, label=label, unlabelled=unlabelled
        )
        notes += label_notes
    listing = images.to_listing([str(file) for file in files], root, names, source, unlabelled)
    return replace(listing, notes=notes + listing.notes)


def _find_source(source: str) -> Path:
    """Path of a source, which must be on this machine."""
    if not storage.is_local(source):
        raise ValueError(
            f"{source}: sources are files of this machine (or a mounted file system); destinations "
            "can be object storage."
        )
    path = storage.local_path(source)
    if not path.exists():
        raise ValueError(f"there is no {source}; the source is a folder of class folders or a tar.")
    return path


def _find_archives(path: Path) -> list[Path]:
    """Find the tars or parquet files that a source is made of; [] = a folder of images."""
    if path.is_file():
        if not _is_archive(path):
            raise ValueError(
                f"{path} is neither a tar (.tar, .tar.gz, ...) nor a parquet file, nor a folder."
            )
        return [path]
    with os.scandir(path) as scan:
        entries = list(scan)
    files = sorted(
        Path(entry.path) for entry in entries if _is_archive(Path(entry.name)) and entry.is_file()
    )
    # a set of ours has a folder of receipts
    images = [
        entry
        for entry in entries
        if files and (is_image_name(entry.name) or (entry.is_dir() and entry.name != "receipts"))
    ]
    if images:
        raise ValueError(
            f"{path} holds archives ({files[0].name}) beside images or folders ({images[0].name}); "
            "shard each by itself."
        )
    return files


def _is_archive(path: Path) -> bool:
    return path.suffix in (".tar", ".parquet") or scratch.is_compressed_tar(path)


def _find_class_names(path: Path) -> ClassNames:
    """Read class names from the manifest beside tars."""
    if path.is_dir() and (path / manifest.NAME).exists():
        described = manifest.load(str(path))
        meaning: Literal["names", "positions"] = (
            "names" if described.provenance.get("labels") == "ids" else "positions"
        )
        readings = (described.classes,) if described.classes else ()
        return ClassNames(readings, f"{path / manifest.NAME}", meaning)
    return ClassNames()


def _list_archive(
    images: UnsortedImages, file: Path, number: int, folder: Path | None, *, use_prefix: bool
) -> Path:
    """List one archive; returns the file that holds the bytes."""
    if file.suffix == ".tar":
        plain = file
    elif folder is None:
        raise ValueError(f"{file} needs a scratch folder to be read.")
    else:
        plain = scratch.decompress_tar(file, folder)
    list_tar(images, plain, number, prefix=f"{plain.stem}/" if use_prefix else "")
    return plain


def _list_parquet(
    images: UnsortedImages, files: Sequence[Path], folder: Path | None, image: str, label: str
) -> tuple[list[Path], parquet.Columns]:
    """List parquet files; returns the files that hold the bytes, and what was taken of them."""
    if folder is None:
        raise ValueError(f"{files[0]} needs a scratch folder to be read.")
    if tars := [file for file in files if file.suffix != ".parquet"]:
        raise ValueError(f"{tars[0]} is a tar beside {files[0].name}; shard each by itself.")
    columns = parquet.choose_columns(files, image, label)
    plain = []
    for number, file in enumerate(files):
        path, rows = parquet.copy_images(file, folder, columns)
        plain.append(path)
        for row in rows:
            images.add_image(row.name, number, row.offset, row.size, row.label)
    return plain, columns


def _list_tree(images: UnsortedImages, root: Path) -> None:
    """Walk a folder; linked folders are followed as `ImageFolder` does, once each."""
    visited: set[tuple[int, int]] = set()
    waiting = [""]  # below the root, each with a slash at the end
    while waiting:
        folder = waiting.pop()
        status = os.stat(f"{root}/{folder}")  # noqa: PTH116 - Path costs as much as the call
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(f"{name}/")
                elif not is_image_name(entry.name):
                    images.left_out.append(name)
                elif not entry.is_file():
                    raise ValueError(f"{root / name} is a link to nothing; remove or repair it.")
                else:
                    images.add_image(name, -1, 0, entry.stat().st_size, folder_class(name))


def _check_images(images: UnsortedImages, source: str, under: str) -> None:
    """Refuse a source without images, and a folder of splits."""
    if not images.names:
        searched = f"{source} (below {under})" if under else source
        raise ValueError(
            f"{searched} holds no images (files ending in {', '.join(SUFFIXES)}), "
            f"but {len(images.left_out)} other files."
        )
    tops = {name.partition("/")[0] for name in images.names if name.count("/") > 1}
    if tops and tops <= _SPLITS and not any(name.count("/") < 2 for name in images.names):
        raise ValueError(
            f"{source} holds splits ({', '.join(sorted(tops))}), not classes; shard each by itself "
            f"with --under {min(tops)} --split {min(tops)}."
        )
