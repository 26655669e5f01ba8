"""The bench of compressed gradients: bias and noise told apart, rows of a run, what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mocov3_ds.bench.compression import (
    CompressionOptions,
    draw,
    gradient,
    load_networks,
    measure_error,
    read_batches,
    run_bench,
)
from mocov3_ds.config.compression import SequenceLength, count_length
from mocov3_ds.encoders.load import read_run_config
from mocov3_ds.training.step import Draws
from tests.evaluation.runs import make_run, make_splits

SMALL = {"batch": 24, "draws": 2, "shares": (0.5,), "scales": (1.0, 2.0)}


def test_bias_and_noise_are_told_apart() -> None:
    torch.manual_seed(0)
    whole_W = torch.randn(20_000)
    unit = whole_W.norm() / 20_000**0.5
    noise_DW = 0.5 * unit * torch.randn(4, 20_000)
    # 20,000 numbers: the noise is known to a percent, the squared bias to a hundredth
    assert measure_error(whole_W + noise_DW, whole_W).noise == pytest.approx(0.5, rel=0.03)
    assert measure_error(whole_W + noise_DW, whole_W).bias < 0.1
    shifted = measure_error(1.3 * whole_W + noise_DW, whole_W)
    assert shifted.bias == pytest.approx(0.3, rel=0.05)
    assert shifted.noise == pytest.approx(0.5, rel=0.03)
    assert shifted.error == pytest.approx((0.3**2 + 0.5**2) ** 0.5, rel=0.03)
    assert shifted.cosine == pytest.approx(1.3 / (1.3**2 + 0.5**2) ** 0.5, rel=0.01)
    assert measure_error(0.8 * whole_W.expand(2, -1), whole_W) == pytest.approx(
        (0.2, 0.0, 0.2, 1.0), abs=1e-5
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compression")
    train, val = make_splits(folder, train=600)
    return make_run(folder / "run", train=train, val=val)


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_rows_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {}
    for untrained in (True, False):
        run_bench(CompressionOptions(run=run, untrained=untrained, **SMALL))
        text = capsys.readouterr().out
        assert f"after step {0 if untrained else 7}, 24 images" in text
        tables[untrained] = rows_of(text)
    for rows in tables.values():
        assert [row[:2] for row in rows] == [
            ["all 16, another batch", "1"],
            ["8 of 16", "1"],
            ["4 of 4", "2"],
            ["2 of 4", "2"],
        ]
        other, half, large, both = rows
        assert (other[2], other[3], large[4]) == ("100", "", "0")  # nothing is drawn of all
        assert float(both[2]) < float(half[2]) < 100
        for row in rows:
            assert float(row[5]) > 0 and -1 < float(row[6]) < 1
            if row[3] not in ("", "0"):  # an estimate, which is cut off at 0
                parts = (float(row[3]) ** 2 + float(row[4]) ** 2) ** 0.5
                assert float(row[5]) == pytest.approx(parts, abs=1.1)
    assert tables[True] != tables[False]


def test_untrained_networks_are_those_of_the_seed(run: Path) -> None:
    config = read_run_config(run)
    networks = load_networks(config, None)
    base = dict(networks.model.base.state_dict())
    for name, tensor in networks.momentum_encoder.full_state():
        assert torch.equal(tensor, base[name])
    one, other = read_batches(config, None, 24, 2)
    assert not {*one.sample_ids_B.tolist()} & {*other.sample_ids_B.tolist()}
    whole_W = gradient(networks, one, Draws())
    length = count_length(SequenceLength(query_share=1.0, key_share=1.0), 16)
    again_W = gradient(networks, one, draw(length, one, 0))
    assert torch.equal(again_W, whole_W)
    assert not torch.equal(gradient(networks, other, Draws()), whole_W)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 1}, "--draws 1 shows no noise"),
        ({"batch": 1000}, "--batch 1000 must be from 2 to the run's 256"),
        ({"scales": (3.0,)}, "patch scale 3 .* do not divide an image of 16"),
        ({"run": Path("nowhere")}, "nowhere is no run folder"),
    ],
)
def test_refused(run: Path, changes: dict[str, object], message: str) -> None:
    options = dataclasses.replace(CompressionOptions(run=run, **SMALL), **changes)
    with pytest.raises(ValueError, match=message):
        run_bench(options)
