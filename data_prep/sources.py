"""What is there to shard? A list of images by name, and where the bytes of each lie.

    folder of class folders     labels by sorted folder name, as torchvision's ImageFolder
    ILSVRC2012_img_train.tar    a tar of one tar a class: only headers are read, nothing is unpacked
    another tar, or several     webdataset samples (KEY.jpg, KEY.cls or KEY.json), or class folders
    compressed tar, parquet     by way of a scratch file (`scratch`)

Names, labels and order come out the same whichever form the images have, so the shards do too.
Classes may also be given by a file: one name a line (`classes`), or one label an image (`labels`).
"""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_prep import class_levels, command_sources, parquet, scratch
from data_prep.class_files import read_class_names
from data_prep.class_numbers import ClassNames, Unlabelled
from data_prep.images import SUFFIXES
from data_prep.label_files import read_image_labels
from data_prep.listing import Listing, UnsortedImages
from data_prep.member_names import normalize_name, quote_name
from data_prep.source_files import (
    SourceFiles,
    find_source_files,
    is_table,
    run_commands,
    select_names,
)
from data_prep.source_labels import label_images, path_facts
from data_prep.source_options import SourceOptions
from data_prep.tar_listing import list_tar
from data_prep.tree_listing import list_tree
from data_prep.wds_samples import NO_LABEL, NO_PICK, MemberPick
from mocov3_ds.data import manifest

PLAIN = SourceOptions()
_NO_NOTES: tuple[str, ...] = ()
_NO_NAMES: Sequence[str] = ()
_LOOKED_AT = ("only the labels of parquet files are read here: names and sizes are not known yet.",)


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
    options: SourceOptions = PLAIN,
    is_look: bool = False,
) -> Listing:
    """List the images of a source without reading them.

    Args:
        source: Folder of class folders, a tar or parquet file, or a folder of such files; patterns
            and braces as in `source_files`.
        under: Folder of the source, or of each of its archives, from which alone images are taken.
        classes: File with one class name a line, which numbers the classes; None = sorted names.
        labels: File with the label of each image; see `label_files.read_image_labels`.
        image: Name of what holds the image, where several can: column of a parquet file, or member
            of a sample.
        label: Name of what holds the class: column of `labels` or of a parquet file, member of a
            sample, entry of its JSON; `-` = take images without labels.
        unlabelled: What to do with images without a label where others have one.
        scratch_folder: Folder for copies of compressed tars and parquet files; None = refuse them.
        options: How the source is read.
        is_look: Write nothing: compressed tars are read from front to back, and the images in them
            cannot be read afterwards.

    Raises:
        ValueError: There is no such source, it is none, names and labels do not fit, or more than
            one reading is possible.
    """
    class_levels.check_level(options.class_level)
    file_source = run_commands(source, scratch_folder) if options.run_pipes else source
    source_files = find_source_files(file_source, options.files)
    source = command_sources.shorten_commands(source)
    pick = MemberPick(image, label if labels is None else NO_LABEL)
    listed = _list_files(source_files, source, under.strip("/"), scratch_folder, pick, is_look)
    images = listed.images
    names = listed.classes if classes is None else read_class_names(classes)
    notes = listed.notes + _describe_oddities(images)
    origin, empty = "", _NO_NAMES
    facts = listed.facts()
    if (labels is not None or label == NO_LABEL) and not options.class_level:
        class_levels.check_splits({folders for _, folders in facts.folders}, source)
    if labels is not None:
        images.label, names, label_notes = read_image_labels(
            labels, images.names, names, label=label, unlabelled=unlabelled
        )
        origin, notes = f"the file {quote_name(str(labels))}", notes + label_notes
    elif (label != NO_LABEL and not listed.has_lists) or options.class_level:
        origin, empty = label_images(images, facts, names, source, options)
    listing = images.to_listing(
        [str(file) for file in listed.files], listed.root, names, source, unlabelled, empty
    )
    notes += _note_one_class(listing, origin) + listing.notes
    return replace(listing, form=_describe_form(source_files), class_origin=origin, notes=notes)


class _Listed(NamedTuple):
    """The images of a source, before their classes are numbered."""

    images: UnsortedImages
    files: Sequence[Path]
    """files that hold the bytes of archives"""
    root: str
    """folder of images that are files of their own"""
    stems: Sequence[str]
    """names of the archives without their endings"""
    classes: ClassNames
    """class names that the source states itself"""
    notes: tuple[str, ...]
    has_lists: bool
    """whether a table lists the classes of each image, which has no single one then"""

    def facts(self) -> class_levels.PathFacts:
        """Folders of the images, each with its archive."""
        return path_facts(self.images, self.stems)


def _list_files(
    source_files: SourceFiles,
    source: str,
    under: str,
    scratch_folder: Path | None,
    pick: MemberPick,
    is_look: bool,
) -> _Listed:
    """List the images of archives or of a folder, those below `under` alone."""
    images, root, files = UnsortedImages(), "", list(source_files.archives)
    has_lists = False
    images.balance.add(source_files.balance)
    classes, notes = ClassNames(), _NO_NOTES
    if files and is_table(files[0]):
        columns = parquet.choose_columns(files, pick.image, pick.label)
        has_lists = columns.has_lists
        classes = ClassNames() if has_lists else columns.classes
        notes = columns.notes + (_LOOKED_AT if is_look else ())
        files = _list_tables(images, files, scratch_folder, columns, is_look)
    elif files:
        classes = _find_class_names(source_files.folder)
        reader = _TarReader(images, scratch_folder, pick, len(files) > 1, is_look)
        files = [reader.list_archive(file, number) for number, file in enumerate(files)]
    else:
        if pick.image:
            raise ValueError(
                f"--image {quote_name(pick.image)} names a member of samples or a column of a "
                f"table; {quote_name(source)} is a folder of images."
            )
        root = str(_find_folder(source_files.folder, under, source))
        list_tree(images, Path(root))
        images = _select_files(images, source_files)
    if files and under:
        images = images.select_folder(under)
    _check_images(images, source, under, NO_PICK if has_lists else pick)
    if pick.label == NO_LABEL:
        images.label = [None] * len(images.names)
    stems = [scratch.archive_stem(file) for file in source_files.archives]
    return _Listed(images, files, root, stems, classes, notes, has_lists)


def _find_folder(root: Path, under: str, source: str) -> Path:
    """Folder of a source below which images are taken, whichever form of Unicode its name has."""
    if ".." in under.split("/"):
        raise ValueError(f"--under {quote_name(under)} leaves {quote_name(source)}.")
    folder = root / under
    if not folder.is_dir() and under:
        folder = root
        for folder_name in under.split("/"):
            with contextlib.suppress(OSError):
                names = {normalize_name(path.name): path for path in folder.iterdir()}
                folder = names.get(normalize_name(folder_name), folder / folder_name)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {quote_name(under)} in {quote_name(source)}.")
    return folder if under else root


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


class _TarReader(NamedTuple):
    """Lists tars, compressed ones by way of a scratch folder."""

    images: UnsortedImages
    folder: Path | None
    pick: MemberPick
    use_prefix: bool
    is_look: bool

    def list_archive(self, file: Path, number: int) -> Path:
        """List one tar; returns the file that holds the bytes."""
        prefix = f"{scratch.archive_stem(file)}/" if self.use_prefix else ""
        plain = file
        if scratch.find_compression(file):
            if self.is_look:
                with contextlib.closing(scratch.CompressedTar(file)) as stream:
                    list_tar(self.images, file, number, prefix, pick=self.pick, stream=stream)
                return file
            plain = scratch.decompress_tar(file, _own_folder(file, number, self.folder))
        list_tar(self.images, plain, number, prefix, pick=self.pick)
        return plain


def _own_folder(file: Path, number: int, folder: Path | None) -> Path:
    """Make a folder for an archive's copy: names may differ in their endings alone."""
    if folder is None:
        raise ValueError(
            f"{quote_name(str(file))} needs a scratch folder to be read, as python -m data_prep "
            "shard makes one."
        )
    return Path(tempfile.mkdtemp(prefix=f"{number:06d}-", dir=folder))


def _list_tables(
    images: UnsortedImages,
    files: Sequence[Path],
    folder: Path | None,
    columns: parquet.Columns,
    is_look: bool,
) -> list[Path]:
    """List parquet files; returns the files that hold the bytes."""
    plain = []
    for number, file in enumerate(files):
        if is_look:
            path, rows = file, parquet.list_rows(file, columns)
        else:
            copy_folder = _own_folder(file, number, folder)
            path, rows = parquet.copy_images(file, copy_folder, columns)
        plain.append(path)
        for row in rows:
            images.balance.see()
            images.add_image(row.name, number, row.offset, row.size, row.label, row.json)
    return plain


def _select_files(images: UnsortedImages, source_files: SourceFiles) -> UnsortedImages:
    """The images of a folder whose paths match the patterns of `--files`."""
    patterns = source_files.image_patterns
    if not patterns:
        return images
    chosen = {*select_names(images.names, patterns)}
    return images.select_images(
        lambda row: images.names[row] if images.names[row] in chosen else None
    )


def _check_images(images: UnsortedImages, source: str, under: str, pick: MemberPick) -> None:
    """Refuse a source without images or labels that are asked for, or with several of a sample."""
    images.choices.check(source)
    if images.names:
        if not images.bad_rows:
            pick.check_label(images.label, quote_name(source))
        return
    searched = f"{source} (below {under})" if under else source
    archives = [
        omission.example
        for reason, omission in images.balance.left_out.items()
        if ".tar," in reason or ".parquet," in reason
    ]
    omitted = max(images.balance.left_out.values(), key=lambda it: it.count, default=None)
    advice = f", e.g. {quote_name(omitted.example)}." if omitted else "."
    if pick.image:
        advice = f"; no image is called {quote_name(pick.image)} (--image)."
    if (Path(source) / manifest.NAME).is_file():
        advice = (
            "; its manifest describes shards that lie elsewhere, which python -m data_prep stats "
            "and verify read."
        )
    if archives:
        archive_folder = archives[0].rpartition("/")[0]
        advice = (
            f"; archives lie in its folders, e.g. {quote_name(archives[0])}: give that folder as "
            f"the source, or add --files '{quote_name(archive_folder)}/*'."
        )
    raise ValueError(
        f"{quote_name(searched)} holds no images (files ending in {', '.join(SUFFIXES)}), "
        f"but {images.balance.omitted} other files{advice}"
    )


def _describe_form(source_files: SourceFiles) -> str:
    """What a source is, in a few words."""
    if not source_files.archives:
        return "folder of images"
    kinds = Counter(_archive_kind(file) for file in source_files.archives)
    return " and ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _archive_kind(file: Path) -> str:
    if is_table(file):
        return "parquet file"
    kind = scratch.named_compression(file)
    return f"tar compressed by {kind}" if kind else "tar"


def _note_one_class(listing: Listing, origin: str) -> tuple[str, ...]:
    """Say that all images lie in one class folder: it may be none."""
    if not origin.startswith("folder ") or len(np.unique(listing.label_N)) > 1:
        return ()
    return ("all images have one class; --class-level none takes them without classes.",)


def _describe_oddities(images: UnsortedImages) -> tuple[str, ...]:
    """What of the source was guessed or not used."""
    notes = []
    if images.bad_rows:
        notes.append(
            f"{len(images.bad_rows)} label files cannot be read, and their images have no label: "
            f"{images.bad_label}"
        )
    if images.choices.unused:
        endings = sorted(images.choices.unused)
        notes.append(
            f"{sum(images.choices.unused.values())} label files are not used "
            f"(.{', .'.join(endings)}); --label {endings[0]} reads them."
        )
    if images.repeated_folders:
        notes.append(
            f"{len(images.repeated_folders)} folders are links to one that is listed as well, e.g. "
            f"{quote_name(min(images.repeated_folders))}; their images occur in both."
        )
    return tuple(notes)
