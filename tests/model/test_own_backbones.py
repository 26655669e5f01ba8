"""Names of networks of one's own: those given to the process, and those that can be imported."""

import pytest
import torch
from torch import nn

from mocov3_ds.config.parts import ModelConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.model.own_backbones import make_own_backbone, register_backbone
from mocov3_ds.model.shapes import OwnShape


def make_small() -> nn.Module:
    return nn.Linear(3, 2)


def test_a_module_is_copied_and_a_function_called() -> None:
    network = nn.Linear(2, 2)
    weight = network.weight.detach().clone()
    name = register_backbone(network)
    assert name == "own:Linear"
    nn.init.zeros_(network.weight)
    one, two = make_own_backbone("Linear"), make_own_backbone("Linear")
    assert isinstance(one, nn.Linear) and isinstance(two, nn.Linear)
    assert torch.equal(one.weight, weight)
    assert one.weight is not two.weight
    assert register_backbone(make_small, "mine") == "own:mine"
    assert isinstance(make_own_backbone("mine"), nn.Linear)


def test_a_name_may_say_where_the_network_is_made() -> None:
    made = make_own_backbone("tests.model.test_own_backbones:make_small")
    assert isinstance(made, nn.Linear) and made.in_features == 3
    shape = Config(model=ModelConfig(backbone=f"own:{__name__}:make_small")).backbone
    assert isinstance(shape, OwnShape)
    assert shape.size == (224, 224)
    assert isinstance(shape.make(), nn.Linear)
    for name, words in (
        ("unknown", "was a network in the memory of a program"),
        ("no_such_module:make", "names no function that can be imported"),
        (f"{__name__}:make_large", "names no function that can be imported"),
    ):
        with pytest.raises(ValueError, match=words):
            make_own_backbone(name)
