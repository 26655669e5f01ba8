"""Stochastic depth: draws by sample, the same in any cut of the batch and in a second pass."""

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor

from mocov3_ds.data.splitmix import hash_counters
from mocov3_ds.model import stochastic_depth
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.stochastic_depth import StochasticDepth, draw_factors, find_branches
from mocov3_ds.model.vit import VitShape
from mocov3_ds.training.step import Draws, QueriesToLoss

SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=16, depth=3, heads=2),
    hidden=24,
    out=8,
    drop_path=0.5,
)
IDS = np.array([7, 3, 10**12, 0, 41, 8, 5])


def plain_factor(seed: int, step: int, sample: int, counter: int, rate: float) -> float:
    """One draw at a time."""
    word = hash_counters(seed, stochastic_depth._STREAM, step, sample, counter)
    return 0.0 if (word >> 11) * 2.0**-53 < rate else 1 / (1 - rate)


def test_a_draw_is_a_hash_of_what_it_belongs_to() -> None:
    rates = [0.25, 0.5, 0.9]
    factors_VBM = draw_factors(rates, IDS, seed=3, step=9)
    for view in range(2):
        for row, sample in enumerate(IDS.tolist()):
            for branch, rate in enumerate(rates):
                expected = plain_factor(3, 9, sample, view * 3 + branch, rate)
                assert float(factors_VBM[view, row, branch]) == pytest.approx(expected, rel=1e-6)
    part = draw_factors(rates, IDS[2:5], seed=3, step=9)
    assert torch.equal(part, factors_VBM[:, 2:5])
    assert not torch.equal(draw_factors(rates, IDS, seed=3, step=10), factors_VBM)


def test_shares_and_means_are_those_of_the_rate() -> None:
    factors_VBM = draw_factors([0.2, 0.7, 1.0], np.arange(20_000), seed=-1, step=0)
    dropped_M = (factors_VBM == 0).double().mean((0, 1))
    assert dropped_M.tolist() == pytest.approx([0.2, 0.7, 1.0], abs=0.01)
    assert factors_VBM.double().mean((0, 1)).tolist() == pytest.approx([1, 1, 0], abs=0.03)
    first, second = (factors_VBM[:, :, branch].flatten().double() for branch in (0, 1))
    for other in (second, first.roll(1), first.roll(20_000)):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.03


def test_timms_layers_are_replaced_and_draw_alike_without_factors() -> None:
    base = BaseEncoder(SHAPE)
    assert not any(isinstance(layer, DropPath) for layer in base.modules())
    rates = [branch.rate for branch in find_branches(base.backbone)]
    assert rates == pytest.approx([0.25, 0.25, 0.5, 0.5])
    x = torch.randn(64, 5, 4)
    layer, timms = StochasticDepth(0.5), DropPath(0.5)
    torch.manual_seed(0)
    ours = layer.train()(x)
    torch.manual_seed(0)
    assert torch.equal(ours, timms.train()(x))
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("recompute_blocks", [False, True])
@pytest.mark.parametrize("chunks", [Chunks(size=2), Chunks(size=3, keep=2), Chunks(size=1, keep=9)])
def test_gradients_equal_one_plain_pass_whatever_the_chunks(
    chunks: Chunks, recompute_blocks: bool
) -> None:
    torch.manual_seed(0)
    base = BaseEncoder(SHAPE).double().train()
    x1, x2 = torch.randn(2, 7, 3, 16, 16, dtype=torch.float64)
    factors = draw_factors([b.rate for b in find_branches(base.backbone)], IDS, seed=0, step=4)

    def gradients(chunks: Chunks, recompute_blocks: bool) -> list[Tensor]:
        base.backbone.set_grad_checkpointing(recompute_blocks)
        model = QueriesToLoss(base, ContrastiveLoss(0.2), chunks=chunks)
        features1, features2 = model.features(x1, x2, Draws(factors_VBM=factors))
        queries = base.predictor(base.projector(torch.cat([features1, features2])))
        loss = queries.square().mul(torch.arange(8)).sum() + (features1 * features2).sum()
        return list(torch.autograd.grad(loss, [p for p in base.parameters() if p.requires_grad]))

    plain = gradients(Chunks(), False)
    for given, expected in zip(gradients(chunks, recompute_blocks), plain, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-11)
    for given, expected in zip(gradients(Chunks(), recompute_blocks), plain, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-11)
