"""Do the optimizers' kernels give what the formulas give, to the last bit of fp32 twice alike?

The formulas are written out in fp64 here, tensor by tensor. A flat of six tensors with padding
holds every kind of segment: of one number, odd, long, absent; with and without alignment.

Shape suffixes: Q = quantities measured, S = tensors of a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.checks.finding import Finding, judge_errors, judge_problem
from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim import plain_kernels
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

CPU = torch.device("cpu")
LENGTHS = (1, 37, 300, 0, 64, 5000)
"""elements of the tensors here; the one of length 0 lies on another rank"""
DECAYS = (0.0, 1.0, 0.5, 1.0, 0.0, 1.0)
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_ALIGNED = 4  # elements of padding with which all offsets and lengths are multiples of 4
FIRST, ROWS = 2, 9  # the flat's rows among those of a step with other tensors around
ADAM = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}
LARS = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": False}
STEP = 3
LIMIT = 1e-6
"""sixteen roundings of fp32, 6e-8 each: a sum of g^2 / v may hang on a single element, whose root,
quotient and square each round; 7.0e-7 was seen, on AVX-512"""
LARGE = 2**31 + 2**16
"""numbers of a flat that an int32 cannot count"""

ADAM_CASES: Mapping[str, tuple[dict[str, Any], int]] = {
    "usual": ({}, STEP),
    "no bias correction": ({"bias_correction": False}, STEP),
    "no averaging": ({"grad_averaging": False}, STEP),
    "no averaging, no correction": ({"grad_averaging": False, "bias_correction": False}, STEP),
    "no decay": ({"weight_decay": 0.0}, STEP),
    "first step": ({}, 1),
    "late": ({}, 100_000),
    "no momentum": ({"betas": (0.0, 0.0)}, STEP),
}
"""what differs from `ADAM`, and the number of the step"""

_REMEDY = (
    "the Triton kernels compute something else on this card: train with the optimizer's parameter "
    'backend "plain" (--ds optimizer.params.backend=plain) and report card, driver and versions.'
)


def check_kernels(kernels: Kernels, device: torch.device) -> list[Finding]:
    """Compare all cases of all kernels with the formulas, and each with itself.

    Args:
        kernels: the kernels that the device is given.
        device: the device that they run on.
    """
    return [
        judge_errors(
            "optimizer kernels = formulas",
            {"largest of all cases": max(measure_all_errors(kernels, device).values())},
            LIMIT,
            _REMEDY,
        ),
        judge_problem(
            "optimizer kernels twice",
            "the same bits",
            "the same bits",
            problem=", ".join(find_unequal_runs(kernels, device)),
            remedy=_REMEDY,
        ),
    ]


def check_large_flat(kernels: Kernels, device: torch.device, numbers: int = LARGE) -> list[Finding]:
    """Move a flat of more numbers than an int32 counts; its last tensor is compared.

    Args:
        kernels: the kernels that the device is given.
        device: where they run, with 16 bytes a number free.
        numbers: length of the flat.
    """
    tail = LENGTHS[-1]
    lengths = (numbers - tail, tail)
    flats = [torch.full((numbers,), 0.1, device=device) for _ in range(4)]
    generator = torch.Generator().manual_seed(3)
    ends = [torch.randn(tail, generator=generator).abs_() for _ in flats]
    for flat, end in zip(flats, ends, strict=True):
        flat[-tail:] = end.to(device)
    sums_QS = torch.zeros(NORMS, 2, device=device)
    rate_S = torch.tensor([0.0, RATES[-1]], device=device)
    kernels.update_adam(_large_step(kernels, flats, lengths), sums_QS, rate_S)
    small = _large_step(plain_kernels, ends, (0, tail))
    expected_QS = torch.zeros(NORMS, 2)
    plain_kernels.update_adam(small, expected_QS, rate_S.cpu())
    errors = {
        name: relative(flat[-tail:].cpu(), end.double())
        for name, flat, end in zip(("w", "g", "m", "v"), flats, ends, strict=True)
        if name != "g"  # it is undefined afterwards
    }
    errors["norms"] = relative(sums_QS[:, 1].cpu(), expected_QS[:, 1].double())
    square_sum = torch.tensor((numbers - tail) * 0.1**2, dtype=torch.float64)
    squares = float((sums_QS[Quantity.WEIGHT, 0].cpu().double() - square_sum).abs() / square_sum)
    return [
        judge_errors(f"{numbers / 2**31:.2f} x 2^31 numbers", errors, LIMIT, _REMEDY),
        judge_errors("sum of their squares", {"": squares}, 1e-4, _REMEDY),
    ]


def _large_step(kernels: Kernels, flats: list[Tensor], lengths: tuple[int, ...]) -> FlatStep:
    segments, offset = [], 0
    for index, length in enumerate(lengths):
        if length:
            segments.append(Segment(f"t{index}", index, 0, length, offset))
            offset += length
    names, shapes = ("t0", "t1"), tuple((length,) for length in lengths)
    flat = Flat(flats[0], names, shapes, tuple(segments), sharded=True)
    one = Share(flat, 0, (Rule(decay=0.0), Rule(decay=1.0)))
    weight, gradient, *state = flats
    return FlatStep(one, kernels, weight, gradient, tuple(state), ADAM, STEP)


# ------------------------------------------------------------------------------------ small flats


def make_share(gap: int = 3, device: torch.device = CPU) -> Share:
    """A flat with `gap` elements of padding around each segment; with 4, all are aligned."""
    lengths = [-(-n // 4) * 4 for n in LENGTHS] if gap == _ALIGNED else LENGTHS
    segments, offset = [], gap
    for index, length in enumerate(lengths):
        if length:
            segments.append(Segment(f"t{index}", index, 11, length, offset))
            offset += length + gap
    names = tuple(f"t{index}" for index in range(len(lengths)))
    shapes = tuple((length + 20,) for length in lengths)
    flat = Flat(torch.zeros(offset, device=device), names, shapes, tuple(segments), sharded=True)
    return Share(flat, FIRST, tuple(Rule(decay=decay) for decay in DECAYS))


def make_flat_step(
    kernels: Kernels,
    group: dict[str, Any],
    number: int,
    gap: int,
    moments: int,
    device: torch.device = CPU,
) -> FlatStep:
    """A step on random flats, NaN in the padding; the second moment is a square."""
    one = make_share(gap, device)
    generator = torch.Generator().manual_seed(3)
    flats = []
    for index in range(2 + moments):
        values = torch.randn(one.flat.tensor.numel(), generator=generator)
        values = values.square() if index == 3 else values
        for first, end in one.flat.gaps():
            values[first:end] = torch.nan
        flats.append(values.to(device))
    weight, gradient, *state = flats
    return FlatStep(one, kernels, weight, gradient, tuple(state), group, number)


def make_rates(device: torch.device = CPU) -> Tensor:
    """Learning rate of each tensor of a step (S,); NaN for those that lie elsewhere."""
    rate_S = torch.full((ROWS,), torch.nan)
    rate_S[FIRST : FIRST + len(RATES)] = torch.tensor(RATES)
    return rate_S.to(device)


def measure_adam_error(
    kernels: Kernels,
    group: dict[str, Any],
    step: int,
    move: bool,
    gap: int,
    quantities: int,
    device: torch.device = CPU,
) -> float:
    """Largest error relative to each result's own size, of moments, weights, u and quantities."""
    flat = make_flat_step(kernels, group, step, gap, moments=2, device=device)
    one, start = flat.share, [x.cpu().double() for x in flat.tensors]
    on_device_QS = torch.zeros(quantities, ROWS, device=device)
    kernels.update_adam(flat, on_device_QS, make_rates(device) if move else None)
    direction = flat.gradient.cpu()
    if not move:
        kernels.move_weights(flat, make_rates(device))
    sums_QS, (w, _, m, v) = on_device_QS.cpu(), [x.cpu() for x in flat.tensors]
    beta1, beta2 = group["betas"]
    corrected, averaging = group["bias_correction"], group.get("grad_averaging", True)
    errors = []
    for segment in one.flat.segments:
        w0, g0, m0, v0 = (segment.of(x) for x in start)
        m1 = beta1 * m0 + ((1 - beta1) if averaging else 1) * g0
        v1 = beta2 * v0 + (1 - beta2) * g0**2
        c1, c2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
        decay = group["weight_decay"] * DECAYS[segment.index]
        u1 = (m1 / c1) / ((v1 / c2).sqrt() + group["eps"]) + decay * w0
        w1 = w0 - RATES[segment.index] * u1
        errors += [relative(segment.of(m), m1), relative(segment.of(v), v1)]
        errors += [relative(segment.of(w), w1)]
        errors += [] if move else [relative(segment.of(direction), u1)]
        for quantity, x in ((Quantity.WEIGHT, w0), (Quantity.GRADIENT, g0), (Quantity.UPDATE, u1)):
            errors.append(relative(sums_QS[quantity, FIRST + segment.index], x.square().sum()))
        expected = {Quantity.AFTER: (g0 / (v1 / c2).sqrt()).square().sum()}
        b2 = 1 - beta2 ** (step - 1) if corrected else 1.0
        expected[Quantity.BEFORE] = (g0 / (v0 / (b2 or 1.0)).sqrt()).square().sum()
        expected |= _momentum_quantities(g0, m0)
        errors += _quantity_errors(sums_QS[:, FIRST + segment.index], expected, g0, m0)
    return _largest([*errors, _judge_rest(one, [w, m, v], sums_QS)])


def _momentum_quantities(g: Tensor, m: Tensor) -> dict[Quantity, Tensor]:
    return {
        Quantity.PRODUCT: (g * m).sum(),
        Quantity.MOMENTUM: m.square().sum(),
        Quantity.PEAK: g.abs().max(),
    }


def _quantity_errors(
    ours_Q: Tensor, expected: dict[Quantity, Tensor], g: Tensor, m: Tensor
) -> list[float]:
    """Of those of the quantities that were asked for; a product may cancel, its factors do not."""
    size = {Quantity.PRODUCT: float(g.norm() * m.norm())}
    return [
        abs(float(ours_Q[row]) - float(value)) / size.get(row, float(value))
        for row, value in expected.items()
        if row < len(ours_Q)
    ]


def measure_lars_error(
    kernels: Kernels, group: dict[str, Any], gap: int, quantities: int, device: torch.device = CPU
) -> float:
    """Largest error relative to each result's own size, of LARS's momentum and weights."""
    flat = make_flat_step(kernels, group, STEP, gap, moments=1, device=device)
    one, start = flat.share, [x.cpu().double() for x in flat.tensors]
    momentum = group["momentum"]
    on_device_QS = torch.zeros(quantities, ROWS, device=device)
    ratio_S = make_rates(device) * 0.7
    kernels.measure_lars(flat, on_device_QS)
    kernels.move_lars(flat, ratio_S, make_rates(device))
    sums_QS, (w, _, m) = on_device_QS.cpu(), [x.cpu() for x in flat.tensors]
    errors = []
    for segment in one.flat.segments:
        w0, g0, m0 = (segment.of(x) for x in start)
        rate = RATES[segment.index]
        u1 = g0 + group["weight_decay"] * DECAYS[segment.index] * w0
        m1 = momentum * m0 + rate * 0.7 * u1
        w1 = w0 - rate * (rate * 0.7 * u1 + momentum * m1 if group["nesterov"] else m1)
        errors += [relative(segment.of(m), m1), relative(segment.of(w), w1)]
        for quantity, x in ((Quantity.WEIGHT, w0), (Quantity.GRADIENT, g0), (Quantity.UPDATE, u1)):
            errors.append(relative(sums_QS[quantity, FIRST + segment.index], x.square().sum()))
        expected = _momentum_quantities(g0, m0)
        errors += _quantity_errors(sums_QS[:, FIRST + segment.index], expected, g0, m0)
    return _largest([*errors, _judge_rest(one, [w, m], sums_QS)])


def relative(present: Tensor, expected: Tensor) -> float:
    """|present - expected| / |expected|, norms in fp64."""
    return float((present.double() - expected).norm() / expected.norm())


def _largest(errors: list[float]) -> float:
    """The largest of errors; one that is not a number counts as infinite."""
    return max(error if error == error else float("inf") for error in errors)


def _judge_rest(one: Share, flats: list[Tensor], sums_QS: Tensor) -> float:
    """0 where padding is as it was, and rows of tensors that are not here are zero; else inf."""
    sound = all(x[first:end].isnan().all() for x in flats for first, end in one.flat.gaps())
    sound &= all(segment.of(x).isfinite().all() for x in flats for segment in one.flat.segments)
    rows_here = {one.row(segment) for segment in one.flat.segments}
    elsewhere = [row for row in range(ROWS) if row not in rows_here]
    return 0.0 if sound and not sums_QS[:, elsewhere].any() else float("inf")


def measure_all_errors(kernels: Kernels, device: torch.device = CPU) -> dict[str, float]:
    """Error of each case of each kernel: padded or aligned, with each number of quantities."""
    errors = {}
    settings = [(0, NORMS), (3, NORMS), (3, NORMS_AND_RMS), (3, EVERYTHING), (_ALIGNED, EVERYTHING)]
    for gap, q in settings:
        for name, (options, step) in ADAM_CASES.items():
            for move in (False, True):
                error = measure_adam_error(kernels, ADAM | options, step, move, gap, q, device)
                errors[f"adam {name} {move=} {gap=} {q=}"] = error
        for nesterov in (False, True):
            error = measure_lars_error(kernels, LARS | {"nesterov": nesterov}, gap, q, device)
            errors[f"lars {nesterov=} {gap=} {q=}"] = error
    return errors


def find_unequal_runs(kernels: Kernels, device: torch.device) -> list[str]:
    """Names of the kernels that, run twice on the same numbers, give other bits."""

    def run_adam(move: bool) -> list[Tensor]:
        flat = make_flat_step(kernels, ADAM, STEP, 3, moments=2, device=device)
        sums_QS = torch.zeros(EVERYTHING, ROWS, device=device)
        kernels.update_adam(flat, sums_QS, make_rates(device) if move else None)
        if not move:
            kernels.move_weights(flat, make_rates(device))
        return [flat.weight, *flat.state, sums_QS]

    def run_lars() -> list[Tensor]:
        flat = make_flat_step(kernels, LARS, STEP, 3, moments=1, device=device)
        sums_QS = torch.zeros(EVERYTHING, ROWS, device=device)
        kernels.measure_lars(flat, sums_QS)
        kernels.move_lars(flat, make_rates(device), make_rates(device))
        return [flat.weight, *flat.state, sums_QS]

    runs = {
        "AdamW": lambda: run_adam(move=True),
        "LAMB": lambda: run_adam(move=False),
        "LARS": run_lars,
    }
    return [
        name
        for name, run in runs.items()
        if any(
            not torch.equal(a.view(torch.int32), b.view(torch.int32))
            for a, b in zip(run(), run(), strict=True)
        )
    ]
