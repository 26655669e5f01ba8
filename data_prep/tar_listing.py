"""Which images does a tar hold? Only headers and labels are read, nothing is unpacked.

Three kinds of archives are told apart by their member names: webdataset samples (KEY.jpg with
KEY.cls or KEY.json), an archive of one archive a class (ILSVRC2012_img_train.tar), and class
folders.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep import labels, tar
from data_prep.images import SUFFIXES
from data_prep.labels import Label
from data_prep.listing import UnsortedImages, folder_class, is_image_name

_SYNSET = re.compile(r"n\d{8}")


class FileWindow:
    """Bytes `start` to `end` of an open file as a `tar.ByteSource`.

    Args:
        descriptor: File descriptor of the open file.
        start: First byte of the window.
        end: Byte behind the last one of the window.
    """

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self._descriptor, self._start, self._end, self._position = descriptor, start, end, start

    def read(self, size: int, /) -> bytes:
        """Read the next bytes, fewer than `size` at the end."""
        count = max(0, min(size, self._end - self._position))
        data = os.pread(self._descriptor, count, self._position)
        self._position += len(data)
        return data

    def seek(self, position: int, /) -> None:
        """Go to a byte of the window."""
        self._position = self._start + position

    def read_member(self, member: tar.Member) -> bytes:
        """Read a member's bytes, wherever reading is."""
        return os.pread(self._descriptor, member.size, self._start + member.offset)


def list_tar(images: UnsortedImages, path: Path, number: int, prefix: str) -> None:
    """Add the images of an archive, and of the archives in it.

    Args:
        images: List to which the images are added.
        path: Path of the archive.
        number: Number of the archive among the source's files.
        prefix: Path that is put before the names of the images.

    Raises:
        ValueError: The archive is damaged, or a label cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        window = FileWindow(file.fileno(), 0, size)
        members = list(tar.read_members(window, str(path), size))
        if any(member.name.endswith(".tar") for member in members):
            _list_nested(images, file.fileno(), members, path, number)
        elif any(member.name.endswith((".cls", ".json")) for member in members):
            for sample in group_samples(members):
                image, name = sample.image, f"{prefix}{sample.image.name}"
                label = read_label(sample, window.read_member, path)
                json = (sample.json.offset, sample.json.size) if sample.json else (0, 0)
                images.add_image(name, number, image.offset, image.size, label, json)
        else:
            _list_folders(images, members, path, number, prefix)


def _list_folders(
    images: UnsortedImages, members: Sequence[tar.Member], path: Path, number: int, prefix: str
) -> None:
    """Add the images of an archive of class folders, or of one class."""
    for member in members:
        name = prefix + member.name
        if not is_image_name(member.name) or _is_hidden(member.name):
            images.left_out.append(name)
            continue
        label = folder_class(member.name)
        if label is None and _SYNSET.fullmatch(path.stem):
            label = path.stem  # the archive of one class, taken out of the large one
        images.add_image(name, number, member.offset, member.size, label)


def _list_nested(
    images: UnsortedImages, descriptor: int, members: Sequence[tar.Member], path: Path, number: int
) -> None:
    """Add the images of ILSVRC2012_img_train.tar: each member is the archive of one class."""
    for outer in members:
        if not outer.name.endswith(".tar"):
            images.left_out.append(outer.name)
            continue
        label = outer.name.rpartition("/")[2].removesuffix(".tar")
        window = FileWindow(descriptor, outer.offset, outer.offset + outer.size)
        for inner in tar.read_members(window, f"{outer.name} in {path}", outer.size):
            name = f"{label}/{inner.name}"
            if not is_image_name(inner.name) or _is_hidden(inner.name):
                images.left_out.append(name)
            else:
                images.add_image(name, number, outer.offset + inner.offset, inner.size, label)


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


class TarSample(NamedTuple):
    """Members of one webdataset sample."""

    key: str
    image: tar.Member
    cls: tar.Member | None
    json: tar.Member | None


def group_samples(members: Sequence[tar.Member]) -> Iterator[TarSample]:
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
                yield from _split_group(current, group)
            current, group = key, {}
        group[suffix.lower()] = member
    if current is not None:
        yield from _split_group(current, group)


def _split_group(key: str, group: dict[str, tar.Member]) -> Iterator[TarSample]:
    """Samples among the members with one key, given by the rest of their names."""
    image = next((member for suffix, member in group.items() if suffix in SUFFIXES), None)
    if image is not None:
        yield TarSample(key, image, group.get("cls"), group.get("json"))
        return
    for suffix, member in group.items():
        stem, _, ending = suffix.rpartition(".")
        if ending in SUFFIXES:
            cls, json = (group.get(f"{stem}.{kind}", group.get(kind)) for kind in ("cls", "json"))
            yield TarSample(f"{key}.{stem}", member, cls, json)


def read_label(
    sample: TarSample, read_member: Callable[[tar.Member], bytes], archive: object
) -> Label:
    """Read the label of a webdataset sample: its `.cls`, or `label` or `cls` in its `.json`.

    Args:
        sample: Members of the sample.
        read_member: Function that returns the bytes of a member.
        archive: Name of the archive, for messages.

    Raises:
        ValueError: A label file that is too large or says nothing that can be a label.
    """
    member = sample.cls or sample.json
    if member is None:
        return None
    limit = labels.LONGEST_CLS if sample.cls else labels.LONGEST_JSON
    name = f"{member.name} in {archive}"
    if member.size > limit:
        raise ValueError(f"{name} has {member.size} bytes, a label file at most {limit}.")
    parse = labels.parse_cls if sample.cls else labels.parse_json_label
    return parse(read_member(member), name)
