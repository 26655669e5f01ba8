"""Keys on a stream of their own: who waits for whom, on the fake GPU."""

import pytest

from tests.fake_gpu.process import run_on_fake_gpu

pytestmark = pytest.mark.slow


def order_keys() -> list[int]:
    """Launches not waited for: of the main stream by the keys, of the keys by the main one."""
    import torch

    from mocov3_ds.model.momentum_encoder import ViewKeys
    from mocov3_ds.training.key_stream import begin_keys, stream_of_keys
    from tests.fake_gpu import inside

    card = torch.device("cuda", 0)
    main, side = torch.cuda.current_stream(card), stream_of_keys(card)
    weights, unordered = torch.ones(8, device=card), []
    weights += 1  # the move of the momentum encoder

    def make_keys() -> tuple[ViewKeys, ViewKeys]:
        unordered.append(inside.count_unordered(main, side))
        assert torch.cuda.current_stream(card) == side
        keys = ViewKeys(weights + 1, weights + 2)
        return keys, keys

    with inside.counted() as use:
        take_keys = begin_keys(make_keys, card)
        unordered.append(inside.count_unordered(side, main))
        weights + 3  # a query
        take_keys()
        unordered.append(inside.count_unordered(side, main))
    return [*unordered, use.syncs]


def test_keys_wait_for_the_move_and_the_loss_for_the_keys() -> None:
    assert run_on_fake_gpu(order_keys) == [0, 2, 0, 0]
