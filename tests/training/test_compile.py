"""Compiled blocks: the same step up to rounding at stages 0 to 2, in chunks of unequal size."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors, start_engine
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape, compile_blocks
from mocov3_ds.monitoring.block_signals import block_signals
from mocov3_ds.optim import AdamW
from mocov3_ds.training.step import QueriesToLoss, train_step
from tests.ranks_pool import run_ranks

SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=24, depth=3, heads=3), hidden=32, out=16
)


def after_two_steps(stage: int, compiled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the weights of base and momentum encoder, of 5 images a rank in chunks of 2."""
    torch.manual_seed(0)
    model = QueriesToLoss(BaseEncoder(SHAPE), ContrastiveLoss(0.2), chunks=Chunks(size=2))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    config = engine_config(
        {"zero_optimization": {"stage": stage}},
        global_batch=5 * ranks.world_size(),
        world_size=ranks.world_size(),
    )
    engine = start_engine(model, AdamW(named, lr=1e-3), config)
    encoder = MomentumEncoder(SHAPE)
    for network in (model, encoder):
        suit_cpu(network, smallest_weight=1)  # small layers, too, are computed otherwise on a CPU
    encoder.start_from(dict(full_tensors(model.base)))
    encoder.follow(model.base)
    if compiled:
        compile_blocks(model.base.backbone)
        compile_blocks(encoder.backbone)
    generator = torch.Generator().manual_seed(ranks.rank())
    losses = []
    for _ in range(2):
        x1, x2 = (torch.randn(5, 3, 16, 16, generator=generator) for _ in range(2))
        losses.append(train_step(engine, encoder, x1, x2, momentum=0.9).loss)
    if compiled:
        signals = block_signals(model.base.backbone, x1)
        assert all(signals[f"block_{i}/max_logit"] > 0 for i in (0, 2))
    weights = {f"base.{name}": tensor for name, tensor in full_tensors(model.base)}
    return losses, weights | {f"momentum.{n}": t.clone() for n, t in encoder.full_state()}


def all_stages() -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    compiled = [after_two_steps(stage, compiled=True) for stage in (0, 1, 2)]
    return [after_two_steps(1, compiled=False), *compiled]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own
def test_one_code_for_all_chunks() -> None:
    """A smaller last chunk is filled up: no further compilation, and not one for a changing size.

    Each of two kinds of block is compiled with gradient and without.
    """
    torch.manual_seed(0)
    model = QueriesToLoss(BaseEncoder(SHAPE), ContrastiveLoss(0.2), chunks=Chunks(size=3))
    encoder = MomentumEncoder(SHAPE)
    for network in (model.base, encoder):
        for block in network.backbone.blocks:
            block.compile(backend="eager")
    counters.clear()
    for batch in (7, 5):  # in pieces of 3, 3, 3 and of 3, 3
        views = torch.randn(2, batch, 3, 16, 16)
        features1_BD, features2_BD = model.features(*views)
        (features1_BD + features2_BD).square().sum().backward()
        for view_BCHW in views:
            assert len(encoder.make_keys(view_BCHW, 3).keys_BP) == batch
    assert counters["stats"]["unique_graphs"] == 4, counters["stats"]


@pytest.mark.slow
def test_compiled_blocks_make_the_same_step() -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    [plain, *compiled], _ = run_ranks(2, all_stages, timeout=900)
    for losses, weights in compiled:
        assert losses == pytest.approx(plain[0], rel=1e-5)
        assert {*weights} == {*plain[1]}
        for name, tensor in weights.items():
            if name.endswith(("backbone.norm.bias", "attn.qkv.bias", "running_mean")):
                continue  # a gradient of rounding noise, which Adam makes whole steps of; and means
            torch.testing.assert_close(tensor, plain[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler: install g"):
        compile_blocks(BaseEncoder(SHAPE).backbone)
