"""The Triton kernels: torch's numbers in the interpreter, and code for a GPU that is not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mocov3_ds.checks.view_kernels import SPEC, draw_cases
from mocov3_ds.data.views import photometric

pytest.importorskip("triton")


def compare():
    """Printed by the process that interprets."""
    from mocov3_ds.data.views import photometric_triton

    for crops_BCHW, rows_BP, dtype in draw_cases():
        expected = torch.empty(crops_BCHW.shape, dtype=dtype)
        normalisation = photometric.scale_and_shift(SPEC.mean, SPEC.std)
        photometric.make_views_torch(crops_BCHW, rows_BP, *normalisation, expected)
        before, got = crops_BCHW.clone(), torch.empty_like(expected)
        photometric_triton.make_views(crops_BCHW, rows_BP, *normalisation, got)
        if dtype == torch.bfloat16:  # the interpreter casts by cutting off
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(got, expected), (tuple(crops_BCHW.shape), dtype)
        assert torch.equal(crops_BCHW, before)
    print("all equal")


def test_the_interpreted_kernels_equal_torch():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from tests.data.views import test_photometric_triton as t; t.compare()"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[3])
    run = subprocess.run(
        [sys.executable, "-c", program, root],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("all equal\n"), run.stderr[-2000:]


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("name", ["colour_pass", "level_pass", "box_pass", "finish_pass"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(name, flag):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mocov3_ds.data.views import photometric_triton

    kernel = getattr(photometric_triton, name)
    kinds = {"rows": "*fp32", "orders": "*i32", "sums": "*i32", "images": "*i32", "source": "*u8"}
    kinds |= {"target": "*bf16" if name == "finish_pass" else "*u8", "plane": "i32"}
    kinds |= dict.fromkeys(("height", "width", "channels", "planes"), "i32") | {"factors": "*fp32"}
    constants = {"BLOCK": 1024, "SECOND": flag, "VERTICAL": flag}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    options = {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert "fma.rn" not in compiled.asm["ptx"] or name == "colour_pass"
