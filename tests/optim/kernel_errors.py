"""Errors of a set of kernels against the written-out formulas, on a flat with padding."""

from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim.kernel_types import (
    EVERYTHING,
    NORMS,
    NORMS_AND_RMS,
    FlatStep,
    Kernels,
    Quantity,
)
from mocov3_ds.optim.rules import Rule
from mocov3_ds.optim.step_tables import Share

LENGTHS = [1, 37, 300, 0, 64, 5000]  # the one of length 0 lies on another rank
DECAYS = [0.0, 1.0, 0.5, 1.0, 0.0, 1.0]
RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
FIRST, ROWS = 2, 9  # the flat's rows among those of a step with other tensors around
ADAM = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}
LARS = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": False}
STEP = 3


def share(gap: int = 3) -> Share:
    """A flat with `gap` elements of padding around each segment."""
    segments, offset = [], gap
    for index, length in enumerate(LENGTHS):
        if length:
            segments.append(Segment(f"t{index}", index, 11, length, offset))
            offset += length + gap
    names = tuple(f"t{index}" for index in range(len(LENGTHS)))
    shapes = tuple((length + 20,) for length in LENGTHS)
    flat = Flat(torch.zeros(offset), names, shapes, tuple(segments), sharded=True)
    return Share(flat, FIRST, tuple(Rule(decay=decay) for decay in DECAYS))


def flat_step(
    kernels: Kernels, group: dict[str, Any], number: int, gap: int, moments: int
) -> FlatStep:
    """A step on random flats, NaN in the padding; the second moment is a square."""
    one = share(gap)
    generator = torch.Generator().manual_seed(3)
    flats = []
    for index in range(2 + moments):
        values = torch.randn(one.flat.tensor.numel(), generator=generator)
        values = values.square() if index == 3 else values
        for first, end in one.flat.gaps():
            values[first:end] = torch.nan
        flats.append(values)
    weight, gradient, *state = flats
    return FlatStep(one, kernels, weight, gradient, tuple(state), group, number)


def rates() -> Tensor:
    rate_S = torch.full((ROWS,), torch.nan)
    rate_S[FIRST : FIRST + len(RATES)] = torch.tensor(RATES)
    return rate_S


def adam_error(
    kernels: Kernels, group: dict[str, Any], step: int, move: bool, gap: int, quantities: int
) -> float:
    """Largest error relative to each result's own size, of moments, weights, u and quantities."""
    flat = flat_step(kernels, group, step, gap, moments=2)
    one, (w, g, m, v) = flat.share, flat.tensors
    before = [x.double() for x in (w, g, m, v)]
    sums_QS = torch.zeros(quantities, ROWS)
    kernels.update_adam(flat, sums_QS, rates() if move else None)
    if not move:
        u = g.clone()
        kernels.move_weights(flat, rates())
    beta1, beta2 = group["betas"]
    corrected, averaging = group["bias_correction"], group.get("grad_averaging", True)
    errors = []
    for segment in one.flat.segments:
        w0, g0, m0, v0 = (segment.of(x) for x in before)
        m1 = beta1 * m0 + ((1 - beta1) if averaging else 1) * g0
        v1 = beta2 * v0 + (1 - beta2) * g0**2
        c1, c2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
        decay = group["weight_decay"] * DECAYS[segment.index]
        u1 = (m1 / c1) / ((v1 / c2).sqrt() + group["eps"]) + decay * w0
        w1 = w0 - RATES[segment.index] * u1
        errors += [relative(segment.of(m), m1), relative(segment.of(v), v1)]
        errors += [relative(segment.of(w), w1)]
        errors += [] if move else [relative(segment.of(u), u1)]
        for which, x in ((Quantity.WEIGHT, w0), (Quantity.GRADIENT, g0), (Quantity.UPDATE, u1)):
            errors.append(relative(sums_QS[which, FIRST + segment.index], x.square().sum()))
        expected = {Quantity.AFTER: (g0 / (v1 / c2).sqrt()).square().sum()}
        b2 = 1 - beta2 ** (step - 1) if corrected else 1.0
        expected[Quantity.BEFORE] = (g0 / (v0 / (b2 or 1.0)).sqrt()).square().sum()
        expected |= momentum_quantities(g0, m0)
        errors += quantity_errors(sums_QS[:, FIRST + segment.index], expected, g0, m0)
    check_rest(one, [w, m, v], sums_QS)
    return max(errors)


def momentum_quantities(g: Tensor, m: Tensor) -> dict[int, Tensor]:
    return {
        Quantity.PRODUCT: (g * m).sum(),
        Quantity.MOMENTUM: m.square().sum(),
        Quantity.PEAK: g.abs().max(),
    }


def quantity_errors(ours_Q: Tensor, want: dict[int, Tensor], g: Tensor, m: Tensor) -> list[float]:
    """Of those of the quantities that were asked for; a product may cancel, its factors do not."""
    size = {Quantity.PRODUCT: float(g.norm() * m.norm())}
    return [
        abs(float(ours_Q[row]) - float(value)) / size.get(row, float(value))
        for row, value in want.items()
        if row < len(ours_Q)
    ]


def lars_error(kernels: Kernels, group: dict[str, Any], gap: int, quantities: int) -> float:
    flat = flat_step(kernels, group, STEP, gap, moments=1)
    one, (w, g, m) = flat.share, flat.tensors
    momentum = group["momentum"]
    before = [x.double() for x in (w, g, m)]
    sums_QS = torch.zeros(quantities, ROWS)
    ratio_S = rates() * 0.7
    kernels.measure_lars(flat, sums_QS)
    kernels.move_lars(flat, ratio_S, rates())
    errors = []
    for segment in one.flat.segments:
        w0, g0, m0 = (segment.of(x) for x in before)
        rate = RATES[segment.index]
        u1 = g0 + group["weight_decay"] * DECAYS[segment.index] * w0
        m1 = momentum * m0 + rate * 0.7 * u1
        w1 = w0 - rate * (rate * 0.7 * u1 + momentum * m1 if group["nesterov"] else m1)
        errors += [relative(segment.of(m), m1), relative(segment.of(w), w1)]
        for which, x in ((Quantity.WEIGHT, w0), (Quantity.GRADIENT, g0), (Quantity.UPDATE, u1)):
            errors.append(relative(sums_QS[which, FIRST + segment.index], x.square().sum()))
        expected = momentum_quantities(g0, m0)
        errors += quantity_errors(sums_QS[:, FIRST + segment.index], expected, g0, m0)
    check_rest(one, [w, m], sums_QS)
    return max(errors)


def relative(ours: Tensor, want: Tensor) -> float:
    return float((ours.double() - want).norm() / want.norm())


def check_rest(one: Share, flats: list[Tensor], sums_QS: Tensor) -> None:
    """Padding is as it was, and rows of tensors that are not here are zero."""
    for x in flats:
        for first, end in one.flat.gaps():
            assert x[first:end].isnan().all()
        assert all(segment.of(x).isfinite().all() for segment in one.flat.segments)
    held = {one.row(segment) for segment in one.flat.segments}
    elsewhere = [row for row in range(ROWS) if row not in held]
    assert not sums_QS[:, elsewhere].any()


ADAM_CASES: dict[str, tuple[dict[str, Any], int]] = {
    "usual": ({}, STEP),
    "no bias correction": ({"bias_correction": False}, STEP),
    "no averaging": ({"grad_averaging": False}, STEP),
    "no averaging, no correction": ({"grad_averaging": False, "bias_correction": False}, STEP),
    "no decay": ({"weight_decay": 0.0}, STEP),
    "first step": ({}, 1),
    "late": ({}, 100_000),
    "no momentum": ({"betas": (0.0, 0.0)}, STEP),
}


def all_errors(kernels: Kernels) -> dict[str, float]:
    errors = {}
    for gap, q in ((0, NORMS), (3, NORMS), (3, NORMS_AND_RMS), (3, EVERYTHING)):
        for name, (options, step) in ADAM_CASES.items():
            for move in (False, True):
                error = adam_error(kernels, ADAM | options, step, move, gap, q)
                errors[f"adam {name} {move=} {gap=} {q=}"] = error
        for nesterov in (False, True):
            error = lars_error(kernels, LARS | {"nesterov": nesterov}, gap, q)
            errors[f"lars {nesterov=} {gap=} {q=}"] = error
    return errors


def check_exact(kernels: Kernels) -> None:
    """Each case of each kernel is the formula up to fp32's rounding."""
    for case, error in all_errors(kernels).items():
        assert error < 5e-7, case


def check_adamw(kernels: Kernels) -> None:
    """AdamW in one pass moves a segment as torch's AdamW does."""
    flat = flat_step(kernels, ADAM, STEP, gap=3, moments=2)
    for x in flat.tensors:
        x.nan_to_num_(0.1)
    w, g, m, v = flat.tensors
    segment = flat.share.flat.segments[-1]
    parameter = torch.nn.Parameter(segment.of(w).clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=RATES[-1], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(2.0),
        "exp_avg": segment.of(m).clone(),
        "exp_avg_sq": segment.of(v).clone(),
    }
    parameter.grad = segment.of(g).clone()
    kernels.update_adam(flat, torch.zeros(3, ROWS), rates())
    optimizer.step()
    assert relative(segment.of(w), parameter.detach().double()) < 2e-7
