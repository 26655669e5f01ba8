"""Doctor: right on a sound machine; a check that raises or a rank that is gone is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mocov3_ds import doctor
from mocov3_ds.distributed import ranks
from tests.ranks_pool import run_ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
CHECKS = {
    "loss, N ranks = 1 rank",
    "gradients, N ranks = 1 rank",
    "LAMB step = unsharded LAMB",
    "momentum encoder = its formula",
    "momentum encoder, bit-equal ranks",
    "resume, ZeRO-1 to ZeRO-3",
}


def examination(folder: str) -> bool:
    options = doctor.DoctorOptions(runs=Path(folder) / "runs", json=Path(folder) / "out.json")
    return doctor.examine_machines(options, sizes_mb=(1, 16))


def test_a_sound_machine_passes_and_leaves_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, examination, str(tmp_path)) == [True, True]
    tree = json.loads((tmp_path / "out.json").read_text())
    assert tree["good"] is True
    assert len(tree["hosts"]) == 2
    by_name = {f["name"]: f for f in tree["findings"]}
    assert {f["status"] for f in tree["findings"]} <= {"pass", "note", "skip"}
    assert {*by_name} >= CHECKS
    assert {*by_name["LAMB step = unsharded LAMB"]["numbers"]} == {
        f"ZeRO-{stage}" for stage in range(4)
    }
    assert by_name["all_reduce"]["numbers"]["1 MB, GB/s"] > 0
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "vit_x"], "no recipe 'vit_x'"),
        (["--runs", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments, "--local_rank=0"])
    monkeypatch.setattr(ranks, "start", lambda **_: CPU)
    assert doctor.main() == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_ends_with_an_error_when_something_fails(
    tmp_path: Path, free_port: int
) -> None:
    bin_folder = Path(sys.executable).parent
    command = [
        *(
            str(bin_folder / "deepspeed"),
            "--num_accelerators",
            "2",
            "--master_port",
            str(free_port),
        ),
        *(str(ROOT / "mocov3_ds/doctor.py"), "--runs", "runs", "--shards", "nowhere"),
    ]
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **own, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "FAIL shards: check the URL" in done.stdout
    assert "1 failed" in done.stdout
    assert "[10/10] shards" in done.stderr + done.stdout
