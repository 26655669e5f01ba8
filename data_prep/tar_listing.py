"""Which images does a tar hold? Only headers and labels are read, nothing is unpacked.

A tar may hold webdataset samples (KEY.jpg with KEY.cls or KEY.json), class folders, or one archive
a class (ILSVRC2012_img_train.tar), whose names are the first folder of the path then. An image's
label is what its own label file says; whether folders are classes is decided for the whole source
(`class_levels`), so that one stray member changes nothing.
"""

import os
from pathlib import Path
from typing import NamedTuple

from data_prep import balance, labels, tar
from data_prep.images import MAX_BYTES
from data_prep.listing import UnsortedImages, is_image_name
from data_prep.member_names import is_hidden, name_ending, quote_name
from data_prep.wds_samples import (
    LABEL_ENDINGS,
    NO_PICK,
    Choices,
    MemberPick,
    group_samples,
    read_label,
)


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


class _Window:
    """A member of an archive that is an archive itself, read from front to back.

    Args:
        source: The outer archive, at the member's first byte.
        start: Position of that byte.
        size: Bytes of the member.
    """

    def __init__(self, source: tar.ByteSource, start: int, size: int) -> None:
        self._source, self._start, self._size, self._position = source, start, size, 0

    def read(self, size: int, /) -> bytes:
        """Read the next bytes, fewer than `size` at the end of the member."""
        data = self._source.read(max(0, min(size, self._size - self._position)))
        self._position += len(data)
        return data

    def seek(self, position: int, /) -> None:
        """Go to a byte further on."""
        self._position = min(position, self._size)
        self._source.seek(self._start + self._position)


class _Place(NamedTuple):
    """An archive that is being listed, or one in it."""

    where: str
    """name for messages"""
    number: int
    """number among the source's files"""
    prefix: str
    """path that is put before the names of its members"""
    folder: str
    """the part of it that counts as folders of the images"""
    offset: int
    """position of its first byte in the file"""
    descriptor: int
    """of the file, to read in any order; -1 = a stream, whose members are read when they come"""


def list_tar(
    images: UnsortedImages,
    path: Path,
    number: int,
    prefix: str = "",
    *,
    pick: MemberPick = NO_PICK,
    stream: tar.ByteSource | None = None,
) -> None:
    """Add the images of an archive, and of the archives in it.

    Args:
        images: List to which the images are added.
        path: Path of the archive.
        number: Number of the archive among the source's files.
        prefix: Path that is put before the names of the images.
        pick: Members that the user wants for images and labels.
        stream: What the archive is read from; None = the file at `path`.

    Raises:
        ValueError: The archive is damaged.
    """
    images.prefix[number] = prefix
    if stream is not None:
        archive = _Place(quote_name(str(path)), number, prefix, "", 0, -1)
        holds_archives = _list_members(images, stream, None, archive, pick)
    else:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            archive = _Place(quote_name(str(path)), number, prefix, "", 0, file.fileno())
            window = FileWindow(file.fileno(), 0, size)
            holds_archives = _list_members(images, window, size, archive, pick)
    if holds_archives:
        images.prefix[number] = ""


def _list_members(
    images: UnsortedImages,
    source: tar.ByteSource,
    size: int | None,
    place: _Place,
    pick: MemberPick,
) -> bool:
    """Add the images of one archive; returns whether it holds archives."""
    members: list[tar.Member] = []
    label_bytes: dict[int, bytes] = {}  # by the member's offset, where they cannot be read later
    holds_archives = False

    def add_folder(name: str) -> None:
        if name and not is_hidden(name):
            images.folders.add(place.folder + name)

    for member in tar.read_members(source, place.where, size, add_folder=add_folder):
        if is_hidden(member.name):
            images.balance.see()
            images.balance.leave_out(place.prefix + member.name, balance.HIDDEN)
            add_folder(member.name.rpartition("/")[0])
        elif member.name.lower().endswith(".tar"):
            holds_archives = True
            _list_inner(images, source, member, place, pick)
        else:
            members.append(member)
            if place.descriptor < 0 and _is_short_label(member, pick):
                label_bytes[member.offset] = source.read(member.size)
    if tar.has_rest(source):
        images.balance.see()
        images.balance.leave_out(place.where, balance.BEHIND_END)
    images.balance.see(len(members))
    images.folders.update(
        place.folder + folder for folder in {m.name.rpartition("/")[0] for m in members} if folder
    )
    if not _add_samples(images, members, label_bytes, place, pick):
        _add_single_images(images, members, place)
    return holds_archives


def _is_short_label(member: tar.Member, pick: MemberPick) -> bool:
    return pick.is_label(member.name) and member.size <= labels.LONGEST_JSON


def _list_inner(
    images: UnsortedImages,
    source: tar.ByteSource,
    outer: tar.Member,
    place: _Place,
    pick: MemberPick,
) -> None:
    """Add the images of an archive in an archive: its name is the first folder of their paths."""
    name = outer.name.rpartition("/")[2][: -len(".tar")]
    inner = place._replace(
        where=f"{quote_name(outer.name)} in {place.where}",
        prefix=f"{name}/",
        folder=f"{name}/",
        offset=place.offset + outer.offset,
    )
    window = _Window(source, outer.offset, outer.size)
    if not _list_members(images, window, outer.size, inner, pick):
        images.folders.add(name)


def _add_samples(
    images: UnsortedImages,
    members: list[tar.Member],
    label_bytes: dict[int, bytes],
    place: _Place,
    pick: MemberPick,
) -> bool:
    """Add the images of webdataset samples; returns False where no image has a file beside it."""
    if not pick.image and not any(pick.is_label(member.name) for member in members):
        return False
    tally, choices = balance.Balance(), Choices()
    samples = [*group_samples(members, pick, balance=tally, choices=choices)]
    if not pick.image and not any(sample.cls or sample.json for sample in samples):
        if choices.labels or choices.apart:  # no label was taken because it is not certain which
            images.choices.add(choices)
        return False

    def read_member(member: tar.Member) -> bytes:
        if place.descriptor < 0:
            return label_bytes.get(member.offset, b"")
        return os.pread(place.descriptor, member.size, place.offset + member.offset)

    for sample in samples:
        label = None
        try:
            label = read_label(sample, read_member, place.where, pick)
            images.labels_read += bool(sample.cls or sample.json)
        except ValueError as error:
            images.note_bad_label(str(error))
        json = (0, 0)
        if sample.json and sample.json.size <= MAX_BYTES:
            json = (place.offset + sample.json.offset, sample.json.size)
        where = place.number, place.offset + sample.image.offset, sample.image.size
        images.add_image(place.prefix + sample.image.name, *where, label, json)
    images.balance.add(tally)
    images.choices.add(choices)
    return True


def _add_single_images(images: UnsortedImages, members: list[tar.Member], place: _Place) -> None:
    """Add images that have no files of their own beside them: of class folders, or of none."""
    other_members = []
    for member in members:
        if is_image_name(member.name):
            name, offset = place.prefix + member.name, place.offset + member.offset
            images.add_image(name, place.number, offset, member.size, None)
        else:
            other_members.append(member)
    if not other_members:
        return
    stems = {m.name.rpartition(".")[0] for m in members if is_image_name(m.name)}
    for member in other_members:
        name, ending = place.prefix + member.name, name_ending(member.name)
        if ending not in LABEL_ENDINGS and ending != "json":
            images.leave_out(name, place.folder + member.name)
        elif member.name.rpartition(".")[0] in stems:
            images.balance.leave_out(name, balance.UNUSED_LABEL)
            images.choices.unused[ending] += 1
        else:
            images.other_folders.add((place.folder + member.name).rpartition("/")[0])
            images.balance.leave_out(name, balance.LABEL_WITHOUT_IMAGE)
