"""`mocov3 gpu`: a sentence without a GPU, a failure for a wrong value, all parts on a fake GPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mocov3_ds.bench.gpu import command
from mocov3_ds.bench.gpu.flags import GpuOptions
from mocov3_ds.checks.check_run import Check
from mocov3_ds.checks.finding import Finding
from tests.fake_gpu.card import FakeGpu
from tests.fake_gpu.process import run_on_fake_gpu


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "mocov3 gpu needs a CUDA device, and torch finds none it can use here"),
        (["--recipes", "vit_x"], "--recipes vit_x: the paper's networks are vit_s16"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan must be above 0"),
    ],
)
def test_one_sentence_for_what_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(command.ranks, "start", lambda **_: torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["mocov3 gpu", *arguments, "--local_rank=0"])
    assert command.main() == 2
    assert words in capsys.readouterr().err


def without_compiling(checks: list[Check]) -> list[Check]:
    return [check for check in checks if "compiled" not in check.title]


def run_command(folder: str, arguments: list[str], wrong: bool) -> tuple[int, str]:
    from tests.fake_gpu import inside

    if wrong:
        bad = Check("value", lambda: [Finding("value", "fail", "3", "4", "buy another")])
        command.list_correct_checks = lambda *a: [bad]  # type: ignore[assignment]
        command.list_speed_checks = lambda *a: []  # type: ignore[assignment]
    else:  # compiling takes longer than all else; its check is tested on the CPU
        correct, timed = command.list_correct_checks, command.list_speed_checks
        command.list_correct_checks = lambda *a: without_compiling(correct(*a))
        command.list_speed_checks = lambda *a: without_compiling(timed(*a))
    path = f"{folder}/gpu.json"
    finished = inside.run_program(
        "mocov3_ds.bench.gpu.command", ["--json", path, "--folder", folder, *arguments]
    )
    return finished.status, finished.output


@pytest.mark.slow
def test_a_wrong_value_fails_loudly(tmp_path: Path) -> None:
    status, output = run_on_fake_gpu(run_command, str(tmp_path), [], True)
    assert status == 1, output
    assert "FAIL value: buy another" in output
    tree = json.loads((tmp_path / "gpu.json").read_text())
    assert (tree["good"], tree["void"], tree["findings"][0]["measured"]) == (False, False, "3")


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_device_that_computes_nothing(tmp_path: Path) -> None:
    arguments = ["--void", "--recipes", "vit_s16", "--minutes", "9"]
    status, output = run_on_fake_gpu(
        run_command, str(tmp_path), arguments, False, gpu=FakeGpu(memory_gb=39), timeout=900
    )
    assert status == 0, output
    assert command.VOID_WORDS in output
    tree: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert tree["void"] is True and tree["schema"] == 1
    by_name = {finding["name"]: finding for finding in tree["findings"]}
    assert {finding["status"] for finding in tree["findings"]} <= {"pass", "note", "skip"}, output
    for name in ("optimizer kernels = formulas", "step, vit_s16", "resume, same stage", "rates"):
        assert by_name[name]["measured"].startswith("void: "), output
    assert tree["rates"]["bf16_operations_per_s"] > 0


def test_the_parts_have_times_that_fit_ten_minutes() -> None:
    """The checks and what counts most come first; compiling, which takes longest, comes last."""
    cpu, recipes = torch.device("cpu"), GpuOptions().recipes
    checks = command.list_correct_checks(cpu, Path(), recipes)
    timed = command.list_speed_checks(cpu, Path(), recipes, command.Speeds())
    eager = [check for check in timed if "compiled" not in check.title]
    assert sum(check.seconds for check in [*checks, *eager]) < 600
    assert [check.title for check in timed[: len(eager)]] == [check.title for check in eager]
    assert all(check.title.endswith("compiled") for check in timed[len(eager) :])
