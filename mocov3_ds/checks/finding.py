"""What a check found, and how the findings of all ranks become one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "note", "skip", "fail"]
_WORST: tuple[Status, ...] = ("fail", "note", "skip", "pass")


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    status: Status
    """note = it works, and there is something to know"""
    measured: str
    wanted: str = ""
    remedy: str = ""
    """what to do when it fails"""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """what was measured, for machines"""


def judged(
    name: str, errors: Mapping[str, float], limit: float, remedy: str, *, wanted: str = ""
) -> Finding:
    """Pass if each error is a number and within the limit.

    Args:
        name: of the finding.
        errors: what was measured, by case.
        limit: largest error that is rounding.
        remedy: what to do otherwise.
        wanted: instead of the limit.
    """
    assert errors
    good = all(math.isfinite(e) and e <= limit for e in errors.values())
    spelled = ", ".join(
        f"{case} {error:.1e}" if case else f"{error:.1e}" for case, error in errors.items()
    )
    return Finding(
        name,
        "pass" if good else "fail",
        spelled,
        wanted or (f"<= {limit:.0e}" if limit else "0"),
        "" if good else remedy,
        errors,
    )


def sound(
    name: str,
    measured: str,
    wanted: str,
    *,
    trouble: object,
    remedy: str,
    numbers: Mapping[str, float] | None = None,
) -> Finding:
    """Pass unless there is trouble.

    Args:
        name: of the finding.
        measured: what was found; a trouble in words takes its place.
        wanted: what a sound machine shows.
        trouble: words, or anything else that is true when something is wrong.
        remedy: what to do then.
        numbers: what was measured, for machines.
    """
    if isinstance(trouble, str) and trouble:
        measured = trouble
    status: Status = "fail" if trouble else "pass"
    return Finding(name, status, measured, wanted, remedy if trouble else "", numbers or {})


def merged(of_ranks: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """One finding a name: the worst status wins, and the ranks that have it are named.

    Args:
        of_ranks: what each rank found, in rank order.
        hosts: machine of each rank.
    """
    names = list(dict.fromkeys(f.name for findings in of_ranks for f in findings))
    return [_worst(name, of_ranks, hosts) for name in names]


def _worst(name: str, of_ranks: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> Finding:
    found = {r: f for r, findings in enumerate(of_ranks) for f in findings if f.name == name}
    status = min((f.status for f in found.values()), key=_WORST.index)
    ranks = [rank for rank, finding in found.items() if finding.status == status]
    first = found[ranks[0]]
    if status == "pass" or len(ranks) == len(of_ranks) == 1:
        return first
    if len(ranks) == len(of_ranks) and len({found[r].measured for r in ranks}) == 1:
        return first
    who = f"rank {ranks[0]} on {hosts[ranks[0]]}"
    if len(ranks) > 1:
        who += f" and {len(ranks) - 1} more ({', '.join(map(str, ranks[1:9]))})"
    return Finding(
        name, status, f"{who}: {first.measured}", first.wanted, first.remedy, first.numbers
    )
