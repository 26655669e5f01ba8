"""The dispatcher finds benchmarks by name, and reads their options."""

import subprocess
import sys

import pytest

from mocov3_ds.bench import __main__ as dispatch


def test_the_list_needs_no_registration(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main([]) == 0
    listed = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if line.startswith("  ")]
    assert dict(lines)["optimizer"].startswith("One optimizer step on the tensors of a ViT")
    assert "__main__" not in listed


def test_an_unknown_name_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main(["optimiser"]) == 2
    assert "no benchmark 'optimiser' (did you mean optimizer?)" in capsys.readouterr().out


def test_help_of_a_benchmark() -> None:
    command = [sys.executable, "-m", "mocov3_ds.bench", "optimizer", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python -m mocov3_ds.bench optimizer" in done.stdout
    assert "--rounds" in done.stdout
