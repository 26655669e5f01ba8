"""The dispatcher finds benchmarks by name; the optimizer's table has a line for each contender."""

import subprocess
import sys

import pytest
import torch

from mocov3_ds.bench import __main__ as dispatch
from mocov3_ds.bench import optimizer


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


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a.weight": (40, 33), "a.bias": (40,)}
    monkeypatch.setattr(optimizer, "shapes_of", lambda shape: shapes)


def test_each_contender_that_runs_here_has_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    optimizer.main(optimizer.Options(rounds=1, steps=1))
    out = capsys.readouterr().out
    for name in ("our Lamb", "our Lamb, one flat as under ZeRO", "our Lars", "our AdamW"):
        assert f"| {name} | " in out
    assert "| timm Lamb | " in out and "1.00" in out
    if not torch.cuda.is_available():
        assert "| DeepSpeed FusedLamb | does not run here: " in out
    assert out.count("\n| ") == len(optimizer.CONTENDERS) + 1


def test_what_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    monkeypatch.setattr(optimizer, "free_bytes", lambda device: 1000)
    optimizer.main(optimizer.Options(rounds=1, steps=1))
    assert "left out: needs" in capsys.readouterr().out


def test_shapes_are_those_of_the_backbone() -> None:
    shapes = optimizer.shapes_of("vit_b16")
    assert shapes["blocks.0.attn.qkv.weight"] == (2304, 768)
    assert not any("patch_embed" in name for name in shapes)  # frozen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0}, "--rounds, --steps and --threads must be at least 1"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=words):
        optimizer.main(optimizer.Options(**options))  # type: ignore[arg-type]
