"""The check of the momentum encoder's move passes torch's, and finds a wrong one."""

from collections.abc import Callable

import pytest
import torch

from mocov3_ds.checks import momentum_kernel
from mocov3_ds.model.momentum_encoder import MomentumEncoder

CPU = torch.device("cpu")


def test_this_machine_passes() -> None:
    finding = momentum_kernel.check_momentum(CPU)
    assert finding.status == "pass", finding
    assert {*finding.numbers} == {"float32", "bfloat16", "float16"}


def shift_a_master(encoder: MomentumEncoder) -> None:
    name, tensor = next(iter(encoder.full_state()))
    assert "weight" in name or "bias" in name or "token" in name
    tensor.mul_(1 + 1e-5)
    encoder._refresh_copies()


def shift_a_copy(encoder: MomentumEncoder) -> None:
    copy = encoder.projector.get_parameter("0.weight")
    if copy.dtype != torch.float32:
        copy.data[0, 0] += 1.0


@pytest.mark.parametrize(("spoil", "good"), [(shift_a_master, set()), (shift_a_copy, {"float32"})])
def test_a_wrong_move_is_found(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[MomentumEncoder], None], good: set[str]
) -> None:
    finish = MomentumEncoder.finish_move

    def finish_wrongly(encoder: MomentumEncoder) -> None:
        finish(encoder)
        spoil(encoder)

    monkeypatch.setattr(MomentumEncoder, "finish_move", finish_wrongly)
    finding = momentum_kernel.check_momentum(CPU)
    assert finding.status == "fail"
    assert {name for name, error in finding.numbers.items() if error < 3e-7} == good
