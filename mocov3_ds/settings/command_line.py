"""How are the flags of a command read? As a frozen dataclass, before torch is imported."""

from collections.abc import Sequence
from typing import TypeVar

import tyro

from mocov3_ds.settings.paths import expand_home

FlagsT = TypeVar("FlagsT")


def read_flags(flags: type[FlagsT], program: str, arguments: Sequence[str]) -> FlagsT:
    """The flags of a command line, with `~` replaced where no shell has done it.

    Args:
        flags: dataclass of the flags; its docstrings are the help.
        program: how the command is called, e.g. `mocov3 knn`.
        arguments: what follows it.

    Raises:
        SystemExit: tyro has printed help, or what is wrong.
    """
    return tyro.cli(flags, prog=program, args=expand_home(arguments))
