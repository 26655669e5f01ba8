"""Every command on the fake card: training, resume, k-NN, probe, fine-tuning, replay, doctor."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.drawn_samples import ensure_samples
from tests.fake_gpu.process import run_on_fake_gpu

pytestmark = pytest.mark.slow

Command = tuple[str, list[str]]


def run_each(commands: Sequence[Command]) -> list[tuple[int, str, list[str]]]:
    """Status, output and mistakes of commands, in one process."""
    from tests.fake_gpu import inside

    ends = []
    for module, arguments in commands:
        with inside.counted() as use:
            finished = inside.run_program(module, arguments)
        ends.append((finished.status, finished.output, use.mistakes))
    return ends


def test_commands_stay_on_the_card(tmp_path: Path) -> None:
    train, val = ensure_samples(tmp_path / "samples", {"train": 128, "test": 32})
    run = str(tmp_path / "runs" / "a")
    flags = ["--runs", str(tmp_path / "runs"), "--name", "a", "--batch", "32"]
    flags += ["--data.shards", train, "--data.probe_shards", val, "--stop_after_steps"]
    commands: list[Command] = [
        ("mocov3_ds.train", [*flags, "2"]),
        ("mocov3_ds.train", [*flags, "4"]),
        ("mocov3_ds.cli", ["knn", run]),
        ("mocov3_ds.evaluation.linear", [run, "--epochs", "1", "--batch", "64"]),
        ("mocov3_ds.evaluation.finetune", [run, "--epochs", "1", "--batch", "64"]),
        ("mocov3_ds.cli", ["replay", run, "3"]),
        ("mocov3_ds.doctor", ["--runs", str(tmp_path / "runs")]),
    ]
    ends = run_on_fake_gpu(run_each, commands)
    for (module, _), (status, output, mistakes) in zip(commands, ends, strict=True):
        assert mistakes == [], module
        # the doctor compares values, which a device of zeros does not pass
        assert status == (module == "mocov3_ds.doctor"), output[-4000:]
    resumed, doctor = ends[1][1], ends[-1][1]
    assert "steps 2 to" in resumed
    rows = doctor.splitlines()
    assert any(row.startswith("accelerator") and "H100" in row and "pass" in row for row in rows)
    assert any("colour work: Triton, optimizer: Triton" in row and "pass" in row for row in rows)
    assert not any("Error" in row and "ZeroDivision" not in row for row in rows), doctor
