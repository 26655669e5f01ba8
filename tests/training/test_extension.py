"""A finished run goes on as a new one: schedule, state, samples, and what is refused."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds import train
from mocov3_ds.distributed import ranks
from mocov3_ds.recipes import parse
from mocov3_ds.training.schedule import encoder_momentum, learning_rate
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, digests_of, outcomes, rows_of

MUON_LAST = 'optimizer={"type":"Muon","params":{"lr":1e-3,"last_layer":"muon"}}'
Log = list[dict[str, Any]]


def folder_digest(run: Path) -> str:
    """Of each file's name and content; who holds the lock is no part of a run."""
    digest = hashlib.sha256()
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name != "lock":
            digest.update(f"{path.relative_to(run)} {path.stat().st_mtime_ns}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def extend(folder: str, flags: list[str]) -> tuple[str, str]:
    """A parent of 2 epochs (6 steps) and what becomes of it; its digest before and after."""
    os.chdir(folder)
    train.train(parse([*flags, "--epochs", "2", "--name", "parent"]))
    before = folder_digest(Path("runs/parent"))
    more = ["--extend", "runs/parent", "--epochs", "4"]
    train.train(parse([*more, "--name", "unbroken"]))
    for stop in ("9", "0"):
        train.train(parse([*more, "--stop_after_steps", stop]))
    other = ["--extend", "runs/parent", "--epochs", "5", "--batch", "10"]
    renewed = ["--extend_schedule", "new", "--warmup_epochs", "1", "--name", "renewed"]
    train.train(parse([*other, *renewed]))
    return before, folder_digest(Path("runs/parent"))


def extend_a_constant_run(folder: str, flags: list[str]) -> None:
    """With rates that know no end, a run of 4 epochs is one of 2 that was extended by 2."""
    os.chdir(folder)
    train.train(parse([*flags, "--epochs", "4", "--name", "whole"]))
    train.train(parse([*flags, "--epochs", "2", "--name", "half"]))
    train.train(parse(["--extend", "runs/half", "--epochs", "4", "--name", "longer"]))
    ranks.barrier()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small run on a training set of 50 samples: 3 steps an epoch, 2 samples left over."""
    folder = tmp_path_factory.mktemp("shards")
    make_set(str(folder / "train"), [20, 7, 23])
    make_set(str(folder / "probes"), [33])
    probes = ["--data.probe_shards", str(folder / "probes")]
    return [*SMALL, "--data.shards", str(folder / "train"), *probes, "--log", "csv"]


def peak_of(rate: float, batch: int) -> float:
    return rate * batch / 256


@pytest.mark.slow
def test_an_extended_run_counts_on_and_leaves_its_parent_alone(
    tmp_path: Path, flags: list[str]
) -> None:
    before, after = run_ranks(1, extend, str(tmp_path), flags)[0]
    assert before == after
    unbroken, resumed = tmp_path / "runs/unbroken", tmp_path / "runs/parent-extended"
    rows = rows_of(unbroken)
    assert [row["step"] for row in rows] == [*range(6, 13)]
    assert {"knn_full", "knn_chance"} <= {*rows[0]}
    assert rows[-1]["epoch"] == 4
    for row in rows[1:]:
        done = row["step"] - 1
        peak = peak_of(1.5e-3, 16)
        assert row["lr"] == learning_rate(done, peak=peak, warmup_steps=3, total_steps=12)
        assert row["momentum"] == encoder_momentum(done, start=0.99, total_steps=12)
    without_end = [[{**row, "knn_full": 0} for row in r] for r in (rows, rows_of(resumed))]
    assert without_end[0] == without_end[1]
    assert digests_of(resumed) == digests_of(unbroken)

    config = json.loads((unbroken / "config.json").read_text())
    saved = unbroken / "checkpoints/step-00000012/state.json"
    parent = json.loads((tmp_path / "runs/parent/checkpoints/step-00000006/state.json").read_text())
    (entry,) = config["ancestry"]
    assert json.loads(saved.read_text())["ancestry"] == [entry]
    assert entry["path"] == str(tmp_path / "runs/parent")
    assert entry["digest"] == parent["digest"]
    assert (entry["begins_at"], entry["epochs"], entry["batch"]) == (6, 2, 16)

    renewed = rows_of(tmp_path / "runs/renewed")  # 5 steps of 10 images an epoch, 10 before
    assert [row["step"] for row in renewed] == [*range(10, 26)]
    assert [row["epoch"] for row in renewed[1:]] == [step / 5 for step in range(11, 26)]
    for done, row in enumerate(renewed[1:]):
        peak = peak_of(1.5e-3, 10)
        assert row["lr"] == learning_rate(done, peak=peak, warmup_steps=5, total_steps=15)
        assert row["momentum"] == encoder_momentum(done, start=0.99, total_steps=15)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_with_constant_rates_the_extension_is_the_longer_run(
    tmp_path: Path, flags: list[str], world_size: int
) -> None:
    constant = ["--lr_schedule", "constant", "--moco.momentum_schedule", "constant"]
    run_ranks(world_size, extend_a_constant_run, str(tmp_path), [*flags, *constant])
    assert digests_of(tmp_path / "runs/longer") == digests_of(tmp_path / "runs/whole")
    assert rows_of(tmp_path / "runs/longer")[1:] == rows_of(tmp_path / "runs/whole")[7:]


@pytest.mark.slow
def test_what_cannot_be_extended_is_one_sentence(tmp_path: Path, flags: list[str]) -> None:
    done = [*flags, "--epochs", "1", "--warmup_epochs", "0", "--name", "done"]
    from_done = ["--extend", "runs/done", "--epochs", "2"]
    cases = [
        (done, 0, "finished"),
        ([*done, "--name", "part", "--stop_after_steps", "1"], 0, "stopped at step 1 of 3"),
        (["--extend", "runs/none"], 2, "runs/none is no run folder"),
        (["--extend", "runs/part", "--epochs", "2"], 2, "needs a finished run: not finished"),
        (["--extend", "runs/done"], 2, "it has done 1 epochs, and --epochs 1 counts from its"),
        ([*from_done, "--model.dim", "48"], 2, "another network: dim is 24 there, 48 here"),
        (
            [*from_done, "--model.patch_lr", "1"],
            2,
            "is frozen there, trained here (2 such",
        ),
        ([*from_done, "--ds", "optimizer.type=Lamb"], 2, "trained by AdamW, whose moments Lamb"),
        (
            [*done, "--name", "muon", "--ds", 'optimizer={"type":"Muon","params":{"lr":1e-3}}'],
            0,
            "",
        ),
        (
            [*("--extend", "runs/muon", "--epochs", "2", "--ds"), MUON_LAST],
            2,
            "trained by Muon with last_layer 'adamw', here it is 'muon'",
        ),
        (
            [*from_done, "--batch", "8", "--name", "half"],
            0,
            "(3 steps of 16 images); counted as 6 steps of 8; batch 16 -> 8, peak rate 9.375e-05 "
            "-> 4.688e-05 (base rate 0.0015 -> 0.0015 per 256 images, linear rule)",
        ),
        (
            [
                *(*from_done, "--rate_rule", "sqrt", "--moco.momentum_batch", "256"),
                *("--compress", "4x", "--ds", "optimizer.clip=zclip"),
                *("--epochs", "5", "--name", "cured"),
            ],
            0,
            "peak rate 9.375e-05 -> 0.000375 (base rate 0.0015 -> 0.0015 per 256 images, linear -> "
            "sqrt rule); --compress off -> 4x; --moco.momentum_batch 0 -> 256; optimizer.clip none "
            "-> ZClip(z=2.5, alpha=0.97, warmup_steps=25), which begins anew",
        ),
        (
            ["--extend", "runs/done", "--epochs", "2", "--model.sigma_reparam"],
            2,
            "another network: sigma_reparam is False there, True here",
        ),
        ([*from_done, "--recipe", "vit_b16"], 2, "--recipe vit_b16 does not go with --extend"),
        ([*from_done, "--name", "done"], 2, "is the run's own folder; give another --name"),
        (
            [*from_done, "--extend_schedule", "new", "--warmup_epochs", "2"],
            2,
            "are more than the 1",
        ),
        ([*from_done, "--init", "runs/part"], 2, "are two beginnings; give one of them"),
        ([*flags, "--extend_schedule", "new"], 2, "has no effect without --extend"),
    ]
    found = run_ranks(1, outcomes, str(tmp_path), [case for case, *_ in cases])[0]
    for (command_line, wanted, words), (status, said) in zip(cases, found, strict=True):
        assert status == wanted, (command_line, said)
        assert words in " ".join(said.split()), (command_line, said)
        assert "Traceback" not in said, said
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        *("cured", "done", "half", "muon", "part")
    ]
