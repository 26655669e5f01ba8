"""How long a store may fail, and what its refusals mean."""

import re
import time

import pytest

from mocov3_ds.data.storage.retry import (
    Changed,
    Retry,
    RetryLimits,
    StorageError,
    Truncated,
    call_with_retry,
    explain_status,
)


class Flaky:
    """A store that only retrying is tested with."""

    limits = RetryLimits(patience_s=0.2, first_contact_s=0.1, stall_s=1, low_bytes_s=1, connect_s=1)
    has_answered = True
    errors = (ConnectionError,)

    def explain_error(self, url, error):
        return None


def test_progress_begins_the_count_of_failures_anew(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.3)
    retry = Retry(Flaky(), "s3://bucket/x")
    for _ in range(20):
        retry.wait_after(ConnectionError("mine"))
        time.sleep(0.02)
        retry.note_progress(100_000)
    with pytest.raises(StorageError, match="ended with ConnectionError: mine"):
        for _ in range(100):
            retry.wait_after(ConnectionError("mine"))
            retry.note_progress(1)


def test_other_errors_are_not_waited_out():
    def attempt():
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        call_with_retry(Flaky(), "s3://bucket/x", attempt)


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MOCOV3_STORAGE_PATIENCE_S", "30")
    limits = RetryLimits.from_environment()
    assert limits.patience_s == limits.first_contact_s == 30
    monkeypatch.setenv("MOCOV3_STORAGE_STALL_S", "soon")
    with pytest.raises(ValueError, match=r"MOCOV3_STORAGE_STALL_S=.soon. is no number"):
        RetryLimits.from_environment()


@pytest.mark.parametrize(
    ("status", "text", "kind", "words"),
    [
        (404, "", FileNotFoundError, "does not exist"),
        (412, "", Changed, "changed while it was read"),
        (416, "", Truncated, "ends before the bytes"),
        (403, "no", StorageError, r"refuses access \(no\); check"),
        (400, "bad", StorageError, r"refuses \(400 bad\)"),
    ],
)
def test_final_statuses_become_sentences(status, text, kind, words):
    error = explain_status("s3://bucket/x", status, text)
    assert isinstance(error, kind) and re.search(words, str(error))


@pytest.mark.parametrize("status", [200, 408, 425, 429, 500, 503])
def test_other_statuses_may_pass(status):
    assert explain_status("s3://bucket/x", status, "SlowDown") is None
    assert explain_status("s3://bucket/x", 400, "RequestTimeout: slow") is None
