"""Schedules as pure functions of the step (arXiv 2104.02057, Sec. 5; half-cosines of the code)."""

import math


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


def scaled_rate(base_rate: float, global_batch: int) -> float:
    """The linear rule: rates are stated per 256 images.

    Args:
        base_rate: learning rate for a global batch of 256 images.
        global_batch: images of a step over all ranks.
    """
    return base_rate * global_batch / 256
