"""The smallest Triton kernel does its work."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from mocov3_ds.distributed.triton_probe import launch_probe
assert launch_probe(torch.device("cpu")).tolist() == [1]
"""


@pytest.mark.slow
def test_the_probe_stores_a_one() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=200)
