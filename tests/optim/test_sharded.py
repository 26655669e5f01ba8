"""What all optimizers share, without an engine: signals, state, and what is refused."""

import copy
import io
import pickle
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from mocov3_ds.optim import AdamW, Lamb, Lars
from tests.optim.one_process import decay_groups, make_gradients, make_model, movement_error


@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_signals_are_the_norms(kind: Any) -> None:
    net = make_model()
    optimizer = kind(net.named_parameters(), lr=0.01, weight_decay=0.1)
    optimizer.attach()
    assert optimizer.signals() is None
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    step = make_gradients(net, 1)[0]
    for name, parameter in net.named_parameters():
        parameter.grad = step.get(name)
    wanted_gradients = {n: g.clone() for n, g in step.items()}
    optimizer.step()
    rows = optimizer.signals().rows()
    assert list(rows) == list(wanted_gradients)
    for name, row in rows.items():
        g, w = wanted_gradients[name], before[name]
        moved = (dict(net.named_parameters())[name].detach() - w).norm()
        assert row["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-5)
        assert row["weight_norm"] == pytest.approx(float(w.norm()), rel=1e-5)
        assert row["rate"] == pytest.approx(0.01)
        # what all of them are for: the size of this step
        size = row["rate"] * row["trust_ratio"] * row["update_norm"]
        assert size == pytest.approx(float(moved), rel=2e-3)
    total = torch.stack([g.norm() for g in wanted_gradients.values()]).norm()
    assert optimizer.grad_norm() == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_state_dict_goes_on_bit_for_bit(kind: Any) -> None:
    def start() -> tuple[nn.Module, Any]:
        net = make_model()
        optimizer = kind(net.named_parameters(), lr=0.01, weight_decay=0.1)
        optimizer.attach()
        return net, optimizer

    def steps(net: nn.Module, optimizer: Any, which: slice) -> None:
        for step in make_gradients(net)[which]:
            for name, parameter in net.named_parameters():
                parameter.grad = step[name].clone() if name in step else None
            optimizer.step()

    net, optimizer = start()
    steps(net, optimizer, slice(0, 8))
    other, resumed = start()
    steps(other, resumed, slice(0, 5))
    weights, state = other.state_dict(), resumed.state_dict()
    third, last = start()
    third.load_state_dict(weights)
    last.load_state_dict(state)
    steps(third, last, slice(5, 8))
    assert last.step_count == 8
    for name, parameter in third.named_parameters():
        assert torch.equal(parameter, dict(net.named_parameters())[name]), name


def one(name: str = "w", **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, **options))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: [one()], "needs names beside its tensors"),
        (lambda: [{"params": [one()]}], "needs names beside its tensors"),
        (lambda: [("a", one()), ("a", one())], "two tensors are called 'a'"),
        (lambda: [("a", one(dtype=torch.complex64))], "'a' is complex; train its real view"),
        (list, "no tensor that requires a gradient"),
        (lambda: [("a", one().requires_grad_(False))], "no tensor that requires a gradient"),
        (lambda: [("a", nn.Parameter(torch.empty(0, 3)))], "no tensor that requires a gradient"),
    ],
)
@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_tensors_that_cannot_be_trained(kind: Any, given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(given())


def test_a_step_before_attach_is_refused_once_there_is_something_to_do() -> None:
    layer = nn.Linear(2, 2)
    optimizer = Lamb(layer.named_parameters())
    optimizer.step()  # no gradient: DeepSpeed does this while it is being built
    layer.weight.grad = torch.zeros(2, 2)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    layer.weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"call optimizer\.attach\(engine\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"call optimizer\.attach\(engine\)"):
        next(optimizer.full_state())


def test_there_is_one_group() -> None:
    optimizer = Lamb([("a", one())])
    with pytest.raises(ValueError, match="keeps one parameter group; give a rule"):
        optimizer.add_param_group({"params": [one()]})


def test_a_closure_is_run_with_gradients() -> None:
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("w", w)], lr=0.1)
    optimizer.attach()

    def closure() -> float:
        loss = w.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert optimizer.step_count == 1


def test_loading_names_what_does_not_fit_and_changes_nothing() -> None:
    net = make_model()
    optimizer = Lamb(net.named_parameters())
    optimizer.attach()
    state = {n: {k: t + 1 for k, t in s.items()} for n, s in optimizer.full_state()}
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    state["out.weight"]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"saved exp_avg of 'out.weight' has shape \(2, 2\)"):
        optimizer.load_full_state(state.__getitem__, 3)
    del state["out.weight"]["exp_avg"]
    with pytest.raises(ValueError, match=r"'out.weight' has no 'exp_avg'; .* another optimizer"):
        optimizer.load_full_state(state.__getitem__, 3)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert optimizer.step_count == 0


# What people do with an optimizer of PyTorch.


def patterned(net: nn.Module, optimizer: Any, which: slice = slice(None)) -> dict[str, Tensor]:
    """Steps in which some tensors have no gradient, and one is frozen half-way."""
    for number, step in list(enumerate(make_gradients(net)))[which]:
        for name, parameter in net.named_parameters():
            missing = {"wide.weight": number % 2, "norm.weight": 1, "narrow.weight": number >= 4}
            there = name in step and not missing.get(name, 0)
            parameter.grad = step[name].clone() if there else None
        optimizer.step()
    return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_no_gradient_is_not_gradient_zero(kind: Any) -> None:
    """As timm and torch have it; the tensors in question neither move nor decay."""
    options: dict[str, Any] = {"lr": 0.3 if kind is Lars else 0.03, "weight_decay": 0.1}
    net, other = make_model(), make_model()
    optimizer = kind(net.named_parameters(), backend="plain", **options)
    optimizer.attach()
    groups = decay_groups(other, 0.1)
    library: Any = {
        Lamb: lambda: timm.optim.Lamb(groups, lr=0.03, max_grad_norm=None, foreach=False),
        AdamW: lambda: torch.optim.AdamW(groups, lr=0.03),
        Lars: lambda: timm.optim.Lars(groups, lr=0.3, momentum=0.9),
    }[kind]()
    ours, theirs = patterned(net, optimizer), patterned(other, library)
    first = dict(make_model().named_parameters())
    assert torch.equal(ours["norm.weight"], first["norm.weight"])
    for name in ours.keys() - {"norm.weight"}:
        assert movement_error({name: ours[name]}, {name: theirs[name]}) < 1e-5, name
    row = optimizer.signals().rows()["norm.weight"]
    assert row["update_norm"] == row["grad_norm"] == 0 and row["trust_ratio"] == 1
    assert row["weight_norm"] == pytest.approx(float(first["norm.weight"].detach().norm()))


@pytest.mark.parametrize("backend", ["blocks", "plain"])
@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_copies_and_pickles_go_on_by_themselves(kind: Any, backend: str) -> None:
    net = make_model()
    optimizer = kind(net.named_parameters(), lr=0.02, backend=backend)
    optimizer.attach()
    patterned(net, optimizer, slice(0, 3))
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    file = io.BytesIO()
    torch.save((net, optimizer), file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    full = dict(optimizer.full_state())
    fresh = make_model()
    fresh.load_state_dict(net.state_dict())
    again = kind(fresh.named_parameters(), lr=0.02, backend=backend)
    again.attach()
    again.load_full_state(full.__getitem__, optimizer.step_count)
    want = patterned(net, optimizer, slice(3, 8))
    for other, its_optimizer in [*copies, (fresh, again)]:
        got = patterned(other, its_optimizer, slice(3, 8))
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert its_optimizer.step_count == 8


def test_an_optimizer_of_an_engine_is_not_copied() -> None:
    optimizer: Any = Lamb([("a", one())])
    assert copy.deepcopy(optimizer).step_count == 0
    optimizer._engine = object()
    with pytest.raises(ValueError, match=r"attached to a DeepSpeed engine cannot be copied"):
        copy.deepcopy(optimizer)


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    net, other = make_model(), make_model()
    optimizer, compiled = Lamb(net.named_parameters()), Lamb(other.named_parameters())
    optimizer.attach()
    compiled.attach()
    want = patterned(net, optimizer)
    compiled.step = torch.compile(compiled.step)  # type: ignore[method-assign]
    got = patterned(other, compiled)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_layouts_and_rates_of_all_kinds() -> None:
    scalar, table = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(0, 3))
    optimizer = Lamb([("scalar", scalar), ("table", table)], lr=0.1)
    optimizer.attach()
    scalar.square().backward()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)  # as schedulers of compiled code do
    optimizer.step()
    assert float(scalar.detach()) == pytest.approx(1.5, abs=1e-5)
    optimizer.zero_grad()
    assert scalar.grad is None
    picture = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"'weight' is not contiguous .*contiguous_format"):
        Lamb(picture.named_parameters()).attach()
