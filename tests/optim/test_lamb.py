"""Our optimizers without an engine, whole tensors, beside written-out formulas and libraries.

timm's Lamb is the second witness. It differs in four ways, each met by an option or spelled out
here: it clips the global gradient norm to 1 by default (`max_grad_norm`), adapts where a tensor
decays and not where a rule says so, knows an upper bound of the trust ratio alone, 1, and sums its
norms in fp32 without pairing, off by up to 4e-5 on large matrices.
"""

from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from mocov3_ds.optim import AdamW, Lamb, Lars, Rule
from mocov3_ds.optim.rules import vit_rule
from tests.optim import plain

STEPS = 8


def model() -> nn.Module:
    return plain.odd_model()


def gradients(of: nn.Module, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Real ones would follow the weights; these differ by step and tensor, and suffice here."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            name: torch.randn(p.shape, generator=generator) * 10.0 ** (index % 3 - 2)
            for index, (name, p) in enumerate(of.named_parameters())
            if p.requires_grad
        }
        for _ in range(steps)
    ]


def run(optimizer: torch.optim.Optimizer, of: nn.Module) -> dict[str, Tensor]:
    named = dict(of.named_parameters())
    for step in gradients(of):
        for name, gradient in step.items():
            named[name].grad = gradient.clone()
        optimizer.step()
    return {name: p.detach().clone() for name, p in named.items() if p.requires_grad}


def ours(kind: Any, **options: Any) -> dict[str, Tensor]:
    net = model()
    optimizer = kind(net.named_parameters(), **options)
    optimizer.attach()
    return run(optimizer, net)


def groups_of(net: nn.Module, weight_decay: float, always: bool = False) -> list[dict[str, Any]]:
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    matrix = [p for n, p in trained.items() if vit_rule(n, tuple(p.shape)).adapt]
    rest = [p for n, p in trained.items() if not vit_rule(n, tuple(p.shape)).adapt]
    return [
        {"params": matrix, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    first = {n: p.detach() for n, p in model().named_parameters()}
    return max(
        float((one[n] - other[n]).norm() / (other[n] - first[n]).norm().clamp_min(1e-30))
        for n in other
    )


@pytest.mark.parametrize("backend", ["blocks", "plain"])
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"betas": (0.8, 0.95), "eps": 1e-4}, {"betas": (0.8, 0.95), "eps": 1e-4}),
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"grad_averaging": False}, {"grad_averaging": False}),
        ({"always_adapt": True}, {"always_adapt": True}),
        ({"trust_clip": (0.0, 1.0)}, {"trust_clip": True}),
    ],
    ids=str,
)
def test_lamb_is_timm_lamb(options: dict[str, Any], theirs: dict[str, Any], backend: str) -> None:
    net = model()
    groups = groups_of(net, 0.1)
    witness = timm.optim.Lamb(groups, lr=2e-2, max_grad_norm=None, foreach=False, **theirs)
    want = run(witness, net)
    got = ours(Lamb, lr=2e-2, weight_decay=0.1, backend=backend, **options)
    assert error(got, want) < 2e-6
    if options:
        assert error(got, ours(Lamb, lr=2e-2, weight_decay=0.1)) > 1e-3  # the option does something


def test_both_bounds_of_the_trust_ratio() -> None:
    net = model()
    w = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    ratios = []
    for t, step in enumerate(gradients(net), start=1):
        for n, g in step.items():
            rule = vit_rule(n, tuple(g.shape))
            options = {"lr": 2e-2, "wd": 0.1 * rule.decay, "adapt": rule.adapt}
            w[n], m[n], v[n] = plain.lamb_step(
                w[n], g, m[n], v[n], t, low=0.05, high=0.4, **options
            )
    net = model()
    optimizer = Lamb(net.named_parameters(), lr=2e-2, weight_decay=0.1, trust_clip=(0.05, 0.4))
    optimizer.attach()
    assert error(run(optimizer, net), w) < 2e-6
    ratios = [row["trust_ratio"] for row in optimizer.signals().rows().values()]
    assert {0.05, 0.4} <= {round(ratio, 6) for ratio in ratios}


@pytest.mark.parametrize("backend", ["blocks", "plain"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_lars_is_timm_lars(nesterov: bool, always_adapt: bool, backend: str) -> None:
    net = model()
    options = {"lr": 1.0, "trust_coeff": 0.02, "momentum": 0.9, "nesterov": nesterov}
    options["always_adapt"] = always_adapt
    want = run(timm.optim.Lars(groups_of(net, 0.1), **options), net)
    got = ours(Lars, weight_decay=0.1, backend=backend, **options)
    assert error(got, want) < 2e-6


def test_lars_is_the_formula() -> None:
    net = model()
    w = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    for step in gradients(net):
        for n, g in step.items():
            rule = vit_rule(n, tuple(g.shape))
            w[n], m[n] = plain.lars_step(
                w[n], g, m[n], lr=4.0, wd=0.1 * rule.decay, adapt=rule.adapt
            )
    assert error(ours(Lars, lr=4.0, weight_decay=0.1), w) < 2e-6


@pytest.mark.parametrize("backend", ["blocks", "plain"])
def test_adamw_is_torch_adamw(backend: str) -> None:
    net = model()
    want = run(torch.optim.AdamW(groups_of(net, 0.1), lr=0.1, foreach=False), net)
    assert error(ours(AdamW, lr=0.1, weight_decay=0.1, backend=backend), want) < 2e-6


def test_a_rule_changes_rate_decay_and_ratio_of_one_tensor() -> None:
    def rule(name: str, shape: tuple[int, ...]) -> Rule:
        odd = name == "wide.weight"
        return Rule(decay=0.5, lr_multiplier=3.0, adapt=False) if odd else vit_rule(name, shape)

    net = model()
    usual = groups_of(net, 0.1)
    wide = net.wide.weight
    usual[0]["params"] = [p for p in usual[0]["params"] if p is not wide]
    lamb = timm.optim.Lamb(usual, lr=2e-2, max_grad_norm=None, foreach=False)
    # without a ratio LAMB's step is AdamW's with the decay inside, at LAMB's eps
    adamw = torch.optim.AdamW([wide], lr=6e-2, weight_decay=0.05, eps=1e-6)

    class Both:
        def step(self) -> None:
            lamb.step()
            adamw.step()

    want = run(Both(), net)  # type: ignore[arg-type]
    assert error(ours(Lamb, lr=2e-2, weight_decay=0.1, rule=rule), want) < 2e-6


@pytest.mark.parametrize("kind", [Lamb, AdamW, Lars])
def test_signals_are_the_norms(kind: Any) -> None:
    net = model()
    optimizer = kind(net.named_parameters(), lr=0.01, weight_decay=0.1)
    optimizer.attach()
    assert optimizer.signals() is None
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    step = gradients(net, 1)[0]
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
        net = model()
        optimizer = kind(net.named_parameters(), lr=0.01, weight_decay=0.1)
        optimizer.attach()
        return net, optimizer

    def steps(net: nn.Module, optimizer: Any, which: slice) -> None:
        for step in gradients(net)[which]:
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


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = Lamb(table.named_parameters())
    optimizer.attach()
    table(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 'weight' is sparse; .* sparse=False"):
        optimizer.step()
    assert optimizer.step_count == 0


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


def test_low_precision_weights_without_an_engine_are_refused() -> None:
    optimizer = Lamb([("a", one(dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"'a' is torch\.bfloat16; .* must be fp32"):
        optimizer.attach()


def test_there_is_one_group() -> None:
    optimizer = Lamb([("a", one())])
    with pytest.raises(ValueError, match="keeps one parameter group; give a rule"):
        optimizer.add_param_group({"params": [one()]})


def test_one_element_and_zero_tensors() -> None:
    """A ratio of zero norms is 1: a tensor that starts at zero must be able to leave it."""
    scalar, zero = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.zeros(2, 2))
    optimizer = Lamb(
        [("scalar", scalar), ("zero", zero)], lr=0.1, weight_decay=0.0, always_adapt=True
    )
    optimizer.attach()
    scalar.grad, zero.grad = torch.tensor([5.0]), torch.ones(2, 2)
    optimizer.step()
    assert scalar.item() == pytest.approx(1.8, rel=1e-5)  # w - lr |w| sign(g)
    assert torch.allclose(zero, torch.full((2, 2), -0.1), rtol=1e-5)
    rows = optimizer.signals().rows()
    assert rows["scalar"]["trust_ratio"] == pytest.approx(2.0, rel=1e-5)
    assert rows["zero"]["trust_ratio"] == 1.0


def test_a_zero_gradient_moves_by_decay_alone() -> None:
    w = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = Lamb([("w", w)], lr=0.1, weight_decay=0.5)
    optimizer.attach()
    w.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.allclose(w, torch.full((2, 2), 2.7))  # u = wd w, ratio = 1 / wd


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
    net = model()
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


def test_the_plain_writing_is_the_sign_of_the_gradient_at_first() -> None:
    """The writing of LAMB in tests/optim/plain.py, on one tensor."""
    generator = torch.Generator().manual_seed(5)
    w, g = torch.randn(6, 7, generator=generator), torch.randn(6, 7, generator=generator)
    w1, m1, _ = plain.lamb_step(w, g, 0 * w, 0 * w, 1, lr=0.1, wd=0.2, adapt=True)
    u = g / (g.abs() + 1e-6) + 0.2 * w  # at the first step both moments are the gradient's own
    assert torch.allclose(w1, w - 0.1 * w.norm() / u.norm() * u, atol=1e-6)
    assert torch.allclose(m1, 0.1 * g)
