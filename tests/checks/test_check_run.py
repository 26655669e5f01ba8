"""Checks run in turn: one that raises, a rank that is gone, a clock that is over, a void device."""

import pytest

from mocov3_ds.checks import check_run
from mocov3_ds.checks.check_run import Check
from mocov3_ds.checks.finding import Finding, judge_errors


def test_a_check_that_raises_does_not_stop_the_others() -> None:
    def raises() -> list[Finding]:
        raise RuntimeError("no\n such  thing")

    fine = Finding("fine", "pass", "1", "2")
    findings = check_run.run_checks(
        [Check("first", raises), Check("second", lambda: [fine])], ["a"]
    )
    assert [f.status for f in findings] == ["fail", "pass"]
    assert findings[0].measured == "RuntimeError: no such thing"
    text = check_run.format_table(findings)
    assert "FAIL first: see the error" in text
    assert "2 checks, 1 failed" in text


def test_what_was_found_is_told_when_a_rank_answers_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = Finding("fine", "pass", "1", "2")

    def leaves() -> list[Finding]:
        def lost(own: object) -> list[object]:
            raise RuntimeError("[gloo] Timed out")

        monkeypatch.setattr(check_run.ranks, "gather_objects", lost)
        return []

    todo = [Check("first", lambda: [fine]), Check("second", leaves), Check("third", lambda: [fine])]
    findings = check_run.run_checks(todo, ["a"])
    assert [(f.name, f.status) for f in findings] == [("fine", "pass"), ("second: ranks", "fail")]
    assert "[gloo] Timed out" in check_run.format_table(findings)


def test_what_takes_longer_than_is_left_is_left_out_with_a_word() -> None:
    fine = Finding("fine", "pass", "1", "2")
    told: list[int] = []
    findings = check_run.run_checks(
        [Check("long", lambda: [fine], 100.0), Check("short", lambda: [fine], 1.0)],
        ["a"],
        limit_s=50.0,
        tell=lambda so_far: told.append(len(so_far)),
    )
    assert [(f.name, f.status) for f in findings] == [("long", "skip"), ("fine", "pass")]
    assert findings[0].measured == "left out: may take 100 s, 50 s are left"
    assert told == [2]


def test_a_device_that_computes_nothing_fails_by_errors_alone() -> None:
    def raises() -> list[Finding]:
        raise RuntimeError("a tensor on the wrong device")

    checks = [
        Check("value", lambda: [judge_errors("value", {"": float("nan")}, 1e-3, "buy another")]),
        Check("error", raises),
    ]
    value, error = check_run.run_checks(checks, ["a"], is_void=True)
    assert (value.status, value.measured, value.remedy) == ("note", "void: nan", "")
    assert error.status == "fail"
