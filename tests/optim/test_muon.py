"""Muon without an engine, whole tensors, beside torch's Muon, DeepSpeed's and the formula.

Errors are relative to how far each tensor moved. With products in bf16 the iteration is torch's bit
for bit (test_orthogonal.py); a momentum that differs in its last fp32 bit may be rounded to the
other side. That this is all that differs shows where torch's own Muon is made to keep fp32: its
weights are ours within 1e-5 then. In fp32 the iteration raises rounding in directions that a matrix
hardly has by 3.4445^5 = 485.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.optim import Muon, Rule
from mocov3_ds.optim.build import build_optimizer
from mocov3_ds.optim.rules import RuleFor, vit_rule
from tests.optim import plain
from tests.optim.one_process import (
    decay_groups,
    make_gradients,
    make_model,
    movement_error,
    run_steps,
    train_ours,
)
from tests.reference import adamw_step

RATE, DECAY = 0.1, 0.1


class Attention(nn.Module):
    """What is called as in a ViT: 4 heads of 3 features; a kernel first, a layer last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 5, 3)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.last = nn.Linear(12, 4)


def attention_rule(name: str, shape: tuple[int, ...]) -> Rule:
    heads = 4 if name == "qkv.weight" else 0
    return Rule(decay=len(shape) > 1, adapt=len(shape) > 1, heads=heads)


class Both:
    """Two of torch's optimizers in one step."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def torch_muon(net: nn.Module, hidden: list[str], **options: Any) -> Any:
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    matrices = [named[n] for n in hidden]
    rest = nn.Module()
    for name, tensor in named.items():
        if name not in hidden:
            rest.register_parameter(name.replace(".", "_"), tensor)
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, **options)
    return Both(muon, torch.optim.AdamW(decay_groups(rest, DECAY), lr=RATE))


@contextmanager
def fp32_products() -> Iterator[None]:
    """Torch's Muon without its rounding to bf16; all else of it is its own."""
    with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
        yield


@pytest.mark.parametrize("backend", ["blocks", "plain"])
@pytest.mark.parametrize(
    ("last_layer", "nesterov", "adjust", "ns_steps"),
    [
        ("adamw", True, "match_rms_adamw", 5),
        ("muon", True, "original", 5),
        ("adamw", False, "match_rms_adamw", 3),
    ],
)
def test_muon_is_torch_muon(
    last_layer: str, nesterov: bool, adjust: str, ns_steps: int, backend: str
) -> None:
    net = make_model()
    hidden = ["wide.weight", "narrow.weight"] + ["out.weight"] * (last_layer == "muon")
    options: dict[str, Any] = {"nesterov": nesterov, "ns_steps": ns_steps}
    want = run_steps(torch_muon(net, hidden, adjust_lr_fn=adjust, **options), net)
    net = make_model()
    with fp32_products():
        want_fp32 = run_steps(torch_muon(net, hidden, adjust_lr_fn=adjust, **options), net)
    options |= {"adjust": adjust, "last_layer": last_layer, "backend": backend}
    got = train_ours(Muon, lr=RATE, weight_decay=DECAY, ns_dtype="bf16", **options)
    assert movement_error(got, want) < 5e-4
    fp32 = train_ours(Muon, lr=RATE, weight_decay=DECAY, ns_dtype="fp32", **options)
    assert movement_error(fp32, want_fp32) < 1e-5
    assert 1e-3 < movement_error(want_fp32, want) < 0.03  # what bf16 is for torch itself


def plain_run(
    net: nn.Module, cut: dict[str, int], rule: RuleFor = vit_rule, adamw_rate: float = 1.0
) -> dict[str, Tensor]:
    """The formula on whole tensors; name of each matrix -> blocks that are taken by themselves."""
    w = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    for t, step in enumerate(make_gradients(net), start=1):
        for n, g in step.items():
            wd = DECAY * rule(n, tuple(g.shape)).decay
            if n not in cut:
                lr = RATE * adamw_rate
                w[n], m[n], v[n] = adamw_step(w[n], g, m[n], v[n], t, lr=lr, wd=wd)
                continue
            parts = []
            for rows in range(cut[n]):
                own = [x.flatten(1).chunk(cut[n])[rows] for x in (w[n], g, m[n])]
                parts.append(plain.muon_step(*own, lr=RATE, wd=wd))
            w[n], m[n] = (torch.cat(x).view(g.shape) for x in zip(*parts, strict=True))
    return w


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({}, {"qkv.weight": 1, "proj.weight": 1}),
        ({"qkv": "thirds", "adamw_rate": 0.5}, {"qkv.weight": 3, "proj.weight": 1}),
        ({"qkv": "heads"}, {"qkv.weight": 12, "proj.weight": 1}),
        (
            {"convolutions": "muon", "last_layer": "muon"},
            {"embed.weight": 1, "qkv.weight": 1, "proj.weight": 1, "last.weight": 1},
        ),
    ],
)
def test_muon_is_the_formula(options: dict[str, Any], cut: dict[str, int]) -> None:
    torch.manual_seed(0)
    net = Attention()
    first = {n: p.detach().clone() for n, p in net.named_parameters()}
    want = plain_run(net, cut, attention_rule, options.get("adamw_rate", 1.0))
    optimizer = Muon(net.named_parameters(), lr=RATE, rule=attention_rule, **options)
    optimizer.attach()
    got = run_steps(optimizer, net)
    errors = {n: float((got[n] - want[n]).norm() / (want[n] - first[n]).norm()) for n in want}
    assert max(errors.values()) < 5e-5, errors


def test_signals() -> None:
    net = Attention()
    optimizer = Muon(net.named_parameters(), lr=RATE, weight_decay=0.0, rule=attention_rule)
    optimizer.attach()
    optimizer.measure_all(True)
    run_steps(optimizer, net)
    signals = optimizer.signals()
    assert signals is not None
    rows = signals.rows()
    last = make_gradients(net)[-1]
    for name, row in rows.items():
        assert row["trust_ratio"] == 1.0 and row["adapts"] == 0.0
        assert row["rate"] == pytest.approx(RATE)
        assert row["grad_norm"] == pytest.approx(float(last[name].norm()), rel=1e-5)
        assert row["grad_peak"] == pytest.approx(float(last[name].abs().max()))
        hidden = name in ("qkv.weight", "proj.weight")
        assert (row["rms"] != row["rms"]) == hidden  # a matrix has no second moment
        assert abs(row["cosine"]) <= 1
    count = 12**2
    rms = rows["proj.weight"]["update_norm"] / count**0.5
    assert rms == pytest.approx(0.2, rel=0.25)


def test_copies_go_on_alike() -> None:
    net = Attention()
    optimizer = Muon(net.named_parameters(), lr=RATE, qkv="heads", rule=attention_rule)
    optimizer.attach()
    run_steps(optimizer, net)
    other = copy.deepcopy(optimizer)
    for each in (optimizer, other):
        for tensor in each.param_groups[0]["params"]:
            tensor.grad = torch.ones_like(tensor)
        each.step()
    pairs = zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_matrix_without_a_gradient_stays() -> None:
    net = Attention()
    optimizer = Muon(net.named_parameters(), lr=RATE, rule=attention_rule)
    optimizer.attach()
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.grad = None if name == "proj.weight" else torch.ones_like(parameter)
    optimizer.step()
    stay = [name for name, tensor in net.named_parameters() if torch.equal(tensor, before[name])]
    assert stay == ["proj.weight"]
    assert not optimizer.state[net.proj.weight]["exp_avg"].any()


def test_a_matrix_has_no_second_moment() -> None:
    net = Attention()
    optimizer = Muon(net.named_parameters(), lr=RATE, rule=attention_rule)
    optimizer.attach()
    run_steps(optimizer, net)
    full = dict(optimizer.full_state())
    for name, parameter in net.named_parameters():
        moments = {"exp_avg", *["exp_avg_sq"] * (name not in ("qkv.weight", "proj.weight"))}
        assert {*full[name]} - {"weight"} == {*optimizer.state[parameter]} - {"step"} == moments
    assert [name for name, state in optimizer.full_state("exp_avg_sq") if not state] == [
        "qkv.weight",
        "proj.weight",
    ]


def test_state_of_other_matrices_is_refused() -> None:
    """AdamW cannot go on with a matrix that Muon has moved, and is told so; Muon can with any."""
    nets = [Attention(), Attention()]
    muon, adamw = (
        Muon(net.named_parameters(), lr=RATE, rule=attention_rule, last_layer=last_layer)
        for net, last_layer in zip(nets, ("muon", "adamw"), strict=True)
    )
    for optimizer, net in ((muon, nets[0]), (adamw, nets[1])):
        optimizer.attach()
        run_steps(optimizer, net)
    with pytest.raises(ValueError, match=r"saved state of 'last\.weight' has no 'exp_avg_sq'"):
        adamw.load_full_state(dict(muon.full_state()).__getitem__, 3)
    with pytest.raises(ValueError, match="last_layer 'muon' and not 'adamw'"):
        adamw.load_state_dict(muon.state_dict())
    muon.load_full_state(dict(adamw.full_state()).__getitem__, 3)


def test_a_frozen_projection_is_nobodys() -> None:
    """Frozen, it is neither moved nor counted as a kernel; trained, AdamW or Muon moves it."""
    moved = {}
    for convolutions, is_frozen in (("adamw", True), ("adamw", False), ("muon", False)):
        torch.manual_seed(0)
        net = Attention()
        net.embed.weight.requires_grad_(not is_frozen)
        before = net.embed.weight.detach().clone()
        options: dict[str, Any] = {"rule": attention_rule, "convolutions": convolutions}
        optimizer = Muon(net.named_parameters(), lr=RATE, weight_decay=0.0, **options)
        optimizer.attach()
        assert ("embed.weight" in optimizer.matrix_works()) == (convolutions == "muon")
        run_steps(optimizer, net)
        moved[convolutions, is_frozen] = net.embed.weight.detach() - before
    assert not moved["adamw", True].any()
    assert moved["adamw", False].any() and moved["muon", False].any()
    assert not torch.allclose(moved["adamw", False], moved["muon", False], rtol=0.1)
    net.embed.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trained kernel has more than two dimensions"):
        Muon(net.named_parameters(), rule=attention_rule, convolutions="muon")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ns_steps": 0}, "ns_steps is 0; it must be at least 1"),
        ({"ns_steps": 2.5}, "ns_steps is 2.5; it must be a whole number"),
        ({"momentum": 1.0}, "momentum is 1.0; .* below 1"),
        ({"adjust": "rms"}, "adjust is 'rms'; it must be one of match_rms_adamw, original"),
        ({"ns_dtype": "fp16"}, "ns_dtype is 'fp16'; it must be one of auto, bf16, fp32"),
        ({"adamw_rate": 0}, "adamw_rate is 0; it must be above 0"),
        ({"qkv": "halves"}, "qkv is 'halves'; it must be one of whole, thirds, heads"),
        ({"qkv": "heads"}, "'qkv.weight': 36 rows and an unknown number of heads"),
        ({"adam_lr": 1e-3}, "'adam_lr' has no effect here; give adamw_rate, a multiple of lr"),
        ({"adjust_lr_fn": "original"}, "it is called adjust here"),
        ({"moementum": 0.9}, r"no parameter 'moementum' \(did you mean momentum\?\)"),
        ({"trust_clip": [0, 1]}, "no parameter 'trust_clip'"),
    ],
)
def test_refused(params: dict[str, Any], message: str) -> None:
    named = Attention().named_parameters()
    with pytest.raises(ValueError, match=message):
        build_optimizer({"type": "Muon", "params": {"lr": 0.1, **params}}, named)


def test_refused_for_lack_of_tensors() -> None:
    one = [("norm.weight", nn.Parameter(torch.ones(3))), ("w", nn.Parameter(torch.ones(2, 3)))]
    with pytest.raises(ValueError, match="of 2 trained tensors none is a hidden matrix"):
        Muon(one)
    Muon(one, last_layer="muon")
    two = [("a", nn.Parameter(torch.ones(2, 3))), *one]
    with pytest.raises(ValueError, match="convolutions 'muon' has no effect"):
        Muon(two, convolutions="muon")
    with pytest.raises(ValueError, match=r"qkv 'thirds' has no effect: no matrix is called \*qkv"):
        Muon(two, qkv="thirds")
    odd = [("qkv.weight", nn.Parameter(torch.ones(4, 3))), *one]
    with pytest.raises(ValueError, match="4 rows"):
        Muon(odd, qkv="thirds")


@pytest.mark.parametrize("ns_method", ["gram", "standard"])
def test_beside_the_muon_of_deepspeed(ns_method: str) -> None:
    """Its direction of a whole matrix is ours with adjust "original".

    That holds for its standard iteration and for its default, which goes over Gram matrices: in
    fp32 to rounding, in bf16 to bf16's, as it rounds in another order (3 to 5 % here). What differs
    in a run: its momentum has the gradient's dtype (fp32 here), and it clips the finished
    directions, not the gradient.
    """
    from deepspeed.runtime.zero.muon import original_muon

    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0, "adjust": "original"}
    for ns_dtype, dtype, within in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 0.1)):
        generator = torch.Generator().manual_seed(3)
        theirs, ours = torch.zeros(24, 10), nn.Parameter(torch.zeros(24, 10))
        last = nn.Parameter(torch.zeros(2, 2))
        optimizer = Muon([("w", ours), ("last", last)], ns_dtype=ns_dtype, **options)
        optimizer.attach()
        for _ in range(4):
            g = torch.randn(24, 10, generator=generator)
            before = ours.detach().clone()
            ours.grad, last.grad = g.clone(), torch.zeros(2, 2)
            optimizer.step()
            direction = before - ours.detach()
            with (
                mock.patch.object(original_muon, "ns_compute_dtype", lambda _=None: dtype),  # noqa: B023
                torch.compiler.set_stance("force_eager"),
            ):
                other = original_muon.muon_update(g.clone(), theirs, ns_method=ns_method)
            assert float((other - direction).norm() / direction.norm()) < within, ns_dtype
        assert torch.allclose(optimizer.state[ours]["exp_avg"], theirs, atol=1e-6)
