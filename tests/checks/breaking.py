"""Break a piece of the product on purpose, to prove that a check sees it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from mocov3_ds.checks.finding import Finding


@dataclass(frozen=True)
class Breakage:
    """What is broken and how, the check that must see it, and the findings that must fail."""

    owner: Any
    name: str
    damage: Callable[[Any], Any]
    """makes the broken piece from the sound one"""
    check: Callable[[], list[Finding]]
    failing: set[str]

    def run_check(self) -> list[Finding]:
        """Findings of the check while the piece is broken."""
        with broken(self.owner, self.name, self.damage):
            return self.check()


@contextlib.contextmanager
def broken(owner: Any, name: str, damage: Callable[[Any], Any]) -> Iterator[None]:
    """Exchange a piece of the product by one that is made from it."""
    with mock.patch.object(owner, name, damage(getattr(owner, name))):
        yield


def failing_names(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.status == "fail"}
