"""Run checks one after the other on all ranks, in a given time, and show what they found."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mocov3_ds.checks.finding import Finding, merge_findings
from mocov3_ds.distributed import ranks

_MARKS = {"pass": "pass", "note": "note", "skip": "skip", "fail": "FAIL"}
VOID = "void: "
"""what stands before a value that means nothing, as the device computes nothing"""


class Check(NamedTuple):
    """Something that is examined or measured; all ranks run it."""

    title: str
    run: Callable[[], list[Finding]]
    """what it found, on this rank"""
    seconds: float = 0.0
    """time that it may take; it is left out where less than that is left"""


def run_checks(
    checks: Sequence[Check],
    hosts: Sequence[str],
    *,
    limit_s: float = math.inf,
    is_void: bool = False,
    tell: Callable[[Sequence[Finding]], object] = len,
) -> list[Finding]:
    """Run all checks on all ranks and merge the findings of the ranks.

    Args:
        checks: what to run, the same on all ranks.
        hosts: the machine of each rank, in rank order.
        limit_s: seconds for all of them; by rank 0's clock.
        is_void: whether the device computes nothing, so that a wrong value is no failure.
        tell: takes all findings so far after each check, on every rank.
    """
    findings: list[Finding] = []
    begin = time.monotonic()
    for number, check in enumerate(checks, 1):
        start = time.monotonic()
        title = f"[{number}/{len(checks)}] {check.title}"
        left_s = limit_s - (start - begin)
        if limit_s < math.inf:
            left_s = ranks.broadcast_object(left_s)
        if left_s < check.seconds:
            text = f"left out: may take {check.seconds:.0f} s, {max(left_s, 0):.0f} s are left"
            findings.append(Finding(check.title, "skip", text, "", "give more --minutes."))
            show_progress(f"{title}: {text}")
            continue
        show_progress(f"{title} ...")
        rank_findings = _run_check(check, is_void)
        try:
            findings += merge_findings(ranks.gather_objects(rank_findings), hosts)
        except Exception as error:  # a rank has ended, or is still in an earlier check
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            remedy = "no later check was run: mend what failed before, and run it again."
            silence = Finding(f"{check.title}: ranks", "fail", message, "all ranks answer", remedy)
            return [*findings, *rank_findings, silence]
        show_progress(f"{title}: {time.monotonic() - start:.1f} s")
        tell(findings)
    return findings


def _run_check(check: Check, is_void: bool) -> list[Finding]:
    """The findings of a check, or one that says why it could not run."""
    try:
        findings = check.run()
    except (Exception, SystemExit) as error:  # the other checks are run all the same
        message = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "see the error of this rank."
        return [Finding(check.title, "fail", message[:300], "the check runs", remedy)]
    return [_make_void(finding) for finding in findings] if is_void else findings


def _make_void(finding: Finding) -> Finding:
    status = "note" if finding.status == "fail" else finding.status
    return replace(finding, status=status, measured=f"{VOID}{finding.measured}", remedy="")


def format_table(findings: Sequence[Finding]) -> str:
    """The findings for people, and under them what to do."""
    rows = [(f.name, _MARKS[f.status], f.measured, f.expected) for f in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    widths[2] = min(widths[2], 76)
    lines = [
        f"{name:<{widths[0]}}  {mark:<4}  {measured:<{widths[2]}}  {expected}".rstrip()
        for name, mark, measured, expected in rows
    ]
    remedies = [f"{_MARKS[f.status]} {f.name}: {f.remedy}" for f in findings if f.remedy]
    failed = sum(f.status == "fail" for f in findings)
    counts = f"{len(findings)} checks, {failed} failed"
    return "\n".join([*lines, *[""] * bool(remedies), *remedies, "", counts])


def show_progress(text: str) -> None:
    """Say on stderr what is being done; rank 0 alone speaks."""
    if ranks.is_first():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
