"""A sink that fails, hangs or is slow costs the run nothing but its rows."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from mocov3_ds.monitoring.background_sink import BackgroundSink
from mocov3_ds.monitoring.sinks import Sink


class FakeSink:
    """Keeps rows, and does something at each."""

    def __init__(self, at_row: Callable[[int], object] = lambda _: None) -> None:
        self.rows: list[int] = []
        self.closed, self.at_row = False, at_row

    def show_row(self, step: int, _values: Mapping[str, float]) -> None:
        self.at_row(step)
        self.rows.append(step)

    def show_picture(self, step: int, name: str, picture: Image.Image) -> None:
        raise NotImplementedError

    def drop_steps_after(self, step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def send_rows(sink: BackgroundSink, steps: range) -> None:
    for step in steps:
        sink.send(lambda opened, step=step: opened.show_row(step, {}))  # type: ignore[misc]


def start(sink: Sink, waiting: int = 100) -> BackgroundSink:
    return BackgroundSink("fake", lambda *_: sink, Path(), 0, waiting)


def test_rows_come_in_order_and_the_sink_is_closed() -> None:
    fake = FakeSink()
    sink = start(fake)
    send_rows(sink, range(50))
    assert sink.close(time.monotonic() + 20) == ""
    assert fake.rows == list(range(50))
    assert fake.closed


def test_a_failing_row_is_lost_told_once_and_the_next_ones_come(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(step: int) -> None:
        if step in (3, 4, 7):
            raise SystemExit("the tracker gives up")

    fake = FakeSink(fail)
    sink = start(fake)
    send_rows(sink, range(10))
    assert sink.close(time.monotonic() + 20) == "fake has not got 3 of 10 rows"
    assert fake.rows == [0, 1, 2, 5, 6, 8, 9]
    assert caplog.text.count("--log fake failed (SystemExit: the tracker gives up)") == 1
    assert len(caplog.records) == 1


def test_a_sink_that_fails_for_ever_is_left_alone() -> None:
    calls: list[int] = []

    def fail(step: int) -> None:
        calls.append(step)
        raise OSError("no server")

    sink = start(FakeSink(fail))
    send_rows(sink, range(60))
    assert sink.close(time.monotonic() + 20) == "fake has not got 60 of 60 rows"
    assert len(calls) == 20


def test_a_sink_that_does_not_open_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_run: Path, _steps_done: int) -> Sink:
        raise RuntimeError("no key\nmore lines")

    sink = BackgroundSink("fake", refuse, Path(), 0)
    send_rows(sink, range(3))
    assert sink.close(time.monotonic() + 20) == "fake has not got 3 of 3 rows"
    assert "--log fake cannot be opened (RuntimeError: no key)" in caplog.text
    assert "more lines" not in caplog.text


def test_a_sink_that_hangs_neither_slows_the_run_nor_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    released = threading.Event()
    sink = start(FakeSink(lambda _: released.wait(60)), waiting=10)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        send_rows(sink, range(500))
        assert time.monotonic() - began < 1
        words = sink.close(time.monotonic() + 0.2)
    assert time.monotonic() - began < 5
    assert words.startswith("fake did not finish in time")
    assert sink.lost >= 489
    assert caplog.text.count("does not keep up: 10 rows wait for it") == 1
    assert len(caplog.records) == 1
    released.set()
