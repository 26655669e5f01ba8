"""The flags of `mocov3 stability run` are there before anything heavy is."""

import subprocess
import sys
from typing import get_args

from mocov3_ds.stability.grid import SCALES
from mocov3_ds.stability.grid_options import GridOptions, Scale


def test_the_scales_are_those_of_grids() -> None:
    assert get_args(Scale) == SCALES and GridOptions().scale in SCALES


def test_flags_are_read_without_torch() -> None:
    code = "import sys, mocov3_ds.stability.commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["False"], done.stderr
