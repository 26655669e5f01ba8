"""What the optimizer measures on the way is what a plain writing finds on whole tensors.

On 1 to 3 ranks and each ZeRO stage, against formulas on the full gradient, weight and moments; and
StableAdamW's update clip against its formula and against torch's AdamW at the clipped rates.
"""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mocov3_ds.optim import AdamW
from mocov3_ds.optim.kernel_types import EVERYTHING, NORMS
from tests.optim import engines, plain
from tests.optim.engines import Case, Witness, movement_error, rule
from tests.ranks_pool import run_ranks
from tests.traffic import count_collectives

STEPS = 6
CLIP = {"update_clip": True, "betas": (0.9, 0.95)}
CASES = [
    *[Case(stage, "fp32", "adamw", options=CLIP) for stage in range(4)],
    *[Case(stage, "bf16", "lamb") for stage in range(4)],
    *[Case(1, "fp32", "lars"), Case(3, "fp32", "adamw"), Case(2, "fp32", "lamb", clip=0.05)],
]


def plain_signals(witness: Witness, name: str, g: Tensor) -> dict[str, float]:
    """Of one whole tensor, before the step."""
    g, w, m, v = (x.double() for x in (g, witness.w[name], witness.m[name], witness.v[name]))
    b2, t = witness.options.get("betas", (0.0, 0.0))[1], witness.t + 1
    after, before = b2 * v + (1 - b2) * g * g, v
    eps = witness.options["eps"]
    adam = witness.case.optimizer != "lars"

    def rms(second: Tensor, steps: int) -> float:
        if not adam or steps == 0:
            return math.nan
        root = (second / (1 - b2**steps)).sqrt().clamp_min(eps)
        return float((g / root).square().mean().sqrt())

    return {
        "grad_norm": float(g.norm()),
        "weight_norm": float(w.norm()),
        "grad_peak": float(g.abs().max()),
        "rms": rms(after, t),
        "rms_before": rms(before, t - 1),
        "cosine": float((g * m).sum() / (g.norm() * m.norm())) if m.any() else math.nan,
        "adapts": float(rule(name, tuple(w.shape)).adapt and witness.case.optimizer != "adamw"),
    }


def signal_error(ours: float, expected: float, key: str) -> float:
    """Relative, except for a cosine; NaN is right where the plain writing has it, too."""
    if math.isnan(expected) or math.isnan(ours):
        return 0.0 if math.isnan(expected) and math.isnan(ours) else math.inf
    return abs(ours - expected) / (1.0 if key in ("cosine", "adapts") else abs(expected) or 1.0)


def measure_errors(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Largest error of each signal over all tensors and steps, and the step's, of each case."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    results = []
    for case in cases:
        engine, optimizer = engines.start(case)
        optimizer.measure_all(True)
        clipping = bool(case.options.get("update_clip"))
        witness = (StableWitness if clipping else Witness)(case, optimizer, rule)
        named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        worst: dict[str, float] = {}
        ratios: list[float] = []
        for ((x, y),) in engines.batches(case, STEPS):
            engines.backward(engine, x, y)
            gradients = {n: engines._full_gradient(p, witness.w[n].shape) for n, p in named.items()}
            gradients = engines._clipped(gradients, case.clip)
            expected = {n: plain_signals(witness, n, g) for n, g in gradients.items()}
            engine.step()
            witness.step(gradients)
            rows = optimizer.signals().rows()
            for name, values in expected.items():
                if clipping:
                    values |= {"trust_ratio": witness.ratio[name], "adapts": 1.0}
                    ratios.append(witness.ratio[name])
                for key, value in values.items():
                    error = signal_error(rows[name][key], value, key)
                    worst[key] = max(worst.get(key, 0.0), error)
        ours = engines.weights(optimizer)
        worst["weights"] = movement_error(ours, witness.w, witness.first)
        worst["library"] = movement_error(
            ours, {n: p.detach() for n, p in witness.library.items()}, witness.first
        )
        results.append({"case": str(case), "worst": worst, "ratios": ratios, "rows": str(rows)})
        engines.stop(engine)
    return results


class StableWitness(Witness):
    """StableAdamW on whole tensors; the library's AdamW gets each tensor's clipped rate."""

    def step(self, gradients: dict[str, Tensor]) -> None:
        [library] = self.library_optimizers
        for group, (n, g) in zip(library.param_groups, self._in_order(gradients), strict=True):
            lr = self.options["lr"] * self.rules[n].lr_multiplier
            self.ratio[n] = plain.update_clip(g, self.v[n], self.t + 1, b2=0.95)
            group["lr"], group["betas"] = lr * self.ratio[n], self.options["betas"]
        super().step(gradients)

    def _in_order(self, gradients: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [(n, gradients[n]) for n in self.rules]

    def _plain_step(self, n: str, g: Tensor) -> None:
        self.w[n], self.m[n], self.v[n] = plain.stable_adamw_step(
            self.w[n],
            g,
            self.m[n],
            self.v[n],
            self.t,
            lr=self.options["lr"] * self.rules[n].lr_multiplier,
            wd=self.options["weight_decay"] * self.rules[n].decay,
            b2=0.95,
        )


def count_traffic(case: Case) -> dict[bool, Any]:
    """All-reduces of a step without and with everything measured; the weights after three steps."""
    warnings.filterwarnings("ignore")
    take = count_collectives()
    results: dict[bool, Any] = {}
    for measures_all in (False, True):
        engine, optimizer = engines.start(case)
        optimizer.measure_all(measures_all)
        for ((x, y),) in engines.batches(case, 3):
            engines.backward(engine, x, y)
            take()
            engine.step()
        names = len(optimizer.signals().names)
        results[measures_all] = (take()["all_reduce"], names, engines.weights(optimizer))
        engines.stop(engine)
    return results


def run_all(cases: Sequence[Case]) -> dict[str, Any]:
    return {"errors": measure_errors(cases), "traffic": count_traffic(Case(2, "fp32", "adamw"))}


@cache
def results_of_ranks(world_size: int) -> list[dict[str, Any]]:
    # one rank never cuts a tensor: a case of each kind is enough there
    cases = CASES[:1] + CASES[4:5] + CASES[8:9] if world_size == 1 else CASES
    return run_ranks(world_size, run_all, cases, timeout=600)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_signals_equal_a_plain_writing(world_size: int) -> None:
    results = results_of_ranks(world_size)
    for result in results[0]["errors"]:
        for key, error in result["worst"].items():
            assert error < 5e-6, (result["case"], key, error)
    for other in results[1:]:  # what a rank decides on is the same on each
        assert [r["rows"] for r in other["errors"]] == [r["rows"] for r in results[0]["errors"]]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_update_clip_engages_in_the_test(world_size: int) -> None:
    results = [r for r in results_of_ranks(world_size)[0]["errors"] if r["ratios"]]
    assert len(results) == (1 if world_size == 1 else 4)
    for result in results:
        assert min(result["ratios"]) < 0.8 and max(result["ratios"]) == 1.0


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_measuring_all_costs_one_tiny_all_reduce_and_changes_no_bit(world_size: int) -> None:
    traffic = results_of_ranks(world_size)[0]["traffic"]
    (calls, elements), names, weights = traffic[False]
    (more_calls, more_elements), _, other_weights = traffic[True]
    assert more_calls == calls + 1
    assert more_elements - elements == (EVERYTHING - NORMS) * names
    assert all(torch.equal(weights[n], other_weights[n]) for n in weights)


def test_what_was_not_measured_is_not_in_the_rows() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = AdamW([("w", weight)])
    optimizer.attach()
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert "rms" not in optimizer.signals().rows()["w"]
    optimizer.measure_all(True)
    weight.grad = torch.full((3, 4), torch.nan)
    optimizer.step()
    row = optimizer.signals().rows()["w"]
    assert math.isnan(row["grad_peak"]) and math.isnan(row["rms"])
