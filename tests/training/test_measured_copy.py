"""Gradient, Hessian and noise of the copy against the loss written out; N ranks against one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import ViewKeys
from mocov3_ds.model.vit import VitShape, build_vit
from mocov3_ds.training.curvature import largest_eigenvalue
from mocov3_ds.training.instruments import measure_noise
from mocov3_ds.training.measured_copy import FixedBatch, MeasuredCopy
from mocov3_ds.training.noise_scale import draw_halves
from mocov3_ds.training.step import Draws, QueriesToLoss
from tests.ranks_pool import run_ranks

VIT = VitShape(image_size=8, patch_size=4, dim=8, depth=1, heads=2)
SHAPE = EncoderShape(backbone=VIT, hidden=6, out=4)
BATCH, TEMPERATURE, CPU = 12, 0.2, torch.device("cpu")
IDS = torch.arange(50, 50 + BATCH)


def setting(dtype: torch.dtype) -> tuple[MeasuredCopy, Tensor, list[Tensor], list[Tensor]]:
    """Copy, weights, views and keys of the whole batch."""
    torch.manual_seed(1)
    base = BaseEncoder(SHAPE)
    copy = MeasuredCopy(QueriesToLoss(base, ContrastiveLoss(TEMPERATURE, key_block=3)), CPU)
    copy._model.to(dtype)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = torch.cat([p.detach().reshape(-1) for p in copy._trained])
    weights += 0.1 * drawn(len(weights))
    views = [drawn(BATCH, 3, 8, 8) for _ in range(2)]
    return copy, weights, views, [drawn(BATCH, 4) for _ in range(2)]


def fixed(
    views: list[Tensor], keys: list[Tensor], rows: slice | Tensor = slice(None)
) -> FixedBatch:
    view_keys = [ViewKeys(k[rows], k[rows]) for k in keys]
    return FixedBatch(
        (views[0][rows], views[1][rows]), (view_keys[0], view_keys[1]), Draws(), seed=0
    )


def written_out(copy: MeasuredCopy, views: list[Tensor], keys: list[Tensor]) -> Any:
    """Function of all trained weights in one row: the loss by the paper's formulas."""
    vit = build_vit(VIT).double()
    vit.load_state_dict(copy._model.base.backbone.state_dict())
    for block in vit.blocks:
        block.attn.fused_attn = False
    shapes = [p.shape for p in copy._trained]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    def queries(w: dict[str, Tensor], x: Tensor) -> Tensor:
        inside = {n.removeprefix("base.backbone."): t for n, t in w.items() if "backbone" in n}
        h = torch.func.functional_call(vit, inside, (x,))
        for head, last in (("projector", 6), ("predictor", 3)):
            for index in range(0, last, 3):
                h = norm(h @ w[f"base.{head}.{index}.weight"].T)
                scale, shift = (w[f"base.{head}.{index + 1}.{n}"] for n in ("weight", "bias"))
                h = (h * scale + shift).relu()
            h = norm(h @ w[f"base.{head}.{last}.weight"].T)
        return F.normalize(h, dim=1)

    def loss(row: Tensor) -> Tensor:
        parts = torch.split(row, [math.prod(shape) for shape in shapes])
        w = {n: p.view(s) for n, p, s in zip(copy.names, parts, shapes, strict=True)}
        total = row.new_zeros(())
        for x, k in ((views[0], keys[1]), (views[1], keys[0])):
            scores = queries(w, x) @ F.normalize(k, dim=1).T / TEMPERATURE
            total = total - 2 * TEMPERATURE * scores.log_softmax(1).diagonal().mean()
        return total

    return loss


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    """Gradient and full Hessian, fp64."""
    copy, weights, views, keys = setting(torch.float64)
    loss = written_out(copy, views, keys)
    hessian = torch.func.jacrev(torch.func.grad(loss), chunk_size=128)(weights)
    return torch.func.grad(loss)(weights), hessian.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradient_and_hessian_are_those_of_the_loss_written_out(
    truth: tuple[Tensor, Tensor], chunk: int
) -> None:
    gradient, hessian = truth
    copy, weights, views, keys = setting(torch.float64)
    copy.set_chunk(chunk)
    batch = fixed(views, keys)
    copy.set_weights(weights)
    heads = copy.differentiate_heads(batch)
    assert relative(copy.gradient(batch, heads), gradient) < 1e-12
    u = torch.randn(len(weights), generator=torch.Generator().manual_seed(2)).double()
    # differences of fp64: an error of the square of the step
    assert relative(copy.hessian_product(batch, heads, weights, u, 1e-5), hessian @ u) < 1e-6
    of_heads = u.clone()
    of_heads[: copy.backbone_numbers] = 0
    product = copy.hessian_product(batch, heads, weights, of_heads, 1e-5)
    assert relative(product, hessian @ of_heads) < 1e-6
    assert relative(copy.gradient(batch, heads), gradient) < 1e-12  # the weights are back


def test_sharpness_in_fp32_is_the_largest_eigenvalue(truth: tuple[Tensor, Tensor]) -> None:
    _, hessian = truth
    copy, weights, views, keys = setting(torch.float32)
    batch = fixed(views, keys)
    copy.set_weights(weights)
    heads = copy.differentiate_heads(batch)
    generator = torch.Generator().manual_seed(5)
    root = torch.rand(len(weights), generator=generator).exp()
    expected = torch.linalg.eigvalsh(root.double()[:, None] * hessian * root.double())[-1]
    value, _ = largest_eigenvalue(
        lambda z: root * copy.hessian_product(batch, heads, weights, root * z, 1e-4),
        torch.randn(len(weights), generator=generator),
        iterations=60,
        tolerance=1e-4,
    )
    assert value == pytest.approx(float(expected), rel=2e-3)  # fp32, and a step of 1e-4


def part_of_rank(whole: int) -> tuple[Tensor, Tensor, Any]:
    """Gradient, Hessian product and noise scale; each rank has its part of the batch."""
    copy, weights, views, keys = setting(torch.float64)
    size = whole // ranks.world_size()
    rows = slice(ranks.rank() * size, (ranks.rank() + 1) * size)
    batch = fixed(views, keys, rows)
    copy.set_weights(weights)
    heads = copy.differentiate_heads(batch)
    u = torch.randn(len(weights), generator=torch.Generator().manual_seed(2)).double()
    product = copy.hessian_product(batch, heads, weights, u, 1e-5)
    of_rank = [tensor[rows] for tensor in (*views, *keys)]

    def fix_batch(rows_H: Tensor | None) -> FixedBatch:
        assert rows_H is not None
        return fixed(of_rank[:2], of_rank[2:], rows_H)

    noise = measure_noise(copy, fix_batch, weights, IDS[rows])
    return copy.gradient(batch, heads), product, noise


def test_two_ranks_are_one(truth: tuple[Tensor, Tensor]) -> None:
    (one,), two = (run_ranks(n, part_of_rank, BATCH) for n in (1, 2))
    for rank in two:
        assert relative(rank[0], one[0]) < 1e-12 and relative(rank[1], one[1]) < 1e-6
        assert rank[2] == pytest.approx(one[2], rel=1e-10)
    assert relative(one[0], truth[0]) < 1e-12
    assert one[2] == pytest.approx(noise_written_out(), rel=1e-10)


def noise_written_out() -> tuple[float, float]:
    """Trace and gradient square from the loss of each half written out, heads and all."""
    copy, weights, views, keys = setting(torch.float64)
    gradients = []
    for rows in draw_halves(IDS.numpy()):
        loss = written_out(copy, [x[rows] for x in views], [k[rows] for k in keys])
        gradients.append(torch.func.grad(loss)(weights).numpy())
    mean = (gradients[0] + gradients[1]) / 2
    # the variance of a half is the sum over both of their distance to the mean, and S that times H
    trace = BATCH / 2 * sum(((gradient - mean) ** 2).sum() for gradient in gradients)
    return float(trace), float((gradients[0] * gradients[1]).sum())
