"""The optimizers' table: a line for each contender, and why some do not run here."""

import pytest
import torch

from mocov3_ds.bench import optimizer

SMALL = {"a.weight": (40, 33), "a.bias": (40,)}


def test_each_contender_that_runs_here_has_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer.compare_optimizers("small", SMALL, optimizer.OptimizerOptions(rounds=1, steps=1))
    out = capsys.readouterr().out
    for name in ("our Lamb", "our Lamb, one flat as under ZeRO", "our Lars", "our AdamW"):
        assert f"| {name} | " in out
    assert "| timm Lamb | " in out and "1.00" in out
    if not torch.cuda.is_available():
        assert "| DeepSpeed FusedLamb | does not run here: " in out
    assert out.count("\n| ") == len(optimizer.CONTENDERS["elementwise"]) + 1


def test_muon_tells_its_operations(capsys: pytest.CaptureFixture[str]) -> None:
    options = optimizer.OptimizerOptions(rounds=1, steps=1, kind="muon")
    optimizer.compare_optimizers("small", SMALL, options)
    out = capsys.readouterr().out
    assert "| torch Muon | " in out and "| our Muon, bf16 products | " in out
    assert out.count(" of a product of 512 x 512 in bfloat16") == 2
    assert optimizer.muon_operations(SMALL) == 5 * (4 * 33**2 * 40 + 2 * 33**3)


def test_what_does_not_fit_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = optimizer.OptimizerOptions(rounds=1, steps=1)
    optimizer.compare_optimizers("small", SMALL, options, free=1000)
    assert "left out: needs" in capsys.readouterr().out


def test_shapes_are_those_of_the_backbone() -> None:
    shapes = optimizer.backbone_shapes("vit_b16")
    assert shapes["blocks.0.attn.qkv.weight"] == (2304, 768)
    assert not any("patch_embed" in name for name in shapes)  # frozen
    first = {n: s for n, s in shapes.items() if not n.startswith("blocks.") or ".0." in n}
    assert optimizer.backbone_shapes("vit_b16", blocks=1) == first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0}, "--rounds, --steps and --threads must be at least 1"),
        ({"blocks": -1}, "--blocks is -1; it must be 0"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=words):
        optimizer.run_bench(optimizer.OptimizerOptions(**options))
