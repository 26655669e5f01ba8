"""The Triton kernels: torch's numbers in the interpreter, and code for a GPU that is not here."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mocov3_ds.checks.view_kernels import SPEC, draw_cases
from mocov3_ds.data.views import photometric
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.spec import ViewSpec

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
    compare_channels()
    print("all equal")


def compare_channels():
    from mocov3_ds.data.views import photometric_triton

    for channels in (1, 2, 5):
        spec = ViewSpec(
            mean=(0.1, 0.2, 0.3, 0.4, 0.5)[:channels], std=(0.3, 0.2, 0.1, 0.2, 0.4)[:channels],
            saturation=0.0, hue=0.0, grey_p=0.0, solarise_p=(0.5, 0.5), solarise_threshold=99,
        )  # fmt: skip
        rows = np.concatenate([draw_views(spec, 0, 0, i, 90, 90)[2] for i in range(3)])
        shape = (len(rows), channels, 11, 7)
        crops = np.random.default_rng(channels).integers(0, 256, shape, dtype=np.uint8)
        crops_BCHW, rows_BP = torch.from_numpy(crops), torch.from_numpy(rows)
        normalisation = photometric.scale_and_shift(spec.mean, spec.std)
        expected, got = torch.empty(shape), torch.empty(shape)
        photometric.make_views_torch(crops_BCHW, rows_BP, *normalisation, expected)
        split = photometric.split_channels(crops_BCHW, rows_BP)
        photometric_triton.make_views(*split, *normalisation, got)
        assert torch.equal(got, expected), channels


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
