"""What LAMB is under DeepSpeed's own handling, and that `flat=True` is the same thing.

The tests of test_exact.py fail on it, which is what shows that they can fail.
"""

from typing import Any

import deepspeed
import timm.optim
import torch

from mocov3_ds.optim import Rule
from tests.optim import engines, plain
from tests.optim.engines import STEPS, Case, movement_error
from tests.ranks_pool import run_ranks

FLAT = {"flat": True}


def everything(name: str, shape: tuple[int, ...]) -> Rule:
    """As a stock optimizer sees a flat: one decay, one ratio."""
    return Rule()


def stock_and_flat(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        stock = stock_run(case)
        engine, optimizer = engines.start(case, everything)
        first = engines.weights(optimizer)
        engines.train(engine, engines.batches(case, STEPS))
        flat, ratios = engines.weights(optimizer), optimizer.signals().trust_ratio_S.tolist()
        engines.stop(engine)
        exact = engines.compare(Case(case.stage, case.precision, options=FLAT))
        results.append(
            {
                "flat against stock": movement_error(flat, stock, first),
                "flat against LAMB": exact["plain"],
                "flat against timm": exact["library"],
                "ratios": ratios,
            }
        )
    return results


def stock_run(case: Case) -> dict[str, torch.Tensor]:
    """timm's Lamb handed to DeepSpeed as it is."""
    engines.quiet()
    model = plain.odd_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": engines.RATES["lamb"], "weight_decay": 0.1}
    optimizer = timm.optim.Lamb(trained, max_grad_norm=None, foreach=False, **options)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=engines.ds_config(case)
    )
    engines.train(engine, engines.batches(case, STEPS))
    weights = {
        n: p.detach().clone() for n, p in engine.module.named_parameters() if p.requires_grad
    }
    engines.stop(engine)
    return weights


def test_flat_is_the_stock_behaviour_and_is_not_lamb() -> None:
    cases = [Case(1, options=FLAT)]
    first, second = run_ranks(2, stock_and_flat, cases, timeout=600)
    for result in first:
        assert result["flat against stock"] < 2e-5, result
        assert result["flat against LAMB"] > 0.1, result
        assert result["flat against timm"] > 0.1, result
        assert len(set(result["ratios"])) == 1, result  # one ratio a flat ...
    assert first[0]["ratios"] != second[0]["ratios"]  # ... and another one on each rank
