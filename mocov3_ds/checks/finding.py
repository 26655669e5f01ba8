"""What did a check find, and how do the findings of all ranks become one?"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "note", "skip", "fail"]
_WORST: tuple[Status, ...] = ("fail", "note", "skip", "pass")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    status: Status
    """note = it works, and there is something to know"""
    measured: str
    expected: str = ""
    remedy: str = ""
    """what to do when it fails"""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """the measured values, for programs"""

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values; in the file `expected` is called "wanted".

        Numbers that JSON does not know become text.
        """
        tree = dataclasses.asdict(self)
        tree["wanted"] = tree.pop("expected")
        tree["numbers"] = {
            name: value if math.isfinite(value) else str(value)
            for name, value in self.numbers.items()
        }
        return tree


def judge_errors(
    name: str, errors: Mapping[str, float], limit: float, remedy: str, *, expected: str = ""
) -> Finding:
    """A finding that passes if each error is a number within the limit.

    Args:
        name: the name of the finding, unique among the checks.
        errors: the measured error of each case.
        limit: the largest error that is still rounding.
        remedy: what to do if an error is larger.
        expected: words for the table, in place of the limit.
    """
    assert errors
    good = all(math.isfinite(error) and error <= limit for error in errors.values())
    listed = ", ".join(
        f"{case} {error:.1e}" if case else f"{error:.1e}" for case, error in errors.items()
    )
    return Finding(
        name,
        "pass" if good else "fail",
        listed,
        expected or (f"<= {limit:.0e}" if limit else "0"),
        "" if good else remedy,
        errors,
    )


def judge_problem(
    name: str,
    measured: str,
    expected: str,
    *,
    problem: object,
    remedy: str,
    numbers: Mapping[str, float] | None = None,
) -> Finding:
    """A finding that passes unless there is a problem.

    Args:
        name: the name of the finding, unique among the checks.
        measured: what was measured; a problem in words takes its place.
        expected: what a sound machine shows.
        problem: words, or another value that is true if something is wrong.
        remedy: what to do about the problem.
        numbers: the measured values, for programs.
    """
    if isinstance(problem, str) and problem:
        measured = problem
    status: Status = "fail" if problem else "pass"
    return Finding(name, status, measured, expected, remedy if problem else "", numbers or {})


def merge_findings(by_rank: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """One finding for each name: the worst status counts, and the ranks that have it are named.

    Args:
        by_rank: the findings of each rank, in rank order.
        hosts: the machine of each rank, in rank order.
    """
    names = list(dict.fromkeys(finding.name for findings in by_rank for finding in findings))
    return [_worst_finding(name, by_rank, hosts) for name in names]


def _worst_finding(
    name: str, by_rank: Sequence[Sequence[Finding]], hosts: Sequence[str]
) -> Finding:
    findings = {r: f for r, of_rank in enumerate(by_rank) for f in of_rank if f.name == name}
    status = min((finding.status for finding in findings.values()), key=_WORST.index)
    ranks = [rank for rank, finding in findings.items() if finding.status == status]
    first = findings[ranks[0]]
    if status == "pass" or len(ranks) == len(by_rank) == 1:
        return first
    if len(ranks) == len(by_rank) and len({findings[rank].measured for rank in ranks}) == 1:
        return first
    source = f"rank {ranks[0]} on {hosts[ranks[0]]}"
    if len(ranks) > 1:
        source += f" and {len(ranks) - 1} more ({', '.join(map(str, ranks[1:9]))})"
    return dataclasses.replace(first, measured=f"{source}: {first.measured}")
