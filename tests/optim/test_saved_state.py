"""State dicts of other optimizers and models are refused before anything has changed."""

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from mocov3_ds.optim import AdamW, Lamb, Lars, Muon


def trained(kind: Any, *, plain: bool = False, width: int = 3, **options: Any) -> Any:
    layer = nn.Linear(2, width)
    optimizer = kind(layer.parameters() if plain else layer.named_parameters(), **options)
    if not plain:
        optimizer.attach()
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: trained(torch.optim.AdamW, plain=True), "another optimizer than Lamb: .* no bias"),
        (lambda: trained(torch.optim.SGD, plain=True, lr=0.1), "another optimizer than Lamb"),
        (lambda: trained(timm.optim.Lamb, plain=True), "another optimizer than Lamb: .* no flat"),
        (lambda: trained(AdamW), "another optimizer than Lamb: its group has no grad_averaging"),
        (lambda: trained(Lars), "another optimizer than Lamb: its group has no betas"),
        (lambda: trained(Lamb, width=4), r"exp_avg of tensor 0 has shape \(4, 2\).* \(3, 2\)"),
    ],
)
def test_other_states(given: Any, words: str) -> None:
    optimizer = trained(Lamb)
    before = {n: {k: t.clone() for k, t in s.items()} for n, s in optimizer.full_state()}
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(given().state_dict())
    for name, state in optimizer.full_state():
        assert all(torch.equal(state[key], before[name][key]) for key in state)
    assert optimizer.step_count == 1 and optimizer.param_groups[0]["grad_averaging"] is True


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": torch.ones(2)}, "was given one with 'weight'"),
        ([1], "was given a list"),
        (None, "was given a NoneType"),
    ],
)
def test_what_is_no_state(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trained(Lamb).load_state_dict(given)


def test_a_state_of_moments_alone() -> None:
    state = trained(Lamb).state_dict()
    del state["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match="tensor 1 has no exp_avg_sq"):
        trained(Lamb).load_state_dict(state)


def test_a_state_of_an_earlier_version() -> None:
    state = trained(Lars).state_dict()
    del state["param_groups"][0]["moco_v3"]
    optimizer = trained(Lars)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["moco_v3"] is False


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Muon, {"qkv": "thirds"}, "a Muon with qkv 'thirds' and not 'whole', which decides"),
        (Muon, {"last_layer": "muon"}, "last_layer 'muon' and not 'adamw'"),
        (
            Muon,
            {"convolutions": "muon", "adamw_rate": 0.1},
            "convolutions 'muon' and not 'adamw', adamw_rate 0.1 and not 1.0, which",
        ),
        (Lars, {"moco_v3": True}, "a Lars with moco_v3 True and not False"),
    ],
)
def test_options_that_made_the_rules(kind: Any, given: dict[str, Any], words: str) -> None:
    shapes = {"patch.weight": (3, 2, 1, 1), "qkv.weight": (6, 2), "last.weight": (2, 2)}
    writer, reader = (
        kind([(n, nn.Parameter(torch.ones(s))) for n, s in shapes.items()], **options)
        for options in (given, {})
    )
    for optimizer in (writer, reader):
        optimizer.attach()
    before = dict(reader.param_groups[0])
    with pytest.raises(ValueError, match=words):
        reader.load_state_dict(writer.state_dict())
    assert reader.param_groups[0] == before
    reader.load_state_dict(reader.state_dict())
