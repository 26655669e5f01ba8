"""Which bytes an answer holds, by headers that come from strangers."""

import pytest

from mocov3_ds.data.storage.retry import OddAnswer
from mocov3_ds.data.storage.span import Span, closed_if_odd, read_span


@pytest.mark.parametrize(
    ("length", "content_range", "span"),
    [
        ("10", None, Span(0, 10, 10)),
        (0, None, Span(0, 0, 0)),
        ("10", "bytes 5-14/100", Span(5, 15, 100)),
        (None, "bytes 5-14/100", Span(5, 15, 100)),
        ("10", "bytes 5-14/*", Span(5, 15, 15)),
        ("10", "5-14/100", Span(5, 15, 100)),
    ],
)
def test_headers_that_say_it(length, content_range, span):
    assert read_span(length, content_range) == span


@pytest.mark.parametrize(
    ("length", "content_range", "words"),
    [
        (None, None, "sends no Content-Length"),
        ("ten", None, "Content-Length: 'ten'"),
        ("-1", None, "Content-Length: '-1'"),
        ("9" * 30, None, "Content-Length"),
        ("²", None, "Content-Length"),
        ("10", "bytes x-14/100", "Content-Range: 'bytes x-14/100'"),
        ("10", "bytes 14-5/100", "Content-Range"),
        ("10", "bytes */100", "Content-Range"),
        ("10", "", "Content-Range"),
        ("11", "bytes 5-14/100", "and Content-Length: 11"),
    ],
)
def test_headers_that_do_not(length, content_range, words):
    with pytest.raises(OddAnswer) as error:
        read_span(length, content_range)
    assert words in str(error.value)


def test_an_odd_answer_gives_its_connection_back() -> None:
    """Else the connection is open until the garbage collector comes by."""

    class Answer:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    answer = Answer()
    with closed_if_odd(answer):
        read_span("10", None)
    assert answer.closed == 0
    with pytest.raises(OddAnswer), closed_if_odd(answer):
        read_span("ten", None)
    assert answer.closed == 1
