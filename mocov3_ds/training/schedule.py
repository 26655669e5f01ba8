"""Schedules as pure functions of the step (arXiv 2104.02057, Sec. 5; half-cosines of the code)."""

import math

from mocov3_ds.config.run_config import Config, RateRule


def learning_rate(
    step: int, *, peak: float, warmup_steps: float, total_steps: int, cosine: bool = True
) -> float:
    """Linear warm-up from exactly 0 at step 0 to `peak`, then half a cosine down to 0 (or none).

    Args:
        step: optimizer steps done before this one.
        peak: rate at the end of the warm-up.
        warmup_steps: length of the warm-up in steps, which need not be whole.
        total_steps: length of the whole run in steps.
        cosine: False keeps `peak` to the end.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if not cosine:
        return peak
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def encoder_momentum(step: int, *, start: float, total_steps: int, cosine: bool = True) -> float:
    """Momentum of the momentum encoder: `start` at step 0, 1 at the end, along half a cosine.

    Args:
        step: optimizer steps done before this one.
        start: momentum of the first step.
        total_steps: length of the whole run in steps.
        cosine: False keeps `start` to the end.
    """
    if not cosine:
        return start
    return 1.0 - 0.5 * (1 + math.cos(math.pi * step / total_steps)) * (1.0 - start)


def momentum_for_batch(momentum: float, global_batch: int, stated_for: int) -> float:
    """Momentum of a step at another batch: m^(batch / stated_for), arXiv 2307.13813.

    Over as many images the momentum encoder keeps the same share of its weights: k steps of a batch
    multiply it by m^k, and one step of a batch k times as large does the same.

    Args:
        momentum: momentum that one step of the batch `stated_for` has, 0 to 1.
        global_batch: images of a step over all ranks.
        stated_for: global batch that the momentum is meant for; 0 = any, so that it stays.
    """
    return momentum ** (global_batch / stated_for) if stated_for else momentum


def scaled_rate(base_rate: float, global_batch: int, rule: RateRule = "linear") -> float:
    """Peak rate of a global batch, of a base rate that is stated for 256 images.

    Args:
        base_rate: learning rate for a global batch of 256 images.
        global_batch: images of a step over all ranks.
        rule: how the rate grows with the batch, see `--rate_rule`.
    """
    factor = global_batch / 256
    return base_rate * {"linear": factor, "sqrt": math.sqrt(factor), "none": 1.0}[rule]


def describe_rules(config: Config, peak_rate: float) -> str:
    """What rate and momentum follow from the batch, and by which rule.

    Args:
        config: settings of the run.
        peak_rate: learning rate at the end of the warm-up.
    """
    batch, moco = config.batch, config.moco
    factor = {"linear": f"{batch} / 256", "sqrt": f"sqrt({batch} / 256)", "none": "1"}
    base = peak_rate / scaled_rate(1.0, batch, config.rate_rule)
    rate = f"peak lr {peak_rate:.3g} = {base:.3g} x {factor[config.rate_rule]}"
    momentum = momentum_for_batch(moco.momentum, batch, moco.momentum_batch)
    rule = f" = {moco.momentum:g}^({batch} / {moco.momentum_batch})" if moco.momentum_batch else ""
    return f"{rate} ({config.rate_rule} rule), momentum {momentum:.6g}{rule}"
