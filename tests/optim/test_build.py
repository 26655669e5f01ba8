"""Optimizer blocks of DeepSpeed JSONs, and what is refused in them."""

import math
from typing import Any

import pytest
import torch

from mocov3_ds.optim import AdamW, Lamb, Lars, Rule
from mocov3_ds.optim.build import base_rate, build_optimizer
from mocov3_ds.optim.rules import check_rule, vit_rule
from mocov3_ds.recipes import parse
from tests.ds_configs import CONFIGS


def named() -> list[tuple[str, torch.nn.Parameter]]:
    return list(torch.nn.Linear(2, 3).named_parameters())


def build(kind: str, **parameters: Any) -> torch.optim.Optimizer:
    return build_optimizer({"type": kind, "params": parameters}, named())


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        *[("AdamW", AdamW), ("adam", AdamW), ("Adam", AdamW)],
        *[("Lamb", Lamb), ("LAMB", Lamb), ("FusedLamb", Lamb), ("Lars", Lars)],
    ],
)
def test_types(kind: str, wanted: type) -> None:
    assert type(build(kind, lr=0.1)) is wanted


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


def test_the_coefficients_of_deepspeed_bound_the_ratio() -> None:
    stock = build("FusedLamb", max_coeff=10.0, min_coeff=0.01).param_groups[0]
    assert stock["trust_clip"] == (0.01, 10.0)
    assert build("Lamb", max_coeff=10.0).param_groups[0]["trust_clip"] == (0.0, 10.0)
    assert build("Lamb", min_coeff=0.5).param_groups[0]["trust_clip"] == (0.5, math.inf)
    assert build("Lamb").param_groups[0]["trust_clip"] is None


def test_flat_from_the_command_line() -> None:
    arguments = ["--ds", "optimizer.type=Lamb", "--ds", "optimizer.params.flat=true"]
    run = parse(["--recipe", "cifar10", *arguments])
    optimizer = build_optimizer(run.engine["optimizer"], named())
    assert isinstance(optimizer, Lamb)
    assert optimizer.param_groups[0]["flat"] is True


@pytest.mark.parametrize(
    ("block", "words"),
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
        ({"type": "Lamb", "params": {"lr": -1}}, "lr is -1; it must be at least 0"),
        ({"type": "Lamb", "params": {"lr": "1e-3"}}, "lr is '1e-3'; it must be a number"),
        ({"type": "Lamb", "params": {"lr": math.nan}}, "lr is nan; it must be at least"),
        ({"type": "Lamb", "params": {"betas": [0.9]}}, "betas is .* two numbers"),
        ({"type": "Lamb", "params": {"betas": [0.9, 1.0]}}, r"betas\[1\] is 1.0; .* below 1"),
        ({"type": "Lamb", "params": {"eps": -1e-8}}, "eps is -1e-08"),
        ({"type": "Lamb", "params": {"flat": "false"}}, "flat is 'false'; it must be true or"),
        ({"type": "Lamb", "params": {"trust_clip": True}}, "trust_clip is True; it must be null"),
        ({"type": "Lamb", "params": {"trust_clip": [2, 1]}}, "first number must not be larger"),
        ({"type": "Lamb", "params": {"trust_clip": [0, 1], "max_coeff": 2}}, "keep one of them"),
        ({"type": "Lamb", "params": {"backend": "cuda"}}, "must be one of auto, plain, blocks"),
        ({"type": "Lars", "params": {"momentum": 1.0}}, "momentum is 1.0"),
        ({"type": "Lars", "params": {"betas": [0.9, 0.9]}}, "no parameter 'betas'"),
    ],
)
def test_refused(block: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_optimizer(block, named())


def test_a_block_without_a_rate_has_no_base_rate() -> None:
    with pytest.raises(ValueError, match=r"no params\.lr"):
        base_rate({"type": "Lamb", "params": {}})


def test_matrices_adapt_and_the_rest_does_not() -> None:
    for name, shape, matrix in [
        ("blocks.0.attn.qkv.weight", (9, 3), True),
        ("patch_embed.proj.weight", (9, 3, 2, 2), True),
        ("blocks.0.attn.qkv.bias", (9,), False),
        ("norm.weight", (3,), False),
        ("cls_token", (1, 1, 3), False),
        ("backbone.pos_embed", (1, 5, 3), False),
    ]:
        assert vit_rule(name, shape) == Rule(decay=matrix, adapt=matrix), name


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(decay=-1), "decay -1; it must be 0 or above"),
        (Rule(decay=math.nan), "decay nan"),
        (Rule(lr_multiplier=0), "lr_multiplier 0; it must be above 0"),
    ],
)
def test_impossible_rules(rule: Rule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_rule(rule, "w")
