"""On a real GPU: each check of `mocov3 gpu`, which says what is wrong in its own words."""

from pathlib import Path

import pytest
import torch

from mocov3_ds.bench.gpu.command import list_correct_checks
from mocov3_ds.bench.gpu.flags import GpuOptions
from mocov3_ds.distributed import ranks

RECIPES = GpuOptions().recipes
TITLES = [check.title for check in list_correct_checks(torch.device("cpu"), Path(), RECIPES)]


@pytest.mark.gpu
@pytest.mark.parametrize("title", TITLES)
def test_the_gpu_is_right(title: str, tmp_path: Path) -> None:
    checks = list_correct_checks(ranks.start(), tmp_path, RECIPES)
    [check] = [check for check in checks if check.title == title]
    findings = check.run()
    assert findings
    assert [finding for finding in findings if finding.status == "fail"] == []
