"""What became of every file that was seen? Kept, rejected, used as a label, or left out, and why.

The four must add up to the files seen. `shard` and `index` print the balance and keep it in the
manifest (`made.balance`), and `verify` holds the set against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.images import SUFFIXES
from data_prep.member_names import name_ending, quote_name

HIDDEN = "hidden (or a system's own)"
LABEL_WITHOUT_IMAGE = "label or side file without an image"
FURTHER_IMAGE = "further image of a sample"
UNUSED_LABEL = "label file that is not used"
BEHIND_END = "bytes behind the end mark of a tar"
OUTSIDE = "outside the folder or files asked for"
LOOP = "folder that holds itself by a link"
NOT_READ = "image format that is not read"
NO_IMAGES = "archive without images"

UNREAD_FORMATS = {
    *("jxl", "avif", "heic", "heif", "jp2", "jpx", "j2k", "tga", "ico", "svg", "exr", "psd", "dng"),
    *("cr2", "nef", "arw", "raw", "dcm", "nii", "apng"),
} - SUFFIXES.keys()
"""Endings of images that cannot be read here."""


@dataclass
class Omission:
    """Files that were left out for one reason."""

    count: int
    example: str
    """the first of their names"""


@dataclass
class Balance:
    """Files of a source by what became of them."""

    files: int = 0
    """files that were met"""
    images: int = 0
    """files that are taken for images; kept or rejected once they are read"""
    side_files: int = 0
    """label files that were read, and JSON that is carried along"""
    left_out: dict[str, Omission] = field(default_factory=dict)
    """by reason"""

    def see(self, count: int = 1) -> None:
        """Count files that were met, before it is known what becomes of them."""
        self.files += count

    def leave_out(self, name: str, reason: str) -> None:
        """Count a file that is left out.

        Args:
            name: Path of the file in the source.
            reason: Reason, in the words of the balance.
        """
        omission = self.left_out.get(reason)
        if omission is None:
            self.left_out[reason] = Omission(1, name)
        else:
            omission.count += 1
            omission.example = min(omission.example, name)

    def add(self, other: "Balance") -> None:
        """Add what became of other files."""
        self.files += other.files
        self.images += other.images
        self.side_files += other.side_files
        for reason, omission in other.left_out.items():
            total = self.left_out.setdefault(reason, Omission(0, omission.example))
            total.count += omission.count
            total.example = min(total.example, omission.example)

    @property
    def omitted(self) -> int:
        """Number of files that were left out."""
        return sum(omission.count for omission in self.left_out.values())

    def as_json(self, rejected: int) -> dict[str, Any]:
        """The balance as it stands in a manifest.

        Args:
            rejected: Number of images that could not be read.
        """
        assert self.files == self.images + self.side_files + self.omitted, "a file was lost"
        return {
            "seen": self.files,
            "kept": self.images - rejected,
            "rejected": rejected,
            "side_files": self.side_files,
            "left_out": {
                reason: omission.count for reason, omission in sorted(self.left_out.items())
            },
        }

    def lines(self, rejected: int | None = None) -> list[str]:
        """The balance in words: the sum, then a line a reason.

        Args:
            rejected: Number of images that could not be read; None = not known yet.
        """
        assert self.files == self.images + self.side_files + self.omitted, "a file was lost"
        images = f"{self.images} images"
        if rejected is not None:
            images = f"{self.images - rejected} images kept + {rejected} rejected"
        head = (
            f"balance: {self.files} files seen = {images} + {self.side_files} label and side files "
            f"+ {self.omitted} left out"
        )
        return [head, *self.omission_lines()]

    def omission_lines(self) -> list[str]:
        """A line for each reason for which files are left out, most files first."""
        omissions = sorted(self.left_out.items(), key=lambda item: (-item[1].count, item[0]))
        return [
            f"  left out: {omission.count} x {reason}, e.g. {quote_name(omission.example)}"
            for reason, omission in omissions
        ]


def ending_reason(name: str) -> str:
    """Reason for which a file is left out that is no image by its ending."""
    ending = name_ending(name)
    if ending in UNREAD_FORMATS:
        return f"{NOT_READ} (.{ending})"
    if not ending:
        return "no ending, so no image by its name"
    ending = ending if ending.isascii() and ending.isalnum() and len(ending) < 12 else "..."
    return f"ends in .{ending}, so no image by its name"


def check_balance(balance: Mapping[str, Any], samples: int, rejected: object) -> str:
    """Say what is wrong with the balance in a manifest; empty = it closes.

    Args:
        balance: What `Balance.as_json` made, maybe changed by somebody since.
        samples: Number of samples in the manifest.
        rejected: Number of rejected images in the manifest.
    """
    try:
        left_out = sum(int(count) for count in balance["left_out"].values())
        images, files = int(balance["kept"]), int(balance["seen"])
        total = images + int(balance["rejected"]) + int(balance["side_files"]) + left_out
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return f"the balance in the manifest cannot be read ({type(error).__name__})"
    if files != total:
        return f"the balance does not close: {files} files seen, {total} accounted for"
    if images != samples:
        return f"the balance says {images} images kept, the manifest holds {samples} samples"
    if balance["rejected"] != rejected:
        return f"the balance says {balance['rejected']} rejected, the manifest {rejected}"
    return ""
