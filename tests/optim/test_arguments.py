"""What a user can get wrong in an optimizer's values, and DeepSpeed's spelling of the bounds."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mocov3_ds.optim import AdamW, Lamb, Lars
from mocov3_ds.optim.arguments import check_number
from mocov3_ds.optim.build import build_optimizer


def build(kind: str, **params: Any) -> torch.optim.Optimizer:
    named = torch.nn.Linear(2, 3).named_parameters()
    return build_optimizer({"type": kind, "params": params}, named)


def test_the_coefficients_of_deepspeed_bound_the_ratio() -> None:
    stock = build("FusedLamb", max_coeff=10.0, min_coeff=0.01).param_groups[0]
    assert stock["trust_clip"] == (0.01, 10.0)
    assert build("Lamb", max_coeff=10.0).param_groups[0]["trust_clip"] == (0.0, 10.0)
    assert build("Lamb", min_coeff=0.5).param_groups[0]["trust_clip"] == (0.5, math.inf)
    assert build("Lamb").param_groups[0]["trust_clip"] is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
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
        ({"type": "Lars", "params": {"momentum": 1.0}}, "momentum is 1.0"),
        ({"type": "Lamb", "params": {"lr": 10**400}}, "lr is a number of more than 300 digits; it"),
        ({"type": "Lamb", "params": {"betas": [0.9, 10**400]}}, r"betas\[1\] is a number of more"),
        ({"type": "Muon", "params": {"ns_steps": 10**400}}, "ns_steps is a number of more than"),
        ({"type": "Lamb", "params": {"lr": "1" * 5000}}, r"lr is '1+\.\.\.1+'; it must be a num"),
    ],
)
def test_impossible_values(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(block["type"], **block["params"])


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("foreach", "has no 'foreach'; give backend="),
        ("fused", "has no 'fused'; give backend="),
        ("max_grad_norm", "has no 'max_grad_norm'; use the DeepSpeed config's gradient_clipping"),
        ("amsgrad", "has no 'amsgrad'; AMSGrad is not implemented"),
        ("wieght_decay", r"has no 'wieght_decay' \(did you mean weight_decay\?\); known: lr, "),
    ],
)
@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_keywords_of_other_libraries(kind: Any, keyword: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} {words}"):
        kind([("w", torch.nn.Parameter(torch.ones(2)))], **{keyword: True})


def test_numbers_of_numpy_and_tensors() -> None:
    assert check_number("lr", np.float32(0.5), 0) == 0.5
    with pytest.raises(ValueError, match=r"lr is a tensor; .* lr\.item\(\), .* set_lr"):
        Lamb([("w", torch.nn.Parameter(torch.ones(2)))], lr=torch.tensor(0.1))  # type: ignore[arg-type]


def test_a_tensor_is_named_once() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor, which would move twice"):
        Lamb([("a", weight), ("b", weight)])
