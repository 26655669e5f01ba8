"""Which options decide the bytes of the shards, besides the images?"""

import re
from dataclasses import dataclass

from data_prep.images import Check

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """What the bytes of the shards depend on besides the images.

    The fields are flags of the command line and keys of `plan.json`.
    """

    shard_size: str = "1000"
    """samples (1000) or bytes of source images (256MB; also kB, GB, MiB, GiB) of a shard, about"""
    seed: int = 0
    """seed of the order of all images over all shards"""
    resize: int = 0
    """shrink images whose shorter side is longer than so many pixels, as JPEG; 0 keeps all bytes;
    384 with --reencode halves them and views of 224 pixels hardly change, 256 blurs theirs"""
    quality: int = 90
    """JPEG quality of resized images, 1 to 100"""
    reencode: bool = False
    """with --resize, write smaller images again as JPEG, too"""
    check: Check = "header"
    """`header` finds broken headers and cut files, `decode` also damaged pixels (20 x CPU)"""
    split: str = ""
    """name of the split: the set goes to DST/SPLIT, its shards are SPLIT-000000.tar, ..."""


def check_options(options: ShardOptions) -> None:
    """Refuse options that make no sense.

    Raises:
        ValueError: An option is out of range, or one is missing.
    """
    if options.resize < 0:
        raise ValueError(f"--resize {options.resize} is negative; 0 keeps the original bytes.")
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality {options.quality} is outside 1 to 100.")
    if options.reencode and not options.resize:
        raise ValueError("--reencode needs --resize N, the shorter side of larger images.")
    if options.split and not re.fullmatch(r"[A-Za-z0-9_-]+", options.split):
        raise ValueError(
            f"--split {options.split!r} names shards and a folder; use letters, digits, _ and -."
        )
    parse_shard_size(options.shard_size)


def parse_shard_size(text: str) -> tuple[int, bool]:
    """Read a size such as `1000` or `256MB`.

    Returns:
        The number, and whether it counts bytes (or else samples).

    Raises:
        ValueError: The text is not of that form, or the size is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?(b)?", text.strip().lower())
    number = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if match is None or number < 1 or (not match[3] and (match[2] or "." in match[1])):
        raise ValueError(
            f"--shard-size {text!r} is neither samples (1000) nor bytes (256MB, 1GiB)."
        )
    return number, bool(match[3])
