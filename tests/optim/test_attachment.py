"""What people give to `attach`, and what is said of it."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from mocov3_ds.optim import Lamb
from mocov3_ds.optim.attachment import check_attachable, check_whole, tell_clipping


class DistributedDataParallel(nn.Module):
    pass


class FullyShardedDataParallel(nn.Module):
    pass


class FSDPModule(nn.Module):
    pass


class Wrapped(FSDPModule):
    pass


class Trainer:
    args = None

    def create_optimizer(self) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Linear(2, 2), r"given a Linear, which is no DeepSpeed engine: .* attach\(\) alone"),
        (
            DistributedDataParallel(),
            "given a DistributedDataParallel, which is no DeepSpeed engine",
        ),
        (FullyShardedDataParallel(), "FSDP cuts the weights .* use DeepSpeed"),
        (Wrapped(), "given a Wrapped: FSDP cuts the weights"),
        (Trainer(), r"create_optimizer, .* optimizer\.attach\(trainer\.model_wrapped\)"),
        ((1, 2, 3, 4), "given a tuple: deepspeed.initialize returns the engine as the first"),
        ("engine", "given a str, which is no DeepSpeed engine"),
    ],
)
def test_what_is_no_engine(given: Any, words: str) -> None:
    optimizer = Lamb([("w", nn.Parameter(torch.ones(2, 2)))])
    with pytest.raises(ValueError, match=words):
        optimizer.attach(given)
    check_attachable(None)


def test_tensors_that_are_not_whole() -> None:
    w = nn.Parameter(torch.ones(4))
    check_whole("w", w, (4,))
    with pytest.raises(ValueError, match=r"'w' is cut over the ranks .* Parameter of shape \(4,\)"):
        check_whole("w", w, (2, 4))
    w._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="FSDP, tensor parallelism"):
        check_whole("w", w, (4,))
    cut = nn.Parameter(torch.empty(0))
    cut.ds_id, cut.ds_shape = 0, (2, 2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"cut over the ranks by ZeRO-3; call attach\(engine\)"):
        Lamb([("w", cut)]).attach()


class Engine:
    def __init__(self, norm: float, config: Any) -> None:
        self.norm, self.config = norm, config

    def gradient_clipping(self) -> float:
        return self.norm


def test_the_default_clipping_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mocov3_ds"):
        tell_clipping(Engine(1.25, {"gradient_clipping": 1.25}))
        tell_clipping(Engine(0.0, {}))
        assert caplog.messages == []
        for _ in range(2):
            tell_clipping(Engine(1.25, {"train_batch_size": 8}))
    (message,) = caplog.messages
    assert "no gradient_clipping" in message and "norm 1.25" in message
