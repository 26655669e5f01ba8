"""What long work says: plain lines into a file, a bar on a terminal, nothing when asked."""

import io
import sys

import pytest

from data_prep import progress
from data_prep.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_say_rate_and_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("shard", 400) as shown:
        now[0] = 5.0
        shown.update(50, 1_000_000)  # too soon for a line
        now[0] = 20.0
        shown.update(50, 3_000_000)
    assert capsys.readouterr().err == (
        "shard: 100 of 400 images, 5 images/s, 0.2 MB/s, 60 s left\n"
    )


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("verify", 10) as shown:
        shown.update(10, 5_000_000)
    said = terminal.getvalue()
    assert "verify: 100%" in said and "10/10" in said and "MB/s" in said


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_is_quiet(monkeypatch, stream):
    out = stream()
    monkeypatch.setattr(sys, "stderr", out)
    with Progress("shard", 10, quiet=True, line_s=0) as shown:
        shown.update(10, 1)
    assert out.getvalue() == ""
