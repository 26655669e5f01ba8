"""What there is to shard: a list of images by name, and where the bytes of each lie.

    folder of class folders     labels by sorted folder name, as torchvision's ImageFolder
    ILSVRC2012_img_train.tar    a tar of one tar a class: only headers are read, nothing is unpacked
    another tar, or several     webdataset samples (KEY.jpg, KEY.cls or KEY.json), or class folders
    compressed tar, parquet     by way of a scratch file (`scratch`)

Names, labels and order come out the same whichever form the images have, so the shards do too.
Classes may also be given by a file: one name a line (`classes`), or one label an image (`labels`).

Shape suffixes: N = images, M = members of an archive.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep import scratch, tar
from data_prep.images import SUFFIXES
from mocov3_ds.data import manifest

_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
_SYNSET = re.compile(r"n\d{8}")
_LONGEST_KEY = 90  # with the ending it must fit in a ustar name


class Item(NamedTuple):
    """One image of a source."""

    name: str
    """path in the source"""
    key: str
    """name in the shards: no dots, no slashes, unique in the set"""
    path: str
    """file that holds the bytes"""
    offset: int
    size: int
    """bytes"""
    label: int
    """-1 = none"""
    json_offset: int
    json_size: int
    """KEY.json of the sample, in the same file; 0 bytes = none"""

    @property
    def suffix(self) -> str:
        """Member ending in the shards."""
        return SUFFIXES[self.name.rpartition(".")[2].lower()]


@dataclass(frozen=True, eq=False)
class Listing:
    """All images of a source, by name; columns, because ImageNet has 1.3 million rows."""

    names: Sequence[str]
    keys: Sequence[str]
    files: Sequence[str]
    """files that hold the bytes; a tree's images are files of their own (`file_N` < 0)"""
    file_N: NDArray[np.int32]
    offset_N: NDArray[np.int64]
    size_N: NDArray[np.int64]
    label_N: NDArray[np.int32]
    json_N2: NDArray[np.int64]
    """offset and size of each KEY.json"""
    classes: tuple[str, ...]
    """names by label"""
    root: str = ""
    """folder of the files with `file_N` < 0"""
    left_out: Sequence[str] = field(default=())
    """names of files that are not images by their ending"""

    def __len__(self) -> int:
        return len(self.names)

    def items(self, rows: NDArray[np.int64]) -> list[Item]:
        """Some images in the order asked for."""
        return [
            Item(
                self.names[row],
                self.keys[row],
                self.files[file] if file >= 0 else f"{self.root}/{self.names[row]}",
                *rest,
            )
            for row, file, *rest in zip(
                rows.tolist(),
                self.file_N[rows].tolist(),
                self.offset_N[rows].tolist(),
                self.size_N[rows].tolist(),
                self.label_N[rows].tolist(),
                self.json_N2[rows, 0].tolist(),
                self.json_N2[rows, 1].tolist(),
                strict=True,
            )
        ]

    def digest(self) -> str:
        """What identifies the images: names, sizes, labels and class names."""
        whole = hashlib.sha256(
            "\n".join((*self.classes, "", *self.names)).encode("utf-8", "surrogateescape")
        )
        whole.update(self.size_N.tobytes() + self.label_N.tobytes() + self.json_N2[:, 1].tobytes())
        return whole.hexdigest()


@dataclass
class _Found:
    """Images as they are come across, in any order."""

    names: list[str] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    label: list[str | int | None] = field(default_factory=list)
    """class name, number, or nothing"""
    json: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        file: int,
        offset: int,
        size: int,
        label: str | int | None,
        json: tuple[int, int] = (0, 0),
    ) -> None:
        self.names.append(name)
        self.file.append(file)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)
        self.json.append(json)


def open_source(
    source: str,
    *,
    under: str = "",
    classes: Path | None = None,
    labels: Path | None = None,
    scratch_folder: Path | None = None,
) -> Listing:
    """List the images of a source without reading them.

    Args:
        source: folder of class folders, a tar or parquet file, or a folder of such files.
        under: only what lies in this folder of the source.
        classes: file with one class name a line, which numbers the classes; None = sorted names.
        labels: file with the label of each image; see `_apply_labels`.
        scratch_folder: where compressed tars and parquet files are copied to; None = refuse them.

    Raises:
        ValueError: there is nothing there, it is not a source, or names and labels do not fit.
    """
    path = Path(source).expanduser()
    if "://" in source:
        raise ValueError(
            f"{source}: sources are files of this machine (or a mounted file system); destinations "
            "can be object storage."
        )
    if not path.exists():
        raise ValueError(f"there is no {source}; the source is a folder of class folders or a tar.")
    under = under.strip("/")
    found, root = _Found(), ""
    names = [] if classes is None else read_names(classes)
    files = _archives(path)
    if files:
        if not names:
            names = _names_beside(files, path)
        several = len(files) > 1
        files = [
            _list_archive(found, file, number, scratch_folder, several=several)
            for number, file in enumerate(files)
        ]
    else:
        root = str(path / under)
        if not (path / under).is_dir():
            raise ValueError(f"there is no folder {under} in {source}.")
        _list_tree(found, path / under)
    if under and files:
        found = _below(found, under + "/")
    _refuse_odd(found, source, under)
    if labels is not None:
        names = _apply_labels(found, labels, names)
    return _sorted(found, [str(file) for file in files], root, names, source)


def _archives(path: Path) -> list[Path]:
    """The tars or parquet files that a source is made of; [] = a folder of images."""

    def is_archive(file: Path) -> bool:
        return file.suffix in (".tar", ".parquet") or scratch.is_compressed_tar(file)

    if path.is_file():
        if not is_archive(path):
            raise ValueError(
                f"{path} is neither a tar (.tar, .tar.gz, ...) nor a parquet file, nor a folder."
            )
        return [path]
    with os.scandir(path) as inside:
        entries = list(inside)
    files = sorted(
        Path(entry.path) for entry in entries if is_archive(Path(entry.name)) and entry.is_file()
    )
    # a set of ours has a folder of receipts
    beside = [
        entry
        for entry in entries
        if files and (_is_image(entry.name) or (entry.is_dir() and entry.name != "receipts"))
    ]
    if beside:
        raise ValueError(
            f"{path} holds archives ({files[0].name}) beside images or folders ({beside[0].name}); "
            "shard each by itself."
        )
    return files


def _names_beside(files: Sequence[Path], path: Path) -> list[str]:
    """Class names from the manifest beside tars, or from inside a parquet file; [] = none."""
    if files[0].suffix == ".parquet":
        return scratch.class_names(files[0])
    if path.is_dir() and (path / manifest.NAME).exists():
        return list(manifest.load(str(path)).classes)
    return []


def _list_archive(
    found: _Found, file: Path, number: int, folder: Path | None, *, several: bool
) -> Path:
    """List one archive; returns the file that holds the bytes."""
    if file.suffix == ".tar":
        _list_tar(found, file, number, prefix=f"{file.stem}/" if several else "")
        return file
    if folder is None:
        raise ValueError(f"{file} needs a scratch folder to be read.")
    if file.suffix == ".parquet":
        plain, rows = scratch.copied_from_parquet(file, folder)
        for row in rows:
            found.add(row.name, number, row.offset, row.size, row.label)
        return plain
    plain = scratch.decompressed(file, folder)
    _list_tar(found, plain, number, prefix=f"{plain.stem}/" if several else "")
    return plain


def read_names(path: Path) -> list[str]:
    """Class names, one a line: the first word (so `n01440764 tench, Tinca tinca` is n01440764).

    Raises:
        ValueError: no such file, no names, a name twice.
    """
    names = [line.split()[0] for line in _lines(path)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names class {twice[0]} twice.")
    return names


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise ValueError(f"there is no {path}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file.") from None
    if not lines:
        raise ValueError(f"{path} is empty.")
    return lines


def _apply_labels(found: _Found, path: Path, classes: list[str]) -> list[str]:
    """Take the labels from a file; returns the class names in the order that numbers them.

    Three forms are read. `IMAGE CLASS` a line, blank or comma between (the image by its name with
    or without ending; a header line and what follows is left out, so Kaggle's LOC_val_solution.csv
    works). One class name a line, for the images in name order. One number a line in name order
    (the development kit's ILSVRC2012_validation_ground_truth.txt, from 1), which needs `classes`:
    the name of each number, because the kit numbers classes in an order of its own.
    """
    rows = [re.split(r"[,\s]+", line.strip()) for line in _lines(path)]
    stems = [_stem(name) for name in found.names]
    by_name = {row[0].rpartition("/")[2]: row[1] for row in rows if len(row) > 1}
    by_name |= {_stem(name): label for name, label in by_name.items()}
    if any(stem in by_name for stem in stems):
        missing = [n for n, stem in zip(found.names, stems, strict=True) if stem not in by_name]
        if missing:
            raise ValueError(
                f"{path} has no label for {len(missing)} of {len(stems)} images, e.g. {missing[0]}."
            )
        tokens = [by_name[stem] for stem in stems]
        first = 0
    else:
        if len(rows) != len(stems):
            raise ValueError(
                f"{path} has {len(rows)} lines for {len(stems)} images and names none of them; it "
                "must hold one label an image, in the order of the images' names."
            )
        order = sorted(range(len(stems)), key=lambda row: found.names[row])
        tokens = [""] * len(stems)
        for row, line in zip(order, rows, strict=True):
            tokens[row] = line[0]
        first = 1
    if not all(token.isdigit() for token in tokens):
        found.label = list(tokens)
        return classes
    if first and not classes:
        raise ValueError(
            f"{path} numbers the classes in an order of its own, which need not be that of the "
            "training set; add --classes FILE with the name of class 1, 2, ... a line (for "
            "ImageNet's kit: the synsets by ILSVRC2012_ID)."
        )
    numbers = [int(token) - first for token in tokens]
    if classes and not all(0 <= number < len(classes) for number in numbers):
        raise ValueError(
            f"{path} holds class {max(numbers) + first}, the class file has {len(classes)} names."
        )
    found.label = [classes[number] for number in numbers] if classes else list(numbers)
    # the training set numbers its folders by sorted name, whatever order the kit has
    return sorted(classes) if first else classes


def _stem(name: str) -> str:
    last = name.rpartition("/")[2]
    stem, dot, suffix = last.rpartition(".")
    return stem if dot and suffix.lower() in SUFFIXES else last


def _list_tree(found: _Found, root: Path) -> None:
    """Walk a folder; linked folders are followed as `ImageFolder` does, once each."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]  # below the root, each with a slash at the end
    while waiting:
        folder = waiting.pop()
        status = os.stat(f"{root}/{folder}")  # noqa: PTH116 - Path costs as much as the call
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(f"{name}/")
                elif not _is_image(entry.name):
                    found.left_out.append(name)
                elif not entry.is_file():
                    raise ValueError(f"{root / name} is a link to nothing; remove or repair it.")
                else:
                    found.add(name, -1, 0, entry.stat().st_size, _folder_class(name))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES and "." in name


def _folder_class(name: str) -> str | None:
    return name.partition("/")[0] if "/" in name else None


class Window:
    """Bytes `start` to `end` of an open file as a `tar.ByteSource`."""

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self.descriptor, self.start, self.end, self.at = descriptor, start, end, start

    def read(self, size: int, /) -> bytes:
        """The next bytes, fewer than `size` at the end."""
        data = os.pread(self.descriptor, max(0, min(size, self.end - self.at)), self.at)
        self.at += len(data)
        return data

    def seek(self, position: int, /) -> None:
        """Go to a byte of the window."""
        self.at = self.start + position

    def bytes_of(self, member: tar.Member) -> bytes:
        """A member's bytes, wherever reading is."""
        return os.pread(self.descriptor, member.size, self.start + member.offset)


def _list_tar(found: _Found, path: Path, number: int, prefix: str) -> None:
    """Read the headers of an archive, and of the archives in it."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        window = Window(file.fileno(), 0, size)
        members = list(tar.members(window, str(path), size))
        if any(member.name.endswith(".tar") for member in members):
            _list_nested(found, file.fileno(), members, path, number)
        elif any(member.name.endswith((".cls", ".json")) for member in members):
            for sample in samples_of(members):
                image, name = sample.image, f"{prefix}{sample.image.name}"
                label = read_label(sample, window.bytes_of, path)
                extra = (sample.json.offset, sample.json.size) if sample.json else (0, 0)
                found.add(name, number, image.offset, image.size, label, extra)
        else:
            for member in members:
                if not _is_image(member.name) or _hidden(member.name):
                    found.left_out.append(prefix + member.name)
                    continue
                label = _folder_class(member.name)
                if label is None and _SYNSET.fullmatch(path.stem):
                    label = path.stem  # the archive of one class, taken out of the large one
                found.add(prefix + member.name, number, member.offset, member.size, label)


def _list_nested(
    found: _Found, descriptor: int, members: Sequence[tar.Member], path: Path, number: int
) -> None:
    """ILSVRC2012_img_train.tar: each member is the archive of one class."""
    for outer in members:
        if not outer.name.endswith(".tar"):
            found.left_out.append(outer.name)
            continue
        name = outer.name.rpartition("/")[2].removesuffix(".tar")
        window = Window(descriptor, outer.offset, outer.offset + outer.size)
        for inner in tar.members(window, f"{outer.name} in {path}", outer.size):
            if not _is_image(inner.name) or _hidden(inner.name):
                found.left_out.append(f"{name}/{inner.name}")
            else:
                found.add(
                    f"{name}/{inner.name}", number, outer.offset + inner.offset, inner.size, name
                )


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


class Sample(NamedTuple):
    """Members of one webdataset sample."""

    key: str
    image: tar.Member
    cls: tar.Member | None
    json: tar.Member | None


def samples_of(members: Sequence[tar.Member]) -> Iterator[Sample]:
    """Group the members of a webdataset tar; members of one sample follow each other.

    The key ends at the first dot of the file name. Of several images the first with a plain ending
    is the sample's (`a.jpg`, not `a.mask.png`). Where none has a plain ending, the names have dots
    of their own (`img.0001.jpg`) and the key ends at the last one: each image is a sample. A group
    without an image is left out.
    """
    group: dict[str, tar.Member] = {}
    current = None
    for member in members:
        folder, slash, last = member.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        if not stem:
            continue
        key = folder + slash + stem
        if key != current or suffix.lower() in group:
            if current is not None:
                yield from _sample(current, group)
            current, group = key, {}
        group[suffix.lower()] = member
    if current is not None:
        yield from _sample(current, group)


def _sample(key: str, group: dict[str, tar.Member]) -> Iterator[Sample]:
    image = next((member for suffix, member in group.items() if suffix in SUFFIXES), None)
    if image is not None:
        yield Sample(key, image, group.get("cls"), group.get("json"))
        return
    for suffix, member in group.items():
        stem, _, last = suffix.rpartition(".")
        if last in SUFFIXES:
            beside = (group.get(f"{stem}.{kind}", group.get(kind)) for kind in ("cls", "json"))
            yield Sample(f"{key}.{stem}", member, *beside)


_LONGEST_LABEL = 1024
LONGEST_JSON = 1 << 20
"""Largest `.json` of a sample that is read for its label, bytes."""


def read_label(
    sample: Sample, read: Callable[[tar.Member], bytes], where: object
) -> str | int | None:
    """Label of a webdataset sample: its `.cls`, or `label` or `cls` in its `.json`.

    Raises:
        ValueError: a label file that is too large or says nothing that can be a label.
    """
    member = sample.cls or sample.json
    if member is None:
        return None
    limit = _LONGEST_LABEL if sample.cls else LONGEST_JSON
    if member.size > limit:
        raise ValueError(
            f"{member.name} in {where} has {member.size} bytes, a label file at most {limit}."
        )
    data = read(member)
    if sample.cls:
        text = data.decode("utf-8", "replace").strip()
        if not text:
            raise ValueError(f"{member.name} in {where} is empty; it should hold the label.")
        return int(text) if text.isascii() and text.lstrip("-").isdigit() else text
    try:
        tree = json.loads(data)
    except ValueError:
        raise ValueError(f"{member.name} in {where} is not valid JSON.") from None
    label = tree.get("label", tree.get("cls")) if isinstance(tree, dict) else None
    return label if isinstance(label, str | int) and not isinstance(label, bool) else None


def _below(found: _Found, prefix: str) -> _Found:
    """The part of an archive below one folder, as if it were the root."""
    kept = _Found()
    for row, name in enumerate(found.names):
        if name.startswith(prefix):
            short, label = name[len(prefix) :], found.label[row]
            if label == prefix.partition("/")[0]:
                label = _folder_class(short)
            kept.add(
                short, found.file[row], found.offset[row], found.size[row], label, found.json[row]
            )
    return kept


def _refuse_odd(found: _Found, source: str, under: str) -> None:
    if not found.names:
        inside = f"{source} (below {under})" if under else source
        raise ValueError(
            f"{inside} holds no images (files ending in {', '.join(SUFFIXES)}), "
            f"but {len(found.left_out)} other files."
        )
    tops = {name.partition("/")[0] for name in found.names if name.count("/") > 1}
    if tops and tops <= _SPLITS and not any(name.count("/") < 2 for name in found.names):
        raise ValueError(
            f"{source} holds splits ({', '.join(sorted(tops))}), not classes; shard each by itself "
            f"with --under {min(tops)} --split {min(tops)}."
        )


def _sorted(
    found: _Found, files: Sequence[str], root: str, classes: Sequence[str], source: str
) -> Listing:
    """Number the classes, give each image its key, and sort by name."""
    numbers, names = number_labels(found.label, classes, source, found.names)
    order = sorted(
        range(len(found.names)),
        key=lambda row: (found.names[row], found.file[row], found.offset[row]),
    )
    rows = np.array(order, dtype=np.int64)
    sorted_names = [found.names[row] for row in order]
    return Listing(
        names=sorted_names,
        keys=_unique([key_of(name) for name in sorted_names]),
        files=files,
        file_N=np.array(found.file, dtype=np.int32)[rows],
        offset_N=np.array(found.offset, dtype=np.int64)[rows],
        size_N=np.array(found.size, dtype=np.int64)[rows],
        label_N=np.array(numbers, dtype=np.int32)[rows],
        json_N2=np.array(found.json, dtype=np.int64).reshape(-1, 2)[rows],
        classes=tuple(names),
        root=root,
        left_out=sorted(found.left_out),
    )


def number_labels(
    labels: Sequence[str | int | None], classes: Sequence[str], source: str, images: Sequence[str]
) -> tuple[Sequence[int], Sequence[str]]:
    """Labels as numbers, and the names of the numbers.

    Args:
        labels: class names, numbers, or None, one an image.
        classes: names in the order that numbers them; () = sorted.
        source: what to call the whole in errors.
        images: what to call each image in errors.

    Raises:
        ValueError: labels that the names do not cover, or names for some images only.
    """
    if not any(isinstance(label, str) for label in labels):
        numbers = [-1 if label is None else int(label) for label in labels]
        if classes and max(numbers) >= len(classes):
            raise ValueError(
                f"{source} holds label {max(numbers)}, the class file names {len(classes)} classes."
            )
        return numbers, classes
    bare = [name for name, label in zip(images, labels, strict=True) if label is None]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(labels)} images of {source} have no class, e.g. {bare[0]}; "
            "put every image in a class folder or none."
        )
    # numbers among names are read as names: a class folder may be called 7
    named = {str(label) for label in labels}
    names = list(classes) or sorted(named)
    number_of = {name: number for number, name in enumerate(names)}
    unknown = sorted(named - {*number_of})
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} classes that the class file does not name, "
            f"e.g. {unknown[0]}."
        )
    return [number_of[str(label)] for label in labels], names


_ODD = re.compile(r"[^A-Za-z0-9_-]+")


def key_of(name: str) -> str:
    """Key of an image from its path: the class folder and the stem, safe in any archive.

    `n01440764/n01440764_10026.JPEG` gives `n01440764_10026`, `cat/1.5.png` gives `cat_1_5`.
    """
    *folders, last = name.split("/")
    stem = last.rpartition(".")[0]
    if folders and stem.startswith(f"{folders[-1]}_"):
        folders.pop()
    key = _ODD.sub("_", "_".join([*folders, stem]))
    if len(key) > _LONGEST_KEY:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        key = f"{key[: _LONGEST_KEY - len(digest) - 1]}-{digest}"
    return key


def _unique(keys: list[str]) -> list[str]:
    """Number the keys that occur more than once, in order."""
    taken = Counter(keys)
    if len(taken) == len(keys):
        return keys
    seen: Counter[str] = Counter()
    unique = []
    for key in keys:
        seen[key] += 1
        fresh = key
        if seen[key] > 1:
            number = seen[key]
            while (fresh := f"{key}-{number}") in taken:
                number += 1
            taken[fresh] += 1
        unique.append(fresh)
    return unique
