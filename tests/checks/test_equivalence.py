"""Each comparison of N ranks with one fails when what it compares is broken, and no other does."""

import time
from typing import Any

import torch

from mocov3_ds.checks import equivalence
from mocov3_ds.checks.finding import Finding
from mocov3_ds.distributed import ranks
from mocov3_ds.model import loss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.optim import sharded
from tests.checks.breaking import Breakage, failing_names
from tests.ranks_pool import run_ranks

CPU = torch.device("cpu")
LOSS, GRADIENT = "loss, N ranks = 1 rank", "gradients, N ranks = 1 rank"
LAMB, FORMULA = "LAMB step = unsharded LAMB", "momentum encoder = its formula"
EQUAL = "momentum encoder, bit-equal ranks"


def other_momentum(begin: Any) -> Any:
    return lambda self, momentum: begin(self, momentum * 0.99)


def nudged_on_rank_1(finish: Any) -> Any:
    def nudged(self: MomentumEncoder) -> None:
        finish(self)
        if ranks.rank() == 1:
            list(self._master.values())[-1].view(-1)[0] += 1e-6  # a large weight: no loss shows it

    return nudged


def noisy_step(step: Any) -> Any:
    return lambda engine, encoder, x1, x2, **options: step(
        engine, encoder, x1 + 1e-3 * (time.perf_counter() % 1), x2, **options
    )


def refusing_stage_2(start: Any) -> Any:
    def start_engine(model: Any, optimizer: Any, config: Any) -> Any:
        if config["zero_optimization"]["stage"] == 2:
            raise RuntimeError("no stage 2 here")
        return start(model, optimizer, config)

    return start_engine


def steps() -> list[Finding]:
    return equivalence.check_steps(CPU, stages=(1, 3))


def all_steps() -> list[Finding]:
    return equivalence.check_steps(CPU)


def batch_norm() -> list[Finding]:
    return [equivalence.check_batch_norm(CPU)]


def gather() -> list[Finding]:
    return [equivalence.check_gather(CPU)]


def repetition() -> list[Finding]:
    return [equivalence.check_determinism(CPU)]


BREAKAGES = {
    "keys of one rank": Breakage(
        ranks, "all_gather_cat", lambda f: lambda x: torch.cat([x, x]), gather, {"key gather"}
    ),
    "keys in another order": Breakage(
        ranks, "all_gather_cat", lambda f: lambda x: f(x).flip(0), gather, {"key gather"}
    ),
    "keys in another order, step": Breakage(
        ranks,
        "all_gather_cat",
        lambda f: lambda x: f(x) if x.dim() != 2 else f(x).roll(4, 0),
        steps,
        {LOSS, GRADIENT},
    ),
    "local batch norm": Breakage(
        ranks,
        "all_gather_stack",
        lambda f: lambda x: x[None],
        batch_norm,
        {"batch norm over ranks"},
    ),
    "local batch norm, step": Breakage(
        ranks, "all_gather_stack", lambda f: lambda x: x[None], steps, {LOSS, GRADIENT, EQUAL}
    ),
    "local gradient of the batch norm": Breakage(
        ranks,
        "all_reduce_sum",
        lambda f: lambda x, group=None: x,
        batch_norm,
        {"batch norm over ranks"},
    ),
    "another loss": Breakage(
        loss.F, "cross_entropy", lambda f: lambda x, y: 1.001 * f(x, y), steps, {LOSS, GRADIENT}
    ),
    "flat LAMB": Breakage(
        equivalence, "Lamb", lambda f: lambda *a, **o: f(*a, **o, flat=True), steps, {LAMB}
    ),
    "norms of the tensors of one rank": Breakage(
        sharded,
        "sum_over_ranks",
        lambda f: lambda shares, sums, device: sums.clone(),
        steps,
        {LAMB},
    ),
    "another momentum": Breakage(
        MomentumEncoder, "begin_move", other_momentum, steps, {FORMULA, LOSS, GRADIENT}
    ),
    "momentum encoders drift apart": Breakage(
        MomentumEncoder, "finish_move", nudged_on_rank_1, steps, {EQUAL}
    ),
    "a step that draws": Breakage(
        equivalence, "train_step", noisy_step, repetition, {"one step twice"}
    ),
    "a stage that does not run": Breakage(
        equivalence, "start_engine", refusing_stage_2, all_steps, {"training step"}
    ),
}


def break_each() -> dict[str, list[Finding]]:
    return {title: breakage.run_check() for title, breakage in BREAKAGES.items()}


def test_what_is_broken_fails_and_nothing_else() -> None:
    first, _ = run_ranks(2, break_each, timeout=500)
    for title, breakage in BREAKAGES.items():
        assert failing_names(first[title]) == breakage.failing, (title, first[title])
        assert all(f.remedy for f in first[title] if f.status == "fail")
    flat = next(f for f in first["flat LAMB"] if f.name == LAMB)
    assert "ZeRO-1" in flat.measured
    refused = next(f for f in first["a stage that does not run"] if f.name == "training step")
    assert refused.measured == "ZeRO-2: RuntimeError: no stage 2 here"
    other_stages = next(f for f in first["a stage that does not run"] if f.name == LOSS)
    assert {*other_stages.numbers} == {"ZeRO-0", "ZeRO-1", "ZeRO-3"}
