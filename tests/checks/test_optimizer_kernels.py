"""The check of the optimizers' kernels passes the plain ones, and finds wrong ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mocov3_ds.checks import optimizer_kernels
from mocov3_ds.checks.finding import Finding
from mocov3_ds.optim import plain_kernels
from mocov3_ds.optim.kernel_types import FlatStep

CPU = torch.device("cpu")


class Wrong:
    """The plain kernels, with one thing that a bad kernel may do."""

    def __init__(self, kind: str) -> None:
        self._kind, self._calls = kind, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(plain_kernels, name)

    def update_adam(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor | None) -> None:
        plain_kernels.update_adam(flat, sums_QS, rate_S)
        self._calls += 1
        match self._kind:
            case "a moment":
                flat.state[1].mul_(1 + 1e-5)
            case "the padding":
                flat.weight.nan_to_num_(0.0)
            case "another row":
                sums_QS[:, 0] = 1.0
            case "chance":
                flat.weight.mul_(1 + 1e-7 * (self._calls % 2))
            case "an int32":
                if rate_S is not None:
                    flat.weight[-1] = 0.1


def statuses(findings: list[Finding]) -> list[str]:
    return [finding.status for finding in findings]


def test_the_plain_kernels_pass() -> None:
    assert statuses(optimizer_kernels.check_kernels(plain_kernels, CPU)) == ["pass", "pass"]
    findings = optimizer_kernels.check_large_flat(plain_kernels, CPU, numbers=70_000)
    assert statuses(findings) == ["pass", "pass"]


@pytest.mark.parametrize("kind", ["a moment", "the padding", "another row"])
def test_wrong_values_are_found(kind: str) -> None:
    findings = optimizer_kernels.check_kernels(Wrong(kind), CPU)
    assert statuses(findings) == ["fail", "pass"]
    assert "backend=plain" in findings[0].remedy


def test_bits_that_change_are_found() -> None:
    exact, twice = optimizer_kernels.check_kernels(Wrong("chance"), CPU)
    assert exact.status == "pass" and twice.status == "fail"
    assert twice.measured == "AdamW, LAMB"


def test_what_lies_behind_an_int32_is_compared() -> None:
    findings = optimizer_kernels.check_large_flat(Wrong("an int32"), CPU, numbers=70_000)
    assert statuses(findings) == ["fail", "pass"]
