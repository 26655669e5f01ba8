"""The bench of compressed gradients tells bias and noise apart."""

import pytest
import torch

from mocov3_ds.bench.compression import measure_error


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
    assert measure_error(0.8 * whole_W.expand(2, -1), whole_W) == pytest.approx(
        (0.2, 0.0), abs=1e-5
    )
