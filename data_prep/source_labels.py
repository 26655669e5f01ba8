"""Which class has each image of a source: what its own label file says, or a folder of its path?

Whether folders are classes is decided for the whole source, once all its images are listed.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from data_prep import class_levels
from data_prep.class_levels import Folders, PathFacts
from data_prep.class_numbers import ClassNames
from data_prep.listing import UnsortedImages
from data_prep.member_names import join_names, quote_name
from data_prep.source_options import SourceOptions


def label_images(
    images: UnsortedImages,
    facts: PathFacts,
    classes: ClassNames,
    source: str,
    options: SourceOptions,
) -> tuple[str, Sequence[str]]:
    """Give images their classes.

    Args:
        images: Images of the source; those without label files get the class of their path.
        facts: Folders of the images, each with its archive.
        classes: Class names that a file or a manifest states.
        source: Name of the source, for messages.
        options: How the source is read.

    Returns:
        Where the classes come from, in a few words (empty = there are none), and the names of class
        folders without images that are to keep their place.

    Raises:
        ValueError: More than one reading is possible, or no label file can be read.
    """
    paths = {folders for _, folders in facts.folders}
    has_labels = any(label is not None for label in images.label)
    if has_labels and not options.class_level:
        class_levels.check_splits(paths, source)
        _check_one_origin(images, source)
        return "the labels of the samples", ()
    if images.bad_rows and not images.labels_read and not options.class_level:
        raise ValueError(
            f"none of the {len(images.bad_rows)} label files of {quote_name(source)} can be read: "
            f"{images.bad_label.rstrip('.')} (--label - takes the images without labels)."
        )
    stated_names = {name for reading in classes.readings for name in reading}
    level = options.class_level or class_levels.choose_level(facts, stated_names, source)
    if not options.class_level and level.isdigit() and any(size for _, size in images.json):
        level = _level_of_samples(paths, int(level), source)
    _set_labels(images, facts.archives, level)
    if level == "none":
        return "", ()
    if all(label is None for label in images.label):
        raise ValueError(
            f"--class-level {level} gives no image of {quote_name(source)} a class; the paths are "
            f"like {quote_name(images.inner_name(0))}."
        )
    empty = _find_empty_classes(images, paths, level, classes, source, options.empty_classes)
    origin = {"archive": "the names of the archives", "own": "the folder that each image lies in"}
    return origin.get(level, f"folder {level} of the path"), empty


def path_facts(images: UnsortedImages, stems: Sequence[str]) -> PathFacts:
    """Folders of the images, each with its archive.

    Args:
        images: Images of the source.
        stems: Names of the archives without their endings.
    """
    counts = Counter(
        (images.file[row], images.inner_name(row).rpartition("/")[0])
        for row in range(len(images.names))
    )
    folders = {(number, _split(folder)): count for (number, folder), count in counts.items()}
    return PathFacts(folders, stems)


def _split(folder: str) -> Folders:
    return tuple(folder.split("/")) if folder else ()


def _set_labels(images: UnsortedImages, stems: Sequence[str], level: str) -> None:
    """Set the label of each image to the class of its path; unread label files do not matter."""
    images.bad_rows.clear()
    of_folder: dict[tuple[int, str], str | None] = {}
    for row, number in enumerate(images.file):
        folder = images.inner_name(row).rpartition("/")[0]
        if (number, folder) not in of_folder:
            archive = stems[number] if number >= 0 else ""
            of_folder[number, folder] = class_levels.class_at_level(level, _split(folder), archive)
        images.label[row] = of_folder[number, folder]


def _check_one_origin(images: UnsortedImages, source: str) -> None:
    """Refuse archives of class folders beside archives of labelled samples."""
    pairs = zip(images.file, images.label, strict=True)
    labelled = {number for number, label in pairs if label is not None}
    for row, number in enumerate(images.file):
        if number not in labelled and "/" in images.inner_name(row):
            raise ValueError(
                f"some archives of {quote_name(source)} hold labelled samples and some folders of "
                f"images (e.g. {quote_name(images.names[row])}); shard each kind by itself with "
                "--files."
            )


def _level_of_samples(paths: Collection[Folders], level: int, source: str) -> str:
    """Level of the class of samples without labels that lie in folders: these may mean nothing."""
    names = sorted({folders[level - 1] for folders in paths if len(folders) >= level})
    if len(names) < 2 or any(len(folders) < level for folders in paths):
        return "none"
    raise ValueError(
        f"{quote_name(source)} holds samples with .json files that name no label, in "
        f"{len(names)} folders ({join_names(names, 3)}): --class-level {level} takes these for the "
        "classes, --class-level none takes the images without classes."
    )


def _find_empty_classes(
    images: UnsortedImages,
    paths: Collection[Folders],
    level: str,
    classes: ClassNames,
    source: str,
    choice: str,
) -> Sequence[str]:
    """Class folders without images that are to keep their place."""
    if classes.readings or choice == "drop":
        return ()
    folders = [_split(folder) for folder in images.folders if folder]
    busy_folders = [_split(folder) for folder in images.other_folders]
    empty = class_levels.find_empty_classes(level, folders, paths, busy_folders)
    if not empty or choice == "keep":
        return empty
    raise ValueError(
        f"{quote_name(source)} has {len(empty)} class folders without images "
        f"({join_names(empty)}); --empty-classes keep lets them keep their numbers, "
        "--empty-classes drop numbers the others without them."
    )
