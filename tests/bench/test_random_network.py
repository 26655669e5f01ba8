"""Networks of the benchmarks: the same at each call, and what each rank trains on differs."""

import torch

from mocov3_ds.bench.random_network import draw_views, start_network
from mocov3_ds.distributed import ranks
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.vit import VitShape
from tests.ranks_pool import run_ranks

SMALL = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=24, depth=1, heads=3), hidden=32, out=16
)


def two_networks() -> list[float]:
    device = ranks.start()
    losses = []
    for _ in range(2):
        network = start_network(SMALL, {}, batch=8, device=device)
        losses += [network.run_step(), network.run_step()]
    return [*losses, float(network.x1_BCHW.sum())]


def test_steps_repeat_and_views_differ_by_rank() -> None:
    (*first, first_sum), (*second, second_sum) = run_ranks(2, two_networks)
    assert first == second  # the loss is that of all ranks
    assert first[0] == first[2]
    assert first_sum != second_sum


def test_views_are_of_the_shape() -> None:
    x1_BCHW, x2_BCHW = draw_views(SMALL, 3, torch.bfloat16, torch.device("cpu"))
    assert x1_BCHW.shape == x2_BCHW.shape == (3, 3, 16, 16)
    assert x1_BCHW.dtype == torch.bfloat16
    assert not torch.equal(x1_BCHW, x2_BCHW)
