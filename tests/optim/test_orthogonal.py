"""Orthogonal directions beside torch's own iteration, exact ones, and operations counted."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz
from torch.utils.flop_counter import FlopCounterMode

from mocov3_ds.optim.orthogonal import (
    COEFFICIENTS,
    SMALLEST_NORM,
    count_operations,
    direction_scale,
    orthogonalise,
)

SHAPES = [(7, 31), (31, 7), (16, 16), (1, 5), (24, 8)]


def draw(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_to_torch_in_bf16(shape: tuple[int, int]) -> None:
    x_RC = draw(*shape)
    want = torch_newton_schulz(x_RC.clone(), COEFFICIENTS, 5, SMALLEST_NORM)
    assert torch.equal(orthogonalise(x_RC.bfloat16(), 5), want)


@pytest.mark.parametrize("shape", [(7, 31), (31, 7), (24, 8)])
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int]) -> None:
    x_RC = draw(*shape)
    u, _, vt = torch.linalg.svd(x_RC, full_matrices=False)
    inner = u.T @ orthogonalise(x_RC, 5) @ vt.T
    values = inner.diagonal()
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    # what is no singular value is rounding, which the iteration may raise by 3.4445^5 = 485
    assert float((inner - values.diag()).abs().max()) < 485 * 1e-6


def test_each_block_by_itself() -> None:
    x_RC = draw(24, 8)
    blocks = [orthogonalise(x, 5) for x in x_RC.split(4)]
    got = orthogonalise(x_RC, 5, blocks=6)
    assert torch.allclose(got, torch.cat(blocks), atol=1e-5)
    assert not torch.allclose(got, orthogonalise(x_RC, 5), atol=0.1)


def test_zeros_stay() -> None:
    assert not orthogonalise(torch.zeros(3, 4), 5).any()


@pytest.mark.parametrize(("shape", "blocks"), [((7, 31), 1), ((31, 7), 1), ((24, 8), 6)])
def test_operations_are_those_that_torch_counts(shape: tuple[int, int], blocks: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalise(draw(*shape), 5, blocks)
    assert counter.get_total_flops() == count_operations(*shape, 5, blocks)


def test_scales() -> None:
    assert direction_scale(400, 100, "match_rms_adamw") == pytest.approx(4.0)
    assert direction_scale(100, 400, "match_rms_adamw") == pytest.approx(4.0)
    assert direction_scale(400, 100, "original") == pytest.approx(2.0)
    assert direction_scale(100, 400, "original") == 1.0
    # the RMS of a direction is AdamW's usual 0.2
    x_RC = direction_scale(64, 256, "match_rms_adamw") * orthogonalise(draw(64, 256), 5)
    assert float(x_RC.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)
