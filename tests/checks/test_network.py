"""Wrong sums of the collectives and clocks that are apart fail."""

import time

import torch

from mocov3_ds.checks import network
from mocov3_ds.checks.finding import Finding
from mocov3_ds.distributed import ranks
from tests.checks.breaking import Breakage, failing_names
from tests.ranks_pool import run_ranks

CPU = torch.device("cpu")


def collectives() -> list[Finding]:
    return network.check_collectives(CPU, sizes_mb=(1,))


def clock() -> list[Finding]:
    return [network.check_clock()]


BREAKAGES = {
    "a sum that loses ranks": Breakage(
        ranks, "all_reduce_sum", lambda f: lambda x, group=None: x, collectives, {"all_reduce"}
    ),
    "a scatter of the first part": Breakage(
        ranks,
        "reduce_scatter_sum",
        lambda f: lambda x: x[: len(x) // 2],
        collectives,
        {"reduce_scatter"},
    ),
    "a gather of one rank's part": Breakage(
        ranks, "all_gather_flat", lambda f: lambda x: torch.cat([x, x]), collectives, {"all_gather"}
    ),
    "clocks apart": Breakage(
        time, "time", lambda f: lambda: f() - 5 * ranks.rank(), clock, {"clocks of the ranks"}
    ),
}


def break_each() -> dict[str, list[Finding]]:
    return {title: breakage.run_check() for title, breakage in BREAKAGES.items()}


def without_memory() -> list[Finding]:
    return network.check_collectives(CPU, sizes_mb=(1, 10**9))


def test_what_is_broken_fails_and_nothing_else() -> None:
    first, _ = run_ranks(2, break_each, timeout=300)
    for title, breakage in BREAKAGES.items():
        assert failing_names(first[title]) == breakage.failing, (title, first[title])
        assert all(f.remedy for f in first[title] if f.status == "fail")


def test_sizes_without_memory_are_named() -> None:
    for findings in run_ranks(2, without_memory):
        assert [f.name for f in findings] == ["all_reduce", "reduce_scatter", "all_gather"]
        assert all("no memory for 1000000000 MB" in f.measured for f in findings)
        assert not failing_names(findings)
