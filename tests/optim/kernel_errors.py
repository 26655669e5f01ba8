"""Errors of a set of kernels against the written-out formulas, on a flat with padding."""

from dataclasses import replace

import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim.kernel_types import (
    AFTER,
    BEFORE,
    EVERYTHING,
    GRADIENT,
    MOMENTUM,
    NORMS,
    NORMS_AND_RMS,
    PEAK,
    PRODUCT,
    UPDATE,
    WEIGHT,
    AdamTerms,
    Kernels,
    LarsTerms,
)
from mocov3_ds.optim.rules import Rule
from mocov3_ds.optim.step_tables import Share

LENGTHS = [1, 37, 300, 0, 64, 5000]  # the one of length 0 lies on another rank
DECAYS = [0.0, 1.0, 0.5, 1.0, 0.0, 1.0]
RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
FIRST, ROWS = 2, 9  # the flat's rows among those of a step with other tensors around
TERMS = AdamTerms(0.9, 0.99, True, 1e-6, 0.1, 3, True)
LARS = LarsTerms(momentum=0.9, weight_decay=0.1, nesterov=False)


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


def arrays(one: Share, count: int) -> list[Tensor]:
    """Random flats, NaN in the padding; the last is a second moment."""
    generator = torch.Generator().manual_seed(3)
    flats = []
    for index in range(count):
        values = torch.randn(one.flat.tensor.numel(), generator=generator)
        values = values.square() if index == 3 else values
        for first, end in one.flat.gaps():
            values[first:end] = torch.nan
        flats.append(values)
    return flats


def rates() -> Tensor:
    rate_S = torch.full((ROWS,), torch.nan)
    rate_S[FIRST : FIRST + len(RATES)] = torch.tensor(RATES)
    return rate_S


def adam_error(kernels: Kernels, terms: AdamTerms, move: bool, gap: int, quantities: int) -> float:
    """Largest error relative to each result's own size, of moments, weights, u and quantities."""
    one = share(gap)
    w, g, m, v = arrays(one, 4)
    before = [x.double() for x in (w, g, m, v)]
    sums_QS = torch.zeros(quantities, ROWS)
    kernels.update_adam(one, w, g, m, v, terms, sums_QS, rates() if move else None)
    if not move:
        u = g.clone()
        kernels.move_weights(one, w, g, rates())
    errors = []
    for segment in one.flat.segments:
        w0, g0, m0, v0 = (segment.of(x) for x in before)
        m1 = terms.beta1 * m0 + ((1 - terms.beta1) if terms.grad_averaging else 1) * g0
        v1 = terms.beta2 * v0 + (1 - terms.beta2) * g0**2
        c1 = 1 - terms.beta1**terms.step if terms.bias_correction else 1.0
        c2 = 1 - terms.beta2**terms.step if terms.bias_correction else 1.0
        decay = terms.weight_decay * DECAYS[segment.index]
        u1 = (m1 / c1) / ((v1 / c2).sqrt() + terms.eps) + decay * w0
        w1 = w0 - RATES[segment.index] * u1
        errors += [relative(segment.of(m), m1), relative(segment.of(v), v1)]
        errors += [relative(segment.of(w), w1)]
        errors += [] if move else [relative(segment.of(u), u1)]
        for which, x in ((WEIGHT, w0), (GRADIENT, g0), (UPDATE, u1)):
            errors.append(relative(sums_QS[which, FIRST + segment.index], x.square().sum()))
        expected = {AFTER: (g0 / (v1 / c2).sqrt()).square().sum()}
        b2 = 1 - terms.beta2 ** (terms.step - 1) if terms.bias_correction else 1.0
        expected[BEFORE] = (g0 / (v0 / (b2 or 1.0)).sqrt()).square().sum()
        expected |= momentum_quantities(g0, m0)
        errors += quantity_errors(sums_QS[:, FIRST + segment.index], expected, g0, m0)
    check_rest(one, [w, m, v], sums_QS)
    return max(errors)


def momentum_quantities(g: Tensor, m: Tensor) -> dict[int, Tensor]:
    return {PRODUCT: (g * m).sum(), MOMENTUM: m.square().sum(), PEAK: g.abs().max()}


def quantity_errors(ours_Q: Tensor, want: dict[int, Tensor], g: Tensor, m: Tensor) -> list[float]:
    """Of those of the quantities that were asked for; a product may cancel, its factors do not."""
    size = {PRODUCT: float(g.norm() * m.norm())}
    return [
        abs(float(ours_Q[row]) - float(value)) / size.get(row, float(value))
        for row, value in want.items()
        if row < len(ours_Q)
    ]


def lars_error(kernels: Kernels, terms: LarsTerms, gap: int, quantities: int) -> float:
    one = share(gap)
    w, g, m = arrays(one, 3)
    before = [x.double() for x in (w, g, m)]
    sums_QS = torch.zeros(quantities, ROWS)
    ratio_S = rates() * 0.7
    kernels.measure_lars(one, w, g, m, terms, sums_QS)
    kernels.move_lars(one, w, g, m, terms, ratio_S, rates())
    errors = []
    for segment in one.flat.segments:
        w0, g0, m0 = (segment.of(x) for x in before)
        rate = RATES[segment.index]
        u1 = g0 + terms.weight_decay * DECAYS[segment.index] * w0
        m1 = terms.momentum * m0 + rate * 0.7 * u1
        w1 = w0 - rate * (rate * 0.7 * u1 + terms.momentum * m1 if terms.nesterov else m1)
        errors += [relative(segment.of(m), m1), relative(segment.of(w), w1)]
        for which, x in ((WEIGHT, w0), (GRADIENT, g0), (UPDATE, u1)):
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


ADAM_TERMS = {
    "usual": TERMS,
    "no bias correction": replace(TERMS, bias_correction=False),
    "no averaging": replace(TERMS, grad_averaging=False),
    "no averaging, no correction": replace(TERMS, grad_averaging=False, bias_correction=False),
    "no decay": replace(TERMS, weight_decay=0.0),
    "first step": replace(TERMS, step=1),
    "late": replace(TERMS, step=100_000),
    "no momentum": replace(TERMS, beta1=0.0, beta2=0.0),
}


def all_errors(kernels: Kernels) -> dict[str, float]:
    errors = {}
    for gap, q in ((0, NORMS), (3, NORMS), (3, NORMS_AND_RMS), (3, EVERYTHING)):
        for name, terms in ADAM_TERMS.items():
            for move in (False, True):
                errors[f"adam {name} {move=} {gap=} {q=}"] = adam_error(
                    kernels, terms, move, gap, q
                )
        for nesterov in (False, True):
            terms = replace(LARS, nesterov=nesterov)
            errors[f"lars {nesterov=} {gap=} {q=}"] = lars_error(kernels, terms, gap, q)
    return errors


def check_exact(kernels: Kernels) -> None:
    """Each case of each kernel is the formula up to fp32's rounding."""
    for case, error in all_errors(kernels).items():
        assert error < 5e-7, case


def check_adamw(kernels: Kernels) -> None:
    """AdamW in one pass moves a segment as torch's AdamW does."""
    one = share()
    w, g, m, v = (x.nan_to_num(0.1) for x in arrays(one, 4))
    segment = one.flat.segments[-1]
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
    kernels.update_adam(one, w, g, m, v, TERMS, torch.zeros(3, ROWS), rates())
    optimizer.step()
    assert relative(segment.of(w), parameter.detach().double()) < 2e-7
