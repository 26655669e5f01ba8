"""Which bytes of a file does an answer over HTTP hold? Its headers come from strangers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from mocov3_ds.data.storage.retry import OddAnswer

_RANGE = re.compile(r"(?:bytes[ =])?\s*(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


class Span(NamedTuple):
    """Bytes of a file."""

    start: int
    end: int
    """position behind the last byte"""
    total: int
    """bytes of the whole file"""


class Connected(Protocol):
    """An answer that keeps a connection as long as it is open."""

    def close(self) -> None:
        """Give the connection back, or drop it."""
        ...


@contextmanager
def closed_if_odd(answer: Connected) -> Iterator[None]:
    """Within, an answer whose headers make no sense gives its connection back at once."""
    try:
        yield
    except OddAnswer:
        answer.close()
        raise


def read_span(length: str | int | None, content_range: str | None) -> Span:
    """Read which bytes an answer holds.

    Args:
        length: The header Content-Length; None = there is none.
        content_range: The header Content-Range, which some servers send with status 200 as well;
            None = there is none, and the answer is the whole file.

    Raises:
        OddAnswer: The headers do not say it, so that a cut answer could not be told.
    """
    text = "" if length is None else str(length).strip()
    if text and not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise OddAnswer(f"the store says Content-Length: {text[:80]!r}")
    if content_range is None:
        if not text:
            raise OddAnswer("the store sends no Content-Length, so a cut answer could not be told")
        return Span(0, int(text), int(text))
    range_match = _RANGE.fullmatch(content_range.strip())
    if range_match is None or int(range_match[2]) < int(range_match[1]):
        raise OddAnswer(f"the store says Content-Range: {content_range[:80]!r}")
    start, end = int(range_match[1]), int(range_match[2]) + 1
    if text and int(text) != end - start:
        raise OddAnswer(
            f"the store says Content-Range: {content_range[:80]!r} and Content-Length: {text}"
        )
    return Span(start, end, end if range_match[3] == "*" else int(range_match[3]))
