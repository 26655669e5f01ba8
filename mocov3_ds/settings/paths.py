"""Paths as a user types them: `~` is the home folder, also where no shell has replaced it."""

import re
from collections.abc import Iterable
from pathlib import Path

_BEGINS_AT_HOME = re.compile(r"(--?[\w.-]+=)?(~[^/\s=]*(?:/.*)?)", re.DOTALL)


def expand_home(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command line with `~` and `~NAME` replaced at their beginning.

    A shell does that for `--out ~/x`, but not for `--out=~/x`, in quotes, or in a file.

    Args:
        arguments: words of the command line; those of a user who does not exist stay as they are.
    """
    return [_expand_word(argument) for argument in arguments]


def _expand_word(argument: str) -> str:
    match = _BEGINS_AT_HOME.fullmatch(argument)
    if match is None:
        return argument
    flag, path = match.groups()
    try:
        return f"{flag or ''}{Path(path).expanduser()}"
    except RuntimeError:  # no such user, or a user without a home
        return argument
