"""The yardstick is a step of the paper's method: its loss, and that it trains."""

import pytest
import torch

from mocov3_ds.bench.random_network import draw_views
from mocov3_ds.bench.script_step import build_encoder, build_script_step
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.loss import contrastive_loss
from mocov3_ds.model.vit import VitShape
from tests.ranks_pool import run_ranks

SMALL = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=24, depth=1, heads=3), hidden=32, out=16
)


def one_step() -> tuple[float, float]:
    """Loss of the step, and of our own loss on the same queries and keys."""
    device = ranks.start()
    x1, x2 = draw_views(SMALL, 6, torch.float32, device)
    loss = build_script_step(SMALL, torch.float32, device, x1, x2)()
    torch.manual_seed(0)
    base, key = build_encoder(SMALL), build_encoder(SMALL)
    key.load_state_dict(base.state_dict())
    with torch.no_grad():
        q1, q2 = base(x1), base(x2)
        k1, k2 = (key.projector(key.backbone(x)) for x in (x1, x2))
        ours = contrastive_loss(q1, k2, 0, 0.2) + contrastive_loss(q2, k1, 0, 0.2)
    return loss, float(ours)


def test_the_loss_is_the_papers() -> None:
    [(loss, ours)] = run_ranks(1, one_step)
    assert loss == pytest.approx(ours, rel=1e-5)
