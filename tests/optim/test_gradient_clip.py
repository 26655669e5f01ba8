"""AdaGC and ZClip: against the papers' algorithms in plain numbers, and on any sharding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.optim import AdamW, Lamb
from mocov3_ds.optim.build import build_optimizer
from mocov3_ds.optim.gradient_clip import AdaGC, Clipper, ZClip, read_clip
from tests.optim import engines, plain
from tests.optim.engines import Case
from tests.optim.one_process import make_model
from tests.ranks_pool import run_ranks

STEPS = 12
ADAGC = AdaGC(lambda_rel=1.05, lambda_abs=3.0, beta=0.9, warmup_steps=4)
ZCLIP = ZClip(z=1.2, alpha=0.9, warmup_steps=4)


class PlainAdaGC:
    """arXiv 2502.11034, Algorithm 1, tensor by tensor."""

    def __init__(self) -> None:
        self.mean: dict[str, float] = {}
        self.steps = 0

    def clip(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        clipped = {}
        for name, g in gradients.items():
            norm = float(g.double().norm())
            if self.steps < ADAGC.warmup_steps:
                h = min(ADAGC.lambda_abs / whole, 1.0)
                self.mean[name] = min(self.mean.get(name, math.inf), h * norm)
            else:
                h = min(ADAGC.lambda_rel * self.mean[name] / norm, 1.0)
                self.mean[name] = ADAGC.beta * self.mean[name] + (1 - ADAGC.beta) * h * norm
            clipped[name] = h * g
        self.steps += 1
        return clipped


class PlainZClip:
    """arXiv 2504.02507, Algorithm 1 with reciprocal clipping."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def clip(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        if len(self.first) < ZCLIP.warmup_steps:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / len(self.first)
            return gradients
        deviation = math.sqrt(self.variance)
        score = (norm - self.mean) / (deviation + 1e-6)
        allowed = norm
        if score > ZCLIP.z:
            allowed = self.mean + ZCLIP.z**2 / score * deviation
        self.mean = ZCLIP.alpha * self.mean + (1 - ZCLIP.alpha) * allowed
        self.variance = ZCLIP.alpha * self.variance + (1 - ZCLIP.alpha) * (allowed - self.mean) ** 2
        return {name: g * (allowed / norm) for name, g in gradients.items()}


def spiky_gradients(net: nn.Module, seed: int = 2) -> list[dict[str, Tensor]]:
    """Tensors of their own scales; every third step has a spike, each time elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    steps = []
    for step in range(STEPS):
        gradients = {}
        for index, (name, p) in enumerate(named.items()):
            scale = 10.0 ** (index % 3 - 2) * (1 + 0.3 * math.sin(step + index))
            if step % 3 == 2 and (index + step) % 2:
                scale *= 8.0
            gradients[name] = torch.randn(p.shape, generator=generator) * scale
        steps.append(gradients)
    return steps


def run(clip: AdaGC | ZClip | None, given: list[dict[str, Tensor]]) -> tuple[Any, list[float]]:
    """AdamW after these gradients, and the smallest factor of each step."""
    net = make_model()
    named = dict(net.named_parameters())
    optimizer = AdamW(net.named_parameters(), lr=0.01)
    optimizer.clipper = None if clip is None else Clipper(clip)
    optimizer.attach()
    smallest = []
    for gradients in given:
        for name, gradient in gradients.items():
            named[name].grad = gradient.clone()
        optimizer.step()
        if optimizer.clipper is not None:
            smallest.append(optimizer.clipper.last_values()["clip_factor"])
    return optimizer, smallest


@pytest.mark.parametrize(("clip", "witness"), [(ADAGC, PlainAdaGC), (ZCLIP, PlainZClip)])
def test_is_the_papers_algorithm(clip: AdaGC | ZClip, witness: Any) -> None:
    given = spiky_gradients(make_model())
    plainly = witness()
    ours, smallest = run(clip, given)
    theirs, _ = run(None, [plainly.clip(gradients) for gradients in given])
    untouched, _ = run(None, given)
    expected = dict(theirs.full_state())
    for name, state in ours.full_state():
        for key in ("weight", *ours.moments):  # factors are rounded to fp32
            torch.testing.assert_close(state[key], expected[name][key], rtol=3e-6, atol=1e-7)
    assert (min(smallest) < 0.5 and max(smallest[4:]) == 1.0) or clip is ADAGC
    assert min(smallest) < 0.5
    assert any(
        not torch.allclose(state["weight"], expected[name]["weight"], rtol=1e-3)
        for name, state in untouched.full_state()
    )


def test_a_tensor_that_begins_with_zeros_is_not_held_for_ever() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    state_KS = torch.zeros(2, 2, dtype=torch.float64)
    clip = AdaGC(warmup_steps=2)
    for norms in ([0.0, 50.0], [0.0, 0.4], [0.0, 0.6]):
        norm_S = zeros + torch.tensor(norms)
        factor_S, state_KS = clip.clip(norm_S, norm_S.norm(), state_KS)
        assert factor_S[0] == 1
        assert state_KS[0, 1] == 2 or factor_S[1] == 1  # nothing is clipped before
    assert state_KS[:, 0].tolist() == [0, 0]
    assert float(factor_S[1]) == pytest.approx(1.05 * 0.4 / 0.6)
    factor_S, state_KS = clip.clip(zeros + 0.3, zeros.norm() + 0.42, state_KS)
    assert factor_S[0] == 1 and state_KS[1, 0] == pytest.approx(0.3)


def test_what_is_not_finite_leaves_no_trace() -> None:
    for clip in (ADAGC, ZCLIP):
        state_KS = torch.rand(clip.numbers, 2, dtype=torch.float64) + 1
        norm_S = torch.tensor([1.0, math.nan], dtype=torch.float64)
        _, after_KS = clip.clip(norm_S, norm_S.norm(), state_KS)
        assert torch.equal(after_KS, state_KS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("adagcc", r"unknown \(did you mean adagc\?\)"),
        (3, "it is one of adagc, zclip, or an object"),
        ({"type": "adagc", "lamda_rel": 2.0}, "no number 'lamda_rel' .*lambda_rel"),
        ({"type": "adagc", "beta": 1.0}, r"clip\.beta is 1\.0"),
        ({"type": "zclip", "z": "high"}, r"clip\.z is 'high'"),
        ({"type": "adagc", "lambda_rel": 0.5}, r"clip\.lambda_rel is 0\.5"),
    ],
)
def test_clips_that_cannot_be(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_clip(value)


def test_the_optimizer_block_names_the_clip() -> None:
    block = {"type": "Lamb", "params": {"lr": 1e-3}, "clip": {"type": "ZClip", "z": 3}}
    optimizer = build_optimizer(block, [("w", nn.Parameter(torch.ones(2, 2)))])
    assert optimizer.clipper is not None and optimizer.clipper.clip == ZClip(z=3.0)
    block = {"type": "Lamb", "params": {"lr": 1e-3}}
    assert build_optimizer(block, [("w", nn.Parameter(torch.ones(2, 2)))]).clipper is None


def test_state_goes_on_bit_for_bit() -> None:
    given = spiky_gradients(make_model())
    whole, _ = run(ADAGC, given)
    half, _ = run(ADAGC, given[:6])
    for way in ("full_state", "state_dict"):  # torch takes over the tensors of a state dict
        net = make_model()
        named = dict(net.named_parameters())
        resumed = AdamW(net.named_parameters(), lr=0.01)
        resumed.clipper = Clipper(ADAGC)
        resumed.attach()
        weights = dict(half.full_state())
        if way == "full_state":
            resumed.load_full_state(weights.get, half.step_count)
        else:
            for name, state in weights.items():
                named[name].data.copy_(state["weight"])
            resumed.load_state_dict(half.state_dict())
        for gradients in given[6:]:
            for name, gradient in gradients.items():
                named[name].grad = gradient.clone()
            resumed.step()
        expected = dict(whole.full_state())
        for name, state in resumed.full_state():
            assert all(torch.equal(state[key], expected[name][key]) for key in state), (way, name)
    half, _ = run(ADAGC, given[:6])
    other = AdamW(make_model().named_parameters(), lr=0.01)
    other.clipper = Clipper(ZCLIP)  # of which the saved state says nothing
    other.attach()
    other.load_full_state(dict(half.full_state()).get, half.step_count)
    assert all(not state["clip"].any() for _, state in other.full_state())


# ------------------------------------------------------------------------------- under DeepSpeed

CASES = [
    Case(0),
    Case(1, "bf16"),
    Case(2, "fp16"),
    Case(3),
    Case(3, "bf16", zero={"sub_group_size": 500}),
    Case(1, zero={"offload_optimizer": {"device": "cpu"}}),
]


SPIKES = (5, 8, 11)
"""steps, after the warm-up of both clips, whose gradient is eight times as long"""


def train_clipped(case: Case, kind: str, saved: Any = None, first: int = 0) -> dict[str, Any]:
    """Whole state after some steps with spikes, and the factors on the way."""
    engine, optimizer = engines.start_unattached(case)
    clips: dict[str, Any] = {"adagc": ADAGC, "zclip": ZCLIP}
    optimizer.clipper = Clipper(clips[kind])
    optimizer.attach(engine)
    if saved is not None:
        optimizer.load_full_state(saved.get, first)
    factors = []
    for step, micro_batches in enumerate(engines.batches(case, STEPS)):
        if step < first:
            continue
        for x, y in micro_batches:
            loss = torch.nn.functional.cross_entropy(engine(x).float(), y)
            engine.backward(loss * (8.0 if step in SPIKES else 1.0))
            engine.step()
        factors.append(optimizer.clipper.last_values()["clip_factor"])
        if saved is None and step == 5:
            half = dict(optimizer.full_state())
    state = dict(optimizer.full_state())
    engines.stop(engine)
    return {"state": state, "factors": factors, "half": half if saved is None else None}


def train_each(cases: list[Case], kind: str) -> list[dict[str, Any]]:
    return [train_clipped(case, kind) for case in cases]


def resume_on_another_stage(case: Case, kind: str, saved: Any) -> dict[str, Any]:
    return train_clipped(case, kind, saved, first=6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adagc", "zclip"])
def test_clips_alike_on_any_sharding(kind: str) -> None:
    """fp32 runs on 1 and 2 ranks and each stage are one run; sums are taken in another order."""
    fp32 = [case for case in CASES if case.precision == "fp32"]
    one, two = (run_ranks(n, train_each, CASES if n == 2 else fp32, kind) for n in (1, 2))
    first = {n: p.detach() for n, p in plain.odd_model().named_parameters() if p.requires_grad}
    want = {n: s["weight"] for n, s in one[0][0]["state"].items()}
    assert min(one[0][0]["factors"][4:]) < 0.9 and 1.0 in one[0][0]["factors"]
    for case, result in [*zip(fp32, one[0], strict=True), *zip(CASES, two[0], strict=True)]:
        if case.precision == "fp32":
            got = {n: s["weight"] for n, s in result["state"].items()}
            assert engines.movement_error(got, want, first) < 2e-5, case
            assert result["factors"] == pytest.approx(one[0][0]["factors"], rel=1e-5), case
        else:  # gradients in low precision differ; what clips them is the same numbers
            assert min(result["factors"][4:]) < 0.95, case
    for case, ours, theirs in zip(CASES, *two, strict=True):
        assert ours["factors"] == theirs["factors"], case
        for name, state in ours["state"].items():
            assert torch.equal(state["clip"], theirs["state"][name]["clip"]), (case, name)
    (resumed,) = run_ranks(1, resume_on_another_stage, Case(2), kind, two[0][3]["half"])
    got = {n: s["weight"] for n, s in resumed["state"].items()}
    assert engines.movement_error(got, want, first) < 2e-5
    assert resumed["factors"] == pytest.approx(one[0][0]["factors"][6:], rel=1e-5)


def refused_beside_deepspeeds() -> str:
    engine, optimizer = engines.start_unattached(Case(1, clip=0.5))
    optimizer.clipper = Clipper(ADAGC)
    try:
        optimizer.attach(engine)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_two_clips_are_refused() -> None:
    (said,) = run_ranks(1, refused_beside_deepspeeds)
    assert "gradient_clipping 0.5 and the optimizer block's clip adagc would both" in said


def test_lamb_takes_a_clip_as_well() -> None:
    net = make_model()
    optimizer = Lamb(net.named_parameters(), lr=0.01)
    optimizer.clipper = Clipper(ADAGC)
    optimizer.attach()
    for gradients in spiky_gradients(net)[:3]:
        for name, gradient in gradients.items():
            dict(net.named_parameters())[name].grad = gradient.clone()
        optimizer.step()
    assert optimizer.signals() is not None
    assert optimizer.grad_norm() == pytest.approx(ADAGC.lambda_abs, rel=1e-5)
