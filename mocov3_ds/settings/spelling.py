"""Hints for misspelt names."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name nearest to a misspelt one, as the end of a sentence.

    Args:
        word: the name as the user wrote it; upper and lower case count as equal.
        known: the names that would have been right.
        cutoff: how alike two names have to be, from 0 (anything) to 1 (equal).

    Returns:
        `" (did you mean NAME?)"`, or an empty string where no name is near enough.
    """
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return f" (did you mean {names[close[0]]}?)" if close else ""
