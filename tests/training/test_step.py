"""The step on real gloo ranks: N ranks, any ZeRO stage, any chunk equal one plain process."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_tensors, start_engine
from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.cpu_ops import SMALLEST_WEIGHT, suit_cpu
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.stochastic_depth import draw_factors, find_branches
from mocov3_ds.model.vit import VitShape
from mocov3_ds.training.step import Draws, QueriesToLoss, train_step
from tests import reference
from tests.ranks_pool import run_ranks
from tests.traffic import Traffic, count_collectives

SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3), hidden=20, out=12
)
BATCH, STEPS, LR, MOMENTUM = 12, 5, 3e-3, 0.9
WHOLE, UNEVEN, SINGLE = Chunks(), Chunks(size=5), Chunks(size=1)


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


def engine_runs(
    cases: list[tuple[Any, ...]], smallest: int = SMALLEST_WEIGHT
) -> list[dict[str, Any]]:
    """For each (ZeRO stage, chunks, key block, recomputed blocks): the run through the engine.

    `smallest` = 1 makes layers of this size take the way that large ones take on a CPU.
    """
    return [engine_run(*case, smallest=smallest) for case in cases]


def engine_run(
    stage: int,
    chunks: Chunks,
    key_block: int,
    recompute: bool,
    bf16: bool = False,
    smallest: int = SMALLEST_WEIGHT,
) -> dict[str, Any]:
    engine, momentum, _ = start_run(
        stage, chunks, key_block, recompute, smallest, sgd_momentum=0.9, bf16={"enabled": bf16}
    )
    frozen = {n: t.clone() for n, t in full_tensors(engine.module.base) if "patch_embed" in n}
    losses = []
    for step in range(STEPS):
        x1, x2 = rank_views(step, compute_dtype(engine.config))
        losses.append(train_step(engine, momentum, x1, x2, momentum=MOMENTUM).loss)
    tensors = {n: t.clone() for n, t in full_tensors(engine.module.base)}
    out = {
        "losses": losses,
        "base": tensors,
        "momentum": copy.deepcopy(dict(momentum.full_state())),
        "masters": {
            n: (p if not bf16 else safe_get_full_fp32_param(p)).detach().clone()
            for n, p in engine.module.base.named_parameters()
            if p.requires_grad and (bf16 or stage < 3)
        },
        "frozen": all(torch.equal(tensors[n], t) for n, t in frozen.items()),
        "tracked": int(engine.module.base.projector[1].num_batches_tracked),
    }
    engine.destroy()
    return out


def start_run(
    stage: int,
    chunks: Chunks = WHOLE,
    key_block: int = 0,
    recompute: bool = False,
    smallest: int = SMALLEST_WEIGHT,
    *,
    zero: dict[str, Any] | None = None,
    sgd_momentum: float = 0.0,
    **config: Any,
) -> tuple[Any, MomentumEncoder, list[Tensor]]:
    """Engine, momentum encoder and this rank's views of step 0 in the engine's dtype."""
    base, momentum = start()
    suit_cpu(base, smallest)
    suit_cpu(momentum, smallest)
    base.backbone.set_grad_checkpointing(recompute)
    model = QueriesToLoss(base, ContrastiveLoss(0.2, key_block), chunks=chunks)
    trained = [p for p in model.parameters() if p.requires_grad]
    given = {"zero_optimization": {"stage": stage, **(zero or {})}, **config}
    json_config = engine_config(given, global_batch=BATCH, world_size=ranks.world_size())
    engine = start_engine(model, Sgd(trained, lr=LR, momentum=sgd_momentum), json_config)
    dtype = compute_dtype(json_config)
    if dtype != torch.float32:
        momentum = MomentumEncoder(SHAPE, dtype=dtype)
        smooth(momentum)
    momentum.start_from(dict(full_tensors(engine.module.base)))
    momentum.follow(engine.module.base)
    return engine, momentum, rank_views(0, dtype)


def rank_views(step: int, dtype: torch.dtype) -> list[Tensor]:
    """This rank's views of a step in the engine's dtype."""
    rows = BATCH // ranks.world_size()
    return [x[ranks.rank() * rows :][:rows].to(dtype) for x in views(step)]


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
CASES = [(stage, *how, False) for stage in (0, 1, 2, 3) for how in ((WHOLE, 0), (UNEVEN, 7))]
CASES += [(1, SINGLE, 1, False), (3, SINGLE, 0, False)]
CASES += [(1, Chunks(size=2, keep=2), 0, True), (3, Chunks(size=2, keep=2), 0, True)]
CASES += [(2, WHOLE, 0, True), (1, Chunks(size=99), 0, False)]  # larger than the batch: one pass


@pytest.mark.parametrize(
    ("world_size", "smallest"),
    [(1, 2**14), (2, 1), pytest.param(4, 2**14, marks=pytest.mark.slow)],
)
def test_equals_one_plain_process(world_size: int, smallest: int) -> None:
    plain = plain_run()
    cases = CASES if world_size < 4 else CASES[:10]
    for parts in run_ranks(world_size, engine_runs, cases, smallest)[:1]:
        for case, ours in zip(cases, parts, strict=True):
            # fp32 against fp64, the worst tensor: measured 2e-6 to 9.2e-6 of its movement
            assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5), case
            for group, wanted in (("base", plain["base"]), ("momentum", plain["momentum"])):
                assert movement_error(ours[group], wanted) < 2e-5, case
                assert whole_error(ours[group], wanted) <= 1e-5, case
            assert ours["frozen"], case
            assert ours["tracked"] == 2 * STEPS, case  # heads are never run twice on a view


DEEP = replace(SHAPE, drop_path=0.5)
DEEP_CASES = [(1, WHOLE, False), (1, UNEVEN, True), (0, WHOLE, True), (3, SINGLE, False)]


def deep_losses(cases: list[tuple[int, Chunks, bool]]) -> list[list[float]]:
    """Losses of three steps with stochastic depth for (ZeRO stage, chunks, recomputed blocks)."""
    runs = []
    for stage, chunks, recompute in cases:
        torch.manual_seed(0)
        base, momentum = BaseEncoder(DEEP), MomentumEncoder(DEEP)
        base.backbone.set_grad_checkpointing(recompute)
        model = QueriesToLoss(base, ContrastiveLoss(0.2), chunks=chunks)
        trained = [p for p in model.parameters() if p.requires_grad]
        given = {"zero_optimization": {"stage": stage}}
        settings = engine_config(given, global_batch=BATCH, world_size=ranks.world_size())
        engine = start_engine(model, Sgd(trained, lr=0.1), settings)
        momentum.start_from(dict(full_tensors(engine.module.base)))
        momentum.follow(engine.module.base)
        rates = [branch.rate for branch in find_branches(base.backbone)]
        rows = BATCH // ranks.world_size()
        sample_ids = np.arange(BATCH)[ranks.rank() * rows :][:rows]
        losses = []
        for step in range(3):
            factors = draw_factors(rates, sample_ids, seed=0, step=step)
            x1, x2 = rank_views(step, torch.float32)
            draws = Draws(factors_VBM=factors)
            result = train_step(engine, momentum, x1, x2, momentum=MOMENTUM, draws=draws)
            losses.append(result.loss)
        runs.append(losses)
        engine.destroy()
    return runs


def test_stochastic_depth_draws_the_same_on_any_cut() -> None:
    """One rank or two, any chunks, recomputed blocks, any ZeRO stage."""
    [[expected, *others]], [two, _] = (run_ranks(size, deep_losses, DEEP_CASES) for size in (1, 2))
    for losses in (*others, *two):
        assert losses == pytest.approx(expected, rel=2e-5)


BF16_CASES = [(stage, how, 0, False, True) for stage in (1, 3) for how in (WHOLE, UNEVEN)]


def test_bf16_stays_near_one_plain_process() -> None:
    plain = plain_run()
    for case, ours in zip(BF16_CASES, run_ranks(2, engine_runs, BF16_CASES)[0], strict=True):
        # bf16 keeps eight bits of each activation and gradient: measured 4 to 5 % of the way that
        # the fp32 masters went, whole or by chunks, and 10 % of the shorter way of their average;
        # at most 2.4 % of a loss, whose batch norms see twelve rows
        assert ours["losses"] == pytest.approx(plain["losses"], rel=0.035), case
        assert whole_error(ours["masters"], plain["base"]) < 0.06, case
        assert whole_error(ours["momentum"], plain["momentum"]) < 0.15, case


def whole_error(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """|ours - plain| / |plain - start| over all tensors of `ours` together."""
    begin = start()[0].state_dict()
    off = sum((ours[n].double() - plain[n]).square().sum() for n in ours if n in plain)
    way = sum((plain[n] - begin[n].double()).square().sum() for n in ours if n in plain)
    return float((off / way) ** 0.5)


def autocast_losses(stages: list[int]) -> list[tuple[float, float, set[torch.dtype]]]:
    """Under DeepSpeed's torch_autocast: loss at once and by blocks of keys, and logits' dtypes."""
    seen = set()
    at_once, by_blocks = torch.nn.functional.cross_entropy, torch.logsumexp

    def noted(function: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(logits.dtype)
        return function(logits, *args, **kwargs)

    torch.nn.functional.cross_entropy = partial(noted, at_once)
    torch.logsumexp = partial(noted, by_blocks)
    found = []
    for stage in stages:
        seen.clear()
        losses = []
        for key_block in (0, 5):
            autocast = {"enabled": True, "dtype": "bfloat16"}
            engine, momentum, (x1, x2) = start_run(stage, UNEVEN, torch_autocast=autocast)
            engine.module.loss.key_block = key_block
            losses.append(train_step(engine, momentum, x1, x2, momentum=MOMENTUM).loss)
            engine.destroy()
        found.append((losses[0], losses[1], set(seen)))
    return found


def test_the_loss_is_fp32_under_torch_autocast() -> None:
    for at_once, by_blocks, dtypes in run_ranks(2, autocast_losses, [0, 1, 3])[0]:
        assert dtypes == {torch.float32}
        assert at_once == pytest.approx(by_blocks, rel=1e-6)  # fp32, another order of the sum


def bad_then_good(cases: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    """Steps that must be dropped, then a good one; beside a run that has the good one alone."""
    found = []
    for stage, bf16 in cases:
        steps: list[tuple[str, bool, float]] = []
        weights_after = []
        for troubles in ((), ("nan loss", "nan gradient", "loss", "norm")):
            engine, momentum, (x1, x2) = start_run(stage, bf16={"enabled": bf16})
            for trouble in (*troubles, "none"):
                bad1 = x1.clone()
                bad1[0, 0, 0, 0] = torch.nan if trouble == "nan loss" and ranks.rank() else 0.5
                hook = None
                if trouble == "nan gradient" and ranks.rank():
                    linear = engine.module.base.predictor[0]
                    hook = linear.register_full_backward_hook(
                        lambda *_: (torch.full_like(_[1][0], torch.nan),)
                    )
                limits = {}
                if trouble in ("loss", "norm"):
                    limits = {f"{trouble}_limit": 1e-3}
                result = train_step(engine, momentum, bad1, x2, momentum=MOMENTUM, **limits)
                if hook is not None:
                    hook.remove()
                steps.append((result.bad_reason, result.applied, result.gradient_norm))
            weights_after.append(masters(engine))
            finite = all(t.isfinite().all() for _, t in full_tensors(engine.module.base))
            engine.destroy()
        alone, after = weights_after
        same = all(torch.equal(alone[name], after[name]) for name in alone)
        found.append({"steps": steps, "same": same, "finite": finite})
    return found


def masters(engine: Any) -> dict[str, Tensor]:
    """Weights of the trained tensors, the fp32 ones where the engine shows them."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            found[name] = (parameter.detach() if master is None else master).clone()
    return found


def test_bad_steps_are_dropped_on_all_ranks_and_leave_no_trace() -> None:
    cases = [(stage, bf16) for stage in (0, 1, 2, 3) for bf16 in (False, True)]
    first, second = run_ranks(2, bad_then_good, cases, timeout=600)
    norms: dict[bool, list[float]] = {False: [], True: []}
    for case, here, there in zip(cases, first, second, strict=True):
        alone, *dropped, good = here["steps"]
        assert [words for words, _, _ in dropped[:2]] == [
            "the loss is nan",
            "the gradient is not finite",
        ], (case, dropped)
        assert dropped[2][0].startswith("the loss "), (case, dropped)
        assert dropped[2][0].endswith(" is above 0.001"), (case, dropped)
        assert dropped[3][0].startswith("the gradient's norm "), (case, dropped)
        assert not any(applied for _, applied, _ in dropped), case
        assert good == alone == ("", True, pytest.approx(alone[2])), case
        assert here["same"], case
        assert here["finite"], case
        for mine, other in zip(here["steps"], there["steps"], strict=True):
            assert mine[:2] == other[:2], case
        norms[case[1]].append(good[2])
    # one norm at every stage, up to the rounding of its dtype
    assert norms[False] == pytest.approx([norms[False][0]] * 4, rel=1e-5)
    assert norms[True] == pytest.approx([norms[False][0]] * 4, rel=0.04)  # measured 2.1 %


def traffic_of_a_step(cases: list[dict[str, Any]]) -> list[dict[str, Traffic]]:
    """Collectives of one step per case: with the momentum encoder, and with it held still."""
    take = count_collectives()
    found = []
    for zero in cases:
        of_case = {}
        for moves in (True, False):
            engine, momentum, (x1, x2) = start_run(zero["stage"], Chunks(size=2), zero=zero)
            if not moves:
                momentum.begin_move = lambda momentum: None  # type: ignore[method-assign]
                momentum.finish_move = lambda: None  # type: ignore[method-assign]
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


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_momentum_after_fifty_steps(stage: int) -> None:
    (ours, average), (theirs, _) = run_ranks(2, fifty_steps, stage)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        if not any(buffer in name for buffer in ("running", "tracked")):  # not averaged
            # fp32 against fp64 over 50 averages
            torch.testing.assert_close(tensor.double(), average[name], rtol=2e-6, atol=2e-7)
