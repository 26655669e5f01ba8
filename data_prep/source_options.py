"""How is a source read, where that is not plain?"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What decides where a source can be read in several ways."""

    files: str = ""
    """take only the archives, or images of a folder, whose names match: 'train-*.tar',
    'train-{0000..0127}.tar', '*/train/*', several joined by ::"""
    class_level: str = ""
    """which folder of an image's path is its class: 1, 2, ..., own (the one it lies in), archive
    (the name of its archive) or none; default 1 where nothing speaks against it"""
    run_pipes: bool = False
    """run each `pipe:COMMAND` of SRC in a shell and read what it prints as a tar ('pipe:aws s3 cp
    s3://bucket/t-{000..127}.tar -')"""
    empty_classes: Literal["refuse", "keep", "drop"] = "refuse"
    """class folders without images: `keep` them among the classes, `drop` them, or `refuse`"""
