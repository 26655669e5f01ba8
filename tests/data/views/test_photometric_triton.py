"""The Triton kernels: torch's numbers in the interpreter, and code for a GPU that is not here."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mocov3_ds.data.views import photometric
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec

pytest.importorskip("triton")

SPEC = ViewSpec()
WIDE = ViewSpec(
    hue=0.5, saturation=1.0, blur_sigma=(0.0, 6.0), blur_p=(1.0, 0.5), solarise_p=(0.5, 0.5)
)


def cases():
    """Crops and rows of all operations; shapes that fill no block and one of a single pixel."""
    rng = np.random.default_rng(0)
    every = (torch.float32, torch.bfloat16, torch.float16)
    shapes = [(SPEC, 2, (13, 9), every), (WIDE, 9, (33, 40), every[:1]), (WIDE, 2, (1, 1), every)]
    for spec, samples, (height, width), dtypes in shapes:
        rows = np.concatenate([draw_views(spec, 0, 0, i, 90, 90)[2] for i in range(samples)])
        crops = rng.integers(0, 256, (len(rows), 3, height, width), dtype=np.uint8)
        crops[::4] //= 16
        crops[1::4] = crops[1::4, :, :1, :1]
        for dtype in dtypes:
            yield torch.from_numpy(crops), torch.from_numpy(rows), dtype


def compare(device):
    """Printed by the process that interprets; also what a GPU must pass."""
    from mocov3_ds.data.views import photometric_triton

    for crops_BCHW, rows_BP, dtype in cases():
        expected = torch.empty(crops_BCHW.shape, dtype=dtype)
        normalisation = photometric.scale_and_shift(SPEC.mean, SPEC.std)
        photometric.make_views_torch(crops_BCHW, rows_BP, *normalisation, expected)
        before, got = crops_BCHW.clone(), torch.empty_like(expected, device=device)
        photometric_triton.make_views(crops_BCHW.to(device), rows_BP, *normalisation, got)
        if device == "cpu" and dtype == torch.bfloat16:  # the interpreter casts by cutting off
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(got.cpu(), expected), (tuple(crops_BCHW.shape), dtype)
        assert torch.equal(crops_BCHW, before)
    print("all equal")


def test_the_interpreted_kernels_equal_torch():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from tests.data.views import test_photometric_triton as t; t.compare('cpu')"
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


@pytest.mark.gpu
def test_the_compiled_kernels_equal_torch():
    compare("cuda")


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("name", ["colour_pass", "box_pass", "finish_pass"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(name, flag):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mocov3_ds.data.views import photometric_triton

    kernel = getattr(photometric_triton, name)
    kinds = {"rows": "*fp32", "orders": "*i32", "sums": "*i32", "images": "*i32", "source": "*u8"}
    kinds |= {"target": "*bf16" if name == "finish_pass" else "*u8", "plane": "i32"}
    kinds |= {"height": "i32", "width": "i32"}
    kinds |= {f"{word}{c}": "fp32" for word in ("scale", "shift") for c in range(3)}
    constants = {"BLOCK": 1024, "SECOND": flag, "VERTICAL": flag}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    options = {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert "fma.rn" not in compiled.asm["ptx"] or name == "colour_pass"
