"""Optimizer blocks of DeepSpeed JSONs, and what is refused in them."""

from typing import Any

import pytest
import torch

from mocov3_ds.optim import AdamW, Lamb, Lars
from mocov3_ds.optim.build import base_rate, build_optimizer
from mocov3_ds.recipes import parse
from tests.ds_configs import CONFIGS


def named() -> list[tuple[str, torch.nn.Parameter]]:
    return list(torch.nn.Linear(2, 3).named_parameters())


def build(kind: str, **parameters: Any) -> torch.optim.Optimizer:
    return build_optimizer({"type": kind, "params": parameters}, named())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *[("AdamW", AdamW), ("adam", AdamW), ("Adam", AdamW)],
        *[("Lamb", Lamb), ("LAMB", Lamb), ("FusedLamb", Lamb), ("Lars", Lars)],
    ],
)
def test_types(kind: str, expected: type) -> None:
    assert type(build(kind, lr=0.1)) is expected


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_builds(name: str) -> None:
    block = CONFIGS[name]["optimizer"]
    optimizer = build_optimizer(block, named())
    assert type(optimizer) is (Lamb if "lamb" in name else AdamW)
    assert optimizer.param_groups[0]["lr"] == base_rate(block) > 0


def test_lamb_options_reach_the_optimizer() -> None:
    options = {
        "lr": 2e-3,
        "betas": [0.8, 0.99],
        "eps": 1e-5,
        "weight_decay": 0.3,
        "bias_correction": False,
        "grad_averaging": False,
        "trust_clip": [0.1, 5],
        "always_adapt": True,
        "flat": True,
    }
    group = build("Lamb", **options).param_groups[0]
    for key, value in options.items():
        assert group[key] == (tuple(value) if isinstance(value, list) else value), key


def test_lars_options_reach_the_optimizer() -> None:
    options = {"lr": 3.0, "momentum": 0.8, "trust_coeff": 0.02, "eps": 1e-6, "nesterov": True}
    group = build("Lars", **options).param_groups[0]
    assert {key: group[key] for key in options} == options


def test_flat_from_the_command_line() -> None:
    arguments = ["--ds", "optimizer.type=Lamb", "--ds", "optimizer.params.flat=true"]
    run = parse(["--recipe", "cifar10", *arguments])
    optimizer = build_optimizer(run.engine["optimizer"], named())
    assert isinstance(optimizer, Lamb)
    assert optimizer.param_groups[0]["flat"] is True


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "needs an optimizer block"),
        ({"type": "SGD"}, "type 'SGD' is unknown; types are AdamW"),
        ({"type": "Lamb", "parms": {}}, "unknown key 'parms'; known: type, params"),
        ({"type": "Lamb", "params": 3}, "params are 3, not an object"),
        ({"type": "Lamb", "params": {"weigth_decay": 1}}, "did you mean weight_decay"),
        ({"type": "Lamb", "params": {"max_grad_norm": 1.0}}, "use the DeepSpeed config's gradient"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "AMSGrad is not implemented"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam_w_mode must be true"),
        ({"type": "AdamW", "params": {"flat": True}}, "no parameter 'flat'"),
        ({"type": "Lamb", "params": {"backend": "cuda"}}, "must be one of auto, plain, blocks"),
        ({"type": "Lars", "params": {"betas": [0.9, 0.9]}}, "no parameter 'betas'"),
    ],
)
def test_refused(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(block, named())


def test_a_block_without_a_rate_has_no_base_rate() -> None:
    with pytest.raises(ValueError, match=r"no params\.lr"):
        base_rate({"type": "Lamb", "params": {}})
