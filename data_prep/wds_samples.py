"""Which members of a webdataset tar make one sample, and which of them are its image and label?

Members of one sample follow each other, and the key ends at the first dot of the file name: that is
webdataset's own rule (`base_plus_ext`, `group_by_keys`), against which this one is tested.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep import labels, tar
from data_prep.balance import (
    FURTHER_IMAGE,
    LABEL_WITHOUT_IMAGE,
    UNREAD_FORMATS,
    UNUSED_LABEL,
    Balance,
    ending_reason,
)
from data_prep.images import ARRAY, SUFFIXES
from data_prep.labels import Label
from data_prep.member_names import join_names, quote_name

LABEL_ENDINGS = {"cls", "cls2", "class", "index", "inx", "id", "label", "target"}
"""Endings of members that hold a label by webdataset's decoders or by custom; `cls` alone is read
unasked."""

NO_LABEL = "-"
"""`--label -` takes images without labels."""


class MemberPick(NamedTuple):
    """Which member of a sample the user wants, by its ending or the word before it; "" = decide."""

    image: str = ""
    label: str = ""

    def is_label(self, name: str) -> bool:
        """Whether a member is read for a label."""
        if not self.label or self.label == NO_LABEL:
            return name[-5:].lower().endswith((".cls", ".json"))
        suffix = name.rpartition("/")[2].partition(".")[2].lower()
        ending = suffix.rpartition(".")[2]
        return ending in ("cls", "json") or _fits(suffix, self.label)

    def check_label(self, found: Iterable[Label], source: str) -> None:
        """Refuse a label that was asked for by name where no image has it.

        Args:
            found: Label of each image; None = none.
            source: Name of the source, for messages.

        Raises:
            ValueError: No image has it.
        """
        if self.label in ("", NO_LABEL) or any(label is not None for label in found):
            return
        raise ValueError(
            f"no image of {source} has a label called {quote_name(self.label)} (--label), which is "
            "a member of its sample, an entry of its JSON, or a column of a table; --label - takes "
            "the images without labels."
        )


NO_PICK = MemberPick()


class TarSample(NamedTuple):
    """Members of one webdataset sample."""

    key: str
    image: tar.Member
    cls: tar.Member | None
    json: tar.Member | None


@dataclass
class Choices:
    """Samples in which several members may be the image or the label, by their endings."""

    images: Counter[tuple[str, ...]] = field(default_factory=Counter)
    labels: Counter[tuple[str, ...]] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    """endings of label members that were not used"""
    apart: Counter[str] = field(default_factory=Counter)
    """labels that do not stand beside their images, by the first of their keys in each archive"""

    def add(self, other: "Choices") -> None:
        """Count the samples of another archive, too."""
        self.images.update(other.images)
        self.labels.update(other.labels)
        self.unused.update(other.unused)
        self.apart.update(other.apart)

    def check(self, source: str) -> None:
        """Refuse samples with several images or labels of one kind, and labels that lie apart.

        Args:
            source: Name of the source, for messages.

        Raises:
            ValueError: There are such samples.
        """
        for title, flag, counts, limit in (
            ("images", "--image", self.images, 2),
            ("labels", "--label", self.labels, 1),
        ):
            endings, count = max(counts.items(), key=lambda item: item[1], default=((), 0))
            if count >= limit:
                raise ValueError(
                    f"{count} samples of {source} hold several {title}: {join_names([*endings])}; "
                    f"{flag} {endings[0]} (or another of them) says which one is meant."
                )
        if self.apart:
            raise ValueError(
                f"{self.apart.total()} labels of {source} do not stand beside their images, e.g. "
                f"{quote_name(min(self.apart))}: the members of a sample follow each other, in one "
                "folder and of one name but for the ending; make the archive again so (tar "
                "--sort=name), or take no labels by --label -."
            )


def group_samples(
    members: Sequence[tar.Member],
    pick: MemberPick = NO_PICK,
    *,
    balance: Balance | None = None,
    choices: Choices | None = None,
) -> Iterator[TarSample]:
    """Group the members of a webdataset tar; members of one sample follow each other.

    The key ends at the first dot of the file name. Of several images the first with a plain ending
    is the sample's (`a.jpg`, not `a.mask.png`). Where none has a plain ending, the names have dots
    of their own (`img.0001.jpg`) and the key ends at the last one: each image is a sample. A NumPy
    array is the image where there is no other. A group without an image is left out.

    Args:
        members: Members of the tar in order, without hidden ones.
        pick: Members that the user wants.
        balance: Counts what becomes of each member but the images, which whoever takes them counts.
        choices: Counts samples in which several members may be meant.
    """
    sorter = _Sorter(
        pick,
        Balance() if balance is None else balance,
        Choices() if choices is None else choices,
        set(),
        set(),
    )
    group: dict[str, tar.Member] = {}
    current = None
    for member in members:
        folder, slash, last = member.name.rpartition("/")
        stem, dot, suffix = last.partition(".")
        if not dot or not stem:
            sorter.balance.leave_out(member.name, ending_reason(member.name))
            continue
        key = folder + slash + stem
        if key != current or suffix.lower() in group:
            if current is not None:
                yield from sorter.split_group(current, group)
            current, group = key, {}
        group[suffix.lower()] = member
    if current is not None:
        yield from sorter.split_group(current, group)
    images = {key.rpartition("/")[2] for key in sorter.bare_images}
    if apart := {key for key in sorter.bare_labels if key.rpartition("/")[2] in images}:
        sorter.choices.apart[min(apart)] += len(apart)


class _Sorter(NamedTuple):
    """Finds images and labels among the members with one key."""

    pick: MemberPick
    balance: Balance
    choices: Choices
    bare_images: set[str]
    """keys of images without a label beside them"""
    bare_labels: set[str]
    """keys of labels without an image beside them"""

    def split_group(self, key: str, group: dict[str, tar.Member]) -> Iterator[TarSample]:
        """Samples among members given by the rest of their names; the others are left out."""
        images = [suffix for suffix in group if suffix.rpartition(".")[2] in SUFFIXES]
        arrays = [suffix for suffix in group if suffix.rpartition(".")[2] == ARRAY]
        if not images or any(_fits(suffix, self.pick.image) for suffix in arrays):
            images += arrays
        if not images and any(map(self._may_be_label, group)):
            # an image in vain: it is rejected, but its label keeps the numbers of the others
            images = [suffix for suffix in group if suffix.rpartition(".")[2] in UNREAD_FORMATS]
        chosen = self._choose_images(images)
        used: set[str] = set()
        is_labelled = False
        for suffix in chosen:
            cls = self._choose_side(group, suffix, "cls", chosen)
            json = self._choose_side(group, suffix, "json", chosen)
            used |= {name for name in (suffix, cls, json) if name}
            is_labelled = is_labelled or bool(cls)
            stem = suffix.rpartition(".")[0]
            is_plain = len(chosen) == 1 and (not stem or bool(self.pick.image))
            yield TarSample(
                key if is_plain else f"{key}.{stem}",
                group[suffix],
                group[cls] if cls else None,
                group[json] if json else None,
            )
        self.balance.side_files += len(used) - len(chosen)
        if not is_labelled:
            has_label = any(self._is_label(suffix) for suffix in group)
            if has_label != bool(chosen):
                (self.bare_labels if has_label else self.bare_images).add(key)
        for suffix, member in group.items():
            if suffix not in used:
                self._leave_out(suffix, member, images, bool(chosen))

    def _is_label(self, suffix: str) -> bool:
        """Whether a member holds a label by its name alone."""
        picked = self.pick.label
        if picked == NO_LABEL:
            return False
        return _fits(suffix, picked) if picked else suffix.rpartition(".")[2] == "cls"

    def _may_be_label(self, suffix: str) -> bool:
        """Whether a member holds a label, or a JSON that may."""
        return self._is_label(suffix) or (
            not self.pick.label and suffix.rpartition(".")[2] == "json"
        )

    def _choose_images(self, images: Sequence[str]) -> list[str]:
        """Suffixes of the images that are samples."""
        if self.pick.image:
            return [suffix for suffix in images if _fits(suffix, self.pick.image)][:1]
        plain = [suffix for suffix in images if "." not in suffix]
        if len(plain) > 1:
            self.choices.images[tuple(sorted(plain))] += 1
        elif not plain and len(images) > 1 and any(_is_word(suffix) for suffix in images):
            self.choices.images[tuple(sorted(images))] += 1
        return plain[:1] or [*images]

    def _choose_side(
        self, group: dict[str, tar.Member], image: str, ending: str, taken: Sequence[str]
    ) -> str:
        """Suffix of the label or JSON that belongs to an image; empty = there is none."""
        picked = self.pick.label
        if picked == NO_LABEL and ending == "cls":
            return ""
        if picked and ending == "cls":
            if picked == "json":
                return ""
            return next((suffix for suffix in group if _fits(suffix, picked)), "")
        stem = image.rpartition(".")[0]
        for suffix in (f"{stem}.{ending}", ending):
            if suffix in group:
                return suffix
        same_kind = [suffix for suffix in group if suffix.rpartition(".")[2] == ending]
        if len(same_kind) > 1 and ending == "cls":
            self.choices.labels[tuple(sorted(same_kind))] += 1
        return same_kind[0] if len(same_kind) == 1 and len(taken) == 1 else ""

    def _leave_out(
        self, suffix: str, member: tar.Member, images: Sequence[str], has_image: bool
    ) -> None:
        """Count a member that belongs to no sample, by reason."""
        ending = suffix.rpartition(".")[2]
        if suffix in images:
            reason = FURTHER_IMAGE
        elif ending in LABEL_ENDINGS or ending == "json":
            reason = UNUSED_LABEL if has_image else LABEL_WITHOUT_IMAGE
            if has_image and ending not in ("cls", "json"):
                self.choices.unused[ending] += 1
        else:
            reason = ending_reason(member.name)
        self.balance.leave_out(member.name, reason)


def _is_word(suffix: str) -> bool:
    """Whether a member is called by a word (`left.png`) and not by a number (`0001.png`)."""
    return any(letter.isalpha() for letter in suffix.rpartition(".")[0])


def _fits(suffix: str, wanted: str) -> bool:
    """Whether a member's suffix is the one that a flag names, or begins or ends with it."""
    suffix_wanted = wanted.lower().lstrip(".")
    stem, _, ending = suffix.rpartition(".")
    return bool(suffix_wanted) and suffix_wanted in (suffix, stem, ending)


def read_label(
    sample: TarSample,
    read_member: Callable[[tar.Member], bytes],
    archive: object,
    pick: MemberPick = NO_PICK,
) -> Label:
    """Read the label of a webdataset sample: its `.cls`, or `label` or `cls` in its `.json`.

    Args:
        sample: Members of the sample.
        read_member: Function that returns the bytes of a member.
        archive: Name of the archive, for messages.
        pick: Members that the user wants.

    Raises:
        ValueError: A label file that is too large or says nothing that can be a label.
    """
    member = sample.cls or sample.json
    if member is None or pick.label == NO_LABEL:
        return None
    limit = labels.LONGEST_CLS if sample.cls else labels.LONGEST_JSON
    name = f"{member.name} in {archive}"
    if member.size > limit:
        raise ValueError(f"{name} has {member.size} bytes, a label file at most {limit}.")
    if sample.cls:
        return labels.parse_cls(read_member(member), name)
    entry = pick.label if pick.label != "json" else ""
    return labels.parse_json_label(read_member(member), name, entry)
