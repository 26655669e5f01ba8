"""The momentum encoder's kernel gives what its formula gives, in the interpreter, and compiles."""

import warnings

import pytest
import torch
from torch import Tensor

from tests.ranks_pool import run_ranks

SIZES = ((3, 5), (4096,), (8, 1024), (4097,), (1,))


def draw_tensors(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Masters, base weights and copies; the base weights lie in one buffer, as DeepSpeed's do."""
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(size, generator=generator) for size in SIZES]
    flat = torch.randn(sum(m.numel() for m in masters), generator=generator).to(dtype)
    bases = [
        part.view_as(master)
        for part, master in zip(flat.split([m.numel() for m in masters]), masters, strict=True)
    ]
    copies = [] if dtype == torch.float32 else [master.to(dtype) for master in masters]
    return masters, bases, copies


def interpreted_differences() -> dict[str, tuple[int, float]]:
    """Numbers that differ from the formula's, and the largest step from torch's, by case."""
    from mocov3_ds.model.momentum_triton import MoveTable, move_tensor

    warnings.filterwarnings("ignore")
    differences = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for weight in (0.01, 0.75):
            masters, bases, copies = draw_tensors(dtype)
            before = [master.clone() for master in masters]
            table = MoveTable(masters, bases, copies)
            assert table.holds(masters, bases, copies)
            assert not table.holds(before, bases, copies)
            table.move(weight)
            alone = draw_tensors(dtype)
            for master, base, copy in zip(*alone[:2], alone[2] or [None] * 5, strict=True):
                move_tensor(master, base, copy, weight)
            pairs = zip((*masters, *copies), (*alone[0], *alone[2]), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
            differing, farthest = 0, 0.0
            for old, base, new in zip(before, bases, masters, strict=True):
                expected = plain_move(old, base.float(), weight)
                differing += int((expected != new).sum())
                by_torch = torch.lerp(old, base.float(), weight)
                farthest = max(farthest, float((by_torch - new).abs().max()))
            for master, copy in zip(masters, copies, strict=False):
                differing += int((as_interpreted(master, dtype) != copy).sum())
            differences[f"{dtype} {weight}"] = (differing, farthest)
    return differences


def as_interpreted(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A master in another dtype; where a GPU rounds to bf16, Triton's interpreter cuts off."""
    if dtype == torch.bfloat16:
        master = (master.view(torch.int32) & -(2**16)).view(torch.float32)
    return master.to(dtype)


def plain_move(old: Tensor, base: Tensor, weight: float) -> Tensor:
    """The two formulas of `torch.lerp`, each operation rounded to fp32."""
    share = torch.tensor(weight)
    if weight < 0.5:
        return old + share * (base - old)
    return base - (base - old) * (1 - share)


def test_equals_the_formula_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must be there before triton is imported
    (differences,) = run_ranks(1, interpreted_differences, import_again=True)
    assert len(differences) == 6
    for case, (differing, farthest) in differences.items():
        assert differing == 0, case
        assert farthest < 1e-6, case  # torch may fuse the multiplication with the addition


@pytest.mark.parametrize("aligned", [True, False])
def test_compiles_for_a_gpu_that_is_not_here(aligned: bool) -> None:
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mocov3_ds.model.momentum_triton import move_one_pass, move_pass

    table = dict.fromkeys(("masters", "bases", "copies"), "*i64")
    table |= {"lengths": "*i32", "weight": "fp32"}
    one = {"master_": "*fp32", "base_": "*bf16", "copy_": "*bf16", "length": "i32"}
    constants = {"COPIES": True, "BLOCK": 4096}
    for kernel, signature, constexprs in [
        (move_pass, table, constants | {"LOW": tl.bfloat16, "ALIGNED": aligned}),
        (move_one_pass, one | {"weight": "fp32"}, constants),
    ]:
        places = {name: kernel.arg_names.index(name) for name in (*signature, *constexprs)}
        known = signature | dict.fromkeys(constexprs, "constexpr")
        source = ASTSource(
            kernel,
            {name: known[name] for name in kernel.arg_names},
            {(places[name],): value for name, value in constexprs.items()},
            {
                (places[name],): [["tt.divisibility", 16]]
                for name, kind in signature.items()
                if aligned and (kind.startswith("*") or name == "length")
            },
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
        assert (".v4.b32" in compiled.asm["ptx"]) == aligned, kernel
