"""The step on real gloo ranks: N ranks, any ZeRO stage, any chunk equal one plain process."""

import copy
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import (
    compute_dtype,
    engine_config,
    full_tensors,
    start_engine,
)
from mocov3_ds.model.moco import BaseEncoder, Chunks, EncoderShape
from mocov3_ds.model.momentum import MomentumEncoder
from mocov3_ds.model.vit import VitShape
from mocov3_ds.step import QueriesToLoss, train_step
from tests import reference
from tests.ranks_pool import run_ranks
from tests.traffic import Traffic, count_collectives

SHAPE = EncoderShape(
    vit=VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3), hidden=20, out=12
)
BATCH, STEPS, LR, MOMENTUM = 12, 4, 3e-3, 0.9


class Sgd(torch.optim.SGD):
    """Elementwise, so each sharding is exact: what differs is the step under test."""

    def attach(self, engine: Any) -> None:
        pass


def smooth(encoder: torch.nn.Module) -> None:
    """Softplus for ReLU: a unit at its kink may flip on rounding and hide what is tested."""
    for head in (encoder.projector, getattr(encoder, "predictor", None)):
        for name, child in list(head.named_children()) if head is not None else []:
            if isinstance(child, torch.nn.ReLU):
                setattr(head, name, torch.nn.Softplus())


def start() -> tuple[BaseEncoder, MomentumEncoder]:
    torch.manual_seed(0)
    base, momentum = BaseEncoder(SHAPE), MomentumEncoder(SHAPE)
    smooth(base)
    smooth(momentum)
    return base, momentum


def views(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 16, 16, generator=g), torch.randn(BATCH, 3, 16, 16, generator=g)


def plain_run() -> dict[str, Any]:
    """fp64, one process, reference.moco_step."""
    base, momentum = start()
    momentum.start_from(base.state_dict())
    base, momentum = base.double(), momentum.double()
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9)
    losses = []
    for step in range(STEPS):
        x1, x2 = (x.double() for x in views(step))
        loss = reference.moco_step(base, momentum, x1, x2, m=MOMENTUM, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    state = {n: p.detach() for n, p in base.named_parameters()}
    return {"losses": losses, "base": state, "momentum": dict(momentum.named_parameters())}


def engine_runs(cases: list[tuple[int, Chunks, int, bool]]) -> list[dict[str, Any]]:
    """For each (ZeRO stage, chunks, key block, recomputed blocks): the run through the engine."""
    return [engine_run(*case) for case in cases]


def engine_run(stage: int, chunks: Chunks, key_block: int, recompute: bool) -> dict[str, Any]:
    base, momentum = start()
    base.backbone.set_grad_checkpointing(recompute)
    model = QueriesToLoss(base, temperature=0.2, chunks=chunks, key_block=key_block)
    optimizer = Sgd([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9)
    config = engine_config(
        {"zero_optimization": {"stage": stage}}, global_batch=BATCH, world_size=ranks.world_size()
    )
    engine = start_engine(model, optimizer, config)
    momentum.start_from(dict(full_tensors(engine.module.base)))
    momentum.follow(engine.module.base)
    frozen = {n: t.clone() for n, t in full_tensors(engine.module.base) if "patch_embed" in n}
    rows = BATCH // ranks.world_size()
    mine = slice(ranks.rank() * rows, (ranks.rank() + 1) * rows)
    losses = []
    for step in range(STEPS):
        x1, x2 = views(step)
        result = train_step(engine, momentum, x1[mine], x2[mine], momentum=MOMENTUM)
        losses.append(result.loss)
    tensors = {n: t.clone() for n, t in full_tensors(engine.module.base)}
    out = {
        "losses": losses,
        "base": tensors,
        "momentum": copy.deepcopy(dict(momentum.full_state())),
        "frozen": all(torch.equal(tensors[n], t) for n, t in frozen.items()),
        "tracked": int(engine.module.base.projector[1].num_batches_tracked),
    }
    engine.destroy()
    return out


def movement_error(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """max over tensors of |ours - plain| / |plain - start|, after fp32's rounding of the weights.

    A norm's weight is 1 and moves by some 1e-3 here, so that half a unit in its last place, made at
    each of the steps, is 1e-4 of the movement: taken off before the comparison.
    """
    begin = {n: p.detach().double() for n, p in start()[0].named_parameters()}
    worst = 0.0
    for name, target in plain.items():
        moved = (target - begin[name]).norm()
        # norm.bias sits before a bias-free linear and a batch norm, a key bias before a softmax:
        # their true gradient is zero and what moves them is rounding noise
        if moved < 1e-9 or name == "backbone.norm.bias" or name.endswith("qkv.bias"):
            continue
        rounding = STEPS * 2**-24 * target.norm()
        difference = (ours[name].double() - target).norm() - rounding
        worst = max(worst, float(difference / moved))
    return worst


# (ZeRO stage, chunks, key block, recomputed blocks)
WHOLE, UNEVEN, SINGLE = Chunks(), Chunks(size=5), Chunks(size=1)
CASES = [(stage, *how, False) for stage in (0, 1, 2, 3) for how in ((WHOLE, 0), (UNEVEN, 7))]
CASES += [(1, SINGLE, 1, False), (3, SINGLE, 0, False)]
CASES += [(1, Chunks(size=2, kept=2), 0, True), (3, Chunks(size=2, kept=2), 0, True)]
CASES += [(2, WHOLE, 0, True)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_one_plain_process(world_size: int) -> None:
    plain = plain_run()
    for parts in run_ranks(world_size, engine_runs, CASES)[:1]:
        for case, ours in zip(CASES, parts, strict=True):
            # fp32 against fp64: measured 1e-6 to 7e-6 of the movement
            assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5), case
            assert movement_error(ours["base"], plain["base"]) < 2e-5, case
            assert movement_error(ours["momentum"], plain["momentum"]) < 2e-5, case
            assert ours["frozen"], case
            assert ours["tracked"] == 2 * STEPS, case  # heads are never run twice on a view


def start_run(
    stage: int, chunks: Chunks = WHOLE, zero: dict[str, Any] | None = None, **config: Any
) -> tuple[Any, MomentumEncoder, list[Tensor]]:
    """Engine, momentum encoder and this rank's views of step 0 in the engine's dtype."""
    base, momentum = start()
    model = QueriesToLoss(base, temperature=0.2, chunks=chunks)
    optimizer = Sgd([p for p in model.parameters() if p.requires_grad], lr=LR)
    given = {"zero_optimization": {"stage": stage, **(zero or {})}, **config}
    json_config = engine_config(given, global_batch=BATCH, world_size=ranks.world_size())
    engine = start_engine(model, optimizer, json_config)
    dtype = compute_dtype(json_config)
    if dtype != torch.float32:
        momentum = MomentumEncoder(SHAPE, dtype=dtype)
        smooth(momentum)
    momentum.start_from(dict(full_tensors(engine.module.base)))
    momentum.follow(engine.module.base)
    rows = BATCH // ranks.world_size()
    mine = slice(ranks.rank() * rows, (ranks.rank() + 1) * rows)
    return engine, momentum, [x[mine].to(dtype) for x in views(0)]


def nan_on_one_rank(stages: list[int]) -> list[str]:
    words = []
    for stage in stages:
        engine, momentum, (x1, x2) = start_run(stage)
        if ranks.rank() == 1:
            x1[0, 0, 0, 0] = float("nan")
        try:
            train_step(engine, momentum, x1, x2, momentum=MOMENTUM)
            words.append("no error")
        except FloatingPointError as error:
            finite = all(t.isfinite().all() for _, t in full_tensors(engine.module.base))
            words.append(f"{error}; weights and statistics finite: {finite}")
        engine.destroy()
    return words


def test_nan_on_one_rank_stops_both_before_the_weights_move() -> None:
    for words in run_ranks(2, nan_on_one_rank, [0, 1, 2, 3]):
        assert words == ["the loss is nan; weights and statistics finite: True"] * 4


def traffic_of_a_step(cases: list[dict[str, Any]]) -> list[dict[str, Traffic]]:
    """Collectives of one step per case: with the momentum encoder, and with it held still."""
    take = count_collectives()
    found = []
    for zero in cases:
        of_case = {}
        for moves in (True, False):
            engine, momentum, (x1, x2) = start_run(zero["stage"], Chunks(size=2), zero)
            if not moves:
                momentum.begin = lambda momentum: None  # type: ignore[method-assign]
                momentum.finish = lambda: None  # type: ignore[method-assign]
            train_step(engine, momentum, x1, x2, momentum=MOMENTUM)  # persistence settles
            take()
            train_step(engine, momentum, x1, x2, momentum=MOMENTUM)
            of_case["moves" if moves else "still"] = take()
            engine.destroy()
        found.append(of_case)
    return found


def test_one_reduction_a_step_and_no_gather_for_the_momentum_encoder() -> None:
    trained = sum(p.numel() for p in start()[0].parameters() if p.requires_grad)
    cases: list[dict[str, Any]] = [{"stage": stage} for stage in (0, 1, 2, 3)]
    cases.append({"stage": 3, "stage3_param_persistence_threshold": 0})
    for case, found in zip(cases, run_ranks(2, traffic_of_a_step, cases)[0], strict=True):
        assert found["moves"] == found["still"], case
        moved = found["moves"]
        reductions = ("all_reduce", "reduce_scatter_tensor", "reduce_scatter", "reduce")
        reduced = sum(moved[name][1] for name in reductions if name in moved)
        # six chunks of two views, and each gradient crosses the wire once; the rest is the loss,
        # batch norm's backward sums and padding
        assert trained <= reduced < 1.15 * trained, (case, moved)
    # without persistence ZeRO-3 gathers for each chunk, with it once a step: the test has power
    assert moved["all_gather_into_tensor"][1] > 2 * trained


def weights(engine: Any) -> dict[str, Tensor]:
    buffers = {name for name, _ in engine.module.base.named_buffers()}
    return {n: t.clone() for n, t in full_tensors(engine.module.base) if n not in buffers}


def overflow(stages: list[int]) -> list[dict[str, Any]]:
    """fp16: a step that overflows, then steps until one is applied."""
    get_accelerator().is_fp16_supported = lambda: True
    found = []
    for stage in stages:
        scaling = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
        engine, momentum, (x1, x2) = start_run(stage, fp16=scaling)
        before = weights(engine)
        first = train_step(engine, momentum, x1, x2, momentum=MOMENTUM)
        after = weights(engine)
        later = [train_step(engine, momentum, x1, x2, momentum=MOMENTUM) for _ in range(25)]
        keys = torch.cat([t.flatten().float() for _, t in momentum.full_state()])
        found.append(
            {
                "first": first.applied,
                "unmoved": all(torch.equal(after[n], before[n]) for n in before),
                "recovered": later[-1].applied,
                "finite": bool(keys.isfinite().all()),
                "keys": keys,
            }
        )
        engine.destroy()
    return found


def test_an_fp16_overflow_leaves_the_weights_and_the_ranks_agree() -> None:
    stages = [1, 2, 3]
    for stage, first, second in zip(stages, *run_ranks(2, overflow, stages), strict=True):
        assert not first["first"], stage
        assert first["unmoved"], stage
        assert first["recovered"], stage
        assert first["finite"], stage
        assert torch.equal(first["keys"], second["keys"]), stage


def fifty_steps(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The momentum encoder after 50 steps, and by the formula from the weights before each step."""
    engine, momentum, (x1, x2) = start_run(stage)
    average = {n: t.double() for n, t in momentum.full_state()}
    for _ in range(50):
        base = dict(full_tensors(engine.module.base))
        train_step(engine, momentum, x1, x2, momentum=MOMENTUM)
        for name in average:
            average[name] = MOMENTUM * average[name] + (1 - MOMENTUM) * base[name].double()
    return copy.deepcopy(dict(momentum.full_state())), average


@pytest.mark.parametrize("stage", [1, 3])
def test_momentum_after_fifty_steps(stage: int) -> None:
    (ours, average), (theirs, _) = run_ranks(2, fifty_steps, stage)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        if not any(buffer in name for buffer in ("running", "tracked")):  # not averaged
            # fp32 against fp64 over 50 averages
            torch.testing.assert_close(tensor.double(), average[name], rtol=2e-6, atol=2e-7)
