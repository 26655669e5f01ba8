"""Words of a command line: `~` is the home folder where no shell has replaced it, text is UTF-8."""

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


def check_text(arguments: Iterable[str]) -> None:
    """Refuse words that are no text, which no file of a run could hold.

    Args:
        arguments: words of the command line.

    Raises:
        ValueError: a word has bytes that are not UTF-8, or a NUL.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{argument!a} of the command line is not UTF-8 text; write it in UTF-8, or set "
                "LC_ALL=C.UTF-8 if it is and the locale hides it."
            ) from None
        if "\0" in argument:
            raise ValueError(f"{argument!a} of the command line has a NUL character; remove it.")


def expand_user(path: str | Path) -> Path:
    """The path with `~` and `~NAME` at its beginning replaced, as a shell does.

    Args:
        path: a path; that of a user who does not exist, or has no home, stays as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _expand_word(argument: str) -> str:
    match = _BEGINS_AT_HOME.fullmatch(argument)
    if match is None:
        return argument
    flag, path = match.groups()
    return f"{flag or ''}{expand_user(path)}"
