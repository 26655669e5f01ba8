"""Each path of kernels gives what the written-out formulas give, and leaves padding alone."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mocov3_ds.distributed.segments import Flat, Segment
from mocov3_ds.optim import kernels
from mocov3_ds.optim.kernels import BLOCKS, PLAIN, AdamTerms, Kernels, LarsTerms, kernels_for
from mocov3_ds.optim.rules import Rule
from mocov3_ds.optim.step_tables import (
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
    Share,
)
from tests.optim import plain
from tests.ranks_pool import run_ranks

LENGTHS = [1, 37, 300, 0, 64, 5000]  # the one of length 0 lies on another rank
DECAYS = [0.0, 1.0, 0.5, 1.0, 0.0, 1.0]
RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
FIRST, ROWS = 2, 9  # the flat's rows among those of a plan with other tensors around
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
        for first, behind in one.flat.gaps():
            values[first:behind] = torch.nan
        flats.append(values)
    return flats


def rates() -> Tensor:
    rate_S = torch.full((ROWS,), torch.nan)
    rate_S[FIRST : FIRST + len(RATES)] = torch.tensor(RATES)
    return rate_S


def adam_error(path: Kernels, terms: AdamTerms, move: bool, gap: int, quantities: int) -> float:
    """Largest error relative to each result's own size, of moments, weights, u and quantities."""
    one = share(gap)
    w, g, m, v = arrays(one, 4)
    before = [x.double() for x in (w, g, m, v)]
    sums_QS = torch.zeros(quantities, ROWS)
    path.adam(one, w, g, m, v, terms, sums_QS, rates() if move else None)
    if not move:
        u = g.clone()
        path.move(one, w, g, rates())
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
        watched = {AFTER: (g0 / (v1 / c2).sqrt()).square().sum()}
        b2 = 1 - terms.beta2 ** (terms.step - 1) if terms.bias_correction else 1.0
        watched[BEFORE] = (g0 / (v0 / (b2 or 1.0)).sqrt()).square().sum()
        watched |= watch_of_momentum(g0, m0)
        errors += watch_errors(sums_QS[:, FIRST + segment.index], watched, g0, m0)
    check_rest(one, [w, m, v], sums_QS)
    return max(errors)


def watch_of_momentum(g: Tensor, m: Tensor) -> dict[int, Tensor]:
    return {PRODUCT: (g * m).sum(), MOMENTUM: m.square().sum(), PEAK: g.abs().max()}


def watch_errors(ours_Q: Tensor, want: dict[int, Tensor], g: Tensor, m: Tensor) -> list[float]:
    """Of those of the quantities that were asked for; a product may cancel, its factors do not."""
    size = {PRODUCT: float(g.norm() * m.norm())}
    return [
        abs(float(ours_Q[row]) - float(value)) / size.get(row, float(value))
        for row, value in want.items()
        if row < len(ours_Q)
    ]


def lars_error(path: Kernels, terms: LarsTerms, gap: int, quantities: int) -> float:
    one = share(gap)
    w, g, m = arrays(one, 3)
    before = [x.double() for x in (w, g, m)]
    sums_QS = torch.zeros(quantities, ROWS)
    ratio_S = rates() * 0.7
    path.lars_norms(one, w, g, m, terms, sums_QS)
    path.lars_move(one, w, g, m, terms, ratio_S, rates())
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
        watched = watch_of_momentum(g0, m0)
        errors += watch_errors(sums_QS[:, FIRST + segment.index], watched, g0, m0)
    check_rest(one, [w, m], sums_QS)
    return max(errors)


def relative(ours: Tensor, want: Tensor) -> float:
    return float((ours.double() - want).norm() / want.norm())


def check_rest(one: Share, flats: list[Tensor], sums_QS: Tensor) -> None:
    """Padding is as it was, and rows of tensors that are not here are zero."""
    for x in flats:
        for first, behind in one.flat.gaps():
            assert x[first:behind].isnan().all()
        assert all(segment.of(x).isfinite().all() for segment in one.flat.segments)
    here = {one.row(segment) for segment in one.flat.segments}
    elsewhere = [row for row in range(ROWS) if row not in here]
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


def all_errors(path: Kernels) -> dict[str, float]:
    errors = {}
    for gap, q in ((0, NORMS), (3, NORMS), (3, NORMS_AND_RMS), (3, EVERYTHING)):
        for name, terms in ADAM_TERMS.items():
            for move in (False, True):
                errors[f"adam {name} {move=} {gap=} {q=}"] = adam_error(path, terms, move, gap, q)
        for nesterov in (False, True):
            terms = replace(LARS, nesterov=nesterov)
            errors[f"lars {nesterov=} {gap=} {q=}"] = lars_error(path, terms, gap, q)
    return errors


@pytest.mark.parametrize("path", [PLAIN, BLOCKS], ids=["plain", "blocks"])
def test_equals_the_formulas(path: Kernels) -> None:
    for case, error in all_errors(path).items():
        assert error < 5e-7, case


def test_blocks_smaller_than_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 48)
    monkeypatch.setattr(kernels, "_ROW", 16)
    for case, error in all_errors(BLOCKS).items():
        assert error < 5e-7, case


def triton_errors() -> dict[str, float]:
    from mocov3_ds.optim.triton_kernels import TRITON

    warnings.filterwarnings("ignore")
    return all_errors(TRITON)


def test_triton_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must be there before triton is imported
    (errors,) = run_ranks(1, triton_errors, import_again=True)
    assert len(errors) == 4 * (2 * len(ADAM_TERMS) + 2)
    for case, error in errors.items():
        assert error < 5e-7, case


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_triton_compiles_for_a_gpu_that_is_not_here(aligned: bool, flag: bool) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mocov3_ds.optim import triton_kernels as tk

    table = {"offsets": "*i64", "lengths": "*i32", "rows": "*i32", "decays": "*fp32"}
    adam = dict.fromkeys(("w_", "g_", "m_", "v_", "rate"), "*fp32") | table
    adam |= {"partial": "*fp32", "n_blocks": "i32"}
    scalars = ("beta1", "beta2", "gain", "gain2", "bias1", "bias2", "bias2_before", "eps")
    adam |= dict.fromkeys((*scalars, "floor", "weight_decay"), "fp32")
    move = dict.fromkeys(("w_", "u_", "rate"), "*fp32") | table
    norms = dict.fromkeys(("w_", "g_", "m_"), "*fp32") | table
    norms |= {"partial": "*fp32", "n_blocks": "i32", "weight_decay": "fp32"}
    lars = dict.fromkeys(("w_", "g_", "m_", "ratio", "rate"), "*fp32") | table
    lars |= {"weight_decay": "fp32", "momentum": "fp32"}
    reduce = {"partial": "*fp32", "first": "*i32", "behind": "*i32", "rows": "*i32"}
    reduce |= {"sums": "*fp32", "n_blocks": "i32", "n_rows": "i32"}
    shape = {"ALIGNED": aligned, "BLOCK": 2048}
    for kernel, signature, constants in [
        (tk.adam_pass, adam, shape | {"MOVE": flag, "Q": EVERYTHING if flag else NORMS}),
        (tk.move_pass, move, shape),
        (tk.lars_norms_pass, norms, shape | {"Q": EVERYTHING if flag else NORMS}),
        (tk.lars_move_pass, lars, shape | {"NESTEROV": flag}),
        (tk.reduce_pass, reduce, {"WIDTH": 1024}),
    ]:
        signature = signature | dict.fromkeys(constants, "constexpr")
        signature = {name: signature[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        pointers = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature, places, pointers)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
        vectorised = ".v4.b32" in compiled.asm["ptx"] or ".v4.f32" in compiled.asm["ptx"]
        if "ALIGNED" in constants:
            assert vectorised == aligned, kernel


def test_square_sums_of_a_million_elements_are_exact() -> None:
    """Where `Tensor.norm` is off by 4e-5 of the norm (2.4 M elements, one thread)."""
    x = torch.randn(2_359_296 + 5, generator=torch.Generator().manual_seed(0))
    want = float(x.double().square().sum())
    assert kernels._row_square_sum(x) == pytest.approx(want, rel=1e-7)
    assert float(kernels._square_sum(x)) == pytest.approx(want, rel=2e-7)


@pytest.mark.parametrize("path", [PLAIN, BLOCKS], ids=["plain", "blocks"])
def test_adamw_in_one_pass_is_torch_adamw(path: Kernels) -> None:
    one = share()
    w, g, m, v = (x.nan_to_num(0.1) for x in arrays(one, 4))
    segment = one.flat.segments[-1]
    theirs = torch.nn.Parameter(segment.of(w).clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=RATES[-1], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
    )
    optimizer.state[theirs] = {
        "step": torch.tensor(2.0),
        "exp_avg": segment.of(m).clone(),
        "exp_avg_sq": segment.of(v).clone(),
    }
    theirs.grad = segment.of(g).clone()
    path.adam(one, w, g, m, v, TERMS, torch.zeros(3, ROWS), rates())
    optimizer.step()
    assert relative(segment.of(w), theirs.detach().double()) < 2e-7


def test_lamb_formula_and_adam_kernel_agree_on_a_whole_tensor() -> None:
    """The second writing of LAMB in tests/optim/plain.py, on one tensor."""
    generator = torch.Generator().manual_seed(5)
    w, g = torch.randn(6, 7, generator=generator), torch.randn(6, 7, generator=generator)
    w1, m1, _ = plain.lamb_step(w, g, 0 * w, 0 * w, 1, lr=0.1, wd=0.2, adapt=True)
    u = g / (g.abs() + 1e-6) + 0.2 * w  # at the first step both moments are the gradient's own
    assert torch.allclose(w1, w - 0.1 * w.norm() / u.norm() * u, atol=1e-6)
    assert torch.allclose(m1, 0.1 * g)


@pytest.mark.parametrize(
    ("backend", "device", "wanted"),
    [
        ("auto", "cpu", BLOCKS),
        ("blocks", "cpu", BLOCKS),
        ("plain", "cpu", PLAIN),
        ("plain", "cuda", PLAIN),
        ("auto", "xpu", PLAIN),
    ],
)
def test_choice(backend: str, device: str, wanted: Kernels) -> None:
    assert kernels_for(backend, torch.device(device)) is wanted


def test_cuda_means_triton() -> None:
    triton_kernels = pytest.importorskip("mocov3_ds.optim.triton_kernels")
    assert kernels_for("auto", torch.device("cuda")) is triton_kernels.TRITON


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("cuda", "cpu", "one of auto, plain, blocks, triton"),
        ("blocks", "cuda", "'blocks' is for the CPU"),
        ("triton", "cpu", "'triton' needs"),
    ],
)
def test_impossible_choice(backend: str, device: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kernels_for(backend, torch.device(device))
