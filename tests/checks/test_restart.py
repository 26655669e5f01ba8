"""A restart that loses something fails, and names what differs."""

from pathlib import Path
from typing import Any

import torch

from mocov3_ds.checks.finding import Finding
from mocov3_ds.checks.restart import check_restart
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.training import run, run_data
from tests.checks.breaking import broken, failing_names
from tests.ranks_pool import run_ranks

CPU = torch.device("cpu")
CONTINUED = {"resume, same stage", "resume, ZeRO-1 to ZeRO-3"}


def from_the_start(stream: Any) -> Any:
    return lambda *args, **options: stream(*args, **options | {"position": 0})


# what is broken: owner, name, damage, and the findings that must fail
BREAKAGES: dict[str, tuple[Any, str, Any, set[str]]] = {
    "nothing saved": (
        run.Run,
        "save_checkpoint",
        lambda f: lambda self, last: None,
        {"checkpoint: save and load"},
    ),
    "momentum encoder forgotten": (
        MomentumEncoder,
        "load_full_state",
        lambda f: lambda s, t: None,
        CONTINUED,
    ),
    "samples from the start": (run_data, "Loader", from_the_start, CONTINUED),
    "optimizer state forgotten": (Lamb, "load_full_state", lambda f: lambda *_: None, CONTINUED),
}


def break_each(folder: str) -> dict[str, list[Finding]]:
    findings = {}
    for title, (owner, name, damage, _) in BREAKAGES.items():
        with broken(owner, name, damage):
            findings[title] = check_restart(CPU, Path(folder) / title)
    return findings


def test_what_is_broken_fails_and_nothing_else(tmp_path: Path) -> None:
    for title in BREAKAGES:
        (tmp_path / title).mkdir()
    first, _ = run_ranks(2, break_each, str(tmp_path), timeout=500)
    for title, (*_, failing) in BREAKAGES.items():
        if title == "nothing saved":  # then the later findings fail as well
            assert failing_names(first[title]) >= failing, (title, first[title])
        else:
            assert failing_names(first[title]) == failing, (title, first[title])
        assert all(f.remedy for f in first[title] if f.status == "fail")


def test_a_folder_that_is_not_shared_is_not_resumed_from(tmp_path: Path) -> None:
    unshared = Finding("run folder: shared", "fail", "FileNotFoundError")
    (finding,) = check_restart(CPU, tmp_path, check_folder=lambda folder: unshared)
    assert (finding.status, finding.measured) == (
        "skip",
        "not tried: a rank does not see the run folder",
    )
