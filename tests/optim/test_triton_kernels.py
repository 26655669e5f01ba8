"""The Triton kernels give what the formulas give, in the interpreter, and compile for a GPU."""

import warnings

import pytest

from mocov3_ds.checks.optimizer_kernels import ADAM_CASES, LIMIT, measure_all_errors
from mocov3_ds.optim.kernel_types import EVERYTHING, NORMS
from tests.ranks_pool import run_ranks


def interpreted_errors() -> dict[str, float]:
    """Errors of the kernels in a process whose environment chose the interpreter."""
    from mocov3_ds.optim import triton_kernels

    warnings.filterwarnings("ignore")
    return measure_all_errors(triton_kernels)


def test_equals_the_formulas_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must be there before triton is imported
    (errors,) = run_ranks(1, interpreted_errors, import_again=True)
    assert len(errors) == 5 * (2 * len(ADAM_CASES) + 2)
    for case, error in errors.items():
        assert error < LIMIT, case


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_compiles_for_a_gpu_that_is_not_here(aligned: bool, flag: bool) -> None:
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
    reduce = {"partial": "*fp32", "first": "*i32", "end": "*i32", "rows": "*i32"}
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
        constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        pointers = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature, constexprs, pointers)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
        vectorised = ".v4.b32" in compiled.asm["ptx"] or ".v4.f32" in compiled.asm["ptx"]
        if "ALIGNED" in constants:
            assert vectorised == aligned, kernel
